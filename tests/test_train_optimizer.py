"""Schedules, weight decay, freezing, averaged parameters, and strict merging."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_fakes import SPEC, Tiny

from octolike.config import ConfigError, OptimConfig
from octolike.train import optimizer, parameter_transfer, state
from octolike.train.step import apply_gradients

GOLDEN = Path(__file__).parents[2] / "shared/golden/octo_parts/schedules.npz"


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: state.init_params(Tiny(), SPEC, key))(jax.random.key(0))


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"no golden arrays at {GOLDEN}")
@pytest.mark.parametrize("name", ["cosine", "rsqrt", "constant"])
def test_schedules_equal_those_of_octo(name):
    golden = np.load(GOLDEN)
    config = OptimConfig(schedule=name, learning_rate=3e-4, warmup=100)
    rate = optimizer.schedule(config, steps=1000)
    rates = [float(rate(step)) for step in golden["lr_steps"]]
    np.testing.assert_allclose(rates, golden[f"lr_{name}"], rtol=1e-4, atol=1e-10)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    config = OptimConfig(warmup=0, learning_rate=1e-3)
    assert float(optimizer.schedule(config, 10)(0)) == pytest.approx(1e-3)


def test_weight_decay_applies_to_kernels_only(params):
    params = params | {"experts": {"in_kernel": jnp.ones((2, 3, 4)), "in_bias": jnp.ones((2, 4))}}
    config = OptimConfig(warmup=0, learning_rate=0.1, weight_decay=0.5, schedule="constant")
    tx = optimizer.make_optimizer(config, 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, update in optimizer.flatten(updates).items():
        value = optimizer.flatten(params)[path]
        expected = -0.05 * value if path.endswith("kernel") else jnp.zeros_like(value)
        np.testing.assert_allclose(update, expected, atol=1e-7, err_msg=path)


@pytest.mark.parametrize(("clip", "scaled"), [(0.5, True), (0.0, False)])
def test_clipping_limits_the_global_norm(clip, scaled):
    config = OptimConfig(clip=clip, warmup=0, b1=0.0)
    tx, grads = optimizer.make_optimizer(config, 10), {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, after = tx.update(grads, tx.init(grads), grads)
    moments = [x for x in jax.tree.leaves(after) if x.shape == (1,)][:2]
    expected = [0.3, 0.4] if scaled else [3.0, 4.0]
    np.testing.assert_allclose([float(m[0]) for m in moments], expected, rtol=1e-6)


def test_frozen_parameters_do_not_change_and_have_no_optimiser_state(params):
    frozen = optimizer.frozen_paths(params, ["stem/*", "norm/scale"])
    assert frozen == {"stem/*": ["stem/bias", "stem/kernel"], "norm/scale": ["norm/scale"]}
    paths = [path for matched in frozen.values() for path in matched]
    tx = optimizer.make_optimizer(OptimConfig(warmup=0), 10)
    before = state.create(params, tx, paths, ema=True)
    trained = {"head/bias", "head/kernel", "norm/bias"}
    assert optimizer.flatten(before.params).keys() == trained
    assert optimizer.flatten(before.ema).keys() == trained
    sizes = sum(x.size for x in jax.tree.leaves(before.params))
    # Two moments per trained parameter, and the counters of AdamW and its schedule.
    assert sum(x.size for x in jax.tree.leaves(before.opt_state)) == 2 * sizes + 2
    after = apply_gradients(before, jax.tree.map(jnp.ones_like, before.params), tx, 0.9)
    flat, was = optimizer.flatten(after.all_params()), optimizer.flatten(params)
    assert flat.keys() == was.keys()
    for path in flat:
        assert np.array_equal(flat[path], was[path]) == (path in paths), path


def test_a_freeze_pattern_without_a_match_is_an_error(params):
    with pytest.raises(ConfigError, match=r"unknown pattern: 'sten/\*'; did you mean 'stem/\*'"):
        optimizer.frozen_paths(params, ["sten/*"])
    with pytest.raises(ConfigError, match=r"did you mean 'head/kernel'"):
        optimizer.frozen_paths(params, ["head/kernl"])


def test_freezing_everything_is_an_error(params):
    with pytest.raises(ConfigError, match="freezes every parameter"):
        optimizer.frozen_paths(params, ["*"])


def test_the_average_equals_its_definition():
    tx = optimizer.make_optimizer(OptimConfig(warmup=0, learning_rate=0.1), 10)
    now = state.create({"kernel": jnp.array([1.0, -2.0])}, tx, [], ema=True)
    average = np.array([1.0, -2.0])
    for step in range(5):
        now = apply_gradients(now, {"kernel": jnp.array([1.0, -step])}, tx, 0.3)
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * np.asarray(now.params["kernel"])
        np.testing.assert_allclose(now.ema["kernel"], average, rtol=1e-6)
        np.testing.assert_array_equal(now.policy_params()["kernel"], now.ema["kernel"])
    assert not np.allclose(now.ema["kernel"], now.params["kernel"])


def test_a_failed_strict_merge_names_every_difference(params):
    loaded = optimizer.flatten(params)
    kernel = loaded.pop("stem/kernel")
    loaded |= {"stem/kernal": kernel, "head/bias": np.zeros(3)}
    with pytest.raises(ValueError, match="runs/a do not fit this model") as error:
        parameter_transfer.merge_strictly(params, optimizer.unflatten(loaded), "runs/a")
    text = str(error.value)
    assert "missing there: stem/kernel [108, 8]" in text
    assert "only there: unknown parameter: 'stem/kernal'; did you mean 'stem/kernel'?" in text
    assert "other shape: head/bias [3], expected [6]" in text


def test_merging_equal_trees_returns_the_loaded_values(params):
    loaded = jax.tree.map(np.ones_like, params)
    merged = parameter_transfer.merge_strictly(params, loaded, "runs/a")
    assert all((x == 1).all() for x in jax.tree.leaves(merged))


def test_tables_count_parameters(params):
    table = state.summarize_params(params, ["stem/kernel"])
    assert table.splitlines()[-1].split() == ["total", "6", "942", "78"]
    assert "stem/kernel  108×8    864  frozen" in state.describe_params(params, ["stem/kernel"])
