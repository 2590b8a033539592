"""The report: figures and an HTML page from plain rows and arrays, complete or partial."""

import base64
import dataclasses
import json
import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image, ImageDraw
from scipy import stats

from octolike.envs.libero import libero_tasks
from octolike.evaluation import figures, report, statistics, success_tables
from octolike.evaluation.figures import ChunkComparison, VideoClip
from octolike.evaluation.headline import headline
from octolike.evaluation.report import LearningCurves, ReportContent
from octolike.evaluation.statistics import SuccessRate
from octolike.remarks import ONE_RUN

SPLITS = ("train", "held_out_combination")


def rows():
    """Trained: 4 of 5 seen touches, 1 of 5 held-out ones, no lifts; untrained: never."""
    wins = {("trained", "train", "touch"): 4, ("trained", "held_out_combination", "touch"): 1}
    out = []
    for policy in ("trained", "untrained"):
        for split in SPLITS:
            for skill in ("touch", "lift"):
                for seed in range(5):
                    ok = seed < wins.get((policy, split, skill), 0)
                    failure = "" if ok else ("touched red <cube>" if seed == 4 else "time ran out")
                    out.append(
                        {
                            "policy": policy,
                            "split": split,
                            "skill": skill,
                            "seed": seed,
                            "instruction": f"{skill} the <b>red</b> cube & more",
                            "success": ok,
                            "failure": failure,
                            "steps": 3,
                        }
                    )
    return out


def clips():
    pictures = np.random.default_rng(0).integers(0, 255, (4, 24, 24, 3), dtype=np.uint8)
    trained = [r for r in rows() if r["policy"] == "trained"]
    return [VideoClip(r, pictures, range(4)) for r in trained[3:6]]


def chunks():
    rng = np.random.default_rng(0)
    demonstrated = rng.normal(size=(2, 4, 3))
    demonstrated[..., 1] = 0  # a dimension that does not move is not drawn
    mask = np.ones((2, 4, 3), bool)
    mask[0, 2:] = False
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    predicted = np.repeat(demonstrated[:, None], 3, axis=1)
    return ChunkComparison(
        pictures, ["go", ""], ["x", "roll", "gripper"], demonstrated, mask, predicted
    )


@pytest.fixture(scope="module")
def content():
    return ReportContent(
        "a <small> run",
        {"network": "3 parameters"},
        {"checkpoint": 7},
        rows(),
        LearningCurves(
            [(0, 2.0), (10, 1.0)], {"table": [(10, 1.5)]}, {"table": [(10, 0.4)]}, seconds=75.0
        ),
        clips(),
        chunks(),
        ["9 steps/s"],
    )


