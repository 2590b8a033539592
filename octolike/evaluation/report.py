"""The report of a run: report.json for programs, report.html for readers without context.

The page embeds its images and videos, so it can be mailed or copied as one file. It shows the
network, its data and the duration of training; the success rates next to those of the untrained
network; whether success carries over to held-out tasks; and videos of failures and successes.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octolike import files
from octolike.evaluation import figures, milestones, success
from octolike.evaluation.figures import ChunkComparison, VideoClip
from octolike.evaluation.headline import headline, headline_rows
from octolike.evaluation.success import ResultRow, steps_to_success
from octolike.evaluation.success_tables import RateTable, row_fields, success_html
from octolike.pictures import PictureAttempts
from octolike.remarks import ONE_RUN

STRIP_EPISODES = 4  # per film strip
MAX_VIDEOS = 16  # on the page, a few hundred kilobytes each at most


@dataclass(frozen=True)
class LearningCurves:
    """Curves of (step, value) pairs from the training log, and the training time in seconds.

    train: loss; validation: {dataset: loss on held-out demonstrations}; action_error: {dataset:
    mean distance of sampled actions from the demonstrated ones, in normalised units}.
    """

    train: Sequence[tuple[float, float]] = ()
    validation: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    action_error: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class ReportContent:
    """The content of a report.

    facts: {name: text} about the training; setup: of the evaluation (see results_file.ResultsFile);
    remarks: sentences about the evaluation, such as its throughput; groups: {skill: group}, for
    means over groups of skills; caveats: sentences on the meaning of the rates, which stand beside
    them; undemonstrated: skills that are certainly not demonstrated.
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
    caveats: Sequence[str] = ()
    undemonstrated: Collection[str] = ()


def write(content: ReportContent, directory: Path, page: Path) -> Path:
    """Write report.json and the images into `directory`, and the HTML page; return its path.

    Raises ValueError without a result of the trained policy.
    """
    table = success.rate_table(content.rows)
    if "trained" not in table:
        raise ValueError("there are no results of the trained policy; run the evaluation first")
    directory.mkdir(parents=True, exist_ok=True)
    attempts = PictureAttempts()
    images = _draw(content, table, directory, attempts)
    if failures := attempts.summary():
        content = dataclasses.replace(content, remarks=[*content.remarks, f"{failures}."])
    text = json.dumps(to_json(content), indent=2, allow_nan=False) + "\n"
    files.write_text(directory / "report.json", text)
    files.write_text(page, _page(content, table, images))
    return page


def to_json(content: ReportContent) -> dict[str, Any]:
    """Return the content of report.json: rates with intervals, gaps, failures, curves, setup."""
    rows, table = content.rows, success.rate_table(content.rows)
    following = success.instruction_following(rows)
    above_untrained = success.untrained_difference(headline_rows(rows, content.undemonstrated))
    return {
        "title": content.title,
        "headline": headline(rows, content.undemonstrated),
        "facts": dict(content.facts),
        "setup": dict(content.setup),
        "success": {
            policy: {s: {k: r.to_json() for k, r in rates.items()} for s, rates in splits.items()}
            for policy, splits in table.items()
        },
        "steps_to_success": {
            policy: {
                s: {k: steps_to_success(rows, **row_fields(policy, s, k)) for k in rates}
                for s, rates in splits.items()
            }
            for policy, splits in table.items()
        },
        "means": {
            policy: {s: success.mean_rates(rates, content.groups) for s, rates in splits.items()}
            for policy, splits in table.items()
        },
        "above_untrained": above_untrained.to_json() if above_untrained else None,
        "mean_intervals": {
            policy: {s: success.mean_intervals(r, content.groups) for s, r in splits.items()}
            for policy, splits in table.items()
        },
        "gaps": [gap.to_json() for gap in success.generalization_gaps(rows)],
        "following": following.to_json() if following else None,
        "failures": {
            split: success.failure_counts(rows, policy="trained", split=split)
            for split in table.get("trained", {})
        },
        "milestones": {
            split: {
                skill: {name: rate.to_json() for name, rate in funnel.items()}
                for skill, funnel in skills.items()
            }
            for split, skills in milestones.funnels(rows).items()
        },
        "grasped": milestones.grasps(rows),
        "confused": milestones.confusions(rows),
        "crashed": [
            {k: r[k] for k in ("policy", "split", "skill", "seed", "failure")}
            for r in rows
            if r["success"] is None
        ],
        "curves": {
            "train": _points(content.curves.train),
            "validation": {k: _points(v) for k, v in content.curves.validation.items()},
            "action_error": {k: _points(v) for k, v in content.curves.action_error.items()},
            "seconds": content.curves.seconds,
        },
        "caveats": list(content.caveats),
        "remarks": [ONE_RUN, *content.remarks],
    }


