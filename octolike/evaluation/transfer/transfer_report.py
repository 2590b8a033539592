"""The transfer report: one HTML page with its pictures inside, the pictures, and report.json."""

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
from octolike.evaluation.transfer.advice import VERDICTS, Advice
from octolike.evaluation.transfer.gradient_agreement import GradientConflict, GradientSummary
from octolike.evaluation.transfer.group_comparison import FEWEST, GroupComparison
from octolike.evaluation.transfer.transfer_effects import TransferEffect


@dataclass(frozen=True)
class TransferReportContent:
    """What a report is made of; whatever is missing is said to be missing.

    names: of the groups; facts: {what: value} in words.
    """

    title: str
    names: Sequence[str]
    facts: Mapping[str, str] = field(default_factory=dict)
    pairs: Sequence[GroupComparison] = ()
    advices: Sequence[Advice] = ()
    gradients: Mapping[str, GradientSummary] = field(default_factory=dict)
    effects: Sequence[TransferEffect] = ()


def write(material: TransferReportContent, directory: Path) -> Path:
    """Write report.json, the pictures and report.html into a directory; returns the page."""
    directory.mkdir(parents=True, exist_ok=True)
    m = material
    drawn = transfer_figures.draw(directory, m.names, m.pairs, m.gradients, m.effects)
    text = json.dumps(to_json(m), indent=2, allow_nan=False) + "\n"
    files.write_text(directory / "report.json", text)
    files.write_text(directory / "report.html", _page(m, drawn))
    return directory / "report.html"


def to_json(material: TransferReportContent) -> dict[str, Any]:
    """Return what report.json holds."""
    return {
        "title": material.title,
        "summary": summary(material),
        "groups": list(material.names),
        "facts": dict(material.facts),
        "before": {
            "advice": [
                {
                    "a": x.a,
                    "b": x.b,
                    "verdict": x.verdict,
                    "findings": [vars(f) for f in x.findings],
                }
                for x in material.advices
            ],
            "pairs": [pair.to_json() for pair in material.pairs],
        },
        "during": {k: g.to_json() for k, g in material.gradients.items()},
        "after": [effect.to_json() for effect in material.effects],
    }


def summary(material: TransferReportContent) -> list[str]:
    """Return what was found, in plain sentences: before, during, after."""
    lines = []
    worst = _worst_first(material.advices)
    if worst:
        counts = {v: sum(a.verdict == v for a in worst) for v in VERDICTS}
        told = ", ".join(f"{v} {n}" for v, n in counts.items() if n)
        plural = "" if len(worst) == 1 else "s"
        lines.append(f"Before training, of {len(worst)} pair{plural}: {told}.")
        lines += [a.sentence for a in worst[:3] if a.verdict != "share"]
    lines += gradients_in_words(material.gradients)
    if material.effects:
        lines.append(effects_in_words(material.effects))
    return lines or ["Nothing has been compared yet."]


def effects_in_words(found: Sequence[TransferEffect]) -> str:
    """Return how many effects help and hurt, and name the negative transfer."""
    hurts = [e for e in found if e.verdict == "hurts"]
    helps = [e for e in found if e.verdict == "helps"]
    start = (
        f"After training, of {len(found)} comparisons sharing helps in {len(helps)}, hurts in "
        f"{len(hurts)}, and nothing can be said beyond chance of {len(found) - len(helps + hurts)}"
    )
    if not hurts:
        return f"{start}. No negative transfer was found."
    more = f" And {len(hurts) - 4} more, listed below." if len(hurts) > 4 else ""
    return f"{start}. Negative transfer: " + " ".join(e.sentence for e in hurts[:4]) + more


