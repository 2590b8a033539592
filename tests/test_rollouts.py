"""Closed-loop episodes of a fake policy in a fake environment, their results and videos."""

import dataclasses
import functools
import json
import types

import numpy as np
import pytest
from rollout_fakes import Counterfactual, CrashesAlways, CrashesOnce, DiesOnce, Walk, make

from octolike.config import Config
from octolike.envs.pool import EnvPool
from octolike.evaluation import rollouts, success
from octolike.evaluation.results_file import ResultsFile
from octolike.evaluation.rollouts import RolloutSettings
from octolike.evaluation.suites import EpisodePlan
from octolike.policy.execution import ExecutionSettings

A, H = 2, 3


class Forward:
    """A fake policy; its actions depend on observation, task, seed, and the row of the batch."""

    observation_keys, window, horizon = ("proprio",), 2, H
    metadata = {  # noqa: RUF012
        "horizon": H,
        "real_time": "guided",
        "action": {"names": "ab", "absolute": (False, True), "not_averaged": (False, True)},
    }
    goal_shapes = {"image_extra": (3,)}  # noqa: RUF012

    def __init__(self, batch_size):
        self.batch_size, self.calls, self.conditions = batch_size, 0, []
        self.prefixes = []

    def create_task(self, instruction, goal_images, task_id):
        self.conditions.append((instruction, goal_images, task_id))
        return len(instruction or "goal")

    def sample_batch(self, observations, tasks, seeds, prefixes=None):
        self.prefixes.append(prefixes)
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


