"""Rates and intervals, suites, and closed-loop episodes with a fake policy and environment."""

import dataclasses
import functools
import json
import types

import numpy as np
import policy_fakes
import pytest
from rollout_fakes import Counterfactual, CrashesAlways, CrashesOnce, DiesOnce, Walk, make

from octolike.config import CollectConfig, Component, Config, ConfigError, EvaluateConfig
from octolike.envs.pool import EnvPool
from octolike.evaluation import closed_loop, evaluate, rollouts, success, suites
from octolike.evaluation.evaluate import DemonstratedEpisode
from octolike.evaluation.rollouts import ResultsFile
from octolike.evaluation.success import (
    SuccessRate,
    generalization_gaps,
    rate_difference,
    wilson_interval,
)
from octolike.evaluation.suites import EpisodePlan, Suite

A, H = 2, 3


# Rates


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_equals_the_published_table(successes, episodes, low, high):
    assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=5e-5)


def test_newcombe_equals_the_published_table():
    # Newcombe 1998, Statistics in Medicine 17:873, table II (a), method 10: 56/70 - 48/80
    assert rate_difference(SuccessRate(56, 70), SuccessRate(48, 80)) == pytest.approx(
        (0.2, 0.0524, 0.3339), abs=5e-5
    )


def test_impossible_counts_are_rejected():
    with pytest.raises(ValueError, match="3 successes of 2 episodes"):
        wilson_interval(3, 2)


def rows(policy, split, skill, outcomes, failure="time ran out"):
    return [
        {
            "policy": policy,
            "split": split,
            "skill": skill,
            "seed": i,
            "success": ok,
            "failure": "" if ok else failure,
            "steps": 5,
        }
        for i, ok in enumerate(outcomes)
    ]


def test_rates_exclude_crashed_episodes():
    mixed = rows("trained", "train", "touch", [True, False, None, True])
    rate = success.success_rate(mixed)
    assert rate == SuccessRate(2, 3, crashed=1)
    assert success.failure_counts(mixed) == {"time ran out": 1}
    assert success.rate_table(mixed)["trained"]["train"]["all"] == rate


@pytest.mark.parametrize(
    ("seen", "held_out", "floor", "sentence"),
    [
        ([1] * 45 + [0] * 5, [1] * 5 + [0] * 45, [0] * 50, "suggests memorising"),
        ([1] * 45 + [0] * 5, [1] * 30 + [0] * 20, [0] * 50, "a significant loss"),
        ([1] * 45 + [0] * 5, [1] * 44 + [0] * 6, [0] * 50, "no significant gap"),
        ([1] * 20 + [0] * 30, [1] * 45 + [0] * 5, [0] * 50, "succeed more often"),
        ([1] * 3 + [0] * 47, [0] * 50, [1] * 3 + [0] * 47, "the gap is not informative"),
    ],
)
def test_gaps_are_interpreted(seen, held_out, floor, sentence):
    split = "held_out_combination"
    all_rows = rows("trained", "train", "touch", map(bool, seen))
    all_rows += rows("trained", split, "touch", map(bool, held_out))
    all_rows += rows("untrained", "train", "touch", map(bool, floor))
    # a skill that only one of the splits has must not count
    all_rows += rows("trained", "train", "stack", [False] * 50)
    (gap,) = generalization_gaps(all_rows)
    assert gap.skills == ("touch",)
    assert gap.seen == SuccessRate(sum(seen), 50)
    assert sentence in gap.sentence


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        ("counterfactual", "the scene, not the instruction, decides"),
        ("distractors", "recognises whole scenes"),
    ],
)
def test_gaps_of_scene_splits_have_their_own_interpretation(split, sentence):
    (gap,) = generalization_gaps(
        rows("trained", "train", "touch", [True] * 45 + [False] * 5)
        + rows("trained", split, "touch", [True] * 5 + [False] * 45)
    )
    assert sentence in gap.sentence
    assert gap.to_json()["low"] > 0


