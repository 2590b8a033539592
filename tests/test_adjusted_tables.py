"""Tables that compare several ways with one adjust their p-values and count scenes left out."""

import importlib.util
from pathlib import Path

import pytest

from octolike.evaluation.statistics import OutcomeGrid, holm, paired_difference, seed_effect

ROOT = Path(__file__).parents[1]
WINS = {"continue": 5, "guided": 14, "trained": 12}  # of 20 scenes in the first run, one less later


def module(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def outcomes(wins, crashed=()):
    skills = ("touch", "lift")
    return {(skills[i % 2], i): None if i in crashed else i < wins for i in range(20)}


def grids_and_p():
    """Return the outcomes of two runs, and the p-values of the differences to the first."""
    grids = {
        name: OutcomeGrid.from_seeds(
            [outcomes(n - seed, (19,) if name == "guided" else ()) for seed in range(2)],
            {scene: scene[0] for scene in outcomes(0)},
        )
        for name, n in WINS.items()
    }
    first, effect = grids["continue"], seed_effect(grids.values())
    p = [paired_difference(grids[name], first, effect).p for name in ("guided", "trained")]
    assert holm(p) != p, "the adjustment shows"
    return grids, p


def test_late_chunks_are_compared_with_adjusted_p_values(capsys):
    _, p = grids_and_p()
    measured = [
        (
            {"method": name, "delay": 2},
            outcomes(n - seed, (19,) if name == "guided" else ()),
        )
        for seed in range(2)
        for name, n in WINS.items()
    ]
    rows = {row["method"]: row for row in module("scripts/benchmarks/delay.py").over_runs(measured)}
    found = [rows[name]["adjusted p"] for name in ("guided", "trained")]
    assert found == pytest.approx(holm(p))
    assert [rows[name]["left out"] for name in ("guided", "trained")] == [1, 0]
    assert "adjusted p" not in rows["continue"]
    assert "Holm over 2 differences" in capsys.readouterr().out


def test_conventions_are_compared_with_adjusted_p_values():
    grids, p = grids_and_p()
    compare = module("examples/table_conventions.py").compare
    *lines, note = compare(grids)
    assert note == "p adjusted for the whole table (Holm over 2 differences)"
    for line, value in zip(lines[1:], holm(p), strict=True):
        assert f"adjusted p {value:.2g}, same scenes" in line
    assert lines[1].endswith("; 1 scene left out, as a side has no outcome there")
    assert "left out" not in lines[2]
    (alone,) = compare({"continue": grids["continue"]})
    assert "adjusted" not in alone
