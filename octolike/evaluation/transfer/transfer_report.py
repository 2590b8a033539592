"""The transfer report: an HTML page with embedded figures, the figures, and report.json."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.evaluation.transfer import transfer_figures
from octolike.evaluation.transfer.action_agreement import MIN_PROBES
from octolike.evaluation.transfer.advice import VERDICTS, Advice
from octolike.evaluation.transfer.gradient_agreement import GradientConflict, GradientSummary
from octolike.evaluation.transfer.group_comparison import GroupComparison
from octolike.evaluation.transfer.transfer_effects import TransferEffect

LISTED_EFFECTS, LISTED_CONFLICTS, LISTED_ADVICES = 4, 5, 3  # in the summary


@dataclass(frozen=True)
class TransferReportContent:
    """The content of a report; the page states which parts are missing.

    names: names of the groups; facts: {name: text}.
    """

    title: str
    names: Sequence[str]
    facts: Mapping[str, str] = field(default_factory=dict)
    pairs: Sequence[GroupComparison] = ()
    advices: Sequence[Advice] = ()
    gradients: Mapping[str, GradientSummary] = field(default_factory=dict)
    effects: Sequence[TransferEffect] = ()


def write(content: TransferReportContent, directory: Path) -> Path:
    """Write report.json, the figures and report.html into a directory; return the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    c = content
    figures = transfer_figures.draw(directory, c.names, c.pairs, c.gradients, c.effects)
    text = json.dumps(to_json(c), indent=2, allow_nan=False) + "\n"
    files.write_text(directory / "report.json", text)
    files.write_text(directory / "report.html", _page(c, figures))
    return directory / "report.html"


def to_json(content: TransferReportContent) -> dict[str, Any]:
    """Return the content of report.json."""
    return {
        "title": content.title,
        "summary": summary(content),
        "groups": list(content.names),
        "facts": dict(content.facts),
        "before": {
            "advice": [
                {
                    "a": x.a,
                    "b": x.b,
                    "verdict": x.verdict,
                    "findings": [vars(f) for f in x.findings],
                }
                for x in content.advices
            ],
            "pairs": [pair.to_json() for pair in content.pairs],
        },
        "during": {k: g.to_json() for k, g in content.gradients.items()},
        "after": [effect.to_json() for effect in content.effects],
    }


def summary(content: TransferReportContent) -> list[str]:
    """Return the results as sentences: before, during and after training."""
    lines = []
    advices = _worst_first(content.advices)
    if advices:
        counts = {v: sum(a.verdict == v for a in advices) for v in VERDICTS}
        verdicts = ", ".join(f"{v} {n}" for v, n in counts.items() if n)
        plural = "" if len(advices) == 1 else "s"
        lines.append(f"Before training: advice on {len(advices)} pair{plural}: {verdicts}.")
        lines += [a.sentence for a in advices[:LISTED_ADVICES] if a.verdict != "share"]
    lines += conflict_sentences(content.gradients)
    if content.effects:
        lines.append(effects_sentence(content.effects))
    return lines or ["Nothing has been compared yet."]


def effects_sentence(effects: Sequence[TransferEffect]) -> str:
    """Return the number of effects that help and hurt, and the negative transfer."""
    hurts = [e for e in effects if e.verdict == "hurts"]
    helps = [e for e in effects if e.verdict == "helps"]
    counts = (
        f"After training: sharing helps in {len(helps)} and hurts in {len(hurts)} of "
        f"{len(effects)} comparisons; {len(effects) - len(helps + hurts)} are undecided"
    )
    if not hurts:
        return f"{counts}. No negative transfer is significant."
    omitted = len(hurts) - LISTED_EFFECTS
    more = f" And {omitted} more, listed below." if omitted > 0 else ""
    listed = " ".join(e.sentence for e in hurts[:LISTED_EFFECTS])
    return f"{counts}. Negative transfer: {listed}{more}"


def conflict_sentences(gradients: Mapping[str, GradientSummary]) -> list[str]:
    """Return the conflicting groups of each variant, and the variants without conflicts."""
    lines = [
        f"During training ({variant}), conflicting gradients: {_list_conflicts(conflicts)}."
        for variant, g in gradients.items()
        if (conflicts := g.conflicting())
    ]
    without = [f"{k} ({g.rate:.0%})" for k, g in gradients.items() if not g.conflicting()]
    if without:
        lines.append(
            f"During training, no pair conflicts significantly in {', '.join(without)} (in "
            "brackets: share of single comparisons with a negative cosine). This does not "
            "exclude conflicts, since common features can hide them."
        )
    return lines