@pytest.mark.parametrize(
    ("held_out", "sentence"),
    [(5, "suggests memorising"), (30, "a significant loss"), (44, "no significant gap")],
)
def test_tasks_without_demonstrations_are_compared_with_all_seen_tasks(held_out, sentence):
    """As in Meta-World's ML10, the splits share no task."""
    outcomes = lambda n: [True] * n + [False] * (50 - n)
    all_rows = rows("trained", "train", "reach", outcomes(48))
    all_rows += rows("trained", "train", "push", outcomes(42))
    all_rows += rows("trained", "held_out_task", "sweep", outcomes(held_out))
    all_rows += rows("untrained", "train", "reach", outcomes(1))
    all_rows += rows("untrained", "train", "push", outcomes(1))
    (gap,) = generalization_gaps(all_rows)
    assert gap.skills == ("reach", "push", "sweep")
    assert (gap.seen, gap.held_out) == (SuccessRate(90, 100), SuccessRate(held_out, 50))
    assert gap.sentence.startswith(f"90% on seen tasks, {held_out / 50:.0%} on “held-out task”")
    assert sentence in gap.sentence
    assert "all seen tasks (2 tasks) with all held-out ones (1 task)" in gap.sentence
    assert success.verdicts(all_rows) == [gap.sentence]


def test_tasks_without_demonstrations_and_without_seen_tasks_have_no_gap():
    all_rows = rows("trained", "held_out_task", "sweep", [True] * 5)
    assert generalization_gaps(all_rows) == []
    assert "cannot answer" in success.verdicts(all_rows)[0]


@pytest.mark.parametrize(
    ("asked", "instead", "sentence"),
    [
        (30, 5, "behaviour follows the instruction"),
        (5, 30, "it repeats the task memorised for the scene"),
        (15, 15, "this does not show that the instruction decides"),
        (0, 0, "this does not show that the instruction decides"),
    ],
)
def test_instruction_following_is_interpreted(asked, instead, sentence):
    outcomes = [i < asked for i in range(50)]
    counterfactual = rows("trained", "counterfactual", "touch", [*outcomes, None])
    for i, row in enumerate(counterfactual):
        row["instead"] = asked <= i < asked + instead
    following = success.instruction_following(counterfactual)
    assert (following.instructed, following.original) == (
        SuccessRate(asked, 50, 1),
        SuccessRate(instead, 50, 1),
    )
    assert sentence in following.sentence
    assert success.verdicts(counterfactual) == [following.sentence]
    assert success.instruction_following(rows("trained", "train", "touch", [True])) is None


def test_every_evaluation_has_a_verdict_on_memorising():
    (sentence,) = success.verdicts(rows("trained", "train", "touch", [True, False]))
    assert "cannot answer" in sentence


def test_steps_to_success_count_successful_episodes_only():
    mixed = rows("trained", "train", "touch", [True, True, False, None])
    for row, steps in zip(mixed, (4, 7, 99, 99), strict=True):
        row["steps"] = steps
    assert success.steps_to_success(mixed, skill="touch") == 5.5
    assert success.steps_to_success(mixed, skill="push") is None


# Suites


def test_a_plan_repeats_pairs_of_split_and_skill_and_omits_empty_ones():
    plan = Suite("tabletop", "", ("train", "held_out_family"), ("touch", "lift"), 2, seed=7).plan()
    pairs = [("train", "touch"), ("train", "lift"), ("held_out_family", "lift")]
    assert plan == [EpisodePlan(*pair, seed) for seed in (7, 8) for pair in pairs]
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


def test_caveats_name_splits_that_contradict_the_demonstrations():
    collect = CollectConfig(skills={"touch": 3, "lift": 3})
    table = suites.suite_by_name("tabletop", {"kind": "tabletop"})
    (note,) = suites.caveats(table.plan(), collect)
    assert "no demonstrations of push, put, stack: unless" in note
    known = dataclasses.replace(table, skills=("touch", "lift"))
    assert suites.caveats(known.plan(), collect) == []
    collect.split = "held_out_family"
    assert "of the split 'held_out_family'" in suites.caveats(known.plan(), collect)[0]
    early = dataclasses.replace(known, seed=5).plan()
    assert "Seeds below 1,000,000" in suites.caveats(early, collect)[1]
    ml10 = suites.suite_by_name("metaworld_ml10", {"kind": "metaworld"})
    collect = CollectConfig(skills=dict.fromkeys((*ml10.skills, "drawer-open"), 1))
    assert "the held-out tasks: drawer-open." in suites.caveats(ml10.plan(), collect)[0]


