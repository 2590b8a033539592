"""Real-time chunking: guided and trained prefixes of diffusion and flow heads."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octolike.config import ConfigError
from octolike.model import diffusion, heads
from octolike.policy.execution import prefix_weights
from octolike.types import Prefix, TokenGroup

HORIZON, A, D = 6, 2, 8
MLP = {"kind": "mlp", "hidden": 32, "blocks": 1, "dropout": 0.0}
KEY = jax.random.key(0)
KINDS = {
    "ddpm": {"steps": 8},
    "ddim": {"steps": 8, "sampler": "ddim", "inference_steps": 4, "prediction": "sample"},
    "flow": {"steps": 5},
}


def head_of(kind, **fields):
    cls = heads.Flow if kind == "flow" else heads.Diffusion
    return cls(HORIZON, A, network=MLP, samples_per_example=8, **KINDS[kind], **fields)


def group(batch):
    tokens = np.random.default_rng(0).normal(size=(batch, 1, 1, D)).astype(np.float32)
    return TokenGroup(jnp.asarray(tokens), None)


def lines(batch):
    """Return chunks [B, H, A] that are straight lines of two slopes, up or down per example."""
    sign = np.where(np.arange(batch) % 2, 1, -1)[:, None, None]
    return (sign * np.linspace(0.5, 1.5, HORIZON)[None, :, None] * np.ones(A)).astype(np.float32)


@functools.cache
def trained(kind, prefix=0):
    """Return (head, parameters) fitted to `lines`, with a readout that is equal for up and down."""
    head = head_of(kind, prefix=prefix)
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), group(16))
    action = jnp.asarray(lines(16))[:, None]
    params = head.init({"params": KEY, "noise": KEY}, same, action)
    optimizer = optax.adam(3e-3)

    def step(carry, key):
        params, state = carry
        gradient = jax.grad(lambda p: head.apply(p, same, action, rngs={"noise": key}).mean())(
            params
        )
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    fit = jax.jit(lambda c: jax.lax.scan(step, c, jax.random.split(KEY, 400))[0][0])
    return head, fit((params, optimizer.init(params)))


def sample(head, params, batch=8, prefix=None, seed=1):
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (batch, *x.shape[1:])), group(1))
    rngs = {"noise": jax.random.key(seed)}
    run = jax.jit(lambda p, prefix: head.apply(p, same, prefix=prefix, rngs=rngs, method="sample"))
    return np.asarray(run(params, prefix))


def prefix_of(action, delay, length=None, guided=True):
    length = HORIZON if length is None else length
    known = np.tile(np.arange(HORIZON) < delay, (len(action), 1))
    weight = np.tile(prefix_weights(delay, length, HORIZON), (len(action), 1))
    return Prefix(action, known, weight if guided else None)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_without_weight_equals_the_plain_sample(kind):
    head, params = trained(kind)
    empty = prefix_of(lines(8), 0, 0)
    assert not empty.weight.any()
    np.testing.assert_allclose(sample(head, params, prefix=empty), sample(head, params), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_chooses_the_mode_of_the_prefix(kind):
    """Up and down are equally likely: a guided chunk continues in the direction of its prefix."""
    head, params = trained(kind)
    target = lines(8)
    plain, guided = sample(head, params), sample(head, params, prefix=prefix_of(target, 2))
    error = lambda x: np.abs(x - target).mean(axis=(1, 2))
    assert (error(plain) > 1).any(), "both modes must occur for this test to mean something"
    assert error(guided).mean() < 0.5 * error(plain).mean()
    assert np.abs(guided - target)[:, :2].mean() < np.abs(plain - target)[:, :2].mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_prefix_is_kept_exactly_and_continued(kind):
    head, params = trained(kind, prefix=3)
    target = lines(8)
    chunk = sample(head, params, prefix=prefix_of(target, 2, guided=False))
    np.testing.assert_array_equal(chunk[:, :2], target[:, :2])
    error = np.abs(chunk - target).mean()
    assert error < 0.4 * np.abs(sample(head, params) - target).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_prefix_of_no_delay_equals_the_plain_sample(kind):
    head, params = trained(kind, prefix=3)
    none = sample(head, params, prefix=prefix_of(lines(8), 0, guided=False))
    np.testing.assert_allclose(none, sample(head, params), atol=1e-5)


@pytest.mark.parametrize(("no_prefix", "share"), [(0.0, 0.25), (0.5, 0.625), (1.0, 1.0)])
def test_the_first_action_is_trained_in_the_draws_without_a_prefix(no_prefix, share):
    head = head_of("flow", prefix=3, no_prefix=no_prefix)
    draw = nn.apply(lambda m: m.draw_prefix((2000,)), head)
    known = np.asarray(draw({}, rngs={"noise": KEY}))
    assert (~known[:, 0]).mean() == pytest.approx(share, abs=0.03)
    assert not known[:, 3:].any()
    assert (known[:, :-1] >= known[:, 1:]).all()  # a prefix has no gap


@pytest.mark.parametrize("network", ["mlp", "unet", "transformer"])
def test_known_actions_have_no_loss_and_their_noise_no_influence(network):
    """In training, the others' errors depend on the known actions, not on the noise there."""
    fields = {"unet": {"features": (8, 8)}, "mlp": {"hidden": 8}, "transformer": {"width": 8}}
    component = {"kind": network, **fields[network]}
    head = heads.Flow(HORIZON, A, network=component, prefix=3)
    action = jnp.asarray(lines(2))[:, None]
    params = head.init({"params": KEY, "noise": KEY}, group(2), action)
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda x: draw(0, 0.3, x.shape).astype(np.float32), params)
    known = np.zeros((1, 2, 1, HORIZON), bool)
    known[..., :2] = True
    noise = draw(size=(1, 2, 1, HORIZON * A)).astype(np.float32)
    other = noise.copy()
    other[..., : 2 * A] += 1

    def errors(noise, known, action=action):
        time = np.full((1, 2, 1, 1), 0.5, np.float32)
        return np.asarray(head.apply(params, group(2), action, time, noise, known, method="errors"))

    first = errors(noise, known)
    assert not first[:, :, :2].any()
    np.testing.assert_array_equal(errors(other, known), first)
    assert np.abs(errors(noise, np.zeros_like(known)) - first)[:, :, 2:].max() > 1e-3
    moved = errors(noise, known, action.at[:, :, 0].add(0.5))
    assert np.abs(moved - first)[:, :, 2:].max() > 1e-4