def gradients_in_words(gradients: Mapping[str, GradientSummary]) -> list[str]:
    """Return who pulls against whom in which variant, and the variants where nobody does."""
    lines = [
        f"During training ({variant}), pulling against one another: {_pairs_in_words(pairs)}."
        for variant, found in gradients.items()
        if (pairs := found.conflicting())
    ]
    calm = [f"{k} ({x.rate:.0%})" for k, x in gradients.items() if not x.conflicting()]
    if calm:
        lines.append(
            f"During training, no pair pulls apart beyond chance in {', '.join(calm)} (in "
            "brackets: single comparisons of gradients with a cosine below zero). That is no proof "
            "of harmony, since what is learned in common can hide a conflict."
        )
    return lines


def _gradients_in_words(found: GradientSummary) -> str:
    pairs = found.conflicting()
    within = found.within[np.isfinite(found.within)]
    ceiling = f"{within.mean():+.2f}" if len(within) else "unknown"
    return (
        f"{found.rate:.0%} of the compared pairs of gradients conflict; two batches of one group "
        f"would have a cosine of {ceiling}, which is what noise leaves of full agreement. "
        + (
            f"Pulling against one another: {_pairs_in_words(pairs)}."
            if pairs
            else "In no period of training is a pair's cosine below zero beyond chance."
        )
    )


def _pairs_in_words(pairs: Sequence[GradientConflict]) -> str:
    named = "; ".join(pair.sentence for pair in pairs[:5])
    return named + (f"; and {len(pairs) - 5} more" if len(pairs) > 5 else "")


def _worst_first(advices: Sequence[Advice]) -> list[Advice]:
    return sorted(advices, key=lambda a: -VERDICTS.index(a.verdict))


def _page(material: TransferReportContent, drawn: Mapping[str, Path]) -> str:
    title = html.escape(material.title)
    lead = "".join(f"<li>{html.escape(line)}</li>\n" for line in summary(material))
    facts = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>\n"
        for k, v in material.facts.items()
    )
    sections = [
        _section("In short", f"<ul>{lead}</ul>"),
        _section("Before training: should they be trained together?", _before(material, drawn)),
        _section("During training: do their gradients agree?", _during(material, drawn)),
        _section("After training: did it help?", _after(material, drawn)),
        _section("What was compared", f"<table>{facts}</table>" if facts else ""),
        _section("How to read this", "".join(f"<p>{html.escape(x)}</p>\n" for x in _METHOD)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_CSS}</style></head>\n<body><main>\n<h1>{title}</h1>\n"
        + "".join(sections)
        + "</main></body></html>\n"
    )


def _before(material: TransferReportContent, drawn: Mapping[str, Path]) -> str:
    if not material.pairs:
        return "<p>Not measured yet: run the stage <code>before</code>.</p>"
    rows = ""
    for advice in _worst_first(material.advices):
        why = "".join(f"<li>{html.escape(f.sentence)}</li>" for f in advice.findings)
        shade = VERDICTS.index(advice.verdict)
        rows += (
            f"<tr><th>{html.escape(advice.a)}<br>{html.escape(advice.b)}</th>"
            f'<td class="v{shade}">{html.escape(advice.verdict)}</td><td><ul>{why}</ul></td></tr>\n'
        )
    table = f"<table><tr><th>pair</th><th>advice</th><th>why</th></tr>\n{rows}</table>"
    return (
        f'<div class="wide">{table}</div>'
        + _figure(drawn, "pairs", _PAIRS)
        + _figure(drawn, "dimensions", _DIMENSIONS)
        + _numbers(material.pairs)
    )


