"""How far episodes come: shares of milestones and first grasps, in numbers and in the report."""

from octolike.evaluation import milestones
from octolike.evaluation.statistics import SuccessRate


def row(passed, grasped="", success=False, skill="lift", **fields):
    names = ("reached", "grasped")
    return {
        "policy": "trained",
        "split": "train",
        "skill": skill,
        "success": success,
        "milestones": {n: n in passed for n in names},
        "target": "red cube",
        "grasped": grasped,
    } | fields


ROWS = [
    row(("reached", "grasped"), "red cube", success=True),
    row(("reached", "grasped"), "red cube"),
    row(("reached",), "red ball"),
    row((), "blue cube"),
    row((), "blue ball"),
    row(()),
    row(("reached", "grasped"), "red cube", success=None),  # crashed: not counted
    row(("reached", "grasped"), "red cube", policy="untrained"),
]


def test_the_funnel_counts_finished_episodes_of_the_policy():
    funnel = milestones.funnels(ROWS)["train"]["lift"]
    assert funnel == {
        "reached": SuccessRate(3, 6),
        "grasped": SuccessRate(2, 6),
        "success": SuccessRate(1, 6),
    }


def test_grasps_are_told_apart_by_colour_and_shape():
    assert milestones.grasps(ROWS)["train"]["lift"] == {
        "the target": 2,
        "another of its colour": 1,
        "another of its shape": 1,
        "another": 1,
        "nothing": 1,
    }
    assert milestones.grasps([row(("reached",))]) == {}


def test_asked_and_grasped_objects_are_tabled_by_colour_and_shape():
    """The five grasps of ROWS: three cubes, a ball for a cube twice; blue for red twice."""
    tables = milestones.confusions(ROWS)["train"]
    assert tables == {
        "colour": {"blue": {"blue": 0, "red": 0}, "red": {"blue": 2, "red": 3}},
        "shape": {"ball": {"ball": 0, "cube": 0}, "cube": {"ball": 2, "cube": 3}},
    }
    page = milestones.to_html(ROWS)
    assert "grasped first (columns), seen: colour</h3>" in page
    assert "<tr><th>red</th><td>2</td><td><b>3</b></td></tr>" in page
    right = [row((), "red cube"), row(())]
    assert milestones.confusions(right) == {}, "nothing is confused"
    assert milestones.confusions([*ROWS, row((), "lid")]) == {}, "a lid has no colour"


def test_objects_of_other_simulators_may_have_any_name():
    """Their names may have one word or three, and the object to grasp may be unknown."""
    named = [
        row((), "cube", target="red cube"),
        row((), "red toy cube", target="red cube"),
        row((), "lid", target="jar"),
        {k: v for k, v in row((), "lid").items() if k != "target"},
    ]
    assert milestones.grasps(named)["train"]["lift"] == {
        "the target": 0,
        "another of its colour": 1,
        "another of its shape": 1,
        "another": 1,
        "nothing": 0,
    }


def test_results_without_milestones_have_no_section():
    plain = [{k: v for k, v in r.items() if k not in ("milestones", "grasped")} for r in ROWS]
    assert milestones.funnels(plain) == milestones.grasps(plain) == {}
    assert milestones.to_html(plain) == ""
    page = milestones.to_html([*ROWS, row((), skill="<b>")])
    assert "reached 50% → grasped 33% → success 17%" in page
    assert "&lt;b&gt;" in page
