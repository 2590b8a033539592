"""Starting from another run: parameter transfer, LoRA, freezing, gradient accumulation."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import model_fakes
import numpy as np
import policy_fakes
import pytest
from train_fakes import SPEC, FakeSource, Tiny, config, make_batch

from octolike.config import ConfigError, OptimConfig, load_module, resolve
from octolike.data.specs.planned import plan_data
from octolike.model.network import build_network, named_rows
from octolike.train import (
    checkpoint,
    gradients,
    initial_state,
    loop,
    lora,
    optimizer,
    parameter_transfer,
)
from octolike.train import state as states
from octolike.types import Names


@pytest.fixture(scope="module")
def params():
    return states.init_params(Tiny(), SPEC, jax.random.key(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return the directory of a finished run."""
    directory = tmp_path_factory.mktemp("source")
    loop.train(config(directory, steps=2), FakeSource(), model=Tiny())
    return directory


def tuned(directory, source, **optim):
    run_config = config(directory, steps=4, checkpoint_every=2)
    run_config.train.init_from = str(source)
    for name, value in optim.items():
        setattr(run_config.optim, name, value)
    return run_config


def test_lora_is_initially_zero_and_adds_a_scaled_product(params):
    change = lora.init(params, ["stem/kernel"], 2, jax.random.key(1))
    chex.assert_trees_all_equal(lora.merge(params | change, 1.0), params)
    a = change["lora"]["stem"]["kernel"]["a"]
    b = jnp.ones_like(change["lora"]["stem"]["kernel"]["b"])
    change["lora"]["stem"]["kernel"]["b"] = b
    merged = lora.merge(params | change, 0.5)
    np.testing.assert_allclose(
        merged["stem"]["kernel"], params["stem"]["kernel"] + 0.5 * a @ b, rtol=1e-5, atol=1e-6
    )
    chex.assert_trees_all_equal(merged["head"], params["head"])


def test_lora_of_a_convolution_factors_the_flattened_kernel():
    conv = {"conv": {"kernel": np.zeros((3, 3, 4, 8), np.float32)}}
    change = lora.init(conv, ["conv/kernel"], 3, jax.random.key(0))
    factors = change["lora"]["conv"]["kernel"]
    assert (factors["a"].shape, factors["b"].shape) == ((36, 3), (3, 8))
    assert lora.merge(conv | change, 1.0)["conv"]["kernel"].shape == (3, 3, 4, 8)


@pytest.mark.parametrize(
    ("path", "shape", "a", "b"),
    [
        ("block_0/attention/query", (16, 4, 8), (16, 2), (2, 32)),
        ("block_0/attention/out", (4, 8, 16), (32, 2), (2, 16)),
        ("heads_action/stacked/mlp", (5, 16, 8), (5, 16, 2), (5, 2, 8)),
        ("block_0/experts", (5, 16, 8), (5, 16, 2), (5, 2, 8)),
    ],
)
def test_lora_factors_the_matrix_of_each_layer_type(path, shape, a, b):
    kernel = f"{path}/{'in_' * path.endswith('experts')}kernel"
    tree = optimizer.unflatten({kernel: np.zeros(shape, np.float32)})
    flat = optimizer.flatten(lora.init(tree, [kernel], 2, jax.random.key(0)))
    assert {k.rpartition("/")[2]: x.shape for k, x in flat.items()} == {"a": a, "b": b}
    assert np.std(flat[f"lora/{kernel}/a"]) == pytest.approx(a[-2] ** -0.5, rel=0.3)
    flat[f"lora/{kernel}/b"] = jnp.ones(b)
    merged = optimizer.flatten(lora.merge(tree | optimizer.unflatten(flat), 1.0))[kernel]
    assert merged.shape == shape
    # each matrix of inputs by outputs has the rank of its own factors
    for i, matrix in enumerate(np.reshape(merged, (-1, a[-2], b[-1]))):
        product = np.reshape(flat[f"lora/{kernel}/a"], (-1, *a[-2:]))[i] @ np.ones(b[-2:])
        np.testing.assert_allclose(matrix, product, rtol=1e-5)


def test_a_pattern_with_an_exclamation_mark_excludes_kernels_from_lora(params):
    matches = lora.match_kernels(params, ["*kernel", "!head/*"])
    assert optimizer.selected_paths(matches) == ["stem/kernel"]


def test_invalid_lora_settings_are_named(params):
    with pytest.raises(ConfigError, match=r"optim\.lora matches no kernel.*stem/kernel"):
        lora.match_kernels(params, ["sten/kernel"])
    with pytest.raises(ConfigError, match="matches no kernel"):
        lora.match_kernels(params, ["stem/bias"])
    with pytest.raises(ConfigError, match=r"lora_rank is 8; expected 1 to 7, as stem/kernel is"):
        lora.init(params, ["stem/kernel"], 8, jax.random.key(0))


