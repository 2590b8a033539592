"""Rates and intervals, suites, and closed-loop episodes with a stand-in policy and environment."""

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
from octolike.evaluation.success import SuccessRate, difference, gaps, wilson
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
    assert wilson(successes, episodes) == pytest.approx((low, high), abs=5e-5)


def test_newcombe_equals_the_published_table():
    # Newcombe 1998, Statistics in Medicine 17:873, table II (a), method 10: 56/70 - 48/80
    assert difference(SuccessRate(56, 70), SuccessRate(48, 80)) == pytest.approx(
        (0.2, 0.0524, 0.3339), abs=5e-5
    )


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="3 successes of 2 episodes"):
        wilson(3, 2)


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


def test_crashed_episodes_are_in_no_rate():
    mixed = rows("trained", "train", "touch", [True, False, None, True])
    rate = success.count(mixed)
    assert rate == SuccessRate(2, 3, crashed=1)
    assert success.failures(mixed) == {"time ran out": 1}
    assert success.table(mixed)["trained"]["train"]["all"] == rate


@pytest.mark.parametrize(
    ("seen", "held_out", "floor", "says"),
    [
        ([1] * 45 + [0] * 5, [1] * 5 + [0] * 45, [0] * 50, "signals memorising"),
        ([1] * 45 + [0] * 5, [1] * 30 + [0] * 20, [0] * 50, "a real loss"),
        ([1] * 45 + [0] * 5, [1] * 44 + [0] * 6, [0] * 50, "no gap beyond chance"),
        ([1] * 20 + [0] * 30, [1] * 45 + [0] * 5, [0] * 50, "went better"),
        ([1] * 3 + [0] * 47, [0] * 50, [1] * 3 + [0] * 47, "the gap says nothing"),
    ],
)
def test_the_gap_is_put_into_words(seen, held_out, floor, says):
    split = "held_out_combination"
    all_rows = rows("trained", "train", "touch", map(bool, seen))
    all_rows += rows("trained", split, "touch", map(bool, held_out))
    all_rows += rows("untrained", "train", "touch", map(bool, floor))
    # a skill that only one of the splits has must not count
    all_rows += rows("trained", "train", "stack", [False] * 50)
    (gap,) = gaps(all_rows)
    assert gap.skills == ("touch",)
    assert gap.seen == SuccessRate(sum(seen), 50)
    assert says in gap.sentence


@pytest.mark.parametrize(
    ("split", "says"),
    [("counterfactual", "the table decides"), ("distractors", "how tables look")],
)
def test_a_gap_on_other_scenes_is_named_for_what_it_is(split, says):
    (gap,) = gaps(
        rows("trained", "train", "touch", [True] * 45 + [False] * 5)
        + rows("trained", split, "touch", [True] * 5 + [False] * 45)
    )
    assert says in gap.sentence
    assert gap.to_json()["low"] > 0


@pytest.mark.parametrize(
    ("held_out", "says"),
    [(5, "signals memorising"), (30, "a real loss"), (44, "no gap beyond chance")],
)
def test_tasks_never_demonstrated_are_compared_with_all_seen_ones(held_out, says):
    """As Meta-World's ML10 has them: the splits have no task in common."""
    outcomes = lambda n: [True] * n + [False] * (50 - n)
    all_rows = rows("trained", "train", "reach", outcomes(48))
    all_rows += rows("trained", "train", "push", outcomes(42))
    all_rows += rows("trained", "held_out_task", "sweep", outcomes(held_out))
    all_rows += rows("untrained", "train", "reach", outcomes(1))
    all_rows += rows("untrained", "train", "push", outcomes(1))
    (gap,) = gaps(all_rows)
    assert gap.skills == ("reach", "push", "sweep")
    assert (gap.seen, gap.held_out) == (SuccessRate(90, 100), SuccessRate(held_out, 50))
    assert gap.sentence.startswith(f"90% on seen tasks, {held_out / 50:.0%} on held-out task")
    assert says in gap.sentence
    assert "all seen tasks with all held-out ones, 2 tasks against 1 task" in gap.sentence
    assert success.verdict(all_rows) == [gap.sentence]