def roll_out(
    directory,
    kind=Walk,
    workers=0,
    policy=None,
    videos=0,
    conditioning=("language",),
    delay=0,
    **execution,
):
    results, new_rows = ResultsFile(directory, SETUP, videos), []
    with EnvPool(functools.partial(make, kind), 4, workers) as pool:
        timing = rollouts.run_episodes(
            policy or Forward(4),
            "trained",
            PLAN,
            pool,
            results,
            new_rows.append,
            RolloutSettings(
                conditioning,
                goal_of,
                execution=ExecutionSettings(execute=2, **execution),
                delay=delay,
            ),
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
    assert timing.episodes == len(new_rows)
    assert timing.seconds >= timing.policy_seconds + timing.environment_seconds
    assert dataclasses.replace(timing, seconds=7200.0, episodes=6).sentence().startswith("3 epis")
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


def test_rows_of_an_earlier_setup_are_never_lost(tmp_path, capsys):
    """Three checkpoints, one after the other, then the first again."""
    roll_out(tmp_path)
    for checkpoint in (2, 3):
        results = ResultsFile(tmp_path, {"checkpoint": checkpoint})
        results.add(results_row(checkpoint), [])
    assert len((tmp_path / "results.old.jsonl").read_text().splitlines()) == 1 + len(PLAN)
    assert "other settings: now results.old-2.jsonl" in capsys.readouterr().out
    again = ResultsFile(tmp_path, SETUP)
    assert len(again.rows) == len(PLAN)
    assert "results.old.jsonl is of this checkpoint and these settings" in capsys.readouterr().out
    second = ResultsFile(tmp_path, {"checkpoint": 2})
    assert [r["seed"] for r in second.rows] == [2]
    assert {p.name for p in tmp_path.glob("results*")} == {
        "results.jsonl",
        "results.old.jsonl",
        "results.old-3.jsonl",
    }


def results_row(seed):
    episode = {"policy": "trained", "split": "train", "skill": "walk", "seed": seed}
    return episode | {"success": True}


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
        settings = RolloutSettings(("task_id",), task_name=name)
        rollouts.run_episodes(policy, "trained", PLAN[:4], pool, results, print, settings)
    assert {number for _, _, number in policy.conditions} == {"robot of go walk", "robot of go run"}


@pytest.mark.parametrize(
    ("tasks", "name"), [("dataset", "table"), ("label", "touch/cube"), ("instruction", "tap it")]
)
def test_the_task_name_depends_on_the_definition_of_tasks(tasks, name):
    config = Config()
    config.data.tasks = tasks
    policy = types.SimpleNamespace(embodiment=types.SimpleNamespace(datasets=("table",)))
    info = {"task": "touch/cube", "instruction": "tap it"}
    assert rollouts.task_name_function(config, policy)(info) == name


def test_a_late_policy_gets_the_actions_that_are_executed_meanwhile(tmp_path):
    policy = Forward(4)
    roll_out(tmp_path, policy=policy, delay=1, real_time="guided")
    assert policy.prefixes[0] is None, "the first chunk has nothing to continue"
    prefix = policy.prefixes[1][0]
    assert (prefix.actions.shape, prefix.delay, prefix.method) == ((1, A), 1, "guided")


def test_a_waiting_robot_succeeds_less_in_the_same_time(tmp_path):
    rates = [
        success.success_rate(roll_out(tmp_path / f"{d}", delay=d, overlap="wait")[0].values()).rate
        for d in (0, 2)
    ]
    assert rates[1] < rates[0]


def test_videos_replay_the_episode(tmp_path):
    got, _, _ = roll_out(tmp_path, videos=1)
    stored = [r for r in got.values() if r["actions"]]
    assert sorted((r["skill"], r["success"]) for r in stored) == sorted(
        {(r["skill"], r["success"]) for r in got.values()}
    )
    with EnvPool(make, 2, workers=0) as pool:
        videos = list(rollouts.render_episodes(pool, stored, tmp_path))
        assert [film.steps for film in videos] == [[*range(r["steps"] + 1)] for r in stored]


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
    assert last.steps[-1] == good["steps"]


def test_a_video_with_a_crash_is_replaced_by_a_sentence(tmp_path):
    got, _, _ = roll_out(tmp_path, videos=9)
    row = got["walk", 0]
    assert row["steps"] >= 3
    with EnvPool(functools.partial(make, CrashesAlways), 2, workers=0) as pool:
        (text,) = rollouts.render_episodes(pool, [row], tmp_path)
    assert text.endswith("its replay crashed: ArithmeticError: the physics exploded.")


def test_a_wrong_batch_size_or_chunk_length_is_rejected(tmp_path):
    results = ResultsFile(tmp_path, SETUP)
    with EnvPool(make, 4, 0) as pool:
        with pytest.raises(ValueError, match="size is 2, the pool has 4"):
            rollouts.run_episodes(
                Forward(2), "trained", PLAN, pool, results, print, RolloutSettings()
            )
        with pytest.raises(ValueError, match="execute is 4; the policy predicts 3"):
            rollouts.run_episodes(
                Forward(4),
                "trained",
                PLAN,
                pool,
                results,
                print,
                RolloutSettings(execution=ExecutionSettings(execute=4)),
            )


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


def test_another_rate_and_missing_tasks_are_rejected():
    policy, env = Forward(1), Walk()
    policy.embodiment = types.SimpleNamespace(
        name="arm", action=types.SimpleNamespace(names=("x",)), control_hz=10.0
    )
    env.action_space = types.SimpleNamespace(shape=(1,))
    env.observation_space = types.SimpleNamespace(spaces={})
    env.metadata = {"control_hz": 20}
    plan = [EpisodePlan("train", "walk", seed) for seed in range(2)]
    with EnvPool(lambda: env, 1, 0) as pool:
        with pytest.raises(ValueError, match="10 per second, the environment executes 20"):
            rollouts.check_fit(policy, pool)
        with pytest.raises(ValueError, match=r"lacks \[\('train', 'walk'\)\]"):
            rollouts.check_tasks(pool, plan, lambda env, pairs: f"lacks {pairs}")
        rollouts.check_tasks(pool, plan, lambda env, pairs: "")


def test_results_are_json_lines(tmp_path):
    roll_out(tmp_path)
    head, *lines = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert head == {"setup": SETUP}
    assert set(lines[0]) == {
        *("policy", "split", "skill", "seed", "task", "instruction", "scene"),
        *("success", "failure", "steps", "return", "actions"),
    }
    assert dataclasses.astuple(EpisodePlan("train", "walk", 0)) == ("train", "walk", 0)