def test_lora_trains_only_its_factors_resumes_and_is_merged_on_loading(source, tmp_path):
    run_config = tuned(
        tmp_path, source, lora=("stem/*",), frozen=("*",), lora_rank=2, lora_scale=0.5
    )
    run_config.train.steps = 2
    loop.train(run_config, FakeSource(), model=Tiny())
    run_config.train.steps = 4
    last = loop.train(run_config, FakeSource(), model=Tiny())
    assert list(last.params) == ["lora"]
    moments = [x for x in jax.tree.leaves(last.opt_state) if x.ndim]
    factors = jax.tree.leaves(last.params)
    assert sorted(x.size for x in moments) == sorted(2 * [x.size for x in factors])

    before, after = checkpoint.load_run(source).params, checkpoint.load_run(tmp_path).params
    chex.assert_trees_all_equal(after["head"], before["head"])
    change = after["stem"]["kernel"] - before["stem"]["kernel"]
    assert np.linalg.matrix_rank(change, tol=1e-7) == 2
    a, b = (last.params["lora"]["stem"]["kernel"][k] for k in "ab")
    np.testing.assert_allclose(change, 0.5 * np.asarray(a) @ np.asarray(b), rtol=1e-4, atol=1e-6)


def test_a_leading_exclamation_mark_unfreezes_parameters(params):
    matches = optimizer.frozen_paths(params, ("*", "!head/*"))
    assert not any(path.startswith("head") for path in optimizer.selected_paths(matches))
    assert len(optimizer.selected_paths(matches)) == len(optimizer.flatten(params)) - 2
    with pytest.raises(ConfigError, match="freezes every parameter"):
        optimizer.frozen_paths(params, ("!head/*", "*"))


def test_matching_parameters_are_taken_over_and_reinit_patterns_are_not(params):
    source = jax.tree.map(lambda x: x + 1, params)
    source["head"] = {"kernel": np.zeros((8, 2)), "bias": np.zeros(2), "gone": np.zeros(1)}
    transfer = parameter_transfer.transfer_params(params, source, ("head/*",), "runs/a")
    assert set(transfer.taken) == {k for k in optimizer.flatten(params) if "head" not in k}
    np.testing.assert_array_equal(transfer.taken["stem/bias"], source["stem"]["bias"])
    assert (transfer.reinitialized, transfer.unused) == (
        ["head/bias", "head/kernel"],
        ["head/gone"],
    )
    assert "head            0" not in parameter_transfer.describe_transfer(transfer)
    with pytest.raises(ConfigError, match=r"of runs/a do not fit[^$]*head/gone[^$]*train\.reinit"):
        parameter_transfer.transfer_params(params, source, (), "runs/a")
    with pytest.raises(ConfigError, match=r"train\.reinit=\"\('stem/b\*', 'head\*'\)\""):
        parameter_transfer.transfer_params(
            params, source, ("stem/b*",), "runs/a"
        )  # one remedy for all
    with pytest.raises(ConfigError, match=r"train\.reinit matches no parameter.*'heda/\*'"):
        parameter_transfer.transfer_params(params, source, ("heda/*",), "runs/a")


def test_parameters_that_start_afresh_must_be_trained(source, tmp_path):
    stuck = tuned(tmp_path, source, frozen=("*", "!head/bias"))
    stuck.train.reinit = ("head/*",)
    with pytest.raises(ConfigError, match=r"reinit head/\* starts .* add '!head/\*' to optim"):
        loop.train(stuck, FakeSource(), model=Tiny())


@pytest.mark.parametrize("by", ["embodiment", "task"])
def test_rows_of_robots_and_tasks_are_transferred_by_name(by, capsys):
    model = model_fakes.model()
    head = {"kind": "l1", "readout": "readout_action"}
    model["heads"] = {"action": {"kind": "per_group", "by": by, "head": head}}
    model["tokenizers"]["which"] = {"kind": "task_id", "width": 8}
    there = Names(("d",), ("arm", "base"), ("lift", "push", "touch"))
    here = Names(("d",), ("base",), ("touch", "push"))
    spec = model_fakes.spec()
    batch = model_fakes.batch(spec, 1)

    def act(names, params, robot, task):
        task_input = batch["task"] | {"task_id": np.array([names.tasks.index(task)], np.int32)}
        which = np.array([names.embodiments.index(robot)], np.int32)
        network = build_network(model, spec, names)
        sample = network.sample_actions
        return network.apply(
            {"params": params}, batch["observation"], task_input, embodiment=which, method=sample
        )

    network = build_network(model, spec, there)
    params = model_fakes.parameters(network.init, batch, train=False)["params"]
    reordered = initial_state.reorder_named_rows(
        params, named_rows(model, there), named_rows(model, here), (), "runs/a"
    )
    assert "tokenizers_which/token/kernel: the rows of touch, push" in capsys.readouterr().out
    for task in here.tasks:
        expected = act(there, params, "base", task)
        np.testing.assert_allclose(act(here, reordered, "base", task), expected, atol=1e-5)

    wrong_rows = named_rows(model, Names(("d",), ("base", "hand"), ("fold", "push")))
    with pytest.raises(ConfigError, match=r"in runs/a, but none for (hand|fold); reinitialise it"):
        initial_state.reorder_named_rows(params, named_rows(model, there), wrong_rows, (), "runs/a")
    fresh = ("heads_action/*", "tokenizers_which/*")
    chex.assert_trees_all_equal(
        initial_state.reorder_named_rows(
            params, named_rows(model, there), wrong_rows, fresh, "runs/a"
        ),
        params,
    )


