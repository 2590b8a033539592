"""Evaluation suites: the episodes that they plan."""

import dataclasses
import itertools
from collections import Counter

import pytest

from octolike.config import ConfigError, EvaluateConfig
from octolike.envs import demonstrations
from octolike.envs.libero import libero_tasks
from octolike.evaluation import suites
from octolike.evaluation.suites import EpisodePlan, Suite


def test_a_plan_repeats_pairs_of_split_and_skill_and_omits_empty_ones():
    plan = Suite("tabletop", "", ("train", "held_out_family"), ("touch", "lift"), 2, seed=7).plan()
    pairs = [("train", "touch"), ("train", "lift"), ("held_out_family", "lift")]
    assert [(e.split, e.skill) for e in plan] == 2 * pairs
    assert [e.seed for e in plan] == [7, 20_000_007, 25_000_007, 8, 20_000_008, 25_000_008]
    assert plan[0].options == {"split": "train", "skills": ["touch"]}


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_suite_has_a_plan(name):
    plan = suites.SUITES[name].plan()
    assert len(set(plan)) == len(plan) > 0
    assert min(e.seed for e in plan) >= suites.FIRST_SEED


@pytest.mark.parametrize(
    ("suite", "match"),
    [
        (Suite("tabletop", "", ("trian",)), "unknown split: 'trian'; did you mean 'train'"),
        (Suite("tabletop", "", (), ("tuch",)), "unknown skill: 'tuch'; did you mean 'touch'"),
        (Suite("tabletop", "", ("held_out_family",), ("stack",)), "none of the splits"),
        (Suite("tabletop", "", episodes=0), "0 episodes"),
    ],
)
def test_invalid_suites_are_rejected(suite, match):
    with pytest.raises(ConfigError, match=match):
        suite.plan()


def test_suites_come_from_a_name_or_a_config():
    with pytest.raises(ConfigError, match="unknown suite: 'tabletop_quik'; did you mean"):
        suites.suite_by_name("tabletop_quik", {"kind": "tabletop"})
    config = EvaluateConfig(episodes=3, splits=("train",))
    plan = suites.suite_from_config({"kind": "tabletop"}, config, ["push"]).plan()
    assert plan == [EpisodePlan("train", "push", 10_000_000 + config.seed + i) for i in range(3)]


def test_other_words_are_tried_in_the_seen_scenes_and_other_tasks_in_their_own():
    plan = Suite("tabletop", "", episodes=3).plan()
    seeds = {}
    for e in plan:
        seeds.setdefault((e.split, e.skill), set()).add(e.seed)
    assert seeds["train", "put"] == seeds["held_out_phrasing", "put"]
    assert not seeds["train", "put"] & seeds["held_out_combination", "put"]
    assert not seeds["train", "put"] & seeds["train", "stack"]
    libero = suites.SUITES["libero_object"].plan()
    starts = {e.seed % 50 for e in libero if e.skill == "object/3"}
    assert starts == set(range(50))  # each of the benchmark's initial states once


def test_the_blocks_of_seeds_are_disjoint():
    table = suites.SUITES["tabletop"]
    blocks = {}
    for name, first in suites.BLOCKS.items():
        plan = dataclasses.replace(table, seed=first).plan()
        blocks[name] = {e.seed for e in plan}
        assert {suites.block_of(e) for e in plan} == {name}
    assert not blocks["development"] & blocks["test"]
    early = dataclasses.replace(table, seed=0, episodes=1).plan()
    assert {suites.block_of(e) for e in early} == {"demonstrations"}
    with pytest.raises(ConfigError, match="seeds from 0 to 4,999,999"):
        dataclasses.replace(table, seed=4_999_990).plan()


def test_liberos_published_suites_and_variants_are_planned_by_the_benchmarks_protocol():
    plan = suites.SUITES["libero"].plan()
    assert len(plan) == 4 * 10 * 50
    assert {e.split for e in plan} == {"train"}
    for skill in ("spatial/0", "10/9"):  # each initial state of the benchmark once
        states = [e.seed % 50 for e in plan if e.skill == skill]
        assert sorted(states) == list(range(50))
    pro = suites.SUITES["libero_goal_pro"].plan()
    assert {e.split for e in pro} == set(libero_tasks.SPLITS)
    assert libero_tasks.suite_of("counterfactual", "goal/3") == ("libero_goal_task", 3)
    with pytest.raises(ConfigError, match="none of the splits"):
        dataclasses.replace(suites.SUITES["libero_90"], splits=("distractors",)).plan()


