"""Whole evaluations: the report, several robots, success during training."""

import dataclasses
import json

import numpy as np
import policy_fakes
import pytest

from octolike.config import Component, ConfigError
from octolike.envs import registry
from octolike.envs.replays import Film
from octolike.evaluation import closed_loop, evaluate, rollouts
from octolike.evaluation.demonstrated_episode import DemonstratedEpisode
from octolike.evaluation.figures import VideoClip

A, H = 2, 3


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


@pytest.mark.parametrize(
    "text",
    [
        "1\n",
        "[1]\n",
        '{"step": 1}\n',
        '{"validation/a/loss": 1, "seconds": 1}\n',
        "x\n{}\n",
        "\xff",
    ],
)
def test_malformed_metrics_do_not_end_an_evaluation(tmp_path, capsys, text):
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    curves = evaluate.read_curves(tmp_path)
    assert (curves.train, curves.validation, curves.seconds) == ([], {}, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"no learning curves: {tmp_path / 'metrics.jsonl'} is malformed (")


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
    alone = evaluate.Evaluation(tmp_path, overrides={"skills": ("touch",)}, untrained=False)
    alone.run()
    assert [r["policy"] for r in alone.rows] == ["trained"] * 2
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


def test_the_caveats_of_a_run_are_in_its_table_and_report(tmp_path, capsys):
    """Its datasets are not found, so the instructions decide which tasks were demonstrated."""
    run = policy_fakes.run_of()
    run.config.environment = Component(kind="tabletop", primary_size=policy_fakes.SIDE)
    run.config.evaluate.episodes, run.config.evaluate.videos = 2, 0
    run.config.collect.dataset, run.config.evaluate.skills = "arm", ("touch", "push")
    names = policy_fakes.RUN_NAMES._replace(tasks=("Touch the  red cube",))
    policy_fakes.save_run(tmp_path, dataclasses.replace(run, names=names))
    evaluation = evaluate.Evaluation(tmp_path)
    (before,) = evaluation.caveats
    assert before.startswith("Unknown which of these tasks were demonstrated (data is not in")
    fields = {"failure": "", "steps": 1, "success": False, "scene": ""}
    for e in evaluation.plan:
        row = {"policy": "trained", "instruction": f"{e.skill} the red cube", **fields}
        evaluation.results.add({**row, **dataclasses.asdict(e)}, [])
    (after,) = evaluation.caveats
    assert after.startswith(
        "Not demonstrated, by the instructions of the training's datasets: push"
    )
    assert f"- {after}" in evaluation.table()
    evaluation.report()
    stored = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert stored["caveats"] == [after]
    assert "On tasks without demonstrations it succeeds in 0%" in stored["headline"]


@pytest.mark.parametrize("keeps_task", [True, False])
def test_a_simulator_that_is_slow_to_build_keeps_its_tasks(tmp_path, monkeypatch, keeps_task):
    simulated_run(tmp_path)
    evaluation = evaluate.Evaluation(tmp_path, overrides={"episodes": 4})
    table = registry.simulator("tabletop")
    parts = dataclasses.replace(table, keeps_task=keeps_task)
    monkeypatch.setattr(evaluate, "simulator", lambda kind: parts)
    skills = [e.skill for e in evaluation._order(1)[:4]]
    assert (skills == 4 * ["touch"]) is keeps_task
    assert registry.simulator("libero").keeps_task


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
    assert "not the robot 'bridge_dataset': their actions differ in meaning" in reason
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


@pytest.mark.filterwarnings("ignore:the instruction .* is truncated to 8")
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
        assert measure(run.params, 10) == rates  # a resumed run reads the stored rates
        assert path.read_text() == text
    finally:
        measure.close()


def test_success_during_training_needs_a_single_robot():
    robots = [policy_fakes.robot(n) for n in ("left", "right")]
    names = policy_fakes.RUN_NAMES._replace(embodiments=("left", "right"))
    run = closed_loop_run(embodiments=robots, names=names)
    with pytest.raises(ConfigError, match=r"left, right; choose one in evaluate\.embodiment"):
        closed_loop.ClosedLoop(run.config, run.embodiments, run.spec, run.names)


def test_a_missing_video_becomes_a_remark(tmp_path, monkeypatch):
    simulated_run(tmp_path)
    evaluation = evaluate.Evaluation(tmp_path)
    rows = [
        {"policy": "trained", "actions": "x", **dataclasses.asdict(e)} for e in evaluation.plan[:2]
    ]
    monkeypatch.setattr(evaluate.Evaluation, "rows", rows)
    film = Film(["picture"], [0], {})
    monkeypatch.setattr(rollouts, "render_episodes", lambda *_: iter([film, "No video of touch."]))
    assert evaluation._render_clips(None) == [VideoClip(rows[0], ["picture"], [0])]
    assert evaluation._remarks == ["No video of touch."]