def test_suites_come_from_a_name_or_a_config():
    with pytest.raises(ConfigError, match="unknown suite: 'tabletop_quik'; did you mean"):
        suites.suite_by_name("tabletop_quik", {"kind": "tabletop"})
    config = EvaluateConfig(episodes=3, splits=("train",))
    plan = suites.suite_from_config({"kind": "tabletop"}, config, ["push"]).plan()
    assert plan == [EpisodePlan("train", "push", config.seed + i) for i in range(3)]


# Rollouts


class Forward:
    """A fake policy; its actions depend on observation, task, seed, and the row of the batch."""

    observation_keys, window, horizon = ("proprio",), 2, H
    gripper = (False, True)
    goal_shapes = {"image_extra": (3,)}  # noqa: RUF012

    def __init__(self, batch_size):
        self.batch_size, self.calls, self.conditions = batch_size, 0, []

    def create_task(self, instruction, goal_images, task_id):
        self.conditions.append((instruction, goal_images, task_id))
        return len(instruction or "goal")

    def sample_batch(self, observations, tasks, seeds):
        assert len(observations) == len(tasks) == len(seeds) == self.batch_size
        self.calls += 1
        out = []
        for row, (observation, task, seed) in enumerate(zip(observations, tasks, seeds)):
            assert set(observation) == {"proprio", "timestep_mask"}
            assert observation["proprio"].shape == (2, 1)
            draw = np.random.default_rng([seed, row]).uniform(0, 0.2 * task, (H, A))
            out.append(draw + 0.01 * observation["proprio"][-1])
        return np.stack(out).astype(np.float32)


PLAN = [EpisodePlan("train", skill, seed) for seed in range(6) for skill in ("walk", "run")]
SETUP = {"checkpoint": 1}


def goal_of(env, seed, options):
    return {"image_extra": np.full(3, seed), "image_other": np.zeros(3)}


def roll_out(directory, kind=Walk, workers=0, policy=None, videos=0, conditioning=("language",)):
    results, new_rows = ResultsFile(directory, SETUP, videos), []
    with EnvPool(functools.partial(make, kind), 4, workers) as pool:
        timing = rollouts.run_episodes(
            policy or Forward(4),
            "trained",
            PLAN,
            pool,
            results,
            new_rows.append,
            conditioning,
            goal_of,
        )
    by_episode = {(r["skill"], r["seed"]): r for r in results.rows}
    return by_episode, new_rows, timing


@pytest.mark.parametrize(
    ("conditioning", "expected"),
    [
        (("language",), ("go walk", None, None)),
        (("language", "task_id"), ("go walk", None, "t")),
        (("goal",), (None, {"extra": [0.0, 0.0, 0.0]}, None)),
        ((), (None, None, None)),
    ],
)
def test_the_policy_is_conditioned_as_configured(tmp_path, conditioning, expected):
    policy = Forward(4)
    roll_out(tmp_path, policy=policy, conditioning=conditioning)
    instruction, goals, task_id = policy.conditions[0]
    goals = goals and {k: v.tolist() for k, v in goals.items()}
    assert (instruction, goals, task_id) == expected


def test_results_do_not_depend_on_the_number_of_workers(tmp_path):
    expected, new_rows, timing = roll_out(tmp_path / "one")
    assert len(expected) == len(new_rows) == len(PLAN)
    assert {r["success"] for r in new_rows} == {True, False}
    assert all(r["failure"] == ("" if r["success"] else "time ran out") for r in new_rows)
    assert all(r["return"] == float(r["success"]) for r in new_rows)
    assert sum(r["steps"] for r in new_rows) == timing.environment_steps
    assert expected["run", 3]["instruction"] == "go run"
    assert "environment steps/s" in timing.sentence()
    two, _, _ = roll_out(tmp_path / "two", workers=2)
    assert two == expected


