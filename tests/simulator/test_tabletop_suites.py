"""Splits and robots of the table: counterfactuals, distractors, action conventions."""

import dataclasses
import functools
import importlib.util

import numpy as np
import pytest

from octolike.config import CollectConfig, ConfigError
from octolike.envs import demonstrations, registry, rendering
from octolike.envs.pool import EnvPool, ResetCommand
from octolike.envs.simulators import TabletopSettings
from octolike.envs.tabletop import tabletop_tasks as tasks
from octolike.envs.tabletop.conventions import CONVENTIONS, ROBOTS, to_robot, to_table
from octolike.envs.tabletop.tabletop_tasks import SKILLS, TableObject, make_task

pytest.importorskip("mujoco", reason="needs pip install 'octolike[sim]'")
pytest.importorskip("gymnasium")

from octolike.envs.tabletop import TabletopEnv, TabletopExpert, collect_episode

SIZES = {"primary_size": 24, "wrist_size": 16}


@pytest.fixture(scope="module")
def env():
    env = TabletopEnv(TabletopSettings(**SIZES))
    yield env
    env.close()


def options(split, skill):
    return {"split": split, "skills": [skill]}


def roll(env, act):
    """Play until the episode ends; return its last info and its length."""
    for steps in range(1, 100):
        *_, terminated, truncated, info = env.step(act())
        if terminated or truncated:
            return info, steps
    raise AssertionError("the episode did not end")


# Counterfactual instructions


@pytest.mark.parametrize("skill", SKILLS)
def test_a_counterfactual_is_another_task_in_the_same_scene(env, skill):
    for seed in range(6):
        env.reset(seed=seed, options=options("train", skill))
        train_task, table = env.task, set(env._objects)
        positions = {t: env.scene.position(t) for t in table}
        _, info = env.reset(seed=seed, options=options("counterfactual", skill))
        assert info["task"] != info["original"]
        parts = {(t.skill, t.target, t.reference) for t in (env.task, env.original)}
        assert len(parts) == 2
        assert parts <= set(tasks.tasks_of("train"))
        objects = {env.task.target, env.task.reference_object} - {None}
        assert objects <= set(env._objects)
        if env.original == train_task:  # otherwise a new scene was drawn
            assert set(env._objects) == table
            assert all(np.array_equal(env.scene.position(t), p) for t, p in positions.items())


def test_most_scenes_allow_another_task(env):
    unchanged = 0
    for seed in range(20):
        env.reset(seed=seed, options=options("train", "touch"))
        original = env.task
        env.reset(seed=seed, options=options("counterfactual", "touch"))
        unchanged += env.original == original
    assert unchanged >= 18


def test_a_counterfactual_has_another_target_if_possible():
    cube, ball, held_out = (
        TableObject("red", "cube"),
        TableObject("green", "ball"),
        TableObject("blue", "ball"),
    )
    task = make_task("push", cube, "left")
    choices = tasks.counterfactuals(task, (cube, ball, held_out))
    assert {t[1] for t in choices} == {ball}
    alone = tasks.counterfactuals(task, (cube, held_out))
    assert {(t[1], t[2]) for t in alone} == {(cube, d) for d in ("right", "front", "back")}
    assert tasks.counterfactuals(make_task("lift", cube), (cube, ball)) == ()


def original_expert(env):
    """Return a policy for the scene's original task instead of the instructed one."""
    expert = TabletopExpert(env)

    def act():
        task, env.task = env.task, env.original
        try:
            return expert.act()
        finally:
            env.task = task

    return act


@pytest.mark.parametrize("skill", SKILLS)
def test_doing_the_original_task_is_reported_and_not_a_success(env, skill):
    env.reset(seed=3, options=options("counterfactual", skill))
    info, _ = roll(env, original_expert(env))
    assert info["instead"]
    assert not info["success"]
    assert info["failure"] == f"did {info['original']} instead"


@pytest.mark.parametrize("skill", ["touch", "put"])
def test_doing_the_instructed_task_is_a_success(env, skill):
    env.reset(seed=3, options=options("counterfactual", skill))
    info, _ = roll(env, TabletopExpert(env).act)
    assert info["success"]
    assert not info["instead"]


def test_other_splits_have_no_original_task(env):
    _, info = env.reset(seed=0, options=options("train", "touch"))
    assert "instead" not in info
    env.reset(seed=0, options=options("counterfactual", "touch"))
    env.reset(seed=0, options=options("train", "touch"))
    assert env.original is None


