"""The figure of action chunks, and validation per conditioning."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from train_fakes import ACTION, HORIZON, make_batch, robot

from octolike.embodiment import Statistics
from octolike.train import chunk_figures, sharding, validation
from octolike.types import batch_spec


class Conditioned(nn.Module):
    """Predicts 1 for language plus 2 for a goal image plus 4 for a task id, each if present."""

    def __call__(self, batch, *, train):
        return jnp.float32(0), {}

    def sample_actions(self, observation, task, dims=None, embodiment=None):
        present = {k: v.astype(jnp.float32) for k, v in task["present"].items()}
        value = present["language"] + 2 * present["image_primary"] + 4 * present["task_id"]
        return jnp.broadcast_to(value[:, None, None], (len(value), HORIZON, ACTION))


def conditioned_batch():
    """Return a batch of zero actions; its first two examples have no goal image."""
    batch = make_batch(0)
    batch["action"][:] = 0
    batch["task"]["present"] |= {"language": np.ones(4, bool), "task_id": np.ones(4, bool)}
    batch["task"]["present"]["image_primary"] = np.array([False, False, True, True])
    return batch


def validated(batch, model, tasks=()):
    validator = validation.Validator(
        model,
        {"one": lambda: iter([batch])},
        [robot()],
        batch_spec(batch),
        tasks,
        batches=1,
        mesh=sharding.make_mesh(),
        key=jax.random.key(0),
    )
    return validator({})


def test_each_conditioning_is_validated_alone():
    result = validated(conditioned_batch(), Conditioned()).datasets["one"]
    assert result["action_error"] == pytest.approx((5 + 5 + 7 + 7) / 4)
    assert result["action_error_language"] == pytest.approx(1)
    assert result["action_error_goal"] == pytest.approx(2)  # over the two with a goal image
    assert result["action_error_task_id"] == pytest.approx(4)


def test_a_conditioning_without_examples_is_omitted():
    batch = conditioned_batch()
    batch["task"]["present"]["image_primary"][:] = False
    result = validated(batch, Conditioned()).datasets["one"]
    assert {k for k in result if k.startswith("action_error_")} == {
        "action_error_language",
        "action_error_task_id",
    }


def test_only_conditionings_that_the_policy_reads_count_and_a_single_one_is_omitted():
    class Reads:
        def __init__(self, *keys):
            self.keys = keys

        def reads(self):
            return self.keys

    spec = batch_spec(conditioned_batch())
    model = type("Model", (), {"tokenizers": {"a": Reads("task.present.language")}})
    assert validation.conditionings(model, spec) == {}
    model.tokenizers["b"] = Reads("task.image_primary", "task.present.image_primary")
    assert validation.conditionings(model, spec) == {
        "language": ["language"],
        "goal": ["image_primary"],
    }


def test_a_validation_returns_chunks_in_the_units_of_the_robot():
    batch = conditioned_batch()
    batch["action_mask"][0, -1, 1:] = False  # past the end of the episode
    chunks = validated(batch, Conditioned(), ("lift",)).chunks
    assert [c.titles for c in chunks] == [("fake", "one", "lift")] * 4
    assert np.isnan(chunks[0].demonstrated[1:]).all()
    assert np.isfinite(chunks[0].demonstrated[0]).all()
    assert (chunks[0].predicted == 5).all()
    assert (chunks[3].predicted == 7).all()
    assert chunks[0].units == ("normalised", "normalised", "")


def robot_with_statistics():
    ones = np.ones(ACTION, np.float32)
    numbers = dict.fromkeys(("mean", "min", "max", "p01", "p99"), 0 * ones)
    statistics = Statistics(**numbers, std=0.5 * ones, steps=1, episodes=1)
    return dataclasses.replace(robot(), action_statistics=statistics)


def test_actions_are_unnormalised_if_the_robot_has_statistics():
    demonstration = np.ones((HORIZON, ACTION + 2), np.float32)  # padded for a wider robot
    valid = np.ones(HORIZON, bool)
    chunk = chunk_figures.ActionChunk.from_normalized(
        robot_with_statistics(), demonstration, 2 * demonstration, valid, ("one", "")
    )
    expected = [0.5, 0.5, 1]  # the gripper is not normalised
    np.testing.assert_allclose(chunk.demonstrated[0], expected)
    np.testing.assert_allclose(chunk.predicted[0], [1, 1, 2])
    assert chunk.units == ("m", "m", "")


def test_the_figure_has_a_row_per_example_and_a_column_per_dimension(tmp_path):
    wide = chunk_figures.ActionChunk(
        *np.zeros((2, 4, 5)), tuple("abcde"), ("rad",) * 5, ("other", "two", "turn the tap")
    )
    demonstration = np.ones((HORIZON, ACTION), np.float32)
    narrow = chunk_figures.ActionChunk.from_normalized(
        robot_with_statistics(),
        demonstration,
        2 * demonstration,
        np.array([True, False]),
        ("one", ""),
    )
    figure = chunk_figures.draw_chunks([narrow, wide], 30)
    axes = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title(loc="left") for axis in axes] == [
        *("dx [m]", "dy [m]", "gripper"),
        *(f"{name} [rad]" for name in "abcde"),
    ]
    demonstrated, predicted = axes[0].lines
    np.testing.assert_allclose(demonstrated.get_ydata(), [0.5, np.nan])
    np.testing.assert_allclose(predicted.get_ydata(), [1, 1])
    path = chunk_figures.save_figure([narrow, wide], 30, tmp_path)
    assert path == tmp_path / "pictures" / "chunks_30.png"
    assert imread(path).std() > 0.01