def test_an_interrupted_evaluation_resumes_to_the_same_result(tmp_path):
    expected, _, _ = roll_out(tmp_path / "whole")

    class Killed(Forward):
        def sample_batch(self, *args):
            if self.calls == 6:
                raise KeyboardInterrupt
            return super().sample_batch(*args)

    with pytest.raises(KeyboardInterrupt):
        roll_out(tmp_path / "part", policy=Killed(4))
    path = tmp_path / "part" / "results.jsonl"
    finished = path.read_text().splitlines()[1:]
    assert 0 < len(finished) < len(PLAN)
    path.write_text(path.read_text() + '{"policy": "trai')  # truncated by a kill
    resumed, new_rows, _ = roll_out(tmp_path / "part")
    assert resumed == expected
    assert len(new_rows) == len(PLAN) - len(finished)
    assert len(path.read_text().splitlines()) == 1 + len(PLAN)


def test_rows_of_another_setup_are_moved_to_a_second_file(tmp_path):
    roll_out(tmp_path)
    results = ResultsFile(tmp_path, {"checkpoint": 2})
    assert results.rows == []
    assert len((tmp_path / "results.old.jsonl").read_text().splitlines()) == 1 + len(PLAN)


def test_a_crashed_episode_is_run_again(tmp_path):
    expected, _, _ = roll_out(tmp_path / "sound")
    CrashesOnce.left = 1
    got, _, _ = roll_out(tmp_path / "crash", CrashesOnce)
    assert CrashesOnce.left == 0
    assert got == expected


def test_an_episode_that_always_crashes_is_reported_but_not_a_failure(tmp_path):
    got, _, _ = roll_out(tmp_path, CrashesAlways)
    row = got["walk", 0]
    assert row["success"] is None
    assert row["failure"] == "crashed: ArithmeticError: the physics exploded"
    assert success.success_rate(got.values()).crashed == 1
    again, new_rows, _ = roll_out(tmp_path)  # a later run tries it again, and only it
    assert [r["seed"] for r in new_rows] == [0]
    assert again["walk", 0]["success"] is not None


def test_the_episodes_of_a_killed_worker_are_repeated(tmp_path, monkeypatch):
    """All slots of the worker, with the same results; none counts as a failure."""
    expected, _, _ = roll_out(tmp_path / "sound")
    marker = tmp_path / "died"
    monkeypatch.setenv("DIES_ONCE", str(marker))
    got, new_rows, _ = roll_out(tmp_path / "died once", DiesOnce, workers=2)
    assert marker.exists()
    assert got == expected
    assert len(new_rows) == len(PLAN)


def test_a_row_records_whether_the_original_task_was_done(tmp_path):
    got, _, _ = roll_out(tmp_path, Counterfactual)
    assert {(seed, row["instead"]) for (_, seed), row in got.items()} == {
        (seed, seed % 2 == 0) for seed in range(6)
    }
    assert "instead" not in next(iter(roll_out(tmp_path / "plain")[0].values()))


def test_task_ids_use_the_runs_names(tmp_path):
    policy = Forward(4)
    results = ResultsFile(tmp_path, SETUP)
    with EnvPool(make, 4, 0) as pool:
        name = lambda info: f"robot of {info['instruction']}"
        rollouts.run_episodes(
            policy, "trained", PLAN[:4], pool, results, print, ("task_id",), goal_of, name
        )
    assert {number for _, _, number in policy.conditions} == {"robot of go walk", "robot of go run"}


@pytest.mark.parametrize(
    ("tasks", "name"), [("dataset", "table"), ("label", "touch/cube"), ("instruction", "tap it")]
)
def test_the_task_name_depends_on_the_definition_of_tasks(tasks, name):
    config = Config()
    config.data.tasks = tasks
    policy = types.SimpleNamespace(embodiment=types.SimpleNamespace(datasets=("table",)))
    info = {"task": "touch/cube", "instruction": "tap it"}
    assert evaluate.task_name_function(config, policy)(info) == name


