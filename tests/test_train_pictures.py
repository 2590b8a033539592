"""The picture of chunks, and validation of a policy that is told its task in one way alone."""

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


class Told(nn.Module):
    """Predicts 0, plus 1 for the language, 2 for a goal image, 4 for a task id that it is told."""

    def __call__(self, batch, *, train):
        return jnp.float32(0), {}

    def sample_actions(self, observation, task, dims=None, embodiment=None):
        there = {k: v.astype(jnp.float32) for k, v in task["present"].items()}
        value = there["language"] + 2 * there["image_primary"] + 4 * there["task_id"]
        return jnp.broadcast_to(value[:, None, None], (len(value), HORIZON, ACTION))


def batch_told():
    """Return a batch of zero actions whose first two examples have no goal image."""
    batch = make_batch(0)
    batch["action"][:] = 0
    batch["task"]["present"] |= {"language": np.ones(4, bool), "task_id": np.ones(4, bool)}
    batch["task"]["present"]["image_primary"] = np.array([False, False, True, True])
    return batch


def validated(batch, model, tasks=()):
    made = validation.Validator(
        model,
        {"one": lambda: iter([batch])},
        [robot()],
        batch_spec(batch),
        tasks,
        batches=1,
        mesh=sharding.make_mesh(),
        key=jax.random.key(0),
    )
    return made({})


def test_each_way_of_telling_the_task_is_validated_alone():
    found = validated(batch_told(), Told()).datasets["one"]
    assert found["action_error"] == pytest.approx((5 + 5 + 7 + 7) / 4)
    assert found["action_error_language"] == pytest.approx(1)
    assert found["action_error_goal"] == pytest.approx(2)  # over the two examples that have one
    assert found["action_error_task_id"] == pytest.approx(4)


def test_a_way_that_no_example_has_is_left_out():
    batch = batch_told()
    batch["task"]["present"]["image_primary"][:] = False
    found = validated(batch, Told()).datasets["one"]
    assert {k for k in found if k.startswith("action_error_")} == {
        "action_error_language",
        "action_error_task_id",
    }


def test_only_the_ways_that_the_policy_reads_count_and_one_is_none():
    class Reads:
        def __init__(self, *keys):
            self.keys = keys

        def reads(self):
            return self.keys

    spec = batch_spec(batch_told())
    model = type("Model", (), {"tokenizers": {"a": Reads("task.present.language")}})
    assert validation.ways(model, spec) == {}
    model.tokenizers["b"] = Reads("task.image_primary", "task.present.image_primary")
    assert validation.ways(model, spec) == {"language": ["language"], "goal": ["image_primary"]}


def test_a_validation_keeps_chunks_in_the_robots_units():
    batch = batch_told()
    batch["action_mask"][0, -1, 1:] = False  # past the end of the episode
    chunks = validated(batch, Told(), ("lift",)).chunks
    assert [c.titles for c in chunks] == [("fake", "one", "lift")] * 4
    assert np.isnan(chunks[0].true[1:]).all()
    assert np.isfinite(chunks[0].true[0]).all()
    assert (chunks[0].predicted == 5).all()
    assert (chunks[3].predicted == 7).all()
    assert chunks[0].units == ("normalised", "normalised", "")


def known_robot():
    ones = np.ones(ACTION, np.float32)
    numbers = dict.fromkeys(("mean", "min", "max", "p01", "p99"), 0 * ones)
    statistics = Statistics(**numbers, std=0.5 * ones, steps=1, episodes=1)
    return dataclasses.replace(robot(), action_statistics=statistics)


def test_actions_are_unnormalised_where_statistics_are_known():
    true = np.ones((HORIZON, ACTION + 2), np.float32)  # padded to a wider robot's
    valid = np.ones(HORIZON, bool)
    chunk = chunk_figures.Chunk.of(known_robot(), true, 2 * true, valid, ("one", ""))
    np.testing.assert_allclose(chunk.true[0], [0.5, 0.5, 1])  # the gripper stays as it is
    np.testing.assert_allclose(chunk.predicted[0], [1, 1, 2])
    assert chunk.units == ("m", "m", "")


def test_the_picture_has_a_row_per_example_and_a_column_per_dimension(tmp_path):
    wide = chunk_figures.Chunk(
        *np.zeros((2, 4, 5)), tuple("abcde"), ("rad",) * 5, ("other", "two", "turn the tap")
    )
    true = np.ones((HORIZON, ACTION), np.float32)
    one = chunk_figures.Chunk.of(
        known_robot(), true, 2 * true, np.array([True, False]), ("one", "")
    )
    figure = chunk_figures.draw([one, wide], 30)
    shown = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title(loc="left") for axis in shown] == [
        *("dx [m]", "dy [m]", "gripper"),
        *(f"{name} [rad]" for name in "abcde"),
    ]
    demonstrated, predicted = shown[0].lines
    np.testing.assert_allclose(demonstrated.get_ydata(), [0.5, np.nan])
    np.testing.assert_allclose(predicted.get_ydata(), [1, 1])
    path = chunk_figures.save([one, wide], 30, tmp_path)
    assert path == tmp_path / "pictures" / "chunks_30.png"
    assert imread(path).std() > 0.01
