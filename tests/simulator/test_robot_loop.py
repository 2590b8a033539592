"""examples/robot_loop.py: a slow policy on the table, which moves in a process of its own."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from octolike.policy.execution import ExecutionSettings

ROOT = Path(__file__).parents[2]
TABLE = {"kind": "tabletop", "primary_size": 32, "wrist_size": 32}
HZ, STILL = 10.0, np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("robot_loop", ROOT / "examples/robot_loop.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["robot_loop"] = module  # the table's process imports it by name
    sys.path.insert(0, str(ROOT / "examples"))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "examples"))
    del sys.modules["robot_loop"]


class Still:
    """A policy that keeps the arm still; `chunk` replaces its actions."""

    metadata = {  # noqa: RUF012
        "horizon": 8,
        "window": 1,
        "real_time": "guided",
        "action": {
            "names": list("xyzrpyg"),
            "absolute": [False] * 6 + [True],
            "not_averaged": [False] * 6 + [True],
        },
    }

    def __init__(self, action=STILL):
        self.action, self.tasks, self.prefixes = action, [], []

    def create_task(self, instruction):
        return instruction

    def sample_actions(self, observation, task, seed, prefix):
        assert observation["image_primary"].shape == (1, 32, 32, 3)
        self.tasks.append(task)
        self.prefixes.append(prefix)
        return np.tile(self.action, (8, 1))


def test_a_slow_policy_keeps_the_robot_moving(example):
    """Inference of 2.5 steps: its delay is measured and enters the prefixes."""
    policy = Still()
    settings = ExecutionSettings(execute=2, real_time="guided")
    report = example.drive(policy, TABLE, settings, hz=HZ, slow=2.5 / HZ, max_steps=20)
    assert report.reason in ("step limit", "time ran out")
    assert report.delay >= 1
    assert report.inferences >= 3
    assert policy.prefixes[0] is None
    assert policy.prefixes[-1].delay >= 1
    assert set(policy.tasks) == {policy.tasks[0]}
    assert policy.tasks[0], "the table states its task"


def test_the_robot_refuses_what_it_must_not_do(example):
    policy = Still(np.full(7, 1.0, np.float32))
    report = example.drive(policy, TABLE, ExecutionSettings(execute=2), hz=HZ)
    assert report.reason.startswith("refused the action")
    assert report.steps == 1