def test_tasks_never_demonstrated_without_seen_ones_say_nothing():
    all_rows = rows("trained", "held_out_task", "sweep", [True] * 5)
    assert gaps(all_rows) == []
    assert "cannot say" in success.verdict(all_rows)[0]


@pytest.mark.parametrize(
    ("asked", "instead", "says"),
    [
        (30, 5, "behaviour follows the instruction"),
        (5, 30, "it does what it has memorised for such a table"),
        (15, 15, "this does not show that the instruction decides"),
        (0, 0, "this does not show that the instruction decides"),
    ],
)
def test_following_the_instruction_is_put_into_words(asked, instead, says):
    outcomes = [i < asked for i in range(50)]
    told = rows("trained", "counterfactual", "touch", [*outcomes, None])
    for i, row in enumerate(told):
        row["instead"] = asked <= i < asked + instead
    found = success.following(told)
    assert (found.asked, found.instead) == (SuccessRate(asked, 50, 1), SuccessRate(instead, 50, 1))
    assert says in found.sentence
    assert success.verdict(told) == [found.sentence]
    assert success.following(rows("trained", "train", "touch", [True])) is None


def test_an_evaluation_always_says_something_of_memorising():
    (sentence,) = success.verdict(rows("trained", "train", "touch", [True, False]))
    assert "cannot say" in sentence


def test_steps_to_success_are_of_successes_alone():
    mixed = rows("trained", "train", "touch", [True, True, False, None])
    for row, steps in zip(mixed, (4, 7, 99, 99), strict=True):
        row["steps"] = steps
    assert success.steps_to_success(mixed, skill="touch") == 5.5
    assert success.steps_to_success(mixed, skill="push") is None


# Suites


def test_a_plan_is_paired_and_leaves_out_what_does_not_exist():
    plan = Suite("tabletop", "", ("train", "held_out_family"), ("touch", "lift"), 2, seed=7).plan()
    pairs = [("train", "touch"), ("train", "lift"), ("held_out_family", "lift")]
    assert plan == [EpisodePlan(*pair, seed) for seed in (7, 8) for pair in pairs]
    assert plan[0].options == {"split": "train", "skills": ["touch"]}


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_suite_makes_a_plan(name):
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
def test_bad_suites_are_refused(suite, match):
    with pytest.raises(ConfigError, match=match):
        suite.plan()


def test_what_was_not_demonstrated_is_not_passed_off_as_seen():
    collect = CollectConfig(skills={"touch": 3, "lift": 3})
    table = suites.named("tabletop", {"kind": "tabletop"})
    (note,) = suites.caveats(table.plan(), collect)
    assert "no demonstrations of push, put, stack: unless" in note
    known = dataclasses.replace(table, skills=("touch", "lift"))
    assert suites.caveats(known.plan(), collect) == []
    collect.split = "held_out_family"
    assert "of the split 'held_out_family'" in suites.caveats(known.plan(), collect)[0]
    early = dataclasses.replace(known, seed=5).plan()
    assert "Seeds below 1,000,000" in suites.caveats(early, collect)[1]
    ml10 = suites.named("metaworld_ml10", {"kind": "metaworld"})
    mine = CollectConfig(skills=dict.fromkeys((*ml10.skills, "drawer-open"), 1))
    assert "the held-out tasks: drawer-open." in suites.caveats(ml10.plan(), mine)[0]


def test_suites_by_name_and_from_a_config():
    with pytest.raises(ConfigError, match="unknown suite: 'tabletop_quik'; did you mean"):
        suites.named("tabletop_quik", {"kind": "tabletop"})
    config = EvaluateConfig(episodes=3, splits=("train",))
    plan = suites.from_config({"kind": "tabletop"}, config, ["push"]).plan()
    assert plan == [EpisodePlan("train", "push", config.seed + i) for i in range(3)]