@pytest.fixture(scope="module")
def written(content, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return report.write(content, directory / "evaluation", directory / "report.html")


def test_every_figure_and_video_is_written(written):
    directory = written.parent / "evaluation"
    names = {"success.png", "loss.png", "chunks.png", "successes.png", "failures.png"}
    videos = {"train-touch-3.gif", "train-touch-4.gif", "train-lift-0.gif"}
    assert {p.name for p in directory.iterdir()} == names | videos | {"report.json"}
    for name in names:
        with Image.open(directory / name) as image:
            assert min(image.size) > 200
            assert np.ptp(np.asarray(image.convert("L"))) > 100
    with Image.open(directory / "train-touch-3.gif") as video:
        assert video.n_frames == 4


def test_the_page_is_one_file_with_text_and_images(written):
    page = written.read_text()
    assert "80%" in page
    assert "the gap is not informative" in page
    assert "3 parameters" in page
    assert "9 steps/s" in page
    assert "touched the wrong object" in page
    # nothing is loaded from elsewhere, and the images are complete
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(s.startswith("data:image/") for s in sources)
    data = sources[0].partition("base64,")[2]
    assert base64.b64decode(data) == (written.parent / "evaluation/success.png").read_bytes()


def test_the_limits_of_a_single_run_stand_below_its_rates(written):
    success, _, rest = written.read_text().partition("Memorising or learning?")
    assert "Another training seed of the same recipe can differ" in success
    assert "Another training seed" not in rest


def test_text_is_escaped(written):
    page = written.read_text()
    assert "a &lt;small&gt; run" in page
    assert "<small> run" not in page


def test_report_json_contains_the_numbers(written):
    data = json.loads((written.parent / "evaluation" / "report.json").read_text())
    cell = data["success"]["trained"]["train"]["touch"]
    assert (cell["successes"], cell["episodes"], cell["rate"]) == (4, 5, 0.8)
    assert (cell["low"], cell["high"]) == pytest.approx(statistics.wilson_interval(4, 5))
    (gap,) = data["gaps"]
    assert gap["difference"] == pytest.approx(0.3)
    assert data["failures"]["train"] == {"time ran out": 4, "touched red <cube>": 2}
    assert data["curves"]["train"] == [[0, 2.0], [10, 1.0]]
    assert data["setup"] == {"checkpoint": 7}
    assert data["remarks"] == [ONE_RUN, "9 steps/s"]


def test_the_headline_states_whether_the_policy_learned(content):
    assert "4 of 10" in headline(content.rows)
    assert "do not show that it has learned anything" in headline(content.rows)
    touch = [r for r in rows() if r["skill"] == "touch"]
    many = [{**r, "seed": r["seed"] + 5 * i} for i in range(10) for r in touch]
    assert "It has learned something (the same scenes; trained minus" in headline(many)
    exchanged = {"trained": "untrained", "untrained": "trained"}
    worse = [r | {"policy": exchanged[r["policy"]]} for r in many]
    assert "less often than without training" in headline(worse)
    trained = [r for r in rows() if r["policy"] == "trained"]
    assert "was not evaluated" in headline(trained)


def test_tasks_without_demonstrations_are_not_called_seen():
    both = headline(rows(), {"lift"})
    assert both.startswith("On seen tasks the policy succeeds in 80% of the episodes (4 of 5;")
    assert "On tasks without demonstrations it succeeds in 0% (0 of 5;" in both
    none = headline(rows(), {"lift", "touch"})
    assert none.startswith("On tasks without demonstrations the policy succeeds in 40% of the")
    assert "seen" not in none


def test_caveats_stand_beside_the_rates_everywhere(content, tmp_path):
    notes = ["Not <comparable>."]
    bare = dataclasses.replace(content, clips=(), chunks=None, caveats=notes)
    page = report.write(bare, tmp_path, tmp_path / "page.html").read_text()
    assert "Not &lt;comparable&gt;." in page.partition("Memorising or learning?")[0]
    assert json.loads((tmp_path / "report.json").read_text())["caveats"] == notes
    assert "- Not <comparable>." in success_tables.success_table(content.rows, caveats=notes)


def test_a_policy_that_wins_in_the_same_scenes_has_learned_though_intervals_overlap(tmp_path):
    """20 against 10 of 100 with 11 scenes to 1; a crash takes its pair out of the comparison."""
    won = {"trained": lambda i: i < 20, "untrained": lambda i: i < 9 or i == 99}
    rows_ = [
        row | {"policy": policy, "split": "train", "seed": i, "success": wins(i)}
        for policy, wins in won.items()
        for i, row in enumerate([rows()[0]] * 100)
    ]
    text = headline(rows_)
    p = stats.binomtest(1, 12).pvalue
    assert "It has learned something (the same scenes; trained minus untrained: 95 %" in text
    assert text.endswith(f"p = {p:.2g}).")
    moved = [r | {"scene": f"{r['policy']} {r['seed']}"} for r in rows_]
    text = headline(moved)
    assert "do not show that it has learned anything (other scenes, compared unpaired;" in text
    rows_[50] = rows_[50] | {"success": None}
    note = "the same scenes, 1 scene left out, as a side has no outcome there; trained"
    assert note in headline(rows_)
    report.write(ReportContent("x", {}, {}, rows_), tmp_path, tmp_path / "page.html")
    data = json.loads((tmp_path / "report.json").read_text())["above_untrained"]
    assert (data["p"], data["scenes_left_out"]) == (pytest.approx(p), 1)


def test_the_headline_has_no_rate_without_finished_episodes(tmp_path):
    crash = {"success": None, "failure": "crashed: ArithmeticError"}
    crashed = [r | crash if r["split"] == "train" else r for r in rows()]
    text = headline(crashed)
    assert text.startswith(
        "All 10 episodes on seen tasks crashed. The policy succeeds in 10% of the other"
    )
    floor = [r | crash if r["policy"] == "untrained" else r for r in rows()]
    assert headline(floor).endswith("; the untrained network crashed in all 10.")
    every = [r | crash for r in rows()]
    assert headline(every) == "No episode finished: all 20 crashed."
    seen_alone = [r for r in every if r["split"] == "train"]
    assert headline(seen_alone) == "No episode finished: all 10 crashed."
    page = report.write(
        ReportContent("x", {}, {}, every), tmp_path, tmp_path / "page.html"
    ).read_text()
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page)
    assert "nan" not in success_tables.success_table(every)


def test_a_report_of_results_alone_omits_the_other_sections(content, tmp_path):
    trained = [r for r in rows() if r["policy"] == "trained" and r["split"] == "train"]
    bare = ReportContent("bare", {}, {}, trained)
    page = report.write(bare, tmp_path / "evaluation", tmp_path / "page.html").read_text()
    assert "Predicted and demonstrated actions" not in page
    assert "Videos" not in page
    assert "no held-out split was evaluated" in page