def test_libero_has_no_more_scenes_than_the_benchmarks_initial_states():
    libero = suites.SUITES["libero_object"]
    with pytest.raises(ConfigError, match=r"^51 episodes of each task; expected at most 50: "):
        dataclasses.replace(libero, episodes=51).plan()
    with pytest.raises(ConfigError, match=r"no block 'test' \(seed 3,000,000\): .* --block test"):
        dataclasses.replace(libero, **suites.overrides(block="test")).plan()
    own = EvaluateConfig(episodes=60, splits=("train",))
    with pytest.raises(ConfigError, match=r"^60 episodes of each task; expected at most 50: "):
        suites.suite_from_config({"kind": "libero"}, own, ["object/0"]).plan()
    assert len(dataclasses.replace(libero, **suites.overrides(block="development")).plan()) == 500
    aloha = dataclasses.replace(suites.SUITES["aloha"], episodes=51)  # draws a scene per seed
    assert len(dataclasses.replace(aloha, **suites.overrides(block="test")).plan()) == 102


def changes_of_task(plan, slots):
    """Return how often each slot changes its task; the first task counts, too."""
    pairs = [[(e.split, e.skill) for e in plan[slot::slots]] for slot in range(slots)]
    return [1 + sum(a != b for a, b in itertools.pairwise(queue)) for queue in pairs]


@pytest.mark.parametrize(
    ("name", "tasks", "most"),
    [
        ("libero_goal", tuple(f"goal/{i}" for i in (0, 1, 2, 4, 6, 7, 8, 9)), 4),
        ("libero_goal", (), 1),
        ("libero", (), 4 * 5),  # turns of 10 of 50 episodes
        ("libero_goal_pro", (), 6 * 5),
        ("libero_90", (), 9 * 5),
        ("libero_object_pro", tuple(f"object/{i}" for i in range(3)), 2 * 5),
    ],
)
def test_an_environment_keeps_its_task_for_a_turn(name, tasks, most):
    """Interleaved, the slots change their task at nearly every episode: 8 tasks, 10 slots."""
    plan = dataclasses.replace(suites.SUITES[name], skills=tasks or suites.SUITES[name].skills)
    plan, slots = plan.plan(), 10
    order = suites.keep_tasks(plan, slots)
    assert sorted(map(repr, order)) == sorted(map(repr, plan))
    changes = changes_of_task(order, slots)
    assert max(changes) <= most
    loads = [len(order[slot::slots]) for slot in range(slots)]
    assert max(loads) - min(loads) <= 1


def test_an_interrupted_evaluation_has_run_its_tasks_equally_often_but_for_a_turn():
    plan = suites.SUITES["libero"].plan()
    order = suites.keep_tasks(plan, 10)
    for share in (0.2, 0.5, 0.9):
        counts = Counter(e.skill for e in order[: int(share * len(order))])
        assert len(counts) == 40
        assert max(counts.values()) - min(counts.values()) <= suites.TURN
    quick = suites.keep_tasks(plan[:3], 10)  # fewer episodes than slots
    assert quick == plan[:3]


def test_the_yield_of_an_expert_counts_every_try():
    recorded = [
        demonstrations.Recorded(skill, episode, failed)
        for skill, episode, failed in (("b", {}, 3), ("a", {}, 0), ("a", None, 8), ("c", None, 8))
    ]
    tries = demonstrations.count_tries(recorded)
    assert tries == {"a": [1, 8, 0], "b": [1, 3, 0], "c": [0, 8, 0]}
    shards = [
        demonstrations.DemonstrationShard("train", i, 2, tuple((skill, 0) for skill in skills))
        for i, skills in enumerate(("baac", "b"))
    ]
    yields = demonstrations.yields(zip(shards, [tries, {"b": [1, 0]}], strict=True))
    lines = demonstrations.yield_table(yields).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["a", "1", "of", "2", "9", "11.1%"],
        ["b", "2", "of", "2", "5", "40.0%"],
        ["c", "0", "of", "1", "8", "0.0%"],
    ]
    crash = demonstrations.count_tries([demonstrations.Recorded("b", {}, 1, crashed=2)])
    with_crash = demonstrations.yields(zip(shards, [tries, crash], strict=True))
    lines = demonstrations.yield_table(with_crash).splitlines()
    assert lines[0].endswith("crashed seeds")
    assert lines[2].split() == ["b", "2", "of", "2", "6", "33.3%", "2"]
    with pytest.raises(RuntimeError, match=r"every seed of 'c' at noise 0.5.*remove the dataset"):
        demonstrations.check_yields(yields, 0.5)
    demonstrations.check_yields({"a": yields["a"]}, 0.5)