def test_the_state_contains_the_original_task(env):
    env.reset(seed=3, options=options("counterfactual", "lift"))
    act = original_expert(env)
    for _ in range(4):
        env.step(act())
    state = env.get_state()
    expected = roll(env, act)
    env.reset(seed=0, options=options("distractors", "touch"))
    env.set_state(state)
    assert roll(env, act) == expected


# Distractors


def test_the_distractors_split_adds_objects_to_the_same_task(env):
    env.reset(seed=5, options=options("train", "put"))
    task, few = env.task, len(env._objects)
    env.reset(seed=5, options=options("distractors", "put"))
    assert env.task == task
    assert len(env._objects) == few + tasks.MORE_DISTRACTORS
    env.reset(seed=5, options=options("train", "put"))
    assert len(env._objects) == few


def test_a_larger_scene_does_not_change_other_episodes(env):
    fresh = TabletopEnv(TabletopSettings(**SIZES))
    try:
        env.reset(seed=1, options=options("distractors", "touch"))
        for e in (env, fresh):
            e.reset(seed=1, options=options("train", "push"))
        for _ in range(4):
            action = TabletopExpert(env).act()
            a, b = env.step(action)[0], fresh.step(action)[0]
            assert all(np.array_equal(a[k], b[k]) for k in a)
    finally:
        fresh.close()


# Action conventions


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_are_inverted_exactly(convention):
    action = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    action[:, 6] = (0, 1, 0.5, 0.25, 1)
    there = to_robot(action, convention)
    assert there.dtype == action.dtype
    assert np.array_equal(to_table(there, convention), action)
    assert np.array_equal(there[:, 3:6], action[:, 3:6])
    assert np.array_equal(there[:, 6], action[:, 6]) == (convention != "inverted")
    assert np.array_equal(there, action) == (convention == "standard")


@pytest.mark.parametrize("convention", ["mirrored", "rescaled", "inverted"])
def test_robots_of_all_conventions_move_identically(env, convention):
    second_env = TabletopEnv(TabletopSettings(**SIZES, action_convention=convention))
    try:
        ours, theirs = (collect_episode(e, 2, skills=["lift"]) for e in (env, second_env))
    finally:
        second_env.close()
    assert theirs["episode_metadata"]["success"]
    for key, images in ours["steps"]["observation"].items():
        assert np.array_equal(images, theirs["steps"]["observation"][key])
    for key in ("action", "executed_action"):
        expected = to_robot(ours["steps"][key], convention)
        assert np.array_equal(theirs["steps"][key], expected)
        assert np.abs(theirs["steps"][key] - ours["steps"][key]).max() > 0.02
    assert second_env.action_space.contains(theirs["steps"]["executed_action"][0])


def test_a_turned_gripper_differs_in_the_wrist_image_and_hardly_in_its_actions(env):
    turned = TabletopEnv(TabletopSettings(**SIZES, gripper="turned"))
    try:
        ours, theirs = (collect_episode(e, 2, skills=["lift"]) for e in (env, turned))
        fingers = [turned.scene.data.body(f"{side}_finger").xpos for side in ("left", "right")]
    finally:
        turned.close()
    assert theirs["episode_metadata"]["success"]
    first, other = (e["steps"]["observation"] for e in (ours, theirs))
    assert np.abs(first["image_wrist"][0].astype(int) - other["image_wrist"][0]).mean() > 10
    np.testing.assert_allclose(first["state"][0], other["state"][0], atol=1e-6)
    np.testing.assert_allclose(ours["steps"]["action"][0], theirs["steps"]["action"][0], atol=1e-6)
    apart = np.abs(fingers[0] - fingers[1])
    assert apart[0] > 0.05 > 0.001 > apart[1]  # along x, not along y


def test_another_look_changes_images_and_nothing_else(env):
    repainted = TabletopEnv(TabletopSettings(**SIZES, look="repainted"))
    try:
        ours, theirs = (collect_episode(e, 2, skills=["lift"]) for e in (env, repainted))
    finally:
        repainted.close()
    assert np.array_equal(ours["steps"]["action"], theirs["steps"]["action"])
    for key, values in ours["steps"]["observation"].items():
        other = theirs["steps"]["observation"][key]
        if key == "state":
            assert np.array_equal(values, other)
        else:
            assert np.abs(values.astype(int) - other).mean() > 40


def test_an_unknown_convention_is_rejected():
    with pytest.raises(ValueError, match="action_convention: 'mirored'; did you mean 'mirrored'"):
        TabletopSettings(**SIZES, action_convention="mirored")


