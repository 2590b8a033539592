"""Meta-World: benchmarks, wordings, observations, determinism, experts, means over groups."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from octolike.config import ConfigError, load_module
from octolike.envs import demonstrations
from octolike.envs.metaworld import metaworld_tasks as tasks
from octolike.envs.metaworld.metaworld_tasks import BENCHMARKS, GROUPS, PHRASINGS, SKILLS
from octolike.envs.registry import make_env, simulator
from octolike.evaluation import statistics, success_tables, suites
from octolike.evaluation.success import mean_rates

needs = pytest.mark.skipif(
    not importlib.util.find_spec("metaworld"),
    reason="needs pip install --no-deps packaging 'metaworld>=3.1,<4'",
)
FEW = ("reach", "drawer-close")


@pytest.fixture(scope="module")
def env():
    pytest.importorskip("metaworld")
    env = make_env({"kind": "metaworld", "primary_size": 48})
    yield env
    env.close()


def begin(env, seed, skill, split="train"):
    return env.reset(seed=seed, options={"split": split, "skills": [skill]})


# tasks, wording, benchmarks


def test_group_sizes_match_the_literature():
    sizes = {g: list(GROUPS.values()).count(g) for g in dict.fromkeys(GROUPS.values())}
    assert sizes == {"easy": 28, "medium": 11, "hard": 6, "very hard": 5}
    assert set(GROUPS) == set(SKILLS)


def test_no_two_tasks_share_a_wording_and_held_out_wordings_are_not_in_training():
    trained = [w for x in PHRASINGS.values() for w in x.train]
    held_out = [w for x in PHRASINGS.values() for w in x.held_out]
    assert len(set(trained)) == len(trained)
    assert len(set(held_out)) == len(held_out)
    assert not set(trained) & set(held_out)
    assert all(len(x.train) == 3 and len(x.held_out) == 1 for x in PHRASINGS.values())


def test_test_tasks_are_never_training_tasks():
    for b in BENCHMARKS.values():
        assert not set(b.train) & set(b.test)
    assert len(BENCHMARKS["ml45"].train) == 45
    assert len(BENCHMARKS["mt50"].train) == 50


@needs
def test_benchmarks_equal_the_packages():
    from metaworld import env_dict

    bare = lambda some: {name.removesuffix("-v3") for name in some}
    assert set(SKILLS) == bare(env_dict.ALL_V3_ENVIRONMENTS)
    assert set(BENCHMARKS["mt10"].train) == bare(env_dict.MT10_V3)
    for name, theirs in (("ml10", env_dict.ML10_V3), ("ml45", env_dict.ML45_V3)):
        assert set(BENCHMARKS[name].train) == bare(theirs["train"])
        assert set(BENCHMARKS[name].test) == bare(theirs["test"])
    assert bare(env_dict.ML25_V3["test"]) & bare(env_dict.ML25_V3["train"])  # why it is left out


def test_unknown_names_are_rejected_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'ml25'.*did you mean 'ml45'|'ml25'.*ml10, ml45"):
        tasks.benchmark("ml25")
    with pytest.raises(ConfigError, match="did you mean 'door-open'"):
        tasks.tasks_of("train", ["door-opn"])
    with pytest.raises(ConfigError, match="unknown split: 'val'"):
        tasks.tasks_of("val")


def test_ml_suites_have_their_test_tasks_in_a_separate_split():
    plan = suites.SUITES["metaworld_ml10"].plan()
    of = lambda split: {e.skill for e in plan if e.split == split}
    assert of("train") == set(BENCHMARKS["ml10"].train)
    assert of("held_out_task") == set(BENCHMARKS["ml10"].test)
    assert min(e.seed for e in plan) >= demonstrations.LAST_SEED


# the environment


@needs
def test_the_observation_has_the_image_and_the_hand_only(env):
    observation, _ = begin(env, 3, "push")
    assert {k: (v.shape, v.dtype.name) for k, v in observation.items()} == {
        "image_primary": ((48, 48, 3), "uint8"),
        "proprio": ((4,), "float32"),
    }
    # goal and puck lie elsewhere with another seed; the hand does not know
    repeated, _ = begin(env, 4, "push")
    states = [env.privileged_state().copy()]
    begin(env, 3, "push")
    assert not np.array_equal(env.privileged_state()[-3:], states[0][-3:])
    np.testing.assert_allclose(observation["proprio"], repeated["proprio"], atol=0.01)
    assert (observation["image_primary"] != repeated["image_primary"]).any()


@needs
def test_the_camera_is_upright(env):
    begin(env, 0, "drawer-close")
    picture = env.render().astype(int)
    wood = (picture[..., 0] > picture[..., 2] + 15) & (picture.sum(-1) > 150)
    assert wood[128:].mean() > 2 * wood[:128].mean()  # the table is below, the dark room above


@needs
def test_a_zoomed_view_is_the_middle_and_the_hand_has_a_camera(env):
    near = make_env({"kind": "metaworld", "primary_size": 48, "zoom": 2.0, "hand_size": 32})
    try:
        (wide, _), (close, _) = (begin(e, 3, "drawer-close") for e in (env, near))
        assert near.observation_space.contains(close)
        assert close["image_wrist"].shape == (32, 32, 3)
        middle = wide["image_primary"][12:36, 12:36].astype(float)
        shrunk = close["image_primary"].reshape(24, 2, 24, 2, 3).mean(axis=(1, 3))
        assert np.abs(middle - shrunk).mean() < 12
        assert np.abs(wide["image_primary"][::2, ::2] - shrunk).mean() > 24
    finally:
        near.close()


def test_an_episode_depends_on_seed_and_actions_but_not_on_earlier_episodes(env):
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 4)).astype(np.float32)

    def play():
        frames = [begin(env, 7, "push")[0]] + [env.step(a)[0] for a in actions]
        return frames, env.privileged_state().copy()

    first, end = play()
    begin(env, 8, "push")
    for _ in range(3):
        env.step(np.ones(4, np.float32))
    for skill in SKILLS[:5]:  # evicts the task's simulation from the cache
        begin(env, 1, skill)
    again, end_again = play()
    np.testing.assert_array_equal(end, end_again)
    for a, b in zip(first, again, strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a)


@needs
def test_positions_and_wordings_follow_the_seed(env):
    goals, words = set(), set()
    for seed in range(12):
        _, info = begin(env, seed, "reach")
        goals.add(tuple(env.privileged_state()[-3:]))
        words.add(info["instruction"])
    assert len(goals) == 12
    assert words == set(PHRASINGS["reach"].train)
    _, info = begin(env, 0, "reach", "held_out_phrasing")
    assert info["instruction"] in PHRASINGS["reach"].held_out
    _, info = env.reset(seed=0)  # any task, in the words of training
    assert info["instruction"] in PHRASINGS[info["skill"]].train


@needs
def test_bad_input_is_rejected(env):
    begin(env, 0, "reach")
    with pytest.raises(ValueError, match=r"float32 \[4\].*got shape \[7\]"):
        env.step(np.zeros(7))
    with pytest.raises(ValueError, match="4 finite numbers"):
        env.step(np.array([0, np.nan, 0, 0]))
    with pytest.raises(ConfigError, match="unknown reset option: 'skill'"):
        env.reset(seed=0, options={"skill": "reach"})
    with pytest.raises(ConfigError, match=r"unknown field of environment .*'size'"):
        make_env({"kind": "metaworld", "size": 96})


@needs
def test_the_error_for_a_missing_simulator_has_the_installation_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with pytest.raises(ConfigError, match="pip install --no-deps packaging 'metaworld"):
        make_env({"kind": "metaworld"})


# demonstrations


@needs
def test_demonstrations_replay_exactly(env):
    collect = simulator("metaworld").load("collect_episode")
    for skill in FEW:
        episode = collect(env, 5, "train", [skill], 0.5)
        steps, about = episode["steps"], episode["episode_metadata"]
        length = len(steps["action"])
        assert about["success"]
        assert about["task"] == skill
        assert steps["observation"]["state"].shape == (length, 4)
        assert steps["observation"]["image_primary"].shape == (length, 48, 48, 3)
        assert np.abs(steps["action"]).max() <= 1
        assert np.abs(steps["executed_action"]).max() <= 1
        assert not np.array_equal(steps["action"], steps["executed_action"])
        begin(env, 5, skill)
        outcomes = [env.step(a) for a in steps["executed_action"]]
        assert [o[2] for o in outcomes] == [False] * (length - 1) + [True]
        np.testing.assert_array_equal(outcomes[-2][0]["proprio"], steps["observation"]["state"][-1])


@needs
def test_a_goal_image_shows_the_end(env):
    options = {"split": "train", "skills": ["drawer-close"]}
    end = simulator("metaworld").load("goal")(env, 5, options)["image_primary"]
    start = begin(env, 5, "drawer-close")[0]["image_primary"]
    assert end.shape == start.shape
    assert (end != start).mean() > 0.01


def test_configs_name_their_benchmark():
    module = load_module(str(Path(__file__).parents[2] / "configs" / "metaworld.py"))
    for name, benchmark in BENCHMARKS.items():
        for size in ("cpu", "27m"):
            config = module.get_config(f"tasks={name},size={size}")
            config.check()
            assert tuple(config.collect.skills) == benchmark.train
    with pytest.raises(ConfigError, match="unknown Meta-World benchmark: 'mt25'"):
        module.get_config("tasks=mt25")
    module.get_config("debug,size=27m").check()


def test_each_view_has_demonstrations_of_its_own():
    module = load_module(str(Path(__file__).parents[2] / "configs" / "metaworld.py"))
    usual = module.get_config("")
    assert (usual.workdir, usual.data.root) == ("runs/metaworld-mt10", "runs/metaworld-mt10/data")
    roots = {usual.data.root}
    for arg in ("zoom=1.6", "wrist=true", "pixels=128", "zoom=1.6,wrist=true,size=27m"):
        config = module.get_config(arg)
        config.check()
        assert set(config.data.cameras) <= set(config.model.tokenizers)
        assert config.collect.dataset == config.data.mix
        roots.add(config.data.root)
        assert config.workdir.startswith(config.data.root.removesuffix("/data"))
    assert len(roots) == 5
    strides = module.get_config("stride=2")
    assert strides.data.root == usual.data.root
    assert strides.workdir != usual.workdir
    assert strides.model.tokenizers["primary"]["encoder"]["strides"] == (2, 2, 1)


# results


def test_means_weigh_tasks_equally_and_groups_equally():
    rate = lambda successes, episodes=10: statistics.SuccessRate(successes, episodes)
    cells = {
        "reach": rate(10),
        "window-open": rate(40, 50),
        "push": rate(2),
        "sweep": statistics.SuccessRate(0, 0, 3),  # all crashed: no outcome
        "all": rate(52, 70),
    }
    rates = mean_rates(cells, GROUPS)
    assert rates["tasks"] == pytest.approx((1 + 0.8 + 0.2) / 3)
    assert rates["easy"] == pytest.approx(0.9)
    assert rates["hard"] == pytest.approx(0.2)
    assert rates["groups"] == pytest.approx(0.55)
    assert "medium" not in rates
    assert mean_rates(cells, {}) == {"tasks": rates["tasks"]}
    assert mean_rates({"all": rate(1)}, GROUPS) == {}


def test_the_table_shows_both_means():
    rows = [
        {"policy": "trained", "split": "train", "skill": skill, "seed": seed, "failure": "",
         "success": skill == "reach", "steps": 5}
        for skill in ("reach", "window-open", "push")
        for seed in range(2)
    ]  # fmt: skip
    text = success_tables.success_table(rows, GROUPS)
    assert "mean over tasks 33.3%; over the 2 groups 25.0% (easy 50.0%, hard 0.0%)" in text
    assert "mean over tasks" not in success_tables.success_table(rows)
