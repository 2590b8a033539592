"""The transformer: spans, rematerialisation, half precision; the attention of each device."""

import chex
import jax
import jax.numpy as jnp
import model_fakes as fakes
import numpy as np
import pytest

from octolike.model import attention, tokens
from octolike.model.tokens import TokenSequence
from octolike.model.transformer import Transformer
from octolike.types import TokenGroup

D, WINDOW = 8, 3
RNG = np.random.default_rng(0)
RNGS = {"dropout": jax.random.key(1)}


def group(*shape) -> TokenGroup:
    mask = np.ones(shape, bool)
    mask[0, 0] = False
    return TokenGroup(jnp.asarray(RNG.normal(size=(*shape, D)).astype(np.float32)), mask)


def test_spans_skip_only_masked_pairs():
    groups = TokenSequence(
        {"task_a": group(2, 3)},
        {"obs_b": group(2, WINDOW, 4), "obs_c": group(2, WINDOW, 1)},
        {"readout_d": group(2, WINDOW, 2)},
    )
    x, mask, ends = tokens.join(groups), tokens.attention_mask(groups), tokens.ends(groups)
    assert ends == (10, 17, 24)
    assert ends[-1] == x.shape[1]
    starts = (0, *ends)
    assert not any(mask[:, :, a:b, b:].any() for a, b in zip(starts, ends))
    model = Transformer(layers=2, attention_heads=2, mlp_width=16)
    variables = fakes.parameters(model.init, x, mask, None, train=False)
    by_span, _ = model.apply(variables, x, mask, None, ends=ends, train=False)
    at_once, _ = model.apply(variables, x, mask, None, train=False)
    # the output of a token that may attend to nothing is arbitrary: not compared
    attends = np.broadcast_to(mask.any(-1)[:, 0, :, None], x.shape)
    np.testing.assert_allclose(
        np.where(attends, by_span, 0), np.where(attends, at_once, 0), atol=2e-6
    )


def small(**changes):
    """Return (x, mask, ends, model) of a sequence that is split by timestep."""
    groups = TokenSequence({"task_a": group(2, 3)}, {"obs_b": group(2, WINDOW, 4)}, {})
    x, mask, ends = tokens.join(groups), tokens.attention_mask(groups), tokens.ends(groups)
    return x, mask, ends, Transformer(layers=1, attention_heads=2, mlp_width=16, **changes)


def gradients(model, variables, x, mask, ends):
    def loss(variables):
        y, _ = model.apply(variables, x, mask, None, ends=ends, train=True, rngs=RNGS)
        return jnp.square(y).mean()

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(variables))


def test_remat_changes_neither_parameters_nor_gradients():
    x, mask, ends, plain = small(dropout=0.5)
    *_, remat = small(dropout=0.5, remat=True)
    variables = fakes.parameters(plain.init, x, mask, None, train=False)
    shapes = [jax.tree.map(np.shape, fakes.parameters(remat.init, x, mask, None, train=False))]
    assert shapes == [jax.tree.map(np.shape, variables)]  # a checkpoint fits both
    expected = gradients(plain, variables, x, mask, ends)
    result = gradients(remat, variables, x, mask, ends)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)

    def trace(model):
        def run(variables):
            return model.apply(variables, x, mask, None, train=True, rngs=RNGS)[0]

        return str(jax.make_jaxpr(run)(variables))

    assert "remat" in trace(remat)
    assert "remat" not in trace(plain)


def test_bfloat16_computes_nearly_the_same_with_float32_parameters():
    x, mask, ends, full = small()
    *_, half = small(dtype=jnp.bfloat16)
    variables = fakes.parameters(full.init, x, mask, None, train=False)
    (loss, expected), (rough, result) = (
        gradients(m, variables, x, mask, ends) for m in (full, half)
    )
    out = jax.eval_shape(lambda v: half.apply(v, x, mask, None, train=False)[0], variables)
    assert out.dtype == jnp.bfloat16
    assert {g.dtype for g in jax.tree.leaves(result)} == {jnp.dtype("float32")}
    assert abs(float(rough - loss)) < 0.02 * float(loss)

    def norm(tree):
        return np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(tree)))

    off = jax.tree.map(lambda a, b: a - b, result, expected)
    assert norm(off) < 0.05 * norm(expected)


def test_no_token_attends_to_the_alignment_padding():
    def draw(n):
        return jnp.asarray(RNG.normal(size=(2, n, 2, 8)).astype(np.float32))

    q, k, v, mask = draw(5), draw(11), draw(11), RNG.random((2, 1, 5, 11)) < 0.6
    mask[..., 0] = True
    for mask_or_none in (jnp.asarray(mask), None):
        expected = attention.dot_product(q, k, v, mask_or_none, "xla")
        result = attention._aligned(q, k, v, mask_or_none, "xla")
        np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "width", "expected"),
    [
        ("cpu", "", "bfloat16", 64, "xla"),
        ("gpu", "9.0", "bfloat16", 64, "cudnn"),
        ("gpu", "8.0", "bfloat16", 256, "xla"),
        ("gpu", "9.0", "bfloat16", 256, "cudnn"),
        ("gpu", "10.0", "float16", 64, "cudnn"),
        ("gpu", "7.5", "bfloat16", 64, "xla"),
        ("gpu", "9.0", "float32", 64, "xla"),
        ("gpu", "9.0", "bfloat16", 12, "xla"),
        ("gpu", "gfx942", "bfloat16", 64, "xla"),
    ],
)
def test_flash_attention_is_used_if_the_device_supports_it(
    monkeypatch, platform, capability, dtype, width, expected
):
    device = type("Device", (), {"platform": platform, "compute_capability": capability})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert attention.implementation_for(dtype, width) == expected