def _gradients_text(g: GradientSummary) -> str:
    conflicts = g.conflicting()
    within = g.within[np.isfinite(g.within)]
    ceiling = f"{within.mean():+.2f}" if len(within) else "unknown"
    cost = (
        f" One comparison takes as long as {g.cost:.1f} training steps."
        if np.isfinite(g.cost)
        else ""
    )
    return (
        f"{g.rate:.0%} of the compared pairs of gradients conflict. Two batches of the same group "
        f"would have a cosine of {ceiling}, the upper limit set by noise. "
        + (
            f"Conflicting gradients: {_list_conflicts(conflicts)}."
            if conflicts
            else "In no period of training is a pair's cosine significantly below zero."
        )
        + f" Number of comparisons: {g.comparisons}.{cost}"
    )


def _list_conflicts(conflicts: Sequence[GradientConflict]) -> str:
    listed = "; ".join(c.sentence for c in conflicts[:LISTED_CONFLICTS])
    omitted = len(conflicts) - LISTED_CONFLICTS
    return listed + (f"; and {omitted} more" if omitted > 0 else "")


def _worst_first(advices: Sequence[Advice]) -> list[Advice]:
    return sorted(advices, key=lambda a: -VERDICTS.index(a.verdict))


def _page(content: TransferReportContent, figures: Mapping[str, Path]) -> str:
    title = html.escape(content.title)
    lines = "".join(f"<li>{html.escape(line)}</li>\n" for line in summary(content))
    facts = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>\n"
        for k, v in content.facts.items()
    )
    sections = [
        _section("Summary", f"<ul>{lines}</ul>"),
        _section("Before training: can the groups share a model?", _before_html(content, figures)),
        _section("During training: do the gradients agree?", _during_html(content, figures)),
        _section("After training: did sharing help?", _after_html(content, figures)),
        _section("Data and runs", f"<table>{facts}</table>" if facts else ""),
        _section("Method", "".join(f"<p>{html.escape(x)}</p>\n" for x in _METHOD)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_CSS}</style></head>\n<body><main>\n<h1>{title}</h1>\n"
        + "".join(sections)
        + "</main></body></html>\n"
    )


def _before_html(content: TransferReportContent, figures: Mapping[str, Path]) -> str:
    if not content.pairs:
        return "<p>Not measured yet: run the stage <code>before</code>.</p>"
    rows = ""
    for advice in _worst_first(content.advices):
        reasons = "".join(f"<li>{html.escape(f.sentence)}</li>" for f in advice.findings)
        shade = VERDICTS.index(advice.verdict)
        rows += (
            f"<tr><th>{html.escape(advice.a)}<br>{html.escape(advice.b)}</th>"
            f'<td class="v{shade}">{html.escape(advice.verdict)}</td>'
            f"<td><ul>{reasons}</ul></td></tr>\n"
        )
    table = f"<table><tr><th>pair</th><th>advice</th><th>reasons</th></tr>\n{rows}</table>"
    return (
        f'<div class="wide">{table}</div>'
        + _figure(figures, "pairs", _PAIRS)
        + _figure(figures, "dimensions", _DIMENSIONS)
        + _numbers_html(content.pairs)
    )


def _numbers_html(pairs: Sequence[GroupComparison]) -> str:
    """Return every pair's distances per dimension, in a collapsed section."""
    body = ""
    for p in pairs:
        rows = "".join(
            f"<tr><th>{html.escape(d.name)}</th>"
            + "".join(
                f"<td>{_number(v)}</td>"
                for v in (d.raw, d.scaled, d.floor, d.normalised, d.within, d.across, d.ratio)
            )
            + f"<td>{d.kind}</td></tr>\n"
            for d in p.dimensions
        )
        states = (
            f"{p.probes} similar states by {html.escape(', '.join(p.states))}"
            if p.probes >= MIN_PROBES
            else "too few similar states"
        )
        body += (
            f"<h3>{html.escape(p.a)} and {html.escape(p.b)}</h3><p>{states}; overlap of states "
            f"{_number(p.overlap)}; joint distance of actions {_number(p.joint)} (floor "
            f"{_number(p.joint_floor)}; each group normalised separately "
            f"{_number(p.joint_normalised)}); colours {_number(p.colours)} (floor "
            f"{_number(p.colours_floor)}); brightness {_number(p.brightness)}; same instructions "
            f"{_number(p.same_instructions)}</p>"
            "<table><tr><th></th><th>distance, robot units</th><th>in std</th><th>floor</th>"
            "<th>normalised separately</th><th>correlation within</th><th>across</th>"
            f"<th>ratio</th><th>actions</th></tr>\n{rows}</table>"
        )
    return f"<details><summary>All numbers</summary>{body}</details>"


