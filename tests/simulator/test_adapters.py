"""Adapters to LIBERO and SimplerEnv, tested on fakes with the same calls and shapes."""

import types

import numpy as np
import pytest

pytest.importorskip("gymnasium", reason="needs pip install 'octolike[sim]'")

from octolike.config import ConfigError
from octolike.data.specs import catalog, expressions, oxe
from octolike.envs import adapters, libero, simpler
from octolike.envs.registry import ENVIRONMENTS, check_robot, simulator
from octolike.envs.simulators import LiberoSettings, SimplerSettings


class LiberoSim:
    """A fake OffScreenRenderEnv; its image has one white corner, to detect flips."""

    def __init__(self, bddl_file_name, camera_heights, camera_widths):
        self.path, self.size = bddl_file_name, (camera_heights, camera_widths)
        self.actions, self.seeds, self.closed = [], [], False

    def seed(self, seed):
        self.seeds.append(seed)

    def reset(self):
        return self._raw_observation()

    def set_init_state(self, state):
        self.state = state
        return self._raw_observation()

    def step(self, action):
        self.actions.append(action)
        done = action[0] == 1.0
        return self._raw_observation(), float(done), done, {}

    def close(self):
        self.closed = True

    def _raw_observation(self):
        image = np.zeros((*self.size, 3), np.uint8)
        image[0, 0] = 255
        return {
            "agentview_image": image,
            "robot0_eye_in_hand_image": image,
            "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
            "robot0_eef_quat": np.array([0, 0, np.sin(0.25), np.cos(0.25)]),
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }


class LiberoSuite:
    def get_task(self, number):
        return types.SimpleNamespace(
            problem_folder="libero_spatial", bddl_file=f"{number}.bddl", language=f"do {number}"
        )

    def get_task_init_states(self, number):
        return [f"state {number}/{i}" for i in range(3)]


@pytest.fixture
def libero_env(monkeypatch):
    modules = {
        "libero.libero": types.SimpleNamespace(get_libero_path=lambda name: f"assets/{name}"),
        "libero.libero.envs": types.SimpleNamespace(OffScreenRenderEnv=LiberoSim),
        "libero.libero.benchmark": types.SimpleNamespace(
            get_benchmark_dict=lambda: {"libero_spatial": LiberoSuite}
        ),
    }
    monkeypatch.setattr(adapters, "import_simulator", lambda name, *_: modules[name])
    return libero.LiberoEnv(LiberoSettings(primary_size=256, wrist_size=64))


def test_libero_starts_from_an_initial_state_of_the_benchmark_after_settling(libero_env):
    observation, info = libero_env.reset(
        seed=4, options={"split": "train", "skills": ["spatial/7"]}
    )
    sim = libero_env._env
    assert sim.path == "assets/bddl_files/libero_spatial/7.bddl"
    assert sim.state == "state 7/1"
    assert sim.actions == [[0, 0, 0, 0, 0, 0, -1]] * 10
    assert info["instruction"] == "do 7"
    assert observation["image_primary"][-1, -1].min() == 255  # rotated by 180 degrees
    assert observation["image_primary"].sum() == 3 * 255
    assert observation["image_wrist"].shape == (64, 64, 3)
    expected = [0.1, 0.2, 0.3, 0, 0, 0.5, 0.04, -0.04]
    np.testing.assert_allclose(observation["proprio"], expected, atol=1e-6)


def test_libero_clips_actions_and_ends_with_success_or_the_step_limit(libero_env):
    libero_env.reset(seed=0, options={"skills": ["spatial/0"]})
    *_, info = libero_env.step(np.array([0.5, -3, 0, 0, 0, 0, 1]))
    assert libero_env._env.actions[-1] == [0.5, -1, 0, 0, 0, 0, -1]
    assert not info["success"]
    _, reward, terminated, truncated, info = libero_env.step(np.array([1.0, 0, 0, 0, 0, 0, -1]))
    assert (reward, terminated, truncated, info["success"]) == (1, True, False, True)
    libero_env.reset(seed=0, options={"skills": ["spatial/0"]})
    for _ in range(libero.LIMITS["spatial"]):
        _, _, terminated, truncated, info = libero_env.step(np.zeros(7))
    assert (terminated, truncated, info["failure"]) == (False, True, "time ran out")


@pytest.mark.parametrize("spec", [spec for spec in oxe.OXE if spec.embodiment == "libero"])
def test_libero_gets_the_actions_that_its_demonstrations_store(libero_env, spec):
    """From stored actions through the dataset spec to the simulator: -1 opens, 1 closes."""
    stored = np.array([[0.5, -0.25, 0, 0, 0, 0.125, g] for g in (-1, 1)])
    actions = expressions.evaluate(spec.action_from, {"is_first": [True, False], "action": stored})
    assert actions[:, 6].tolist() == [1, 0]  # 1 is open
    libero_env.reset(seed=0, options={"skills": ["spatial/0"]})
    for action in actions:
        assert libero_env.action_space.contains(action.astype(np.float32))
        libero_env.step(action)
    assert libero_env._env.actions[-2:] == stored.tolist()


