"""The tabletop simulator: determinism, splits, experts, noise, errors."""

import os
import subprocess
import sys

import numpy as np
import pytest

from octolike.envs.simulators import TabletopSettings
from octolike.envs.tabletop import tabletop_tasks as tasks
from octolike.envs.tabletop.tabletop_tasks import (
    HELD_OUT_PAIRS,
    PHRASINGS,
    SKILLS,
    SPLITS,
    TableObject,
)

pytest.importorskip("mujoco", reason="needs pip install 'octolike[sim]'")
gymnasium = pytest.importorskip("gymnasium")

from gymnasium.utils import env_checker  # noqa: E402

from octolike.envs.tabletop import ExpertNoise, TabletopEnv, TabletopExpert, collect_episode  # noqa: E402
from octolike.envs.tabletop.scene import RGB  # noqa: E402
from octolike.envs.tabletop.tabletop_expert import NO_NOISE  # noqa: E402

STILL = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


@pytest.fixture(scope="module")
def env():
    env = TabletopEnv(TabletopSettings(primary_size=(48, 64), wrist_size=32))
    yield env
    env.close()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def play(env, seed: int, actions: np.ndarray) -> list[dict]:
    return [env.reset(seed=seed)[0], *(env.step(a)[0] for a in actions)]


# tasks and splits


def test_tasks_do_not_import_a_simulator():
    code = (
        "import sys, octolike.envs.tabletop.tabletop_tasks as t; t.tasks_of('train'); "
        "assert not {'mujoco', 'gymnasium', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_splits_are_disjoint_by_construction():
    tasks_by_split = {split: set(tasks.tasks_of(split)) for split in SPLITS}
    train = tasks_by_split["train"]
    assert not train & tasks_by_split["held_out_combination"]
    assert not train & tasks_by_split["held_out_family"]
    assert tasks_by_split["held_out_phrasing"] == train
    assert {t.colour for _, t, _ in train} == set(tasks.COLOURS)
    assert {t.shape for _, t, _ in train} == set(tasks.SHAPES)
    targets = {t for _, t, _ in train} | {
        TableObject(*r.split("_")) for _, _, r in train if "_" in r
    }
    assert not targets & set(HELD_OUT_PAIRS)
    assert not any(skill == "lift" and t.shape == "ball" for skill, t, _ in train)
    assert {(skill, t.shape) for skill, t, _ in tasks_by_split["held_out_family"]} == {
        ("lift", "ball")
    }


def test_wordings_are_disjoint_and_numerous():
    wordings = [w for p in PHRASINGS.values() for w in (*p.train, *p.held_out)]
    assert len(wordings) == len(set(wordings))
    for skill, wording in PHRASINGS.items():
        assert len(wording.train) >= 4, skill
        assert len(wording.held_out) >= 2, skill
        assert all(w == w.lower() for w in (*wording.train, *wording.held_out))


def test_sampled_tasks_belong_to_their_split():
    rng = np.random.default_rng(0)
    instructions = {split: set() for split in SPLITS}
    for split in SPLITS:
        allowed = {tasks.make_task(*parts).name for parts in tasks.tasks_of(split)}
        for _ in range(500):
            task = tasks.sample_task(rng, split)
            assert task.name in allowed
            instructions[split].add(task.instruction)
    # these splits have other scenes, but the tasks and instructions of `train`
    scenes = {"train", "counterfactual", "distractors"}
    training_like = set.union(*(instructions[s] for s in scenes))
    assert not training_like & set.union(*(instructions[s] for s in SPLITS if s not in scenes))


def test_distractors_differ_from_the_target_and_the_reference():
    rng = np.random.default_rng(0)
    for _ in range(500):
        task = tasks.sample_task(rng)
        distractors = tasks.distractors(rng, task, 3)
        objects = [task.target, task.reference_object, *distractors]
        assert len(distractors) == 3
        assert len(set(objects)) == len(objects)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda rng: tasks.sample_task(rng, "trian"),
            "unknown split: 'trian'; did you mean 'train'.*held_out_family",
        ),
        (
            lambda rng: tasks.sample_task(rng, "train", ["lft"]),
            "unknown skill: 'lft'; did you mean 'lift'",
        ),
        (lambda rng: tasks.sample_task(rng, "held_out_family", ["push"]), "'held_out_family'"),
        (lambda rng: tasks.sample_task(rng, "train", []), "no skills"),
        (
            lambda rng: tasks.make_task("push", TableObject("red", "cube"), "up"),
            "unknown reference of push: 'up'",
        ),
        (
            lambda rng: tasks.make_task("lift", TableObject("pink", "cube")),
            "unknown colour: 'pink'",
        ),
        (
            lambda rng: tasks.make_task("stack", TableObject("red", "ball"), "red_cube"),
            "unknown shape for stack: 'ball'",
        ),
    ],
)
def test_unknown_names_are_rejected_with_the_choices(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0))