# Rollouts


class Forward:
    """A policy whose actions depend on observation, task, seed and, were it asked wrongly, row."""

    observation_keys, window, horizon = ("proprio",), 2, H
    gripper = (False, True)
    goal_shapes = {"image_extra": (3,)}  # noqa: RUF012

    def __init__(self, batch_size):
        self.batch_size, self.calls, self.told = batch_size, 0, []

    def create_task(self, instruction, goal_images, task_id):
        self.told.append((instruction, goal_images, task_id))
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


def roll_out(directory, kind=Walk, workers=0, policy=None, videos=0, tell=("language",)):
    results, seen = ResultsFile(directory, SETUP, videos), []
    with EnvPool(functools.partial(make, kind), 4, workers) as pool:
        timing = rollouts.run(
            policy or Forward(4), "trained", PLAN, pool, results, seen.append, tell, goal_of
        )
    by_episode = {(r["skill"], r["seed"]): r for r in results.rows}
    return by_episode, seen, timing


@pytest.mark.parametrize(
    ("tell", "told"),
    [
        (("language",), ("go walk", None, None)),
        (("language", "task_id"), ("go walk", None, "t")),
        (("goal",), (None, {"extra": [0.0, 0.0, 0.0]}, None)),
        ((), (None, None, None)),
    ],
)
def test_the_policy_is_told_its_task_as_asked(tmp_path, tell, told):
    policy = Forward(4)
    roll_out(tmp_path, policy=policy, tell=tell)
    instruction, goals, task_id = policy.told[0]
    goals = goals and {k: v.tolist() for k, v in goals.items()}
    assert (instruction, goals, task_id) == told


def test_episodes_become_rows_whatever_the_workers(tmp_path):
    expected, seen, timing = roll_out(tmp_path / "one")
    assert len(expected) == len(seen) == len(PLAN)
    assert {r["success"] for r in seen} == {True, False}
    assert all(r["failure"] == ("" if r["success"] else "time ran out") for r in seen)
    assert all(r["return"] == float(r["success"]) for r in seen)
    assert sum(r["steps"] for r in seen) == timing.environment_steps
    assert expected["run", 3]["instruction"] == "go run"
    assert "environment steps/s" in timing.sentence()
    two, _, _ = roll_out(tmp_path / "two", workers=2)
    assert two == expected


def test_an_interrupted_evaluation_goes_on_to_the_same_result(tmp_path):
    expected, _, _ = roll_out(tmp_path / "whole")

    class Killed(Forward):
        def sample_batch(self, *args):
            if self.calls == 6:
                raise KeyboardInterrupt
            return super().sample_batch(*args)

    with pytest.raises(KeyboardInterrupt):
        roll_out(tmp_path / "part", policy=Killed(4))
    path = tmp_path / "part" / "results.jsonl"
    kept = path.read_text().splitlines()[1:]
    assert 0 < len(kept) < len(PLAN)
    path.write_text(path.read_text() + '{"policy": "trai')  # killed while writing
    resumed, seen, _ = roll_out(tmp_path / "part")
    assert resumed == expected
    assert len(seen) == len(PLAN) - len(kept)
    assert len(path.read_text().splitlines()) == 1 + len(PLAN)


def test_rows_of_another_setup_are_put_aside(tmp_path):
    roll_out(tmp_path)
    other = ResultsFile(tmp_path, {"checkpoint": 2})
    assert other.rows == []
    assert len((tmp_path / "results.old.jsonl").read_text().splitlines()) == 1 + len(PLAN)


def test_a_crashed_episode_is_run_again(tmp_path):
    expected, _, _ = roll_out(tmp_path / "sound")
    CrashesOnce.left = 1
    got, _, _ = roll_out(tmp_path / "crash", CrashesOnce)
    assert CrashesOnce.left == 0
    assert got == expected