@pytest.mark.parametrize("arguments", ["mode=lora", "proprio=drop", "head=fresh,debug"])
def test_the_network_of_the_quick_start_gets_its_inputs_in_a_finetune(arguments):
    run = resolve(load_module("configs/finetune.py").get_config(arguments))
    data = plan_data(run)
    build_network(dataclasses.asdict(run.model), data.spec, data.names)  # else ConfigError


def test_reinitialising_the_head_takes_over_the_rest(source, tmp_path, capsys):
    run_config = tuned(tmp_path, source, learning_rate=0.0)
    run_config.train.reinit, run_config.seed = ("head/*",), 7
    last = loop.train(run_config, FakeSource(), model=Tiny())
    before = checkpoint.load_run(source).params
    chex.assert_trees_all_equal(last.params["stem"], before["stem"])
    assert not np.array_equal(last.params["head"]["kernel"], before["head"]["kernel"])
    output = capsys.readouterr().out
    assert "settings that differ (there -> here):" in output
    assert "  seed: 0 -> 7" in output


def test_accumulated_gradients_equal_those_of_the_whole_batch(params):
    batch = make_batch(0, size=8)
    batch["action_mask"][1:4, 0] = False  # parts with different numbers of valid actions
    batch["observation"]["timestep_mask"][6, 0] = False

    def loss(params, batch, key):
        out = Tiny().apply({"params": params}, batch["observation"], False, method="predict")
        mask = batch["action_mask"] & batch["observation"]["timestep_mask"][..., None, None]
        errors = jnp.where(mask, jnp.square(out - batch["action"]), 0)
        per_example = errors.sum(axis=(1, 2, 3)) / jnp.maximum(mask.sum(axis=(1, 2, 3)), 1)
        return errors.sum() / mask.sum(), {"loss_per_example": per_example}

    # values under a False mask must not matter
    key = jax.random.key(0)
    whole = gradients.whole_batch(loss, params, batch, key)
    cut = gradients.accumulated(gradients.whole_batch, 4)(loss, params, batch, key)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_gradient_norms_are_per_module_and_per_block():
    grads = {
        "transformer": {"block_0": {"a": jnp.array([3.0])}, "block_1": {"a": jnp.array([4.0])}},
        "heads_action": {"kernel": jnp.array([12.0])},
    }
    norms = gradients.gradient_norms(grads)
    assert norms["grad_norm"] == 13
    assert norms["grad_norm/transformer/block_1"] == 4
    assert norms["grad_norm/heads_action"] == 12


def test_a_batch_size_that_accumulate_does_not_divide_is_an_error(tmp_path):
    run_config = config(tmp_path)
    run_config.optim = OptimConfig(accumulate=3, warmup=0)
    with pytest.raises(ConfigError, match=r"batch_size 4 does not divide into optim\.accumulate 3"):
        run_config.check()


def test_the_conventions_of_two_robots_are_compared_field_by_field():
    old = policy_fakes.robot()
    layout = dataclasses.replace(
        old.action, names=tuple(f"joint_{i}" for i in range(7)), absolute=(True,) * 7
    )
    new = dataclasses.replace(
        old, name="mine", control_hz=30.0, action=layout, inferred=("control_hz",)
    )
    lines = initial_state.describe_conventions([old], new, reinit=())
    text = "\n".join(lines)
    assert lines[0] == "conventions of the robot that differ (arm -> mine):"
    assert "control_hz: 5.0 -> 30.0 (inferred, not verified)" in text
    assert 'action.names: ["x", ' in text
    assert "the head is taken over although action.names, action.absolute differ" in lines[-1]
    assert "warning" not in "\n".join(initial_state.describe_conventions([old], new, ["heads_*"]))
    assert initial_state.describe_conventions([old], old, ())[-1] == "none"
