"""Caveats of success rates: what was demonstrated, by whom, and odd tasks."""

import dataclasses
import json

import pytest

from octolike.config import Component, Config
from octolike.envs.libero import libero_tasks
from octolike.evaluation import caveats, suites
from octolike.evaluation.caveats import Demonstrated

TABLE, LIBERO = {"kind": "tabletop"}, {"kind": "libero"}


def config_of(root="", kind="libero", **skills):
    config = Config()
    config.environment, config.data.root = Component(kind=kind), str(root)
    config.collect.skills, config.collect.dataset = skills, "table"
    return config


def write_dataset(root, name, skills, kind="libero", **settings):
    version = root / name / "1.0.0"
    version.mkdir(parents=True)
    if skills:
        settings |= {"environment": {"kind": kind}, "skills": dict.fromkeys(skills, 50)}
        (version / "settings.json").write_text(json.dumps(settings))


def plan(name, **changes):
    return dataclasses.replace(suites.SUITES[name], **changes).plan()


def test_caveats_name_splits_that_contradict_the_configs_demonstrations():
    config = config_of(kind="tabletop", touch=3, lift=3)
    known = caveats.find_demonstrated(config, ["table"])
    (note,) = caveats.sentences(TABLE, plan("tabletop"), known)
    assert "no demonstrations of push, put, stack: unless" in note
    demonstrated = plan("tabletop", skills=("touch", "lift"))
    assert caveats.sentences(TABLE, demonstrated, known) == []
    config.collect.split = "held_out_family"
    known = caveats.find_demonstrated(config, ["table"])
    assert "of the split 'held_out_family'" in caveats.sentences(TABLE, demonstrated, known)[0]
    early = plan("tabletop", skills=("touch", "lift"), seed=5)
    assert "Seeds below 1,000,000" in caveats.sentences(TABLE, early, known)[1]
    ml10 = suites.SUITES["metaworld_ml10"]
    config = config_of(kind="metaworld", **dict.fromkeys((*ml10.skills, "drawer-open"), 1))
    known = caveats.find_demonstrated(config, ["table"])
    (note,) = caveats.sentences({"kind": "metaworld"}, ml10.plan(), known)
    assert "the held-out tasks: drawer-open." in note


def test_the_settings_of_several_datasets_name_what_was_demonstrated(tmp_path):
    """As with libero:suite=all, whose own config collects nothing."""
    for suite in ("object", "spatial", "goal"):
        skills = [s for s in libero_tasks.DEMONSTRATED if s.startswith(suite)]
        write_dataset(tmp_path, f"libero_{suite}", skills)
    datasets = ["libero_object", "libero_spatial", "libero_goal"]
    known = caveats.find_demonstrated(config_of(tmp_path), datasets)
    assert known.others == ""
    assert known.are_own
    goal = plan("libero_goal")
    assert known.missing(e.skill for e in goal) == {"goal/3", "goal/5"}
    new, others = caveats.sentences(LIBERO, goal, known)
    assert new.startswith("Not demonstrated, by the settings of the training's datasets: goal/3, ")
    assert "are not comparable with published ones, whose demonstrations were recorded" in others
    assert len(known.missing(e.skill for e in plan("libero_10"))) == 10
    (others,) = caveats.sentences(LIBERO, plan("libero_object"), known)
    assert "not comparable" in others


def test_an_unfinished_dataset_and_one_of_another_simulator_do_not_count(tmp_path):
    write_dataset(tmp_path, "libero_goal", ["goal/0"])
    (tmp_path / "libero_goal" / "1.0.0").rename(tmp_path / "libero_goal" / "1.0.0.incomplete")
    known = caveats.find_demonstrated(config_of(tmp_path), ["libero_goal"])
    assert (known.skills, known.are_own) == (set(), None)
    write_dataset(tmp_path, "table", ["touch"], kind="tabletop")
    known = caveats.find_demonstrated(config_of(tmp_path), ["table"])
    assert (known.skills, known.are_own) == (set(), False)


def test_without_settings_the_instructions_decide_after_the_episodes(tmp_path):
    """As with the public conversions, which were not recorded by the experts."""
    write_dataset(tmp_path, "libero_goal", [])
    known = caveats.find_demonstrated(config_of(tmp_path), ["libero_goal"])
    episodes = plan("libero_goal", skills=("goal/0", "goal/1"), episodes=2)
    (note,) = caveats.sentences(LIBERO, episodes, known)
    assert note.startswith("Unknown which of these tasks were demonstrated (libero_goal does not")
    rows = [
        {
            "split": e.split,
            "skill": e.skill,
            "instruction": {"goal/0": "open it"}.get(e.skill, "no"),
        }
        for e in episodes
    ]
    assert caveats.compare_instructions(known, rows, ()) == known
    crashed = [*rows, {"split": "train", "skill": "goal/2"}]
    assert caveats.compare_instructions(known, crashed, ["Open it"]) == known
    after = caveats.compare_instructions(known, rows, ["Open  it"])
    (note,) = caveats.sentences(LIBERO, episodes, after)
    assert note.startswith("Not demonstrated, by the instructions of the training's datasets: goal")
    assert after.missing(["goal/0", "goal/1"]) == {"goal/1"}


def test_a_run_without_its_datasets_says_that_its_demonstrators_are_unknown(tmp_path):
    known = caveats.find_demonstrated(config_of(tmp_path / "gone", **{"goal/0": 1}), ["table"])
    assert known.others == f"table is not in {tmp_path / 'gone'}"
    (note,) = caveats.sentences(LIBERO, plan("libero_goal", skills=("goal/0",)), known)
    assert "unknown here" in note
    assert "not comparable" in note


@pytest.mark.parametrize(("skill", "notes"), [("goal/7", 1), ("goal/6", 0)])
def test_an_odd_task_is_named_where_it_is_planned(skill, notes):
    known = Demonstrated(frozenset({skill}), are_own=False)
    odd = plan("libero_goal_task", skills=(skill,))
    assert len(caveats.sentences(LIBERO, odd, known)) == notes
    assert caveats.sentences(LIBERO, plan("libero_goal", skills=(skill,)), known) == []