class SimplerSim:
    def __init__(self, task):
        self.task, self.actions, self.parts = task, [], 1

    def reset(self, seed=None):
        return {"image": np.full((480, 640, 3), 7, np.uint8)}, {}

    def step(self, action):
        self.actions.append(action)
        truncated = len(self.actions) >= 60
        done = action[0] > 0.5
        return self.reset()[0], 0.0, done, truncated, {"success": done}

    def get_language_instruction(self):
        return f"please {self.task}"

    def close(self):
        pass


@pytest.fixture
def simpler_env(monkeypatch):
    modules = {
        "simpler_env": types.SimpleNamespace(make=SimplerSim),
        "simpler_env.utils.env.observation_utils": types.SimpleNamespace(
            get_image_from_maniskill2_obs_dict=lambda env, observation: observation["image"]
        ),
    }
    monkeypatch.setattr(adapters, "import_simulator", lambda name, *_: modules[name])
    return simpler.SimplerEnv(SimplerSettings(primary_size=32))


def test_simpler_sends_the_widowx_axis_angles_and_a_binary_gripper_command(simpler_env):
    task = "widowx_stack_cube"
    observation, info = simpler_env.reset(seed=0, options={"skills": [task]})
    assert info["instruction"] == f"please {task}"
    assert observation["image_primary"].shape == (32, 32, 3)
    assert (observation["image_primary"] == 7).all()
    simpler_env.step(np.array([0.01, 0.02, 0.03, 0, 0, 0.4, 0.9]))
    simpler_env.step(np.array([0, 0, 0, 0.3, 0, 0, 0.1]))
    first, second = simpler_env._env.actions
    np.testing.assert_allclose(first, [0.01, 0.02, 0.03, 0, 0, 0.4, 1], atol=1e-9)
    np.testing.assert_allclose(second, [0, 0, 0, 0.3, 0, 0, -1], atol=1e-9)
    *_, terminated, truncated, info = simpler_env.step(np.array([0.9, 0, 0, 0, 0, 0, 1]))
    assert (terminated, truncated, info["success"]) == (True, False, True)


def test_the_google_robots_gripper_command_is_repeated(simpler_env):
    simpler_env.reset(seed=0, options={"skills": ["google_robot_move_near"]})
    for opening in (1, 1, 0, *[0] * 20, 1):
        simpler_env.step(np.array([0, 0, 0, 0, 0, 0, opening]))
    commands = [a[6] for a in simpler_env._env.actions]
    assert commands == [0, 0, *[1] * simpler.STICKY_STEPS, *[0] * (21 - simpler.STICKY_STEPS), -1]


def test_axis_angles_equal_the_rotation_matrices():
    def matrix(axis, angle):
        k = np.cross(np.eye(3), axis)
        return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k

    roll, pitch, yaw = 0.3, -0.5, 0.9
    wanted = matrix([0, 0, 1], yaw) @ matrix([0, 1, 0], pitch) @ matrix([1, 0, 0], roll)
    turn = simpler.rpy_to_axis_angle(roll, pitch, yaw)
    angle = np.linalg.norm(turn)
    np.testing.assert_allclose(matrix(turn / angle, angle), wanted, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (libero.LiberoEnv, "pip install -e LIBERO"),
        (simpler.SimplerEnv, "pip install -e SimplerEnv"),
    ],
)
def test_the_error_for_a_missing_simulator_has_the_installation_command(make, remedy, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(adapters.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=remedy):
        make()


@pytest.mark.parametrize("kind", ["libero", "simpler"])
def test_goals_and_demonstrations_are_errors_with_a_remedy(kind):
    parts = simulator(kind)
    env = types.SimpleNamespace(unwrapped=object())
    with pytest.raises(ConfigError, match="conditioned on language"):
        parts.load("goal")(env, 0, {})
    with pytest.raises(ConfigError, match=r"octolike convert"):
        parts.load("collect_episode")(env, 0, "train", ["x"], 0.0)
    assert parts.load("tasks_of")("train") == parts.load("skills")
    with pytest.raises(ConfigError, match="did you mean"):
        parts.load("tasks_of")("train", [parts.load("skills")[0] + "x"])


def test_bad_actions_and_images_are_errors(simpler_env):
    simpler_env.reset(seed=0)
    with pytest.raises(ValueError, match=r"\[6\]"):
        simpler_env.step(np.zeros(6))
    with pytest.raises(ValueError, match="another release"):
        adapters.resize_by_area(np.zeros((8, 8), np.uint8), 4, "image_primary")


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_a_simulator_accepts_the_robots_of_its_datasets_and_rejects_others(kind):
    robots = set(simulator(kind).load("robots"))
    specs = catalog.DATASETS.values()
    assert robots <= {spec.embodiment or spec.name for spec in specs}
    simulated = {r.embodiment or r.name for r in specs if f"octolike.envs.{kind})" in r.robot}
    assert simulated <= robots
    for robot in (*robots, "my_recordings"):
        check_robot({"kind": kind}, robot, recorded="my_recordings")
    with pytest.raises(ConfigError, match=f"{kind!r} can be .*, not the robot 'kuka', whose act"):
        check_robot({"kind": kind}, "kuka", recorded="my_recordings")
