"""The report of a run: report.json for programs, report.html for people who know nothing about it.

The page holds its pictures inside, so it can be mailed or copied as one file. It says what was
trained, on what, for how long; how often it succeeds, beside the same network untrained; whether
success carries over to what training never showed; and lets one watch episodes, failures as well as
successes.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octolike import files
from octolike.evaluation import figures, success
from octolike.evaluation.figures import ChunkComparison, VideoClip, split_colour, split_name
from octolike.evaluation.success import MEANING, SEEN, ResultRow, SuccessRate

STRIPS = 4  # episodes per film strip
CLIPS = 16  # videos on the page, a few hundred kilobytes each at most


@dataclass(frozen=True)
class LearningCurves:
    """What training logged: (step, value) pairs, and how long it took in seconds.

    train: the loss; validation: per dataset, on held-out demonstrations; action_error: per
    dataset, mean distance of sampled actions from the demonstrated ones, in normalised units.
    """

    train: Sequence[tuple[float, float]] = ()
    validation: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    action_error: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class ReportContent:
    """All that a report is made of.

    title: the run's name; facts: {what: value} in words, shown as they are; setup: of the
    evaluation (see rollouts.ResultsFile); remarks: sentences about the evaluation, such as its
    throughput; groups: {skill: its group}, where means over groups are wanted too.
    """

    title: str
    facts: Mapping[str, str]
    setup: Mapping[str, Any]
    rows: Sequence[ResultRow]
    curves: LearningCurves = LearningCurves()
    clips: Sequence[VideoClip] = ()
    chunks: ChunkComparison | None = None
    remarks: Sequence[str] = ()
    groups: Mapping[str, str] = field(default_factory=dict)


def write(material: ReportContent, pieces: Path, page: Path) -> Path:
    """Write report.json and the pictures into `pieces`, and the page; returns the page's path.

    Raises ValueError without any finished episode of the trained policy.
    """
    table = success.table(material.rows)
    if "trained" not in table:
        raise ValueError(
            "there are no results of the trained policy to report on; run the evaluation"
        )
    pieces.mkdir(parents=True, exist_ok=True)
    pictures = _draw(material, table, pieces)
    text = json.dumps(to_json(material), indent=2, allow_nan=False) + "\n"
    files.write_text(pieces / "report.json", text)
    files.write_text(page, _page(material, table, pictures))
    return page


def to_json(material: ReportContent) -> dict[str, Any]:
    """Return what report.json holds: rates with intervals, gaps, failures, curves, setup."""
    table, follows = success.table(material.rows), success.following(material.rows)
    return {
        "title": material.title,
        "headline": headline(material.rows),
        "facts": dict(material.facts),
        "setup": dict(material.setup),
        "success": {
            policy: {s: {k: r.to_json() for k, r in cells.items()} for s, cells in splits.items()}
            for policy, splits in table.items()
        },
        "steps_to_success": {
            policy: {
                s: {
                    k: success.steps_to_success(material.rows, **_where(policy, s, k))
                    for k in cells
                }
                for s, cells in splits.items()
            }
            for policy, splits in table.items()
        },
        "means": {
            policy: {s: success.means(cells, material.groups) for s, cells in splits.items()}
            for policy, splits in table.items()
        },
        "gaps": [gap.to_json() for gap in success.gaps(material.rows)],
        "following": follows.to_json() if follows else None,
        "failures": {
            split: success.failures(material.rows, policy="trained", split=split)
            for split in table.get("trained", {})
        },
        "crashed": [
            {k: r[k] for k in ("policy", "split", "skill", "seed", "failure")}
            for r in material.rows
            if r["success"] is None
        ],
        "curves": {
            "train": _points(material.curves.train),
            "validation": {k: _points(v) for k, v in material.curves.validation.items()},
            "action_error": {k: _points(v) for k, v in material.curves.action_error.items()},
            "seconds": material.curves.seconds,
        },
        "remarks": list(material.remarks),
    }


def headline(rows: Sequence[ResultRow]) -> str:
    """Return the result in one or two sentences."""
    trained, floor = (success.count(rows, policy=p, split=SEEN) for p in ("trained", "untrained"))
    first = f"On tasks as in training it succeeds in {_percent(trained)} of the episodes"
    if not trained.episodes:  # none was asked for, or all crashed
        lost = f"All {trained.crashed} episodes on tasks as in training crashed. "
        lost = lost if trained.crashed else ""
        trained, floor = (success.count(rows, policy=p) for p in ("trained", "untrained"))
        if not trained.episodes:
            return f"No episode was finished: all {trained.crashed} crashed."
        which = "the others" if lost else "the episodes"
        first = f"{lost}It succeeds in {_percent(trained)} of {which}"
    if not floor.episodes:
        why = f"crashed in all {floor.crashed}" if floor.crashed else "was not evaluated"
        return f"{first}; the untrained network {why}."
    apart = trained.interval[0] > floor.interval[1]
    verdict = (
        "the intervals do not overlap, so it has learned something"
        if apart
        else "the intervals overlap, so these episodes do not show that it has learned anything"
    )
    return f"{first}, the same network untrained in {_percent(floor)}: {verdict}."


def text_table(rows: Sequence[ResultRow], groups: Mapping[str, str] | None = None) -> str:
    """Return the success table for a terminal, and what it says of memorising.

    groups: {skill: its group}, where means over groups are wanted too.
    """
    table = success.table(rows)
    trained = table.get("trained", {})
    lines = [f"{'':24}{'trained':>24}{'steps to it':>14}{'untrained':>24}"]
    for split, cells in trained.items():
        lines.append(split_name(split))
        for skill, rate in cells.items():
            floor = table.get("untrained", {}).get(split, {}).get(skill)
            name = "all" if skill == "all" else skill
            steps = success.steps_to_success(rows, **_where("trained", split, skill))
            took = f"{steps:g}" if steps is not None else "–"
            other = _cell(floor) if floor else "–"
            lines.append(f"  {name:22}{_cell(rate):>24}{took:>14}{other:>24}")
        lines += [f"  {_means(cells, groups)}"] if groups else []
    lines += ["", *(f"- {sentence}" for sentence in success.verdict(rows))]
    return "\n".join(lines)


# Inside


def _draw(material: ReportContent, table: Any, pieces: Path) -> dict[str, list[Path]]:
    """Draw every picture that there is material for; returns {what: paths}."""
    out: dict[str, list[Path]] = {"bars": [figures.success_bars(pieces / "success.png", table)]}
    curves = material.curves
    if curves.train or curves.validation:
        out["loss"] = [figures.learning_curves(pieces / "loss.png", **vars(curves))]
    if material.chunks:
        out["chunks"] = [figures.action_chunks(pieces / "chunks.png", material.chunks)]
    for word, good in (("successes", True), ("failures", False)):
        clips = _spread([c for c in material.clips if c.row["success"] is good])
        if clips:
            path = pieces / f"{word}.png"
            title = f"Episodes that {'succeeded' if good else 'failed'}"
            out[word] = [figures.film_strips(path, clips[:STRIPS], title)]
        names = ["{split}-{skill}-{seed}.gif".format(**c.row) for c in clips]
        made = [figures.video(pieces / n, c) for n, c in zip(names, clips)]
        out[f"{word} films"] = made[: CLIPS // 2]
    return out


def _spread(clips: Sequence[VideoClip]) -> list[VideoClip]:
    """Return the clips so that the first few are of different skills and splits."""
    seen: dict[Any, int] = {}
    keyed = []
    for clip in clips:
        kinds = (clip.row["skill"], clip.row["split"])
        again = seen[kinds] = seen.get(kinds, -1) + 1
        of_skill = seen[kinds[0]] = seen.get(kinds[0], -1) + 1
        keyed.append(((again, of_skill), clip))
    return [clip for _, clip in sorted(keyed, key=lambda x: x[0])]


def _points(curve: Sequence[tuple[float, float]]) -> list[list[float]]:
    return [[float(step), float(loss)] for step, loss in curve]


def _means(cells: Mapping[str, SuccessRate], groups: Mapping[str, str]) -> str:
    """Say what the means over tasks, within groups and over groups are."""
    found = success.means(cells, groups)
    if not found:
        return "no finished episode"
    parts = {k: f"{v:.1%}" for k, v in found.items()}
    overall = f"mean over tasks {parts.pop('tasks')}"
    over = parts.pop("groups", None)
    if over is None:
        return overall
    inside = ", ".join(f"{k} {v}" for k, v in parts.items())
    return f"{overall}; over the {len(parts)} groups {over} ({inside})"


def _percent(rate: SuccessRate) -> str:
    low, high = rate.interval
    of = f"{rate.successes} of {rate.episodes}"
    return f"{rate.rate:.0%} ({of}; 95 % interval {low:.0%} to {high:.0%})"


def _where(policy: str, split: str, skill: str) -> dict[str, str]:
    one = {} if skill == "all" else {"skill": skill}
    return {"policy": policy, "split": split, **one}


def _cell(rate: SuccessRate) -> str:
    if not rate.episodes:
        return "all crashed" if rate.crashed else "–"
    low, high = (round(100 * v) for v in rate.interval)
    return f"{rate.rate:.0%} [{low}, {high}] of {rate.episodes}"


def _page(material: ReportContent, table: Any, pictures: Mapping[str, Sequence[Path]]) -> str:
    sections = [
        _section(
            "Success",
            _success_html(table, material.rows, material.groups) + _figure(pictures, "bars", _BARS),
        ),
        _section("Memorising or learning?", _gaps_html(material.rows)),
        _section("Watch it", _films_html(pictures)),
        _section("Why episodes fail", _failures_html(material.rows)),
        _section("Training", _facts_html(material) + _figure(pictures, "loss", _LOSS)),
        _section("Does it imitate?", _figure(pictures, "chunks", _CHUNKS)),
        _section("How to read this, and how to repeat it", _method_html(material)),
    ]
    title = html.escape(material.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_CSS}</style></head>\n<body><main>\n<h1>{title}</h1>\n"
        f'<p class="lead">{html.escape(headline(material.rows))}</p>\n'
        + "".join(sections)
        + "</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>\n" if body else ""


def _success_html(table: Any, rows: Sequence[ResultRow], groups: Mapping[str, str]) -> str:
    trained, floor = table["trained"], table.get("untrained", {})
    skills = list(dict.fromkeys(k for cells in trained.values() for k in cells if k != "all"))
    head = "".join(f"<th>{html.escape(s)}</th>" for s in [*skills, "all skills"])
    body = ""
    for split, cells in trained.items():
        name = f'<i style="background:{split_colour(split)}"></i>{html.escape(split_name(split))}'
        rates = "".join(
            _rate_html(cells.get(s), success.steps_to_success(rows, **_where("trained", split, s)))
            for s in [*skills, "all"]
        )
        body += f'<tr title="{html.escape(MEANING.get(split, ""))}"><th>{name}</th>{rates}</tr>\n'
        if split in floor:
            rates = "".join(_rate_html(floor[split].get(s)) for s in [*skills, "all"])
            body += f'<tr class="floor"><th>– untrained network</th>{rates}</tr>\n'
    meanings = "".join(
        f"<li><b>{html.escape(split_name(s))}</b>: {html.escape(MEANING[s])}</li>"
        for s in trained
        if s in MEANING
    )
    means = "".join(
        f"<p>{html.escape(split_name(s))}: {html.escape(_means(cells, groups))}.</p>\n"
        for s, cells in trained.items()
        if groups
    )
    return (
        "<p>How often the policy did what the instruction asked for. Small figures are 95 % "
        "confidence intervals: what the true rate may be, given so many episodes; under them, "
        "the median number of steps of the episodes that succeeded.</p>\n"
        f'<div class="wide"><table class="rates"><tr><th></th>{head}</tr>\n{body}</table></div>\n'
        f"{means}<ul>{meanings}</ul>\n"
    )


def _rate_html(rate: SuccessRate | None, steps: float | None = None) -> str:
    if rate is None or not (rate.episodes or rate.crashed):
        return '<td class="none" title="no such tasks">·</td>'
    crashed = f"<br><small>{rate.crashed} crashed</small>" if rate.crashed else ""
    if not rate.episodes:
        return f"<td>–{crashed}</td>"
    low, high = (round(100 * v) for v in rate.interval)
    shade = f"background:rgba(46,139,87,{0.05 + 0.4 * rate.rate:.2f})" if rate.rate else ""
    took = f"<br><small>{steps:g} steps</small>" if steps is not None else ""
    return (
        f'<td style="{shade}" title="{rate.successes} of {rate.episodes}"><b>{rate.rate:.0%}</b>'
        f"<br><small>{low}–{high}</small>{took}{crashed}</td>"
    )


def _gaps_html(rows: Sequence[ResultRow]) -> str:
    items = "".join(
        f"<li>{html.escape(g.sentence)} <small>(skills: {', '.join(g.skills)})</small></li>\n"
        for g in success.gaps(rows)
    )
    follows = success.following(rows)
    items += f"<li>{html.escape(follows.sentence)}</li>\n" if follows else ""
    if not items:
        return "<p>No held-out split was evaluated, so this report cannot say.</p>"
    return f"<ul>{items}</ul>"


def _films_html(pictures: Mapping[str, Sequence[Path]]) -> str:
    out = ""
    for word in ("successes", "failures"):
        films = "".join(_img(p, p.stem) for p in pictures.get(f"{word} films", ()))
        if films:
            out += f'<h3>{word.capitalize()}</h3>\n<div class="films">{films}</div>\n'
            out += _figure(pictures, word, "")
    return out


def _failures_html(rows: Sequence[ResultRow]) -> str:
    reasons = success.failures(rows, policy="trained")
    if not reasons:
        return "<p>None did.</p>"
    kinds: dict[str, int] = {}
    for reason, number in reasons.items():
        kind = _kind(reason)
        kinds[kind] = kinds.get(kind, 0) + number
    total = sum(kinds.values())
    items = "".join(
        f"<li><b>{number}</b> of {total}: {html.escape(kind)}</li>\n"
        for kind, number in sorted(kinds.items(), key=lambda x: -x[1])
    )
    return f"<ul>{items}</ul>"


def _is_mixup(reason: str) -> bool:
    return reason.startswith(("touched ", "grasped "))


def _kind(reason: str) -> str:
    """Return a reason without the names in it: "touched red cube", "touched blue ball" are one."""
    if reason.startswith("did ") and reason.endswith(" instead"):
        return "did what the table was laid for, not what was asked for"
    return reason.split()[0] + " the wrong thing" if _is_mixup(reason) else reason


def _facts_html(material: ReportContent) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>\n"
        for k, v in material.facts.items()
    )
    return f'<table class="facts">{rows}</table>\n'


def _method_html(material: ReportContent) -> str:
    crashed = [r for r in material.rows if r["success"] is None]
    lines = [
        "Every episode starts from a fixed seed that no demonstration used; equal seeds give equal "
        "tables to every policy. Success is judged by the simulator's state, not by the picture.",
        "The untrained network is the same architecture with random parameters. It shows what luck "
        "achieves: on a small table a wandering gripper touches things.",
        "Intervals are Wilson's; those of differences Newcombe's.",
        f"{len(crashed)} episodes crashed and are in no rate."
        if crashed
        else "No episode crashed: every one that was started is counted.",
        *material.remarks,
    ]
    items = "".join(f"<li>{html.escape(line)}</li>\n" for line in lines)
    setup = html.escape(json.dumps(dict(material.setup), indent=1))
    summary = "<summary>Setup of the evaluation</summary>"
    return f"<ul>{items}</ul><details>{summary}<pre>{setup}</pre></details>"


def _figure(pictures: Mapping[str, Sequence[Path]], what: str, caption: str) -> str:
    note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return "".join(
        f"<figure>{_img(p, caption or what)}{note}</figure>\n" for p in pictures.get(what, ())
    )


def _img(path: Path, words: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/{path.suffix[1:]};base64,{data}" alt="{html.escape(words)}">'


_BARS = (
    "Success per skill, with 95 % intervals. The grey bar beside each is the untrained network. "
    "Bars whose intervals do not overlap differ beyond chance."
)
_LOSS = (
    "The loss on training episodes and on held-out demonstrations. A validation curve that rises "
    "while the training curve falls means that the demonstrations are being memorised. The action "
    "error is how far sampled actions lie from the expert's, in normalised units."
)
_CHUNKS = (
    "What the expert did next on frames of held-out demonstrations (black), and what the policy "
    "would do (blue, several samples). Samples that spread show where it is unsure."
)
_CSS = """
body{margin:0;background:#f5f6f7;color:#22262b;font:16px/1.55 system-ui,-apple-system,"Segoe UI",
 Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:62rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:2rem;line-height:1.2;margin:0 0 .75rem}h2{font-size:1.3rem;margin:0 0 .6rem}