def test_an_episode_that_always_crashes_is_reported_not_counted_as_failure(tmp_path):
    got, _, _ = roll_out(tmp_path, CrashesAlways)
    row = got["walk", 0]
    assert row["success"] is None
    assert row["failure"] == "crashed: ArithmeticError: the physics exploded"
    assert success.count(got.values()).crashed == 1
    again, seen, _ = roll_out(tmp_path)  # a later run tries it again, and only it
    assert [r["seed"] for r in seen] == [0]
    assert again["walk", 0]["success"] is not None


def test_a_worker_that_dies_has_its_episodes_run_again(tmp_path, monkeypatch):
    """Those of all its slots, with the same results; none is counted as a failure."""
    expected, _, _ = roll_out(tmp_path / "sound")
    marker = tmp_path / "died"
    monkeypatch.setenv("DIES_ONCE", str(marker))
    got, seen, _ = roll_out(tmp_path / "died once", DiesOnce, workers=2)
    assert marker.exists()
    assert got == expected
    assert len(seen) == len(PLAN)


def test_a_row_says_whether_another_task_was_done(tmp_path):
    got, _, _ = roll_out(tmp_path, Counterfactual)
    assert {(seed, row["instead"]) for (_, seed), row in got.items()} == {
        (seed, seed % 2 == 0) for seed in range(6)
    }
    assert "instead" not in next(iter(roll_out(tmp_path / "plain")[0].values()))


def test_the_task_is_named_as_the_run_knows_it(tmp_path):
    policy = Forward(4)
    results = ResultsFile(tmp_path, SETUP)
    with EnvPool(make, 4, 0) as pool:
        name = lambda info: f"robot of {info['instruction']}"
        rollouts.run(policy, "trained", PLAN[:4], pool, results, print, ("task_id",), goal_of, name)
    assert {number for _, _, number in policy.told} == {"robot of go walk", "robot of go run"}


@pytest.mark.parametrize(
    ("tasks", "name"), [("dataset", "table"), ("label", "touch/cube"), ("instruction", "tap it")]
)
def test_what_counts_as_a_task_is_what_the_policy_is_told(tasks, name):
    config = Config()
    config.data.tasks = tasks
    policy = types.SimpleNamespace(embodiment=types.SimpleNamespace(datasets=("table",)))
    info = {"task": "touch/cube", "instruction": "tap it"}
    assert evaluate.task_namer(config, policy)(info) == name


def test_films_repeat_the_episode(tmp_path):
    got, _, _ = roll_out(tmp_path, videos=1)
    kept = [r for r in got.values() if r["actions"]]
    assert sorted((r["skill"], r["success"]) for r in kept) == sorted(
        {(r["skill"], r["success"]) for r in got.values()}
    )
    with EnvPool(make, 2, workers=0) as pool:
        films = list(rollouts.film(pool, kept, tmp_path))
        assert [len(pictures) for pictures in films] == [r["steps"] + 1 for r in kept]


def test_a_film_that_shows_something_else_is_left_out_and_named(tmp_path):
    got, _, _ = roll_out(tmp_path, videos=1)
    good = next(r for r in got.values() if r["actions"])
    other = [{**good, "success": not good["success"]}, {**good, "steps": good["steps"] + 1}]
    with EnvPool(make, 2, workers=0) as pool:
        first, *rest, last = rollouts.film(pool, [*other, good], tmp_path)
    for said in (first, *rest):
        assert said.startswith(f"No film of {good['skill']}, train, seed {good['seed']}: the simul")
        assert "did not repeat the episode" in said
    assert len(last) == good["steps"] + 1


def test_a_film_whose_episode_crashes_is_left_out_and_named(tmp_path):
    got, _, _ = roll_out(tmp_path, videos=9)
    row = got["walk", 0]
    assert row["steps"] >= 3
    with EnvPool(functools.partial(make, CrashesAlways), 2, workers=0) as pool:
        (said,) = rollouts.film(pool, [row], tmp_path)
    assert said.endswith("played again it crashed: ArithmeticError: the physics exploded.")