# the environment


@pytest.mark.parametrize("first", ["", "import mujoco; "])
@pytest.mark.parametrize("backend", ["", "glfw"])
def test_a_working_backend_is_found(first, backend):
    """Also if mujoco was imported before, with a backend that needs a display."""
    code = first + (
        "import warnings; warnings.simplefilter('ignore'); "
        "from octolike.envs.registry import make_env; env = make_env({'kind': 'tabletop'}); "
        "assert env.reset(seed=0)[0]['image_primary'].std() > 1"
    )
    environment = {**os.environ, "MUJOCO_GL": backend}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_the_error_without_a_backend_names_the_apt_packages():
    code = (
        "from octolike.envs import rendering; "
        "rendering._BACKENDS = ('nothing',); rendering.load_mujoco()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: MuJoCo cannot render off screen with nothing: ")
    assert "libosmesa6" in last
    assert "libegl1 libgl1 libgl1-mesa-dri" in last


def test_spaces_and_gymnasium_contract(env):
    env_checker.check_env(env, skip_render_check=True)
    observation, info = env.reset(seed=3)
    assert env.observation_space.contains(observation)
    assert set(info) == {"instruction", "task", "skill", "success", "failure", "scene"}
    assert env.render().shape == (256, 256, 3)


def test_same_seed_and_actions_give_the_same_observations(env):
    rng = np.random.default_rng(0)
    actions = rng.uniform(env.action_space.low, env.action_space.high, (8, 7))
    first = play(env, 11, actions)
    env.reset(seed=5)
    again = play(env, 11, actions)
    other_end = play(env, 12, actions)
    assert all(map(same, first, again))
    assert not any(map(same, first, other_end))


def test_a_restored_state_continues_identically(env):
    env.reset(seed=2, options={"skills": ["put"]})
    expert = TabletopExpert(env)
    for _ in range(4):
        env.step(expert.act())
    state = env.get_state()
    ahead = [env.step(expert.act())[0] for _ in range(4)]
    env.reset(seed=7)
    env.set_state(state)
    assert all(map(same, ahead, [env.step(expert.act())[0] for _ in range(4)]))


@pytest.mark.parametrize("aside", [(0.022, 0, 0), (-0.022, 0, 0), (0, 0.02, -0.01), (0, -0.02, 0)])
def test_the_expert_drops_an_object_wherever_the_bowl_catches_it(env, aside):
    """Within a narrower margin, a policy would hang over the bowl with a closed gripper."""
    env.reset(seed=3, options={"skills": ["put"]})
    expert = TabletopExpert(env)
    action = expert.act()
    while not (env.task_state().grasped == env.task.target and action[6] > 0.5):
        _, _, _, truncated, _ = env.step(action)
        assert not truncated
        action = expert.act()
    env.step(np.array([*aside, 0, 0, 0, 0.0]))
    assert env.task_state().grasped == env.task.target
    action, done = expert.act(), False
    assert action[6] > 0.5
    while not done:
        _, _, done, truncated, info = env.step(action)
        action = expert.act()
        assert not truncated
    assert info["success"]


def test_the_gripper_reaches_the_commanded_pose(env):
    """Within 2 mm in one step, in the axes of proprio, and inside the workspace."""
    env.reset(seed=0)
    before = env.pose()
    move = np.array([0.03, -0.05, 0.02, 0.1, -0.2, 0.3, 0.0])
    after = env.step(move)[0]["proprio"]
    np.testing.assert_allclose(after[:3] - before[:3], move[:3], atol=2e-3)
    np.testing.assert_allclose(after[3:6] - before[3:6], move[3:6], atol=2e-2)
    assert before[6] == 1
    assert after[6] < 0.05
    for _ in range(8):
        far = env.step(np.array([0.9, 0, 9, 0, 0, 0, 1]))[0]["proprio"]
    np.testing.assert_allclose(far[[0, 2]], [0.20, 0.22], atol=2e-3)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(6), r"float32 \[7\].*shape \[6\]"),
        (np.zeros((1, 7)), r"shape \[1, 7\]"),
        (np.full(7, np.nan), "finite"),
        (np.array([0, 0, np.inf, 0, 0, 0, 1]), "finite"),
        ("up", "float32"),
    ],
)
def test_wrong_actions_are_rejected(env, action, message):
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)


