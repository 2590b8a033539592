"""Replays of demonstrations: exact as recorded; a wrong record or start is a fault."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("mujoco", reason="needs pip install 'octolike[sim]'")

from octolike.embodiment import Embodiment, Layout, Statistics
from octolike.envs.replays import replay
from octolike.envs.simulators import TabletopSettings
from octolike.envs.tabletop import ExpertNoise, TabletopEnv, collect_episode
from octolike.evaluation import frame_check, policy_check, replay_check

COMPONENT = {"kind": "tabletop", "primary_size": 32, "wrist_size": 24}
NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")


class Demonstration(NamedTuple):
    skill: str
    split: str
    seed: int
    actions: np.ndarray
    observation: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def env():
    env = TabletopEnv(TabletopSettings(primary_size=32, wrist_size=24))
    yield env
    env.close()


@pytest.fixture(scope="module")
def demonstrations(env):
    """Return a few demonstrations of two skills, as scripts/collect.py stores them."""
    recorded = []
    for skill, seed in (("touch", 3), ("push", 11), ("touch", 16), ("push", 40)):
        episode = collect_episode(env, seed, "train", [skill], ExpertNoise())
        assert episode["episode_metadata"]["success"]
        observation = dict(episode["steps"]["observation"])
        observation["proprio"] = observation.pop("state")
        actions = episode["steps"]["executed_action"]
        recorded.append(Demonstration(skill, "train", seed, actions, observation))
    return recorded


@pytest.fixture(scope="module")
def robot(demonstrations):
    x = np.concatenate([d.actions for d in demonstrations])
    numbers = {"mean": x.mean(0), "std": x.std(0), "min": x.min(0), "max": x.max(0)}
    numbers |= {"p01": x.min(0), "p99": x.max(0)}
    gripper = tuple(n == "gripper" for n in NAMES)
    layout = Layout(
        names=NAMES, units=("m",) * 7, absolute=gripper, normalized=tuple(not g for g in gripper)
    )
    return Embodiment(
        name="tabletop",
        robot="",
        control_hz=5.0,
        gripper="",
        action=layout,
        proprio=None,
        action_statistics=Statistics(**numbers, steps=len(x), episodes=4),
    )


def report(demonstrations, robot, component=COMPONENT) -> policy_check.CheckReport:
    calls = []
    replays = replay_check.replay_demonstrations(
        demonstrations, robot, component, lambda: calls.append(1), workers=1
    )
    assert len(calls) == len(demonstrations)
    return policy_check.CheckReport(replays=replays, simulator="tabletop")


def test_recorded_actions_reproduce_their_episode(demonstrations, robot):
    result = report(demonstrations, robot)
    assert result.faults == []
    for r in result.replays:
        assert r.recorded.success
        assert r.round_trip.success
        assert r.recorded.proprio.max() == r.recorded.pixels.max() == 0


@pytest.mark.parametrize(
    "text",
    [
        "relative",
        "absolute",
        "absolute rotation_6d",
        "relative tool_frame rotation_6d",
        "delta tool_frame",
    ],
)
def test_actions_reproduce_their_episode_in_every_representation(demonstrations, robot, text):
    names = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    proprio = dataclasses.replace(
        robot.action, names=names, absolute=(True,) * 7, normalized=(True,) * 7
    )
    action = dataclasses.replace(robot.action, units=("m",) * 3 + ("rad",) * 3 + ("",))
    plain = dataclasses.replace(
        robot, action=action, proprio=proprio, representation=text, action_statistics=None
    )
    learned = np.concatenate(
        [
            plain.represent(d.actions[:, None], d.observation["proprio"])[:, 0]
            for d in demonstrations
        ]
    )
    learned = learned.astype(np.float32)
    numbers = {"mean": learned.mean(0), "std": learned.std(0)}
    numbers |= dict.fromkeys(("min", "p01"), learned.min(0))
    numbers |= dict.fromkeys(("max", "p99"), learned.max(0))
    statistics = Statistics(**numbers, steps=len(learned), episodes=4)
    arm = dataclasses.replace(plain, action_statistics=statistics)
    result = report(demonstrations, arm)
    assert result.faults == []
    for r in result.replays:
        assert r.round_trip.success
        assert r.round_trip.proprio.max() < 1e-3


def test_another_start_diverges_at_the_first_step(env, demonstrations):
    d = demonstrations[0]
    options = {"split": d.split, "skills": [d.skill]}
    result = replay(env, d.seed + 1, options, d.actions, d.observation)
    assert result.proprio[0] > replay_check.PROPRIO_TOLERANCE


def test_a_record_that_does_not_invert_its_normalisation_is_detected(
    demonstrations, robot, monkeypatch
):
    original = Embodiment.unnormalize_action
    monkeypatch.setattr(
        Embodiment, "unnormalize_action", lambda self, x: original(self, x) * np.float32(0.7)
    )
    faults = report(demonstrations, robot).faults
    assert faults
    assert all("after the round trip" in f for f in faults)


def test_another_environment_than_the_recorded_one_is_a_fault(demonstrations, robot):
    component = COMPONENT | {"primary_size": 40}
    result = report(demonstrations[:1], robot, component)
    assert "observation has shape [40, 40, 3], the recording [32, 32, 3]" in result.faults[0]


def test_the_round_trip_of_a_clipping_record_is_not_judged(demonstrations, robot):
    statistics = robot.action_statistics
    narrow = dataclasses.replace(statistics, p01=statistics.p01 / 4, p99=statistics.p99 / 4)
    clipping = dataclasses.replace(robot, normalization="bounds", action_statistics=narrow)
    result = report(demonstrations, clipping)
    compared = frame_check.FrameComparison("tabletop", clipped=0.3)
    faults, remarks = replay_check.replay_faults(result.replays, clipped=compared.clipped > 0)
    assert faults == []
    assert remarks