h3{font-size:1rem;margin:1.2rem 0 .5rem}
.lead{font-size:1.15rem;margin:0 0 1.5rem;max-width:48rem}
section{background:#fff;border:1px solid #e4e6e9;border-radius:10px;padding:1.4rem 1.6rem;
 margin:0 0 1.2rem}
p,li{max-width:50rem}ul{padding-left:1.2rem;margin:.5rem 0}
table{border-collapse:collapse}small{color:#6b7280;font-size:.78rem}
.wide{overflow-x:auto}
.rates th,.rates td{padding:.45rem .8rem;text-align:center;border-bottom:1px solid #e4e6e9;
 line-height:1.25}
.rates th:first-child{text-align:left;font-weight:600;white-space:nowrap}
.rates i{display:inline-block;width:.75rem;height:.75rem;border-radius:3px;margin-right:.5rem}
.floor,.floor th:first-child{color:#7b828a;font-weight:400!important}.floor b{font-weight:400}
.floor td{background:none!important}.none{color:#b4b9bf}
.facts th{text-align:left;font-weight:600;padding:.3rem 1.5rem .3rem 0;vertical-align:top;
 white-space:nowrap}.facts td{padding:.3rem 0}
figure{margin:1.2rem 0 0}figure img{max-width:100%;height:auto}
figcaption{color:#5b626a;font-size:.88rem;max-width:50rem;margin-top:.3rem}
.films{display:grid;grid-template-columns:repeat(auto-fill,minmax(11.5rem,1fr));gap:.8rem}
.films img{width:100%;border:1px solid #e4e6e9;border-radius:6px}
pre{font-size:.8rem;overflow-x:auto}summary{cursor:pointer;color:#2a6fb0}
"""