def _draw(
    content: ReportContent, table: RateTable, directory: Path, attempts: PictureAttempts
) -> dict[str, list[Path]]:
    """Draw every image that the content allows; return {name: paths} of those that succeed."""
    images: dict[str, list[Path]] = {}

    def draw(name: str, function: Callable[..., Path], path: Path, *arguments: Any) -> None:
        drawn = attempts.draw(f"{path.name} of the report", function, path, *arguments)
        images.setdefault(name, []).extend([drawn] if drawn else [])

    draw("bars", figures.success_bars, directory / "success.png", table)
    curves = content.curves
    if curves.train or curves.validation:
        values = (curves.train, curves.validation, curves.action_error, curves.seconds)
        draw("loss", figures.learning_curves, directory / "loss.png", *values)
    if content.chunks:
        draw("chunks", figures.action_chunks, directory / "chunks.png", content.chunks)
    for name, successful in (("successes", True), ("failures", False)):
        clips = _diverse_first([c for c in content.clips if c.row["success"] is successful])
        if clips:
            path = directory / f"{name}.png"
            title = "Successful episodes" if successful else "Failed episodes"
            draw(name, figures.film_strips, path, clips[:STRIP_EPISODES], title)
        videos = f"{name} videos"
        for clip in clips:
            stem = files.file_name("{split}-{skill}-{seed}".format(**clip.row))
            draw(videos, figures.video, directory / f"{stem}.gif", clip)
        images[videos] = images.get(videos, [])[: MAX_VIDEOS // 2]
    return images


def _diverse_first(clips: Sequence[VideoClip]) -> list[VideoClip]:
    """Return the clips sorted so that the first few cover different skills and splits."""
    counts: dict[Any, int] = {}
    keyed_clips = []
    for clip in clips:
        skill, split = clip.row["skill"], clip.row["split"]
        of_both = counts[skill, split] = counts.get((skill, split), -1) + 1
        of_skill = counts[skill] = counts.get(skill, -1) + 1
        keyed_clips.append(((of_both, of_skill), clip))
    return [clip for _, clip in sorted(keyed_clips, key=lambda x: x[0])]


def _points(curve: Sequence[tuple[float, float]]) -> list[list[float]]:
    return [[float(step), float(value)] for step, value in curve]


def _page(content: ReportContent, table: RateTable, images: Mapping[str, Sequence[Path]]) -> str:
    rates = success_html(table, content.rows, content.groups, content.caveats)
    sections = [
        _section("Success", rates + _figure(images, "bars", _BARS)),
        _section("Memorising or learning?", _gaps_html(content.rows)),
        _section("Videos", _videos_html(images)),
        _section("Why episodes fail", _failures_html(content.rows)),
        _section("How far episodes come", milestones.to_html(content.rows)),
        _section("Training", _facts_html(content) + _figure(images, "loss", _LOSS)),
        _section("Predicted and demonstrated actions", _figure(images, "chunks", _CHUNKS)),
        _section("Method", _method_html(content)),
    ]
    title = html.escape(content.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_CSS}</style></head>\n<body><main>\n<h1>{title}</h1>\n"
        f'<p class="lead">{html.escape(headline(content.rows, content.undemonstrated))}</p>\n'
        + "".join(sections)
        + "</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>\n" if body else ""


def _gaps_html(rows: Sequence[ResultRow]) -> str:
    items = "".join(
        f"<li>{html.escape(g.sentence)} "
        f"<small>(skills: {html.escape(', '.join(g.skills))})</small></li>\n"
        for g in success.generalization_gaps(rows)
    )
    following = success.instruction_following(rows)
    items += f"<li>{html.escape(following.sentence)}</li>\n" if following else ""
    if not items:
        return "<p>Unknown: no held-out split was evaluated.</p>"
    return f"<ul>{items}</ul>"


def _videos_html(images: Mapping[str, Sequence[Path]]) -> str:
    body = ""
    for name in ("successes", "failures"):
        videos = "".join(_img(p, p.stem) for p in images.get(f"{name} videos", ()))
        if videos:
            body += f'<h3>{name.capitalize()}</h3>\n<div class="films">{videos}</div>\n'
            body += _figure(images, name, "")
    return body


def _failures_html(rows: Sequence[ResultRow]) -> str:
    reasons = success.failure_counts(rows, policy="trained")
    if not reasons:
        return "<p>No episode failed.</p>"
    counts: dict[str, int] = {}
    for reason, count in reasons.items():
        kind = _failure_kind(reason)
        counts[kind] = counts.get(kind, 0) + count
    total = sum(counts.values())
    items = "".join(
        f"<li><b>{count}</b> of {total}: {html.escape(kind)}</li>\n"
        for kind, count in sorted(counts.items(), key=lambda x: -x[1])
    )
    return f"<ul>{items}</ul>"


def _failure_kind(reason: str) -> str:
    """Return a reason without object names: "touched red cube" → "touched the wrong object"."""
    if reason.startswith("did ") and reason.endswith(" instead"):
        return "did the scene's training task instead of the instructed one"
    if reason.startswith(("touched ", "grasped ")):
        return reason.split()[0] + " the wrong object"
    return reason


def _facts_html(content: ReportContent) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>\n"
        for k, v in content.facts.items()
    )
    return f'<table class="facts">{rows}</table>\n'