def _during_html(content: TransferReportContent, figures: Mapping[str, Path]) -> str:
    if not content.gradients:
        return (
            "<p>Not measured yet: run the stage <code>during</code>, or train with "
            "<code>train.conflicts_every</code>.</p>"
        )
    return "".join(
        f"<h3>{html.escape(variant)}</h3><p>{html.escape(_gradients_text(g))}</p>"
        + _figure(figures, f"gradients {variant}", _GRADIENTS)
        for variant, g in content.gradients.items()
    )


def _after_html(content: TransferReportContent, figures: Mapping[str, Path]) -> str:
    if not content.effects:
        return "<p>Not measured yet: run the stage <code>after</code>.</p>"
    lines = "".join(
        f'<li class="{e.verdict}">{html.escape(e.sentence)}</li>\n' for e in content.effects
    )
    chance = (
        "P-values are adjusted (Holm): each list, of success and of error, has a 5 % chance of one "
        "false alarm."
    )
    return _figure(figures, "effects", _EFFECTS) + f"<ul>{lines}</ul><p>{chance}</p>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>\n" if body else ""


def _figure(figures: Mapping[str, Path], name: str, caption: str) -> str:
    if name not in figures:
        return ""
    data = base64.b64encode(figures[name].read_bytes()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>\n"
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "–"


_PAIRS = (
    "Left: cosine between the actions of two groups in similar states; on the diagonal, between "
    "two halves of one group. Red means opposite actions. Middle and right: distances of actions "
    "and of images, divided by the floor, the distance between two halves of one group."
)
_DIMENSIONS = (
    "Correlation between the mean actions of neighbouring states, per action dimension. Grey: "
    "between two halves of one group, the highest value to expect. Coloured: between the two "
    "groups; a label names the kind of contradiction."
)
_GRADIENTS = (
    "Left: mean cosine between the groups' gradients on their common parameters. Middle: how often "
    "a pair conflicts in each part of the network; pure noise conflicts half of the time. Right: "
    "both over training."
)
_EFFECTS = (
    "Effect of sharing on each group, with 95 % intervals. Coloured: significant after adjustment "
    "for the number of effects."
)
_METHOD = (
    "Similar states are nearest neighbours in proprio and small images, from other episodes, and "
    "with the same instruction if the groups share instructions. Distributions alone do not show "
    "that two groups answer the same scene with opposite actions.",
    "Noise moves the cosine of two gradients towards zero. The cosine between two batches of the "
    "same group (extrapolated from half batches) shows the size of this effect: compare with it, "
    "not with one.",
    "Mind the number of steps. If all groups together train for as many steps as their single runs "
    "in sum, each group's data are seen as often as in its single run, at the same total cost; "
    "with fewer steps they are seen less often. The effect of one group on another is measured by "
    "leaving it out of the mix.",
    "Intervals of success are over training seeds and scenes, paired by scene; those of errors "
    "over seeds (Welch). Held-out errors are in standard deviations of the group's own actions.",
)
_CSS = """
body{margin:0;background:#f5f6f7;color:#22262b;font:16px/1.55 system-ui,-apple-system,"Segoe UI",
 Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:66rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:2rem;margin:0 0 1rem}h2{font-size:1.3rem;margin:0 0 .6rem}h3{font-size:1rem}
section{background:#fff;border:1px solid #e4e6e9;border-radius:10px;padding:1.4rem 1.6rem;
 margin:0 0 1.2rem}
p,li{max-width:54rem}ul{padding-left:1.2rem;margin:.3rem 0}.wide{overflow-x:auto}
table{border-collapse:collapse}th,td{text-align:left;vertical-align:top;padding:.35rem .8rem;
 border-bottom:1px solid #e4e6e9}th{font-weight:600;white-space:nowrap}
details table{font-size:.8rem}summary{cursor:pointer;color:#2a6fb0}
.v0{background:#dceaf6}.v1{background:#e9f0ee}.v2{background:#fbeed9}.v3{background:#f8dfd2}
.v4{background:#f2c9bf}.hurts{color:#b5422b;font-weight:600}.helps{color:#2a6fb0}
figure{margin:1.2rem 0 0}figure img{max-width:100%;height:auto}
figcaption{color:#5b626a;font-size:.88rem;max-width:54rem}
"""
