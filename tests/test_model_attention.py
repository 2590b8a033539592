"""Attention: every kernel computes the masked attention of its definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octolike.model import attention, attention_kernels
from octolike.model.target import Target, compile_for
from octolike.model.tokens import AttentionMask, Layout

LAYOUTS = (
    Layout((3, 2), (4, 1), (2, 1), 3),
    Layout((), (5,), (), 2),
    Layout((2,), (3,), (1, 1, 1), 1),
)
HEADS, WIDTH = 2, 8


def draw(n: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=(2, n, HEADS, WIDTH))
    return jnp.asarray(x, dtype)


def mask_of(layout: Layout) -> AttentionMask:
    visible = np.random.default_rng(1).random((2, len(layout.pattern))) < 0.7
    visible[:, : 1 + sum(layout.task)] = True  # else a row has no key, and its result is arbitrary
    return AttentionMask(jnp.asarray(visible), layout)


def by_definition(q, k, v, mask: AttentionMask) -> np.ndarray:
    """Return the attention with loops over nothing but the dense mask, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(np.asarray(mask.dense()), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spans_and_exclusions_equal_the_pattern(layout):
    allowed = np.zeros_like(layout.pattern)
    for start, end in layout.spans():
        query, key = layout.exclusions(start, end)
        allowed[start:end, :end] = ~(query[:, None] & key[None]).any(axis=-1)
    np.testing.assert_array_equal(allowed, layout.pattern)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_kernels_equal_the_definition_and_their_gradients_agree(kernel, layout):
    mask, n = mask_of(layout), len(layout.pattern)
    inputs = [draw(n, seed) for seed in range(3)]
    result = attention.masked_attention(*inputs, mask, kernel)
    np.testing.assert_allclose(result, by_definition(*inputs, mask), atol=2e-5)

    def gradients(kernel):
        loss = lambda *x: jnp.sin(attention.masked_attention(*x, mask, kernel)).sum()
        return jax.grad(loss, argnums=(0, 1, 2))(*inputs)

    for a, b in zip(gradients(kernel), gradients("xla"), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_mask_in_channels_of_the_heads_changes_nothing(layout, dtype):
    mask = mask_of(layout)
    q, k, v = (draw(len(layout.pattern), seed, dtype) for seed in range(3))
    for start, end in layout.spans():
        span, excluded = (q[:, start:end], k[:, :end], v[:, :end]), layout.exclusions(start, end)
        extended = attention_kernels.with_mask_channels(*span, excluded, mask.visible[:, :end])
        width = WIDTH + attention_kernels.channels(layout)
        assert {x.shape[-1] for x in extended} == {width}
        assert width % attention_kernels.ALIGNMENT == 0
        scale = WIDTH**-0.5
        out = jax.nn.dot_product_attention(*extended, scale=scale, implementation="xla")
        assert not np.asarray(out[..., WIDTH:]).any()
        expected = attention.dot_product(*span, mask.dense(slice(start, end), end))
        np.testing.assert_array_equal(out[..., :WIDTH], expected)  # exact: excluded weights are 0


def test_a_query_without_a_visible_key_gets_finite_values_and_gradients():
    layout = Layout((3,), (4,), (1,), 1)
    visible = jnp.asarray(np.arange(8) >= 3)[None].repeat(2, 0)  # the instruction is missing
    q, k, v = (draw(8, seed) for seed in range(3))

    def run(q, k, v):
        channels = layout.exclusions(0, 8)
        extended = attention_kernels.with_mask_channels(q, k, v, channels, visible)
        flash = jax.nn.dot_product_attention(*extended, scale=WIDTH**-0.5)
        splash = attention.masked_attention(q, k, v, AttentionMask(visible, layout), "splash")
        return jnp.square(flash).sum() + jnp.square(splash).sum()

    values = jax.value_and_grad(run, argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(values))


def test_a_kernel_without_a_mask():
    q, k, v = (draw(5, seed) for seed in range(3))
    expected = attention.dot_product(q, k, v)
    result = attention.masked_attention(q, k, v, None, "splash")
    np.testing.assert_allclose(result, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "width", "expected"),
    [
        ("cpu", 0, "bfloat16", 64, "xla"),
        ("cuda", 9.0, "bfloat16", 64, "flash"),
        ("cuda", 8.0, "bfloat16", 128, "xla"),  # no room for the channels of the mask
        ("cuda", 9.0, "bfloat16", 128, "flash"),
        ("cuda", 12.0, "bfloat16", 64, "flash"),
        ("cuda", 7.5, "bfloat16", 64, "xla"),
        ("cuda", 9.0, "float32", 64, "xla"),
        ("cuda", 9.0, "bfloat16", 12, "xla"),
        ("rocm", 0, "bfloat16", 64, "xla"),
        ("tpu", 0, "bfloat16", 64, "splash"),
        ("tpu", 0, "float32", 64, "xla"),
    ],
)
def test_the_kernel_depends_on_the_device(platform, capability, dtype, width, expected):
    with compile_for(platform, capability):
        assert attention.implementation_for(dtype, width, channels=8) == expected


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", "", Target("cpu")),
        ("gpu", "9.0", Target("cuda", 9.0)),
        ("gpu", "gfx942", Target("rocm")),
        ("tpu", "", Target("tpu")),
    ],
)
def test_the_target_is_the_first_device(monkeypatch, platform, capability, expected):
    from octolike.model import target

    device = type("Device", (), {"platform": platform, "compute_capability": capability})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert target.target() == expected


def test_a_function_is_traced_again_for_another_target():
    targets = []

    @jax.jit
    def f(x):
        targets.append(attention.implementation_for(jnp.bfloat16, 64))
        return x

    for platform in itertools.islice(itertools.cycle(("cpu", "tpu")), 4):
        with compile_for(platform):
            f(1.0)
    assert targets == ["xla", "splash"]