def _numbers(pairs: Sequence[GroupComparison]) -> str:
    """Return every pair's distances per dimension, folded away."""
    out = ""
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
        told = (
            f"{p.probes} similar states by {', '.join(p.states)}"
            if p.probes >= FEWEST
            else "too few similar states"
        )
        out += (
            f"<h3>{html.escape(p.a)} and {html.escape(p.b)}</h3><p>{told}; overlap of states "
            f"{_number(p.overlap)}; joint distance {_number(p.joint)} (floor "
            f"{_number(p.joint_floor)}; each normalised by itself {_number(p.joint_normalised)}); "
            f"colours {_number(p.colours)} (floor {_number(p.colours_floor)}); brightness "
            f"{_number(p.brightness)}; same instructions {_number(p.same_instructions)}</p>"
            "<table><tr><th></th><th>distance, robot units</th><th>in std</th><th>floor</th>"
            "<th>own normalisation</th><th>correlation within</th><th>across</th><th>ratio</th>"
            f"<th>actions</th></tr>\n{rows}</table>"
        )
    return f"<details><summary>All numbers</summary>{out}</details>"


def _during(material: TransferReportContent, drawn: Mapping[str, Path]) -> str:
    if not material.gradients:
        return (
            "<p>Not measured yet: run the stage <code>during</code>, or train with "
            "<code>train.conflicts_every</code>.</p>"
        )
    out = ""
    for variant, found in material.gradients.items():
        cost = (
            f"One comparison takes as long as {found.cost:.1f} training steps."
            if np.isfinite(found.cost)
            else ""
        )
        words = f"{_gradients_in_words(found)} Comparisons: {found.comparisons}. {cost}"
        out += f"<h3>{html.escape(variant)}</h3><p>{html.escape(words)}</p>"
        out += _figure(drawn, f"gradients {variant}", _GRADIENTS)
    return out


def _after(material: TransferReportContent, drawn: Mapping[str, Path]) -> str:
    if not material.effects:
        return "<p>Not measured yet: run the stage <code>after</code>.</p>"
    lines = "".join(
        f'<li class="{e.verdict}">{html.escape(e.sentence)}</li>\n' for e in material.effects
    )
    count = sum(np.isfinite(e.low) for e in material.effects)
    chance = (
        f"Of {count} intervals of 95 %, {count / 20:.1f} are expected to exclude zero by chance "
        "alone."
    )
    return _figure(drawn, "effects", _EFFECTS) + f"<ul>{lines}</ul><p>{chance}</p>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>\n" if body else ""


def _figure(drawn: Mapping[str, Path], what: str, caption: str) -> str:
    if what not in drawn:
        return ""
    data = base64.b64encode(drawn[what].read_bytes()).decode()
    words = html.escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{words}">'
        f"<figcaption>{words}</figcaption></figure>\n"
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "–"


_PAIRS = (
    "Left: how alike the actions of two groups are in similar states; on the diagonal, of two "
    "halves of one group. Red means opposite actions. Middle and right: distances of actions and "
    "of pictures as multiples of the floor, the distance of two halves of one group."
)
_DIMENSIONS = (
    "Per action dimension, the correlation of the mean actions of neighbouring states. Grey: "
    "between two halves of one group, the most that can be expected. Coloured: between the two "
    "groups; what contradicts is named."
)
_GRADIENTS = (
    "Left: mean cosine of the groups' gradients on the parameters that both move. Middle: how "
    "often a pair conflicts in each part of the network; pure noise gives half of the time. "
    "Right: both over training."
)
_EFFECTS = (
    "What sharing did to each group, with 95 % intervals. Blue and red: the interval excludes zero."
)
_METHOD = (
    "Similar states are nearest neighbours in proprio and small pictures, of another episode, and "
    "of the same instruction where the groups share instructions. Distributions alone do not show "
    "that two groups answer the same scene by opposite actions.",
    "The cosine of two noisy gradients is nearer to zero than that of their means. That of two "
    "batches of one group (computed from the halves of its examples) shows how much noise there "
    "is: compare with that, not with one.",
    "Mind the steps: all groups together, trained for as many steps as their single runs take in "
    "sum, see each group's data as often as its single run does, at the same cost; in fewer steps "
    "they see them less. The effect of one group on another is that of leaving it out of the mix.",
    "Intervals are Newcombe's over episodes and Welch's over seeds; of success the wider counts. "
    "Held-out errors are in standard deviations of the group's own actions.",
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
