"""Heads and encoders by themselves: samplers reach their data, masks hold, keypoints point."""

import jax
import jax.numpy as jnp
import model_fakes as fakes
import numpy as np
import optax
import pytest

from octolike.config import ConfigError
from octolike.model import diffusion, encoders, heads, octo
from octolike.types import TokenGroup

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


def test_euler_follows_the_flow_and_keeps_missing_dimensions():
    x = np.array([[0.5, -1.0]], np.float32)
    target = np.array([[2.0, 3.0]], np.float32)
    got = diffusion.euler(lambda x, t: target - np.float32([[0.5, -1.0]]), x, 7)
    np.testing.assert_allclose(got, target, atol=1e-5)
    got = diffusion.euler(lambda x, t: x + 1, x, 7, valid=np.array([[True, False]]))
    assert abs(got[0, 1]) < 1e-6  # training shows zero where an action is missing


def test_masked_losses_by_hand():
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
        heads.Diffusion(
            2, 3, hidden=64, blocks=1, prediction="sample", sampler="ddim", inference_steps=5
        ),
        heads.Flow(2, 3, hidden=64, blocks=1, samples_per_example=8),
        heads.L1(2, 3),
    ],
    ids=["clean actions, ddim", "flow", "l1"],
)
def test_overfitting_makes_sampled_actions_right(head):
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


def test_overfitting_the_whole_model():
    spec = fakes.spec(window=1, cameras={"primary": 8})
    language = {"kind": "language", "vocabulary": fakes.VOCABULARY, "pooled": True}
    model = octo.build(
        fakes.model(
            layers=1,
            tokenizers={"language": language, "proprio": {"kind": "proprio"}},
            readouts={"action": 1},
            heads={
                "action": {"kind": "diffusion", "hidden": 64, "blocks": 1, "samples_per_example": 8}
            },
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


ENCODERS = {
    "small_stem": {"features": (4, 8), "patch": 4, "width": 6, "groups": 2},
    "patch": {"patch": 4, "width": 6},
    "keypoints": {
        "features": (4, 8),
        "kernels": (4, 3),
        "strides": (2, 1),
        "keypoints": 3,
        "width": 6,
        "groups": 0,
    },
}
TOKENS = {"small_stem": 16, "patch": 16, "keypoints": 1}


@pytest.mark.parametrize("kind", encoders.ENCODERS)
def test_encoders_make_tokens_that_film_modulates(kind):
    encoder = encoders.ENCODERS[kind](**ENCODERS[kind])
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(2, 16, 16, 3)).astype(np.float32)
    condition = rng.normal(size=(2, 5)).astype(np.float32)
    params = fakes.parameters(encoder.init, x, condition)
    apply = jax.jit(encoder.apply)
    got = apply(params, x, condition)
    assert got.shape == (2, TOKENS[kind], 6)
    condition[1] += 1
    changed = np.abs(apply(params, x, condition) - got).max(axis=(1, 2))
    assert changed[0] == 0
    assert changed[1] > 1e-3
    plain = jax.eval_shape(encoder.init, jax.random.key(0), x)["params"]
    assert set(plain) == {n for n in params["params"] if not n.startswith("film")}


def test_film_starts_as_the_identity():
    film, x, condition = encoders.Film(), jnp.ones((2, 3, 3, 4)), jnp.ones((2, 5))
    params = film.init(jax.random.key(0), x, condition)
    np.testing.assert_array_equal(film.apply(params, x, condition), x)


def test_keypoints_say_where():
    encoder = encoders.Keypoints(
        features=(2,), kernels=(5,), strides=(1,), keypoints=1, width=4, groups=0, merge=False
    )
    x = jnp.full((1, 9, 9, 3), -1.0).at[0, 2, 6].set(1.0)
    params = fakes.parameters(encoder.init, x)["params"]
    kernel = jnp.zeros_like(params["conv_0"]["kernel"]).at[2, 2].set(10.0)
    params["conv_0"] = {"kernel": kernel, "bias": jnp.zeros(2)}
    params["attention"] = {"kernel": jnp.full((2, 1), 10.0), "bias": jnp.zeros(1)}
    # the token: (x, y) of the keypoint, then the features found there
    params["out"] = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    token = encoder.apply({"params": params}, x)[0, 0]
    np.testing.assert_allclose(token, [0.5, -0.5, 30.0, 30.0], atol=1e-4)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (encoders.SmallStem(features=(4, 8), patch=6), "cells of 4 pixels; patch 6 must be"),
        (encoders.SmallStem(features=(4,), patch=2, groups=3), "4 features.*3 groups"),
        (
            encoders.Keypoints(features=(4, 8), strides=(2, 2)),
            "kernels .5, 3, 3. .*differ in length",
        ),
    ],
)
def test_encoders_refuse_what_does_not_fit(encoder, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_pooled_readout_is_the_mean():
    tokens = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    got = heads.pooled(TokenGroup(tokens, np.ones((2, 3, 4), bool)))
    np.testing.assert_allclose(got, tokens.mean(2), rtol=1e-5)