def test_the_flags_of_a_new_prefix_start_without_influence():
    plain, with_prefix = head_of("flow"), head_of("flow", prefix=2)
    action = jnp.asarray(lines(2))[:, None]
    init = lambda head: head.init({"params": KEY, "noise": KEY}, group(2), action)["params"]
    extra = dict(jax.tree_util.tree_leaves_with_path(init(with_prefix)))
    for path, _ in jax.tree_util.tree_leaves_with_path(init(plain)):
        del extra[path]
    (flags,) = extra.values()
    assert not flags.any()


def test_guidance_is_clipped():
    """The step of a guided flow differs from the plain one by at most the limit · gradient."""
    x, target = jnp.zeros((1, 4)), jnp.full((1, 4), 2.0)
    velocity = lambda x, t: jnp.zeros_like(x)
    for limit in (0.5, 5.0):
        guided = diffusion.guided_velocity(velocity, target, jnp.ones((1, 4)), limit)
        np.testing.assert_allclose(guided(x, jnp.float32(0)), limit * 2.0, rtol=1e-6)
    # without clipping: (t² + (1 − t)²) / (t (1 − t)) = 2 at t = 1/2
    np.testing.assert_allclose(guided(x, jnp.float32(0.5)), 4.0, rtol=1e-6)


def test_heads_of_one_pass_refuse_a_prefix():
    head = heads.L1(HORIZON, A)
    params = head.init(KEY, group(1), jnp.zeros((1, 1, HORIZON, A)))
    with pytest.raises(ConfigError, match="real-time chunking needs a diffusion or flow head"):
        head.apply(params, group(1), prefix=prefix_of(lines(1), 1), method="sample")


def test_a_prefix_as_long_as_the_chunk_is_refused():
    with pytest.raises(ConfigError, match="prefix is 6; it must be below the chunk's 6 actions"):
        heads.Flow(HORIZON, A, prefix=6)
