"""The embodiment record: normalising and un-normalising, JSON, and its errors."""

import dataclasses
import json

import numpy as np
import pytest

from octolike.embodiment import (
    MIN_SPREAD,
    Embodiment,
    Layout,
    Statistics,
    embodiments_from_json,
    embodiments_to_json,
)

LAYOUT = Layout(
    names=("dx", "dy", "gripper"),
    units=("m", "m", ""),
    absolute=(False, False, True),
    normalized=(True, True, False),
)


def record(normalization="normal", **change) -> Embodiment:
    x = np.random.default_rng(0).normal(0.1, 0.3, (1000, 3)).astype(np.float32)
    x[:, 1] = 0.2  # a dimension that never moves
    p01, p99 = np.quantile(x, (0.01, 0.99), axis=0).astype(np.float32)
    statistics = Statistics(
        mean=x.mean(0), std=x.std(0), min=x.min(0), max=x.max(0), p01=p01, p99=p99,
        steps=1000, episodes=10,
    )  # fmt: skip
    fields = {
        "name": "arm",
        "robot": "an arm",
        "control_hz": 5.0,
        "gripper": "1 = open",
        "action": LAYOUT,
        "proprio": None,
        "normalization": normalization,
        "datasets": ("fake",),
        "action_statistics": statistics,
    }
    return Embodiment(**(fields | change))


@pytest.mark.parametrize("normalization", ["normal", "bounds"])
def test_unnormalising_inverts_normalising(normalization):
    arm = record(normalization)
    s = arm.action_statistics
    x = np.random.default_rng(1).uniform(s.p01, s.p99, (50, 3)).astype(np.float32)
    np.testing.assert_allclose(arm.unnormalize_action(arm.normalize_action(x)), x, atol=1e-6)
    assert arm.normalize_action(x).dtype == np.float32


def test_the_gripper_is_not_normalised():
    x = np.float32([[0, 0, 7.0]])
    for normalization in ("normal", "bounds"):
        assert record(normalization).normalize_action(x)[0, 2] == 7
        assert record(normalization).unnormalize_action(x)[0, 2] == 7


def test_bounds_clip_when_normalising():
    y = record("bounds").normalize_action(np.float32([[9, 0.2, 0.5], [-9, 0.2, 0.5]]))
    np.testing.assert_allclose(y[:, 0], [1, -1])


def test_a_constant_dimension_does_not_explode():
    y = record().normalize_action(np.float32([[0, 0.2 + 0.01, 0]]))
    assert abs(y[0, 1]) <= 0.011 / MIN_SPREAD


def test_vectors_and_layouts_of_the_wrong_width_are_refused():
    arm = record()
    with pytest.raises(
        ValueError, match=r"action has 4 dimensions, expected 3 \(dx, dy, gripper\)"
    ):
        arm.normalize_action(np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="no proprio statistics"):
        arm.normalize_proprio(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="no action statistics"):
        record(action_statistics=None).unnormalize_action(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="'maximum' is not one of"):
        record("maximum")
    with pytest.raises(ValueError, match="units has 1 entries, expected 3"):
        dataclasses.replace(LAYOUT, units=("m",))


def test_records_survive_json():
    arm = record()
    text = json.dumps(embodiments_to_json([arm]))
    (back,) = embodiments_from_json(json.loads(text))
    assert dataclasses.asdict(back).keys() == dataclasses.asdict(arm).keys()
    assert back.action == arm.action
    assert back.datasets == ("fake",)
    x = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_array_equal(back.normalize_action(x), arm.normalize_action(x))


def test_records_with_unknown_or_missing_fields_are_refused():
    data = embodiments_to_json([record()])
    data[0]["speed"] = 3
    with pytest.raises(ValueError, match=r"unknown: \['speed'\]"):
        embodiments_from_json(data)
    del data[0]["speed"], data[0]["action"]["units"]
    with pytest.raises(ValueError, match=r"arm.action.*missing: \['units'\]"):
        embodiments_from_json(data)


def test_normal_has_mean_0_and_std_1_and_bounds_map_percentiles_to_1():
    x = np.random.default_rng(0).normal(0.1, 0.3, (1000, 3)).astype(np.float32)  # the record's
    normal = record("normal").normalize_action(x)[:, 0]
    assert normal.mean() == pytest.approx(0, abs=1e-3)
    assert normal.std() == pytest.approx(1, abs=1e-3)
    bounds = record("bounds").normalize_action(x)[:, 0]
    assert (bounds.min(), bounds.max()) == (-1, 1)
    assert np.mean(np.abs(bounds) < 1) == pytest.approx(0.98, abs=0.002)


def test_any_leading_axes_are_allowed():
    x = np.random.default_rng(3).normal(size=(2, 4, 5, 3)).astype(np.float32)
    y = record().normalize_action(x)
    assert y.shape == x.shape
    np.testing.assert_array_equal(y.reshape(-1, 3), record().normalize_action(x.reshape(-1, 3)))


def test_proprio_has_its_own_statistics():
    s = record().action_statistics
    twice = {f.name: getattr(s, f.name) for f in dataclasses.fields(Statistics)}
    twice = Statistics(**(twice | {"mean": s.mean * 2, "std": s.std * 2}))
    arm = record(proprio=LAYOUT, proprio_statistics=twice)
    x = np.float32([[0.3, 0.2, 0.5]])
    np.testing.assert_allclose(
        arm.normalize_proprio(x * 2)[:, 0], arm.normalize_action(x)[:, 0], rtol=1e-5
    )


def test_statistics_of_another_width_are_refused():
    s = record().action_statistics
    with pytest.raises(
        ValueError, match=r"'arm': action_statistics.mean has shape \(1,\), expected \(3,\)"
    ):
        record(action_statistics=dataclasses.replace(s, mean=s.mean[:1]))


def test_json_keeps_every_bit_of_the_statistics():
    arm = record()
    (back,) = embodiments_from_json(json.loads(json.dumps(embodiments_to_json([arm]))))
    for f in dataclasses.fields(Statistics):
        ours, theirs = (getattr(e.action_statistics, f.name) for e in (arm, back))
        np.testing.assert_array_equal(theirs, ours)
        assert np.asarray(theirs).dtype == np.asarray(ours).dtype
    lacking = embodiments_to_json([arm])
    del lacking[0]["action_statistics"]["p99"]
    with pytest.raises(ValueError, match=r"arm.action_statistics.*missing: \['p99'\]"):
        embodiments_from_json(lacking)
