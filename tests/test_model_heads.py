"""Action heads: samplers reach their data, losses are masked, overfitting succeeds."""

import jax
import jax.numpy as jnp
import model_fakes as fakes
import numpy as np
import optax
import pytest

from octolike.model import diffusion, heads
from octolike.model.network import build_network
from octolike.types import TokenGroup

MLP = {"kind": "mlp", "hidden": 64, "blocks": 1}
KEY = jax.random.key(0, impl="rbg")  # initialisers compile in half the time


def optimal_noise(mean: float, spread: float, bars: np.ndarray):
    """Return the noise that a perfect model of x_0 ~ N(mean, spread²) would predict."""

    def noise_at(x, t):
        bar = jnp.asarray(bars)[t]
        total = bar * spread**2 + 1 - bar
        return jnp.sqrt(1 - bar) * (x - jnp.sqrt(bar) * mean) / total

    return noise_at


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim of 10"])
def test_samplers_reach_a_known_distribution(sampler):
    betas = diffusion.cosine_betas(50)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 1)).astype(np.float32)
    noise_at = optimal_noise(0.7, 0.3, diffusion.alpha_bars(betas))
    if sampler == "ddpm":
        z = rng.normal(size=(50, 4000, 1)).astype(np.float32)
        got = diffusion.ddpm(noise_at, betas, x, z, clip=5.0)
    else:
        got = diffusion.ddim(noise_at, betas, x, 10 if "10" in sampler else 50, clip=5.0)
    assert abs(float(got.mean()) - 0.7) < 0.02
    assert abs(float(got.std()) - 0.3) < (0.08 if "10" in sampler else 0.04)


def test_euler_follows_the_flow_and_zeros_missing_dimensions():
    x = np.array([[0.5, -1.0]], np.float32)
    target = np.array([[2.0, 3.0]], np.float32)
    got = diffusion.euler(lambda x, t: target - np.float32([[0.5, -1.0]]), x, 7)
    np.testing.assert_allclose(got, target, atol=1e-5)
    got = diffusion.euler(lambda x, t: x + 1, x, 7, valid=np.array([[True, False]]))
    assert abs(got[0, 1]) < 1e-6  # missing dimensions are zero in training


def test_masked_losses_equal_the_result_by_hand():
    errors = jnp.arange(8.0).reshape(2, 2, 2, 1).at[1, 1, 1, 0].set(jnp.nan)
    mask = np.array([[[1, 1], [0, 0]], [[1, 0], [0, 0]]], bool)[..., None]
    loss, per_example = heads.masked_losses(errors, mask)
    np.testing.assert_allclose(loss, (0 + 1 + 4) / 3, rtol=1e-6)
    np.testing.assert_array_equal(per_example, [0.5, 4.0])


def sampled_error(loss, sample, action, params, steps: int) -> tuple[float, float]:
    """Return the mean error of sampled actions before and after training on one batch."""
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        keys = jax.random.split(jax.random.key(1), steps)
        trained = jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]
        both = jax.tree.map(lambda *x: jnp.stack(x), params, trained)
        return jax.lax.map(lambda p: jnp.abs(sample(p, keys[0]) - action).mean(), both)

    before, after = run(params)
    return float(before), float(after)


@pytest.mark.parametrize(
    "head",
    [
        heads.Diffusion(2, 3, network=MLP, prediction="sample", sampler="ddim", inference_steps=5),
        heads.Flow(2, 3, network=MLP, samples_per_example=8),
        heads.L1(2, 3),
        heads.Bins(2, 3, bins=32, bin_kind="uniform", low=-2.0, high=2.0),
    ],
    ids=["clean actions, ddim", "flow", "l1", "bins"],
)
def test_an_overfitted_head_samples_the_actions(head):
    rng = np.random.default_rng(0)
    group = TokenGroup(jnp.asarray(rng.normal(size=(4, 1, 1, 16)), jnp.float32), None)
    action = jnp.asarray(rng.uniform(-2, 2, size=(4, 1, 2, 3)), jnp.float32)
    params = jax.jit(head.init)({"params": KEY, "noise": KEY}, group, action)
    before, after = sampled_error(
        lambda p, key: head.apply(p, group, action, rngs={"noise": key}).mean(),
        lambda p, key: head.apply(p, group, rngs={"noise": key}, method="sample"),
        action[:, 0],
        params,
        steps=300,
    )
    assert after < 0.15 < before, f"error of sampled actions {before:.3f} → {after:.3f}"


def test_an_overfitted_network_samples_the_actions():
    spec = fakes.spec(window=1, cameras={"primary": 8})
    language = {"kind": "language", "vocabulary": fakes.VOCABULARY, "pooled": True}
    model = build_network(
        fakes.model(
            layers=1,
            tokenizers={"language": language, "proprio": {"kind": "proprio"}},
            readouts={"action": 1},
            heads={"action": {"kind": "diffusion", "network": MLP, "samples_per_example": 8}},
        ),
        spec,
        fakes.NAMES,
    )
    b = fakes.batch(spec, 4)
    rngs = {"params": KEY, "noise": KEY}
    before, after = sampled_error(
        lambda p, key: model.apply(p, b, train=True, rngs={"noise": key, "dropout": key})[0],
        lambda p, key: model.apply(
            p, b["observation"], b["task"], rngs={"noise": key}, method="sample_actions"
        ),
        b["action"][:, 0],
        jax.jit(lambda: model.init(rngs, b, train=False))(),
        steps=300,
    )
    assert after < 0.15 < before, f"error of sampled actions {before:.3f} → {after:.3f}"


def test_pooled_readout_is_the_mean():
    tokens = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    got = heads.pooled(TokenGroup(tokens, np.ones((2, 3, 4), bool)))
    np.testing.assert_allclose(got, tokens.mean(2), rtol=1e-5)