def test_wrong_options_are_rejected(env):
    with pytest.raises(ValueError, match="unknown reset option: 'splits'; did you mean 'split'"):
        env.reset(options={"splits": "train"})
    with pytest.raises(ValueError, match="excludes"):
        env.reset(
            options={"task": tasks.make_task("lift", TableObject("red", "cube")), "split": "train"}
        )
    with pytest.raises(ValueError, match="num_distractors"):
        TabletopSettings(num_distractors=9)
    with pytest.raises(ValueError, match="primary_size is 4"):
        TabletopSettings(primary_size=4)


def test_touching_another_object_fails(env):
    """The expert solves another task of the same scene, so it touches the wrong object."""
    env.reset(seed=4, options={"skills": ["touch"]})
    task, wrong_object = env.task, env.scene.objects[1]
    expert, done = TabletopExpert(env), False
    while not done:
        env.task = tasks.make_task("touch", wrong_object)
        action = expert.act()
        env.task = task
        _, reward, done, truncated, info = env.step(action)
        assert not truncated
    assert info["failure"] == f"touched {wrong_object.words}"
    assert reward == 0
    assert not info["success"]


def test_doing_nothing_is_truncated(env):
    env.reset(seed=0, options={"skills": ["lift"]})
    for step in range(1, tasks.STEP_LIMITS["lift"] + 1):
        _, reward, terminated, truncated, _ = env.step(STILL)
        assert (reward, terminated) == (0, False)
        assert truncated == (step == tasks.STEP_LIMITS["lift"])


@pytest.mark.parametrize("colour", tasks.COLOURS)
def test_the_targets_colour_is_in_the_image(env, colour):
    task = tasks.make_task("touch", TableObject(colour, "cube"))
    observation, _ = env.reset(seed=1, options={"task": task})
    image = observation["image_primary"].astype(float)
    hue = np.array(RGB[colour])
    cosine = image @ hue / np.maximum(np.linalg.norm(image, axis=-1), 1) / np.linalg.norm(hue)
    assert (cosine > 0.985).sum() >= 20


# the experts


@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize("noise", [NO_NOISE, ExpertNoise()], ids=["clean", "noisy"])
def test_expert_succeeds(env, skill, noise):
    episodes = [collect_episode(env, seed, "train", [skill], noise) for seed in range(8)]
    successes = [e["episode_metadata"]["success"] for e in episodes]
    assert sum(successes) >= (8 if noise is NO_NOISE else 7), successes
    lengths = [len(e["steps"]["action"]) for e in episodes]
    assert max(lengths) <= tasks.STEP_LIMITS[skill]


@pytest.mark.parametrize("split", SPLITS[1:])
def test_expert_succeeds_on_held_out_tasks(env, split):
    successes = [
        collect_episode(env, seed, split, noise=NO_NOISE)["episode_metadata"]["success"]
        for seed in range(8)
    ]
    assert all(successes), successes


@pytest.mark.parametrize("num_distractors", [0, 3])
def test_empty_and_full_tables(num_distractors):
    settings = TabletopSettings(16, 16, num_distractors)
    env = TabletopEnv(settings)
    for skill in SKILLS:
        metadata = collect_episode(env, 1, "train", [skill], NO_NOISE)["episode_metadata"]
        assert metadata["success"], skill
    env.close()


def test_labels_are_noise_free_and_executed_actions_are_noisy(env):
    noise = ExpertNoise(share=1.0, kicks=0.3)
    episode = collect_episode(env, 6, "train", ["stack"], noise)
    steps = episode["steps"]
    observation, _ = env.reset(seed=6, options={"split": "train", "skills": ["stack"]})
    expert = TabletopExpert(env)
    for index, (label, executed) in enumerate(zip(steps["action"], steps["executed_action"])):
        assert np.array_equal(steps["observation"]["state"][index], observation["proprio"])
        image = steps["observation"]["image_primary"][index]
        assert np.array_equal(image, observation["image_primary"])
        assert np.array_equal(label, expert.act())
        observation = env.step(executed)[0]
    assert (steps["action"] != steps["executed_action"])[:, :3].any(axis=1).all()
    assert np.array_equal(steps["action"][:, 3:], steps["executed_action"][:, 3:])


def test_episode_contract(env):
    episode = collect_episode(env, 9, "train", ["put"], NO_NOISE)
    steps, metadata = episode["steps"], episode["episode_metadata"]
    count = len(steps["action"])
    expected = {
        "image_primary": ((count, 48, 64, 3), np.uint8),
        "image_wrist": ((count, 32, 32, 3), np.uint8),
        "state": ((count, 7), np.float32),
    }
    shapes = {k: (v.shape, v.dtype) for k, v in steps["observation"].items()}
    assert shapes == expected
    assert steps["action"].dtype == steps["executed_action"].dtype == np.float32
    assert np.array_equal(steps["action"], steps["executed_action"])
    assert metadata["task"].startswith("put/")
    assert metadata == {**metadata, "seed": 9, "skill": "put", "split": "train", "success": True}
    # the episode ends with open fingers and at least one step upwards
    gripper = steps["action"][:, 6]
    assert gripper[-2:].tolist() == [1, 1]
    assert steps["action"][-1, 2] > 0
    assert 0 in gripper