def test_the_environment_follows_the_robot():
    plain = {"kind": "tabletop", "primary_size": 24}
    for robot, fields in ROBOTS.items():
        assert registry.environment_of(plain, robot) == plain | fields
    assert registry.environment_of(plain, "tabletop") == plain
    wrong = plain | {"action_convention": "rescaled"}
    with pytest.raises(ConfigError, match="'tabletop_mirrored' needs 'mirrored'; leave the field"):
        registry.environment_of(wrong, "tabletop_mirrored")


def test_the_belt_carries_what_lies_on_the_table_and_nothing_else():
    component = registry.environment_of({"kind": "tabletop", "primary_size": 24}, "tabletop_belt")
    env = registry.make_env(component)
    try:
        assert (env.metadata["control_hz"], env.action_space.high[0]) == (10, np.float32(0.025))
        env.reset(seed=3, options={"split": "train", "skills": ["put"]})
        items, reference = env._objects, env.present_task.reference_object
        before = {item: env.scene.position(item) for item in items}
        start = env.task_state().start
        for _ in range(10):  # a second
            env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
        moves = np.array([env.scene.position(item) - before[item] for item in items])
        np.testing.assert_allclose(moves, np.tile([0, -0.02, 0], (len(items), 1)), atol=2e-4)
        np.testing.assert_allclose(env.task_state().start - start, [0, -0.02, 0], atol=1e-12)
        expert = TabletopExpert(env)
        while env.task_state().grasped != env.present_task.target:
            env.step(expert.act())
        held, bowl = env.scene.position(items[0]), env.scene.position(reference)
        env.step(np.array([0, 0, 0, 0, 0, 0, 0.0]))
        assert abs(env.scene.position(items[0])[1] - held[1]) < 1e-3
        assert env.scene.position(reference)[1] - bowl[1] == pytest.approx(-0.002)
    finally:
        env.close()


@pytest.mark.parametrize("skill", ["touch", "push", "lift", "put", "stack"])
def test_the_expert_succeeds_on_the_belt(skill):
    component = registry.environment_of({"kind": "tabletop", "primary_size": 24}, "tabletop_belt")
    env = registry.make_env(component)
    try:
        for seed in range(3):
            episode = collect_episode(env, seed, "train", [skill])
            assert episode["episode_metadata"]["success"]
    finally:
        env.close()


# Demonstrations and errors


def test_the_stored_settings_name_the_robot_and_the_split():
    collect = CollectConfig(dataset="tabletop_mirrored", skills={"lift": 1})
    environment = {"kind": "tabletop"}
    usual = demonstrations.settings(environment, collect)
    assert usual["environment"]["action_convention"] == "mirrored"
    assert "split" not in usual  # otherwise existing datasets could not be continued
    held_out = dataclasses.replace(collect, split="held_out_family")
    assert demonstrations.settings(environment, held_out)["split"] == "held_out_family"


@pytest.mark.parametrize(
    ("split", "skill", "match"),
    [
        ("held_out_famly", "lift", "unknown split: 'held_out_famly'; did you mean"),
        ("held_out_family", "touch", "'held_out_family' has no task of skill 'touch'"),
    ],
)
def test_a_split_without_the_skill_is_rejected(split, skill, match):
    collect = CollectConfig(skills={skill: 1}, split=split)
    with pytest.raises(ConfigError, match=match):
        demonstrations.plan({"kind": "tabletop"}, collect)


@pytest.mark.parametrize("version", ["2.3.7", "3.2.9", "4.0.0"])
def test_an_unsupported_mujoco_is_rejected(version):
    with pytest.raises(ImportError, match=rf"mujoco 3.3 or later, before 4.0: found {version}"):
        rendering._check_version(version)
    rendering._check_version("3.3.0")
    rendering._check_version("3.10.1")


@pytest.mark.parametrize(
    ("backend", "packages"),
    [
        ("egl", "libegl1 libgl1 libgl1-mesa-dri"),
        ("osmesa", "libosmesa6"),
        ("egl and osmesa", "libosmesa6 (or: libegl1 libgl1 libgl1-mesa-dri)"),
    ],
)
def test_the_error_of_a_backend_names_its_own_packages(backend, packages):
    """LIBERO, which refuses OSMesa, sets MUJOCO_GL to egl."""
    assert rendering._backend_error(backend).endswith(f": apt-get install {packages}")


def test_the_error_for_a_missing_simulator_has_the_installation_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rendering.load_mujoco.cache_clear()
    make = functools.partial(registry.make_env, {"kind": "tabletop", **SIZES})
    try:
        with (
            EnvPool(make, slots=1, workers=0) as pool,
            pytest.raises(RuntimeError, match=r"cannot be built: .* needs mujoco: pip install"),
        ):
            pool.run({0: ResetCommand(0, {})})
    finally:
        rendering.load_mujoco.cache_clear()