def test_videos_replay_the_episode(tmp_path):
    got, _, _ = roll_out(tmp_path, videos=1)
    stored = [r for r in got.values() if r["actions"]]
    assert sorted((r["skill"], r["success"]) for r in stored) == sorted(
        {(r["skill"], r["success"]) for r in got.values()}
    )
    with EnvPool(make, 2, workers=0) as pool:
        videos = list(rollouts.render_episodes(pool, stored, tmp_path))
        assert [len(images) for images in videos] == [r["steps"] + 1 for r in stored]


def test_a_video_that_differs_from_its_row_is_replaced_by_a_sentence(tmp_path):
    got, _, _ = roll_out(tmp_path, videos=1)
    good = next(r for r in got.values() if r["actions"])
    wrong_rows = [{**good, "success": not good["success"]}, {**good, "steps": good["steps"] + 1}]
    with EnvPool(make, 2, workers=0) as pool:
        first, *middle, last = rollouts.render_episodes(pool, [*wrong_rows, good], tmp_path)
    for text in (first, *middle):
        assert text.startswith(
            f"No video of {good['skill']}, train, seed {good['seed']}: the simul"
        )
        assert "not deterministic" in text
    assert len(last) == good["steps"] + 1


def test_a_video_with_a_crash_is_replaced_by_a_sentence(tmp_path):
    got, _, _ = roll_out(tmp_path, videos=9)
    row = got["walk", 0]
    assert row["steps"] >= 3
    with EnvPool(functools.partial(make, CrashesAlways), 2, workers=0) as pool:
        (text,) = rollouts.render_episodes(pool, [row], tmp_path)
    assert text.endswith("its replay crashed: ArithmeticError: the physics exploded.")


def test_a_missing_video_becomes_a_remark(tmp_path, monkeypatch):
    simulated_run(tmp_path)
    evaluation = evaluate.Evaluation(tmp_path)
    rows = [
        {"policy": "trained", "actions": "x", **dataclasses.asdict(e)} for e in evaluation.plan[:2]
    ]
    monkeypatch.setattr(evaluate.Evaluation, "rows", rows)
    monkeypatch.setattr(
        rollouts, "render_episodes", lambda *_: iter([["picture"], "No video of touch."])
    )
    assert [c.row for c in evaluation._render_clips(None)] == rows[:1]
    assert evaluation._remarks == ["No video of touch."]


def test_a_wrong_batch_size_or_chunk_length_is_rejected(tmp_path):
    results = ResultsFile(tmp_path, SETUP)
    with EnvPool(make, 4, 0) as pool, pytest.raises(ValueError, match="size is 2, the pool has 4"):
        rollouts.run_episodes(Forward(2), "trained", PLAN, pool, results, print)
    with pytest.raises(ValueError, match="execute is 4; the policy predicts 3"):
        rollouts.env_maker(Forward(1), {"kind": "tabletop"}, 4, 0.0)


@pytest.mark.parametrize(
    ("actions", "camera", "match"),
    [
        ((7,), "proprio", r"\(arm\) have 2 dimensions, the environment expects \[7\]"),
        ((2,), "image_a", "does not provide proprio, .*; it provides image_a"),
        ((2,), "proprio", r"proprio \(arm\) has 3 dimensions, the environment provides \[1\]"),
    ],
)
def test_an_environment_that_does_not_fit_is_rejected(actions, camera, match):
    policy, env = Forward(1), Walk()
    policy.embodiment = types.SimpleNamespace(
        name="arm",
        action=types.SimpleNamespace(names=("x", "y")),
        proprio=types.SimpleNamespace(names=("x", "y", "z")),
    )
    env.action_space = types.SimpleNamespace(shape=actions)
    shapes = {camera: types.SimpleNamespace(shape=(1,))}
    env.observation_space = types.SimpleNamespace(spaces=shapes)
    with EnvPool(lambda: env, 1, 0) as pool, pytest.raises(ValueError, match=match):
        rollouts.check_fit(policy, pool)


