"""Gradients per group: their sum, planted conflicts, and PCGrad as published."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import model_fakes
import numpy as np
import pytest
import train_fakes

from octolike.config import Config, ConfigError
from octolike.model.network import SHARED_LOSSES, build_network
from octolike.train import conflicts, group_gradients, loop, metrics, optimizer, pcgrad
from octolike.types import Names

L1 = {"kind": "l1", "readout": "readout_other"}


@pytest.fixture(scope="module")
def results():
    """Gradients of a model with experts and two heads, one of them per robot; uneven masks.

    With an auxiliary head and a subtask tokenizer: their losses are those of the whole batch.
    """
    spec = model_fakes.spec(cameras={"primary": 8})
    spec |= {"closing.position": ((2, 3), "float32"), "closing.mask": ((2,), "bool")}
    spec["task.subtask.ids"] = ((2, model_fakes.WORDS), "int32")
    spec["task.subtask.mask"] = ((2, model_fakes.WORDS), "bool")
    words = {"vocabulary": model_fakes.VOCABULARY, "width": 8}
    settings = model_fakes.model(
        layers=1,
        tokenizers={
            "language": {"kind": "language", **words},
            "subtask": {"kind": "subtask", **words, "replaced": 0.0, "layers": 1},
            "proprio": {"kind": "proprio"},
        },
        auxiliary={"target": {"kind": "closing_position", "weight": 1.0}},
        experts={"kind": "top_k", "count": 2, "balance": 1.0},
        heads={
            "action": model_fakes.model()["heads"]["action"],
            "other": {"kind": "per_group", "head": L1},
        },
    )
    batch = model_fakes.batch(spec, 7)
    batch["dataset"] = np.array([0, 2, 0, 2, 2, 2, 2], np.int32)  # of three; 1 is absent
    batch["embodiment"] = np.array([0, 1, 0, 1, 1, 1, 1], np.int32)
    batch["action_mask"][1, :, 1] = False
    batch["action_mask"][2] = False
    batch["observation"]["timestep_mask"][3, 0] = False
    model = build_network(settings, spec, model_fakes.NAMES)
    params = model_fakes.parameters(model.init, batch, train=True)["params"]

    def loss(params, batch, key):
        return model.apply({"params": params}, batch, train=True, rngs={"noise": key})

    @jax.jit
    def measure(params):
        arguments = params, batch, jax.random.key(1)
        full = jax.value_and_grad(loss, has_aux=True)(*arguments)
        parts = group_gradients.per_group("dataset", 3)(loss, *arguments)
        return full, parts, conflicts.compare(loss, *arguments, batch["dataset"], 3)

    return jax.device_get(measure(params))


def test_group_gradients_add_up_to_the_gradient_of_the_batch(results):
    ((value, _), full), (same, metrics, parts), _ = results
    assert same == value
    for name in SHARED_LOSSES:  # otherwise their shares would not be tested
        assert metrics[name] > 0.1, name
    for path, x in optimizer.flatten(parts).items():
        np.testing.assert_allclose(
            x.sum(axis=0), optimizer.flatten(full)[path], rtol=1e-4, atol=2e-6, err_msg=path
        )


def test_an_absent_group_and_the_head_of_another_robot_get_no_gradient(results):
    _, (_, _, parts), _ = results
    flat = optimizer.flatten(parts)
    assert not any(x[1].any() for x in flat.values())
    head_gradients = [x for path, x in flat.items() if "stacked" in path]
    assert head_gradients
    for x in head_gradients:
        assert x[0, 0].any()
        assert x[2, 1].any()
        assert not x[0, 1].any()
        assert not x[2, 0].any()


def test_a_comparison_covers_shared_parameters_and_reports_the_cosine_within_groups(results):
    _, (_, _, parts), compared = results
    flat = optimizer.flatten(parts)
    row = conflicts.to_row(compared, ("a", "b", "c"), list(conflicts.modules(list(flat))), 5, 0.25)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["examples"] == [2, 0, 5]
    assert row["cosine"][0][1] is None
    assert row["within"][1] is None
    shared = [np.float64(x).reshape(3, -1) for k, x in flat.items() if "stacked" not in k]
    a, _, c = np.concatenate(shared, axis=1)
    expected = a @ c / np.linalg.norm(a) / np.linalg.norm(c)
    assert row["cosine"][0][2] == pytest.approx(expected, abs=1e-4)
    assert row["conflict_rate"] == float(expected < 0)
    own_head = row["modules"]["heads_other"]
    assert own_head["cosine"][0][2] is None
    assert own_head["conflict_rate"] is None
    assert "transformer/block_0" in row["modules"]
    assert abs(row["within"][2]) < 1


class State(NamedTuple):
    """The fields of a state that a comparison reads."""

    params: Any
    step: Any


def quadratic(targets, groups, mask=None):
    """Return (loss, batch): parameters x, y; each example pulls x to its target, y to 1."""
    mask = np.ones(len(groups), bool) if mask is None else mask
    batch = {
        "action_mask": jnp.asarray(mask)[:, None, None, None],
        "observation": {"timestep_mask": jnp.ones((len(groups), 1), bool)},
        "dataset": jnp.asarray(groups),
    }

    def loss(params, batch, key):
        per_example = (params["x"] - jnp.asarray(targets)) ** 2 + (params["y"] - 1.0) ** 2
        loss = (per_example * group_gradients.example_weights(batch)).sum()
        return loss, {"loss_per_example": per_example}

    return loss, batch


def test_a_planted_conflict_has_a_negative_cosine():
    loss, batch = quadratic([3.0, 3.0, -3.0, -3.0, 3.0, 3.0], [0, 0, 1, 1, 2, 2])
    params = {"x": jnp.zeros(()), "y": jnp.zeros(())}
    row = conflicts.to_row(
        conflicts.compare(loss, params, batch, None, batch["dataset"], 3),
        ("a", "b", "c"),
        ["x", "y"],
        0,
        0.0,
    )
    assert row["cosine"][0][1] == pytest.approx((1 - 9) / 10, abs=1e-5)
    assert row["cosine"][0][2] == pytest.approx(1)
    assert row["within"] == pytest.approx([1, 1, 1])
    assert row["conflict_rate"] == pytest.approx(2 / 3)
    assert [m["conflict_rate"] for m in row["modules"].values()] == pytest.approx([2 / 3, 0])


def floats(tree):
    """Return {name: number}."""
    return {k: float(np.squeeze(x)) for k, x in tree.items()}


def naive_pcgrad(parts, orders):
    """Return the sum of parts [G, n] after the published algorithm, for given orders."""
    result = 0
    for i, order in enumerate(orders):
        g = parts[i].copy()
        for j in order:
            if j != i and (d := g @ parts[j]) < 0:
                g -= d / (parts[j] @ parts[j]) * parts[j]
        result = result + g
    return result


@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_is_the_published_algorithm(seed):
    rng = np.random.default_rng(seed)
    parts = rng.normal(size=(5, 6)).astype(np.float32)
    parts[3] = 0  # an absent group
    key = jax.random.key(seed)
    orders = [np.asarray(jax.random.permutation(k, 5)) for k in jax.random.split(key, 5)]
    weights = pcgrad.pcgrad_weights(jnp.asarray(parts @ parts.T), key)
    expected = naive_pcgrad(parts.astype(np.float64), orders)
    np.testing.assert_allclose(np.asarray(weights) @ parts, expected, atol=1e-5)
    assert (np.asarray(weights) >= 1).all()


def test_pcgrad_keeps_components_without_conflict():
    """Two groups conflict in x and agree in y."""
    params = {"x": jnp.zeros(()), "y": jnp.zeros(())}
    key = jax.random.key(0)
    loss, batch = quadratic([2.0, 2.0], [0, 1])
    value, _, parts = group_gradients.per_group("dataset", 2)(loss, params, batch, key)
    grads, rate = pcgrad.pcgrad(parts, key)
    assert rate == 0
    assert value == pytest.approx(5)
    assert floats(grads) == pytest.approx({"x": -4, "y": -2})  # nothing to remove
    loss, batch = quadratic([2.0, -1.0], [0, 1])
    _, _, parts = group_gradients.per_group("dataset", 2)(loss, params, batch, key)
    grads, rate = pcgrad.pcgrad(parts, key)
    assert rate == 1
    expected = naive_pcgrad(np.array([[-2.0, -1.0], [1.0, -1.0]]), [[1], [0]])
    assert floats(grads) == pytest.approx(dict(zip("xy", expected, strict=True)), abs=1e-6)


def test_pcgrad_leaves_parameters_of_a_single_group_unchanged():
    parts = {"own": jnp.array([[3.0], [0.0]]), "shared": jnp.array([[1.0], [-2.0]])}
    grads, rate = pcgrad.pcgrad(parts, jax.random.key(0))
    assert rate == 1
    # (1 − 1) + (−2 + 2): opposite directions cancel; the head's own gradient stays
    assert floats(grads) == pytest.approx({"own": 3.0, "shared": 0.0}, abs=1e-6)


def test_comparisons_are_written_and_continue_after_a_resume(tmp_path):
    loss, batch = quadratic([3.0, -3.0, -3.0, 3.0], [0, 1, 1, 0])
    state = State({"x": jnp.zeros(()), "y": jnp.zeros(())}, jnp.zeros((), jnp.int32))
    names = Names(("one", "two"), ("arm",))
    config = Config(workdir=str(tmp_path))
    config.train.conflicts_every = 2

    def loss_of_state(state, params, batch, key):
        return loss(params, batch, key)

    def compare(steps):
        key = jax.random.key(0)
        comparer = conflicts.GradientComparer(loss_of_state, key, config, names, steps[0])
        for step in filter(comparer.due, steps):
            comparer.call(step, state, batch)

    compare(range(5))
    assert [row["step"] for row in conflicts.read(tmp_path)] == [0, 2, 4]
    compare(range(4, 7))  # resumed at step 4 after a kill
    rows = conflicts.read(tmp_path)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert rows[0]["groups"] == ["one", "two"]
    assert rows[0]["cosine"][0][1] == pytest.approx(-0.8, abs=1e-5)
    assert all(row["seconds"] >= 0 for row in rows)


@pytest.mark.parametrize(
    ("by", "names", "match"),
    [
        ("data", Names(("a", "b"), ()), "unknown value of train.groups: 'data'.*'dataset'"),
        ("dataset", Names(("a",), ()), "'dataset' makes 1 groups.* 2 to 32"),
        ("task", Names((), (), tuple(map(str, range(99)))), "'task' makes 99 groups"),
    ],
)
def test_groups_that_cannot_be_compared_are_errors(by, names, match):
    with pytest.raises(ConfigError, match=match):
        group_gradients.group_names(by, names)


def test_training_with_pcgrad_and_comparisons_logs_both(tmp_path):
    """Use the real loop, with gradients accumulated over two parts."""
    config = train_fakes.config(tmp_path, steps=4, conflicts_every=2)
    config.optim.surgery, config.optim.accumulate = "pcgrad", 2
    loop.train(config, train_fakes.FakeSource(), model=train_fakes.Tiny())
    rows = conflicts.read(tmp_path)
    assert [row["step"] for row in rows] == [0, 2]
    assert rows[0]["groups"] == list(train_fakes.NAMES.datasets)
    assert -1 <= rows[0]["cosine"][0][1] <= 1
    log = metrics.read(tmp_path / metrics.FILE)
    assert all(0 <= row["conflict_rate"] <= 1 for row in log)


def test_pcgrad_with_a_single_group_is_an_error_before_the_first_step(tmp_path):
    config = train_fakes.config(tmp_path, groups="embodiment")
    config.optim.surgery = "pcgrad"
    with pytest.raises(ConfigError, match=r"train.groups 'embodiment' makes 1 groups"):
        loop.choose_gradient_fn(config, train_fakes.NAMES)