def test_the_page_reports_crashes(content, tmp_path):
    crashed = [dict(r) for r in content.rows]
    crashed[0].update(success=None, failure="crashed: ArithmeticError")
    bare = dataclasses.replace(content, rows=crashed, clips=(), chunks=None)
    page = report.write(bare, tmp_path, tmp_path / "page.html").read_text()
    assert "1 episode crashed; rates exclude them" in page
    assert "1 crashed" in page
    assert json.loads((tmp_path / "report.json").read_text())["crashed"][0]["seed"] == 0


def test_a_report_without_results_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="no results of the trained policy"):
        report.write(ReportContent("x", {}, {}, []), tmp_path, tmp_path / "page.html")


def test_the_success_table_for_a_terminal(content):
    lines = success_tables.success_table(content.rows).splitlines()
    assert lines[0].split() == ["split", "skill", "trained", "median", "steps", "untrained"]
    assert re.search(r"^seen +touch +80% \[38, 96\] of 5 +3 +0% \[0, 43\] of 5$", lines[1])


def test_smoothing_preserves_constants_and_the_start():
    np.testing.assert_allclose(figures._smooth(np.full(50, 3.0)), 3.0)
    falling = np.linspace(9, 0, 100)
    smooth = figures._smooth(falling)
    assert smooth[0] == falling[0]
    np.testing.assert_allclose(smooth[5:95], falling[5:95])


def test_durations_are_readable():
    assert [figures.duration(s) for s in (8, 450, 8280)] == ["8 s", "7.5 min", "2.3 h"]


def test_the_first_clips_differ_in_skill():
    row = rows()[0]
    many = [VideoClip({**row, "skill": s, "seed": i}, [], []) for i, s in enumerate("aaabbc")]
    assert [c.row["skill"] for c in report._diverse_first(many)] == ["a", "b", "c", "a", "b", "a"]


def test_a_table_has_a_column_per_group_as_benchmarks_publish_theirs():
    groups = {"object/0": "object", "object/1": "object", "goal/0": "goal"}
    rates = {
        "object/0": SuccessRate(3, 4),
        "object/1": SuccessRate(1, 4),
        "goal/0": SuccessRate(1, 4),
    }
    held_out = {"object/0": SuccessRate(0, 4)}
    table = success_tables.group_table({"train": rates, "held_out_phrasing": held_out}, groups)
    low, high = (f"{100 * x:.1f}" for x in statistics.wilson_interval(4, 8))
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["success", "object", "goal", "mean"]
    assert lines[1][:4] == ["seen", "50.0%", f"[{low},", f"{high}]"]
    assert [x for x in lines[1] if "%" in x] == ["50.0%", "25.0%", "37.5%"]
    assert [x for x in lines[2] if x.strip("[0.,]")] != []
    assert (lines[2][2], lines[2].count("–")) == ("0.0%", 1)


def test_the_page_has_the_table_of_published_ones(tmp_path):
    groups = {skill: libero_tasks.GROUPS[skill] for skill in ("10/0", "10/1", "object/0")}
    skills = dict(zip(groups, (1, 3, 2), strict=True))
    results = [
        {**rows()[0], "skill": skill, "seed": seed, "success": seed < wins}
        for skill, wins in skills.items()
        for seed in range(4)
    ]
    content = ReportContent("x", {}, {}, results, groups=groups)
    page = report.write(content, tmp_path, tmp_path / "page.html").read_text()
    assert "<th>Long</th><th>Object</th><th>mean</th>" in page
    low, high = (f"{100 * x:.1f}" for x in statistics.wilson_interval(4, 8))
    assert f"<td><b>50.0%</b><br><small>{low}–{high}</small></td>" in page
    stored = json.loads((tmp_path / "report.json").read_text())["mean_intervals"]
    assert stored["trained"]["train"]["Long"] == pytest.approx(statistics.wilson_interval(4, 8))


def test_images_are_labelled_with_the_film_s_steps(tmp_path, monkeypatch):
    """A film of a robot at 20 Hz shows every fourth step."""
    texts = []
    for artist in (ImageDraw.ImageDraw, Axes):
        monkeypatch.setattr(
            artist, "text", lambda *args, **_: texts.extend(a for a in args if isinstance(a, str))
        )
    clip = VideoClip(rows()[0], [np.zeros((8, 8, 3), np.uint8)] * 4, [0, 4, 8, 9])
    figures.video(tmp_path / "video.gif", clip)
    labels = [t for t in texts if t.startswith("step")]
    assert labels == ["step 0", "step 4", "step 8"]
    texts.clear()
    figures.film_strips(tmp_path / "strips.png", [clip], "title")
    labels = [t for t in texts if t.startswith("step")]
    assert labels == ["step 0", "step 4", "step 8", "step 9"]