def test_results_are_json_lines(tmp_path):
    roll_out(tmp_path)
    head, *lines = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert head == {"setup": SETUP}
    assert set(lines[0]) == {
        *("policy", "split", "skill", "seed", "task", "instruction"),
        *("success", "failure", "steps", "return", "actions"),
    }
    assert dataclasses.astuple(EpisodePlan("train", "walk", 0)) == ("train", "walk", 0)


# A whole evaluation


def test_learning_curves_are_read_from_the_metrics(tmp_path):
    rows = [
        {"step": 1, "seconds": 2.0, "loss": 3.0, "loss/table": 3.5},
        {
            "step": 1,
            "seconds": 3.0,
            "validation/table/loss": 4.0,
            "validation/table/action_error": 5,
        },
        {"step": 2, "seconds": 4.5, "loss": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    curves = evaluate.read_curves(tmp_path)
    assert curves.train == [(1, 3.0), (2, 2.0)]
    assert (curves.validation, curves.action_error) == ({"table": [(1, 4.0)]}, {"table": [(1, 5)]})
    assert curves.seconds == 4.5
    assert evaluate.read_curves(tmp_path / "none").seconds is None


def simulated_run(directory):
    run = policy_fakes.run_of()
    run.config.environment = Component(kind="tabletop", primary_size=policy_fakes.SIDE)
    run.config.collect.skills, run.config.collect.dataset = {"touch": 1, "push": 1}, "arm"
    settings = run.config.evaluate
    settings.episodes, settings.batch, settings.execute, settings.videos = 2, 2, 3, 1
    return policy_fakes.save_run(directory, run)


def test_a_run_is_evaluated_and_reported(tmp_path):
    """Everything except the demonstrations, in the simulator in worker processes."""
    pytest.importorskip("mujoco")
    simulated_run(tmp_path)
    evaluation = evaluate.Evaluation(tmp_path, overrides={"skills": ("touch",)})
    evaluation.run()
    rows = evaluation.rows
    assert [(r["policy"], r["skill"]) for r in rows] == [("trained", "touch")] * 2 + [
        ("untrained", "touch")
    ] * 2
    assert all(r["success"] is not None for r in rows)
    proprio = np.zeros((5, policy_fakes.P), np.float32)
    images = np.zeros((5, 20, 20, 3), np.uint8)
    demonstration = DemonstratedEpisode(
        {"image_primary": images, "proprio": proprio}, proprio, "touch it"
    )
    chunks = evaluation.predict_chunks([demonstration, demonstration], samples=3)
    assert chunks.predicted.shape == (2, 3, policy_fakes.H, policy_fakes.A)
    assert chunks.mask[:, 0].all()
    assert not chunks.mask[1, -1].any()  # past the demonstration's end
    page = evaluation.report(chunks)
    assert page == tmp_path / "report.html"
    assert list((tmp_path / "evaluation").glob("*.gif"))
    again = evaluate.Evaluation(tmp_path, overrides={"skills": ("touch",)})
    assert again.rows == rows  # nothing is left to run


def test_a_run_without_a_simulator_is_rejected(tmp_path):
    policy_fakes.save_run(tmp_path, policy_fakes.run_of())
    with pytest.raises(ConfigError, match="names no simulator"):
        evaluate.Evaluation(tmp_path)


def test_several_robots_are_evaluated_one_by_one(tmp_path):
    robots = [policy_fakes.robot(n) for n in ("tabletop", "tabletop_mirrored")]
    run = policy_fakes.run_of(robots)
    run.config.environment = Component(kind="tabletop", primary_size=policy_fakes.SIDE)
    run.config.collect.skills, run.config.evaluate.embodiment = {"touch": 1}, "all"
    policy_fakes.save_run(tmp_path, run)
    assert evaluate.robots_to_evaluate(tmp_path) == (["tabletop", "tabletop_mirrored"], [])
    assert evaluate.robots_to_evaluate(tmp_path, "tabletop") == (["tabletop"], [])
    # loading a missing run reports the error
    assert evaluate.robots_to_evaluate(tmp_path / "nowhere", "all") == (["all"], [])
    for robot, convention in (("tabletop", None), ("tabletop_mirrored", "mirrored")):
        evaluation = evaluate.Evaluation(tmp_path, embodiment=robot)
        assert evaluation.results.directory == tmp_path / "evaluation" / robot
        assert evaluation.environment.get("action_convention") == convention
        assert evaluation.setup["environment"] == evaluation.environment
    with pytest.raises(ValueError, match=r"tabletop_mirrored"):
        evaluate.Evaluation(tmp_path, embodiment="tabletop_miror")


def test_an_unsupported_robot_is_skipped_in_all_and_rejected_alone(tmp_path):
    run = policy_fakes.run_of([policy_fakes.robot(n) for n in ("bridge_dataset", "tabletop")])
    run.config.environment = Component(kind="tabletop", primary_size=policy_fakes.SIDE)
    run.config.collect.skills = {"touch": 1}
    policy_fakes.save_run(tmp_path, run)
    supported, (reason,) = evaluate.robots_to_evaluate(tmp_path, "all")
    assert supported == ["tabletop"]
    assert "'tabletop' can be tabletop, tabletop_target, " in reason
    assert "not the robot 'bridge_dataset', whose actions differ in meaning" in reason
    with pytest.raises(ConfigError, match="not the robot 'bridge_dataset'"):
        evaluate.Evaluation(tmp_path, embodiment="bridge_dataset")
    run.config.evaluate.embodiment = "bridge_dataset"
    with pytest.raises(ConfigError, match="not the robot 'bridge_dataset'"):
        closed_loop.ClosedLoop(run.config, run.embodiments, run.spec, run.names)


def test_all_is_rejected_if_the_simulator_supports_no_robot(tmp_path):
    run = policy_fakes.run_of([policy_fakes.robot(n) for n in ("kuka", "bridge_dataset")])
    run.config.environment = Component(kind="tabletop", primary_size=policy_fakes.SIDE)
    policy_fakes.save_run(tmp_path, run)
    with pytest.raises(ConfigError, match="not the robot 'kuka'"):
        evaluate.robots_to_evaluate(tmp_path, "all")


def closed_loop_run(**changes):
    run = policy_fakes.run_of()
    run.config.environment = Component(kind="tabletop", primary_size=policy_fakes.SIDE)
    run.config.collect.skills, run.config.collect.dataset = {"touch": 1, "push": 1}, "arm"
    return dataclasses.replace(run, **changes)


def test_success_is_measured_during_training(tmp_path):
    pytest.importorskip("mujoco")
    run = closed_loop_run()
    run.config.workdir, run.config.data.tasks = str(tmp_path), "label"
    run.config.evaluate.workers, run.config.evaluate.execute = 1, 3
    measure = closed_loop.ClosedLoop(run.config, run.embodiments, run.spec, run.names, episodes=1)
    try:
        rates = measure(run.params, 10)
        assert {"touch", "push"} <= set(rates)
        assert any(name.startswith("push/") for name in rates)  # the run's own name of its task
        assert set(rates.values()) <= {0.0, 1.0}
    finally:
        measure.close()
    path = tmp_path / "closed_loop" / "00000010" / "results.jsonl"
    text = path.read_text()
    assert f'"seed": {closed_loop.FIRST_SEED}' in text
    try:
        assert measure(run.params, 10) == rates  # a resumed run reads what it has measured
        assert path.read_text() == text
    finally:
        measure.close()


def test_success_during_training_needs_a_single_robot():
    robots = [policy_fakes.robot(n) for n in ("left", "right")]
    names = policy_fakes.RUN_NAMES._replace(embodiments=("left", "right"))
    run = closed_loop_run(embodiments=robots, names=names)
    with pytest.raises(ConfigError, match=r"left, right; choose one in evaluate\.embodiment"):
        closed_loop.ClosedLoop(run.config, run.embodiments, run.spec, run.names)
