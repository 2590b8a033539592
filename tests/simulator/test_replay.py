"""Replays of demonstrations: exact as recorded, and red where a record or a start is wrong."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("mujoco", reason="needs pip install 'octolike[sim]'")

from octolike.embodiment import Embodiment, Layout, Statistics
from octolike.envs.replays import replay
from octolike.envs.tabletop import ExpertNoise, TabletopEnv, collect_episode
from octolike.evaluation import checks

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
    env = TabletopEnv(primary_size=32, wrist_size=24)
    yield env
    env.close()


@pytest.fixture(scope="module")
def demonstrations(env):
    """Return a few demonstrations of two skills, as scripts/collect.py makes and stores them."""
    found = []
    for skill, seed in (("touch", 3), ("push", 11), ("touch", 16), ("push", 40)):
        episode = collect_episode(env, seed, "train", [skill], ExpertNoise())
        assert episode["episode_metadata"]["success"]
        seen = dict(episode["steps"]["observation"])
        seen["proprio"] = seen.pop("state")
        actions = episode["steps"]["executed_action"]
        found.append(Demonstration(skill, "train", seed, actions, seen))
    return found


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


def report(demonstrations, robot, component=COMPONENT) -> checks.CheckReport:
    played = []
    found = checks.replay_all(demonstrations, robot, component, lambda: played.append(1), workers=1)
    assert len(played) == len(demonstrations)
    return checks.CheckReport(replays=found, simulator="tabletop")


def test_recorded_actions_repeat_their_episode(demonstrations, robot):
    found = report(demonstrations, robot)
    assert found.faults == []
    for r in found.replays:
        assert r.recorded.success
        assert r.round_trip.success
        assert r.recorded.proprio.max() == r.recorded.pixels.max() == 0


def test_another_start_is_seen_at_once(env, demonstrations):
    d = demonstrations[0]
    options = {"split": d.split, "skills": [d.skill]}
    found = replay(env, d.seed + 1, options, d.actions, d.observation)
    assert found.proprio[0] > checks.DRIFT


def test_a_record_that_does_not_undo_its_normalisation_is_found(demonstrations, robot, monkeypatch):
    original = Embodiment.unnormalize_action
    monkeypatch.setattr(
        Embodiment, "unnormalize_action", lambda self, x: original(self, x) * np.float32(0.7)
    )
    found = report(demonstrations, robot)
    assert found.faults
    assert all("normalised and un-normalised" in f for f in found.faults)


def test_another_environment_than_the_recorded_one_is_told(demonstrations, robot):
    other = COMPONENT | {"primary_size": 40}
    found = report(demonstrations[:1], robot, other)
    assert "the simulator shows [40, 40, 3], the recording has [32, 32, 3]" in found.faults[0]


def test_a_clipping_record_is_shown_and_not_judged(demonstrations, robot):
    part = robot.action_statistics
    narrow = dataclasses.replace(part, p01=part.p01 / 4, p99=part.p99 / 4)
    clipping = dataclasses.replace(robot, normalization="bounds", action_statistics=narrow)
    found = report(demonstrations, clipping)
    compared = checks.FrameComparison("tabletop", clipped=0.3)
    faults, remarks = checks._replay_faults(found.replays, clipped=compared.clipped > 0)
    assert faults == []
    assert remarks