def test_the_expert_does_not_idle(env):
    """No two steps in a row without motion: idling makes the expert ambiguous to imitate."""
    for skill in SKILLS:
        actions = collect_episode(env, 3, "train", [skill], NO_NOISE)["steps"]["action"]
        still = np.abs(actions[:, :6]).max(axis=1) < 1e-3
        assert not (still[1:] & still[:-1]).any(), skill


def test_a_goal_image_shows_the_finished_task_also_with_wrappers():
    from octolike.envs.registry import make_wrapped_env
    from octolike.envs.tabletop import tabletop_expert

    component = {"kind": "tabletop", "primary_size": 48, "wrist_size": 32}
    env = make_wrapped_env(component, 1)
    options = {"split": "train", "skills": ["lift"]}
    goal = tabletop_expert.goal(env, 3, options)
    assert {k: v.shape for k, v in goal.items()} == {
        "image_primary": (48, 48, 3),
        "image_wrist": (32, 32, 3),
    }
    first, info = env.reset(seed=3, options=options)
    assert info["skill"] == "lift"
    now = first[-1]["image_primary"]
    assert np.abs(now.astype(int) - goal["image_primary"]).max() > 50
    env.close()


GRIPPER_GREY = 0.25 * 255 + 25  # brighter than every pixel of hand and fingers, pads apart


def test_a_bare_goal_shows_the_finished_task_without_the_gripper():
    from octolike.envs.registry import make_env
    from octolike.envs.tabletop import tabletop_expert

    component = {"kind": "tabletop", "primary_size": 48, "wrist_size": 32}
    options = {"split": "train", "skills": ["put"]}
    plain, bare = (make_env(component | {"bare_goal": flag}) for flag in (False, True))
    goals = [tabletop_expert.goal(env, 3, options)["image_primary"] for env in (plain, bare)]
    is_grey = [(np.ptp(x, axis=-1) < 20) & (x.max(axis=-1) < GRIPPER_GREY) for x in goals]
    assert is_grey[0].sum() > 20
    assert is_grey[1].sum() == 0
    # the object is in the bowl, and only the images lack the gripper
    assert tasks.succeeded(bare.present_task, bare.task_state())
    assert np.array_equal(bare.observe()["image_primary"], plain.observe()["image_primary"])
    plain.close()
    bare.close()


def test_demonstrations_with_bare_goals_end_with_one_and_are_otherwise_the_same(env):
    from octolike.envs.environment import last_images
    from octolike.envs.registry import environment_of, make_env
    from octolike.envs.tabletop import tabletop_expert

    component = {"kind": "tabletop", "primary_size": (48, 64), "wrist_size": 32}
    other = make_env(environment_of(component, "tabletop_bare_goal"))
    usual, longer = (collect_episode(e, 4, "train", ["lift"]) for e in (env, other))
    assert len(longer["steps"]["action"]) == len(usual["steps"]["action"]) + 1
    for key in ("action", "executed_action", "subtask"):
        assert np.array_equal(longer["steps"][key][:-1], usual["steps"][key])
    for key, images in usual["steps"]["observation"].items():
        assert np.array_equal(longer["steps"]["observation"][key][:-1], images)
    last = usual["steps"]["action"][-1]
    assert longer["steps"]["action"][-1].tolist() == [0] * 6 + [last[6]]
    shown = other.observe_bare()
    assert all(np.array_equal(image, shown[key]) for key, image in last_images(longer).items())
    goal = tabletop_expert.goal(other, 4, {"split": "train", "skills": ["lift"]})
    assert not np.array_equal(goal["image_primary"], other.observe()["image_primary"])
    assert np.array_equal(goal["image_primary"], other.observe_bare()["image_primary"])
    other.close()


@pytest.mark.parametrize("skill", tasks.SKILLS)
def test_the_expert_passes_every_milestone(env, skill):
    env.reset(seed=5, options={"split": "train", "skills": [skill]})
    expert, done, info = TabletopExpert(env), False, {}
    order = []
    while not done:
        _, _, terminated, truncated, info = env.step(expert.act())
        order += [k for k, passed in info["milestones"].items() if passed and k not in order]
        done = terminated or truncated
    assert info["success"]
    assert order == list(tasks.MILESTONES[skill])
    assert info.get("grasped") == (env.task.target.words if "grasped" in order else None)