def test_the_report_goes_on_without_a_film_and_says_so(tmp_path, monkeypatch):
    simulated_run(tmp_path)
    evaluation = evaluate.Evaluation(tmp_path)
    rows = [
        {"policy": "trained", "actions": "x", **dataclasses.asdict(e)} for e in evaluation.plan[:2]
    ]
    monkeypatch.setattr(evaluate.Evaluation, "rows", rows)
    monkeypatch.setattr(rollouts, "film", lambda *_: iter([["picture"], "No film of touch."]))
    assert [c.row for c in evaluation._film(None)] == rows[:1]
    assert evaluation._remarks == ["No film of touch."]


def test_mismatches_are_refused(tmp_path):
    results = ResultsFile(tmp_path, SETUP)
    with EnvPool(make, 4, 0) as pool, pytest.raises(ValueError, match="size is 2, the pool has 4"):
        rollouts.run(Forward(2), "trained", PLAN, pool, results, print)
    with pytest.raises(ValueError, match="execute is 4; the policy predicts 3"):
        rollouts.env_maker(Forward(1), {"kind": "tabletop"}, 4, 0.0)


@pytest.mark.parametrize(
    ("actions", "camera", "match"),
    [
        ((7,), "proprio", r"\(arm\) have 2 dimensions, the environment takes \[7\]"),
        ((2,), "image_a", "does not give proprio, .*; it gives image_a"),
        ((2,), "proprio", r"proprio \(arm\) has 3 dimensions, the environment gives \[1\]"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(actions, camera, match):
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


def test_results_are_plain_json(tmp_path):
    roll_out(tmp_path)
    head, *lines = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert head == {"setup": SETUP}
    assert set(lines[0]) == {
        *("policy", "split", "skill", "seed", "task", "instruction"),
        *("success", "failure", "steps", "return", "actions"),
    }
    assert dataclasses.astuple(EpisodePlan("train", "walk", 0)) == ("train", "walk", 0)


# All of it


def test_curves_are_read_from_the_metrics(tmp_path):
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


def test_from_a_run_to_its_report(tmp_path):
    """Everything but the demonstrations, in the simulator, which lives in worker processes."""
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
    shown = DemonstratedEpisode({"image_primary": images, "proprio": proprio}, proprio, "touch it")
    chunks = evaluation.imitate([shown, shown], samples=3)
    assert chunks.predicted.shape == (2, 3, policy_fakes.H, policy_fakes.A)
    assert chunks.mask[:, 0].all()
    assert not chunks.mask[1, -1].any()  # past the demonstration's end
    page = evaluation.report(chunks)
    assert page == tmp_path / "report.html"
    assert list((tmp_path / "evaluation").glob("*.gif"))
    again = evaluate.Evaluation(tmp_path, overrides={"skills": ("touch",)})
    assert again.rows == rows  # nothing is left to run


def test_a_run_without_a_simulator_is_refused(tmp_path):
    policy_fakes.save_run(tmp_path, policy_fakes.run_of())
    with pytest.raises(ConfigError, match="names no simulator"):
        evaluate.Evaluation(tmp_path)


def test_several_robots_are_evaluated_one_by_one(tmp_path):
    robots = [policy_fakes.robot(n) for n in ("tabletop", "tabletop_mirrored")]
    run = policy_fakes.run_of(robots)
    run.config.environment = Component(kind="tabletop", primary_size=policy_fakes.SIDE)
    run.config.collect.skills, run.config.evaluate.embodiment = {"touch": 1}, "all"
    policy_fakes.save_run(tmp_path, run)
    assert evaluate.robots(tmp_path) == (["tabletop", "tabletop_mirrored"], [])
    assert evaluate.robots(tmp_path, "tabletop") == (["tabletop"], [])
    assert evaluate.robots(tmp_path / "nowhere", "all") == (["all"], [])  # loading it says why
    for robot, convention in (("tabletop", None), ("tabletop_mirrored", "mirrored")):
        evaluation = evaluate.Evaluation(tmp_path, embodiment=robot)
        assert evaluation.results.directory == tmp_path / "evaluation" / robot
        assert evaluation.environment.get("action_convention") == convention
        assert evaluation.setup["environment"] == evaluation.environment
    with pytest.raises(ValueError, match=r"tabletop_mirrored"):
        evaluate.Evaluation(tmp_path, embodiment="tabletop_miror")


def test_a_robot_that_the_simulator_is_not_is_left_out_of_all_and_refused_alone(tmp_path):
    run = policy_fakes.run_of([policy_fakes.robot(n) for n in ("bridge_dataset", "tabletop")])
    run.config.environment = Component(kind="tabletop", primary_size=policy_fakes.SIDE)
    run.config.collect.skills = {"touch": 1}
    policy_fakes.save_run(tmp_path, run)
    found, (why,) = evaluate.robots(tmp_path, "all")
    assert found == ["tabletop"]
    assert "'tabletop' can be tabletop, tabletop_target, " in why
    assert "not the robot 'bridge_dataset', whose actions mean something else" in why
    with pytest.raises(ConfigError, match="not the robot 'bridge_dataset'"):
        evaluate.Evaluation(tmp_path, embodiment="bridge_dataset")
    run.config.evaluate.embodiment = "bridge_dataset"
    with pytest.raises(ConfigError, match="not the robot 'bridge_dataset'"):
        closed_loop.ClosedLoop(run.config, run.embodiments, run.spec, run.names)


def test_where_the_simulator_is_no_robot_of_the_run_all_is_an_error(tmp_path):
    run = policy_fakes.run_of([policy_fakes.robot(n) for n in ("kuka", "bridge_dataset")])
    run.config.environment = Component(kind="tabletop", primary_size=policy_fakes.SIDE)
    policy_fakes.save_run(tmp_path, run)
    with pytest.raises(ConfigError, match="not the robot 'kuka'"):
        evaluate.robots(tmp_path, "all")


def closed_loop_run(**changes):
    run = policy_fakes.run_of()
    run.config.environment = Component(kind="tabletop", primary_size=policy_fakes.SIDE)
    run.config.collect.skills, run.config.collect.dataset = {"touch": 1, "push": 1}, "arm"
    return dataclasses.replace(run, **changes)


def test_success_is_measured_while_training(tmp_path):
    pytest.importorskip("mujoco")
    run = closed_loop_run()
    run.config.workdir, run.config.data.tasks = str(tmp_path), "label"
    run.config.evaluate.workers, run.config.evaluate.execute = 1, 3
    measure = closed_loop.ClosedLoop(run.config, run.embodiments, run.spec, run.names, episodes=1)
    try:
        found = measure(run.params, 10)
        assert {"touch", "push"} <= set(found)
        assert any(name.startswith("push/") for name in found)  # the run's own name of its task
        assert set(found.values()) <= {0.0, 1.0}
    finally:
        measure.close()
    path = tmp_path / "closed_loop" / "00000010" / "results.jsonl"
    kept = path.read_text()
    assert f'"seed": {closed_loop.FIRST_SEED}' in kept
    try:
        assert measure(run.params, 10) == found  # a resumed run reads what it has measured
        assert path.read_text() == kept
    finally:
        measure.close()


def test_success_while_training_is_of_one_robot():
    robots = [policy_fakes.robot(n) for n in ("left", "right")]
    names = policy_fakes.RUN_NAMES._replace(embodiments=("left", "right"))
    run = closed_loop_run(embodiments=robots, names=names)
    with pytest.raises(ConfigError, match=r"left, right; name it in evaluate\.embodiment"):
        closed_loop.ClosedLoop(run.config, run.embodiments, run.spec, run.names)
