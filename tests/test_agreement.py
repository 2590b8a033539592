"""octolike agreement: vla-eval's results next to octolike's own, on files of both."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from octolike.errors import RunError
from octolike.evaluation import harness_agreement
from octolike.evaluation.suites import SUITES

ROOT = Path(__file__).parents[1]
SPATIAL = "libero_spatial"
EPISODES = 4


def setup(**changes):
    execution = {"execute": 8, "overlap": "continue", "real_time": "", "ensemble": 0.0}
    execution |= {"gripper_band": 0.0, "release": 0}
    fields = {"checkpoint": 20, "environment": {"kind": "libero"}, "execution": execution}
    return fields | {"delay": 0, "tell": ["language"], "batch": 10} | changes


def write_own(directory, outcome, setup):
    """Write results.jsonl; outcome: (skill, index) -> (success, steps)."""
    rows = []
    for index in range(EPISODES):
        for number, skill in enumerate(SUITES[SPATIAL].skills):
            success, steps = outcome(skill, index)
            seed = 1_000_000 + 10_000_000 * number + index
            row = {"split": "train", "skill": skill, "seed": seed, "success": success}
            rows += [row | {"steps": steps, "policy": p} for p in ("trained", "untrained")]
    (directory / "evaluation").mkdir(parents=True)
    lines = [{"setup": setup}, *rows]
    path = directory / "evaluation" / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_harness(path, outcome, config=None, server=None, sids=("a",)):
    tasks = []
    for number, skill in enumerate(SUITES[SPATIAL].skills):
        episodes = []
        for index in range(EPISODES):
            success, steps = outcome(skill, index)
            reason = {"failure_reason": "env_step"} if success is None else {}
            first = 1_000_000 + 10_000_000 * number
            names = {"split": "train", "skill": skill, "octolike_seed": first}
            metrics = {"success": bool(success)}
            episode = {"episode_id": index, "metrics": metrics, "steps": steps, **names, **reason}
            episodes.append(episode | {"sid": sids[index % len(sids)]})
        tasks.append({"task": skill, "episodes": episodes})
    config = {"params": {"suite": SPATIAL, "seed": 0}} | (config or {})
    server = {"checkpoint": 20, "execute": 8} | (server or {})
    path.write_text(json.dumps({"tasks": tasks, "config": config, "server_info": server}))
    return path


def alternate(skill, index):
    return (True, 90 + index) if index % 2 else (False, 220)


def test_equal_episodes_agree_and_single_differences_are_listed(tmp_path):
    def with_two_differences(skill, index):
        if skill == "spatial/3" and index == 0:
            return True, 199
        if skill == "spatial/4" and index == 1:
            return True, 92
        return (None, 0) if skill == "spatial/5" and index == 2 else alternate(skill, index)

    write_own(tmp_path / "run", alternate, setup())
    path = write_harness(tmp_path / "equal.json", alternate)
    agreement = harness_agreement.compare(tmp_path / "run", [path])
    assert agreement.holds
    assert agreement.difference.value == 0
    (total,) = (x for x in agreement.text().splitlines() if x.split()[:1] == ["all"])
    assert " ".join(total.split()) == "all 20 of 40 20 of 40 40 of 40 40 of 40"
    path = write_harness(tmp_path / "two.json", with_two_differences)
    agreement = harness_agreement.compare(tmp_path / "run", [path])
    assert agreement.holds
    assert agreement.difference.value == pytest.approx(-1 / 39)
    text = agreement.text()
    assert "seed 31000000: failure after 220 steps; success after 199 steps" in text
    assert "seed 41000001: success after 91 steps; success after 92 steps" in text
    assert text.endswith("left out, without an outcome in both: 1")
    assert "38 of 39" in text


def test_a_difference_beyond_chance_ends_with_1(tmp_path, monkeypatch, capsys):
    write_own(tmp_path / "run", alternate, setup())
    path = write_harness(tmp_path / "none.json", lambda skill, index: (False, 220))
    monkeypatch.setattr(sys, "argv", ["agreement", str(tmp_path / "run"), str(path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "agreement.py"), run_name="__main__")
    assert end.value.code == 1
    output = capsys.readouterr().out
    assert "+50.0 points" in output
    assert "more than chance: one of the loops is wrong" in output


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"config": {"params": {"suite": SPATIAL}}}, "params.seed is 7, .* has 0"),
        ({"config": {"params": {"seed": 7, "env_seed": 0}}}, ""),
        ({"config": {"max_steps": 100}}, "max_steps is 100, .* has 220"),
        ({"config": {"params": {"seed": 0, "num_steps_wait": 0}}}, "num_steps_wait is 0"),
        ({"server": {"checkpoint": 10}}, "the checkpoint is 10, .* has 20"),
        ({"server": {"execute": 4}}, "executed actions of a chunk is 4, .* has 8"),
        ({"server": {"checkpoint": None}}, "the checkpoint is None"),
        ({"sids": ("a", "b")}, "is of 2 shards or attempts"),
    ],
)
def test_results_with_other_settings_are_refused(tmp_path, changes, match):
    write_own(tmp_path / "run", alternate, setup())
    path = write_harness(tmp_path / "theirs.json", alternate, **changes)
    if not match:
        assert harness_agreement.compare(tmp_path / "run", [path]).holds
        return
    with pytest.raises(RunError, match=match) as error:
        harness_agreement.compare(tmp_path / "run", [path])
    assert "\n" not in str(error.value)


def test_an_evaluation_that_the_server_cannot_repeat_is_refused(tmp_path):
    path = write_harness(tmp_path / "theirs.json", alternate)
    execution = setup()["execution"] | {"ensemble": 0.1}
    for i, change in enumerate(({"execution": execution}, {"delay": 2}, {"tell": ["goal"]})):
        write_own(tmp_path / f"run{i}", alternate, setup(**change))
        with pytest.raises(RunError, match=r"the (execution|delay|conditioning) is"):
            harness_agreement.compare(tmp_path / f"run{i}", [path])


def test_wrong_files_are_one_line(tmp_path):
    path = write_harness(tmp_path / "theirs.json", alternate)
    with pytest.raises(RunError, match=r"results.jsonl is missing; run octolike evaluate first"):
        harness_agreement.compare(tmp_path, [path])
    write_own(tmp_path / "run", alternate, setup())
    for text, match in (("[]", "not a result of vla-eval"), ("{", "cannot be read"), ("{}", "not")):
        path.write_text(text)
        with pytest.raises(RunError, match=match):
            harness_agreement.compare(tmp_path / "run", [path])
    path = write_harness(tmp_path / "theirs.json", alternate)
    plain = json.loads(path.read_text())
    for task in plain["tasks"]:
        for episode in task["episodes"]:
            del episode["skill"]
    path.write_text(json.dumps(plain))
    with pytest.raises(RunError, match=r"LiberoBenchmark did not write .*name it as benchmark"):
        harness_agreement.compare(tmp_path / "run", [path])
    (tmp_path / "run" / "evaluation" / "results.jsonl").write_text('{"setup": {}}\n{"a": 1}\n')
    with pytest.raises(RunError, match="not of octolike evaluate"):
        harness_agreement.compare(tmp_path / "run", [path])