def _method_html(content: ReportContent) -> str:
    crashed = sum(r["success"] is None for r in content.rows)
    lines = [
        "Every episode starts from a fixed seed that no demonstration uses; with equal seeds, "
        "every policy meets the same scenes. Success is judged by the simulator's state.",
        "The untrained network has the same architecture with random parameters. It shows the "
        "success rate of chance: on a small table even random motion touches objects. The policy "
        "has learned something if it succeeds more often than that (p below 5 %).",
        "Rates have Wilson's 95 % intervals. Two sides of a comparison are paired scene by scene "
        "if most of their scenes are the same (Bonett and Price's interval, McNemar's test), and "
        "compared as independent episodes otherwise (Newcombe's, Fisher's). The p-values of gaps "
        "between seen and held-out tasks are adjusted for their number (Holm). Rates are equal "
        "within a margin if two one-sided tests at 5 % each say so.",
        f"{crashed} {'episode' if crashed == 1 else 'episodes'} crashed; rates exclude them."
        if crashed
        else "No episode crashed; rates include every episode.",
        *content.remarks,
    ]
    items = "".join(f"<li>{html.escape(line)}</li>\n" for line in lines)
    setup = html.escape(json.dumps(dict(content.setup), indent=1))
    summary = "<summary>Setup of the evaluation</summary>"
    return f"<ul>{items}</ul><details>{summary}<pre>{setup}</pre></details>"


def _figure(images: Mapping[str, Sequence[Path]], name: str, caption: str) -> str:
    note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return "".join(
        f"<figure>{_img(p, caption or name)}{note}</figure>\n" for p in images.get(name, ())
    )


def _img(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/{path.suffix[1:]};base64,{data}" alt="{html.escape(alt)}">'


_BARS = (
    "Success rate per skill and split with 95 % intervals. The narrow grey bar next to each is the "
    "untrained network. An interval is of one bar alone and does not show whether two bars differ; "
    "the tests of differences are in the first lines of the page and in “Memorising or learning?”."
)
_LOSS = (
    "Loss on training examples and on held-out demonstrations. A validation loss that rises while "
    "the training loss falls means that the policy memorises the demonstrations. The action error "
    "is the mean distance of sampled actions from the demonstrated ones, in normalised units."
)
_CHUNKS = (
    "Demonstrated actions after frames of held-out demonstrations (black), and the policy's "
    "predictions for the same frames (blue, several samples). A wide spread of the samples means "
    "that the policy is uncertain."
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
