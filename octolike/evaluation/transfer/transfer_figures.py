"""Figures of the transfer report: matrices, action distances, gradient curves, effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from octolike.evaluation import figures
from octolike.evaluation.transfer.gradient_agreement import GradientSummary
from octolike.evaluation.transfer.group_comparison import GroupComparison
from octolike.evaluation.transfer.transfer_effects import TransferEffect

# Red: opposed; blue: agreeing. Distinguishable with colour blindness.
SIGNED = LinearSegmentedColormap.from_list("signed", ["#b5422b", "#f7f7f5", "#2a6fb0"])
FAR = LinearSegmentedColormap.from_list("far", ["#f7f7f5", "#e08a2e"])
HELPS, HURTS, UNDECIDED = "#2a6fb0", "#b5422b", "#9aa1a8"


def pairs(path: Path, names: Sequence[str], comparisons: Sequence[GroupComparison]) -> Path:
    """Draw three matrices: agreement in similar states, action distance, image distance."""
    by_names = {(p.a, p.b): p for p in comparisons} | {(p.b, p.a): p for p in comparisons}
    agreement, actions, images = (np.full((len(names), len(names)), np.nan) for _ in range(3))
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if pair := by_names.get((a, b)):
                agreement[i, j] = pair.cosine_across
                actions[i, j] = pair.joint / max(pair.joint_floor, 1e-9)
                images[i, j] = pair.pictures / max(pair.pictures_floor, 1e-9)
    within: dict[str, list[float]] = {}
    for p in comparisons:
        for name in (p.a, p.b):
            within.setdefault(name, []).append(p.cosine_within)
    for i, name in enumerate(names):
        finite = [v for v in within.get(name, ()) if np.isfinite(v)]
        agreement[i, i] = np.mean(finite) if finite else np.nan
    with matplotlib.rc_context(figures.STYLE | {"axes.grid": False}):
        side = 1.5 + 0.62 * len(names)
        figure, axes = figures.new(3 * side + 1.8, side + 0.9, 1, 3)
        matrix(axes[0], names, agreement, SIGNED, 1, "Actions in similar states\n(cosine)")
        title = "Action distributions\n(distance / floor)"
        matrix(axes[1], names, actions, FAR, _top(actions), title)
        title = "Images\n(distance / floor)"
        matrix(axes[2], names, images, FAR, _top(images), title)
        return figures.save(figure, path)


def dimensions(path: Path, comparisons: Sequence[GroupComparison]) -> Path:
    """Draw the correlations within and across groups, per pair and action dimension."""
    kinds = {"mirrored": HURTS, "rescaled": "#e08a2e", "shifted": "#8c62a8", "unrelated": UNDECIDED}
    with matplotlib.rc_context(figures.STYLE):
        width = max(5.5, 2.6 + 0.62 * max(len(p.dimensions) for p in comparisons))
        figure, axes = figures.new(width, 2.5 * len(comparisons), len(comparisons))
        for axis, pair in zip(axes, comparisons, strict=True):
            x = np.arange(len(pair.dimensions))
            within = [d.within for d in pair.dimensions]
            axis.bar(x - 0.2, within, 0.38, color=figures.FLOOR)
            colours = [kinds.get(d.kind, HELPS) for d in pair.dimensions]
            axis.bar(x + 0.2, [d.across for d in pair.dimensions], 0.38, color=colours)
            for i, d in enumerate(pair.dimensions):
                if d.kind in kinds:
                    factor = f" ×{d.ratio:.2g}" if d.kind == "rescaled" else ""
                    y = max(d.across, 0) + 0.06
                    axis.text(i + 0.2, y, d.kind + factor, ha="center", fontsize=7)
            axis.set_xticks(x, [d.name for d in pair.dimensions])
            axis.axhline(0, color=figures.FAINT, lw=0.8)
            axis.set(ylim=(-1.1, 1.25), title=f"{pair.a} and {pair.b}", ylabel="correlation")
        axes[0].bar(0, 0, color=figures.FLOOR, label="two halves of one group")
        axes[0].bar(0, 0, color=HELPS, label="the two groups")
        axes[0].legend(loc="lower right", ncols=2, fontsize=8)
        return figures.save(figure, path)


def gradients(path: Path, summary: GradientSummary) -> Path:
    """Draw the cosine matrix, the conflict rate per module, and both over training."""
    names = list(summary.modules)
    with matplotlib.rc_context(figures.STYLE):
        side = 1.6 + 0.62 * len(summary.groups)
        height = max(side, 1.2 + 0.26 * len(names), 3.2)
        figure, axes = figures.new(side + 9.6, height, 1, 3)
        values = summary.cosine.copy()
        np.fill_diagonal(values, summary.within)
        axes[0].grid(visible=False)
        title = "Cosine of gradients\n(diagonal: two halves)"
        matrix(axes[0], summary.groups, values, SIGNED, 1, title)
        rates = [summary.modules[n][1] for n in names]
        colours = [HURTS if summary.modules[n][0] < 0 else HELPS for n in names]
        axes[1].barh(names, rates, color=colours)
        for i, n in enumerate(names):
            axes[1].text(
                rates[i] + 0.02, i, f"{summary.modules[n][0]:+.2f}", va="center", fontsize=7
            )
        axes[1].axvline(0.5, color=figures.FAINT, lw=0.8, ls=":")
        axes[1].set(xlim=(0, 1.15), title="Conflict rate per module\n(label: mean cosine)")
        axes[1].invert_yaxis()
        step, cosine, rate = summary.curve.T
        axes[2].plot(step, cosine, "o-", color=HELPS, ms=3, label="mean cosine")
        axes[2].plot(step, rate, "o-", color=HURTS, ms=3, label="conflict rate")
        axes[2].axhline(0, color=figures.FAINT, lw=0.8)
        low = min(-0.1, float(np.nanmin(cosine)) - 0.1)
        axes[2].set(title="Over training", xlabel="optimiser step", ylim=(low, 1.05))
        axes[2].legend()
        return figures.save(figure, path)


def effects(path: Path, transfer_effects: Sequence[TransferEffect]) -> Path:
    """Draw gains with intervals, in one panel for success and one for the held-out error."""
    measures = [m for m in ("success", "error") if any(e.measure == m for e in transfer_effects)]
    rows = max(sum(e.measure == m for e in transfer_effects) for m in measures)
    titles = {"success": "Success: gain in points", "error": "Held-out error: reduction"}
    with matplotlib.rc_context(figures.STYLE):
        height = 1.3 + 0.34 * rows
        figure, axes = figures.new(7.2 * len(measures), height, 1, len(measures))
        for axis, measure in zip(axes, measures, strict=True):
            measured = [e for e in transfer_effects if e.measure == measure]
            scale = 100 if measure == "success" else 1
            for i, e in enumerate(measured):
                colour = {"helps": HELPS, "hurts": HURTS}.get(e.verdict, UNDECIDED)
                axis.barh(i, scale * e.gain, 0.62, color=colour)
                axis.plot(scale * e.gain, i, "o", color=colour, ms=4)
                if np.isfinite(e.low):
                    span = [[scale * (e.gain - e.low)], [scale * (e.high - e.gain)]]
                    axis.errorbar(scale * e.gain, i, xerr=span, color=figures.INK, lw=1, capsize=2)
            axis.set_yticks(range(len(measured)), [_label(e) for e in measured], fontsize=8)
            axis.axvline(0, color=figures.INK, lw=0.8)
            axis.invert_yaxis()
            axis.grid(axis="y", visible=False)
            axis.set(title=titles[measure], xlabel="← sharing hurts      sharing helps →")
        for colour, word in ((HELPS, "helps"), (HURTS, "hurts"), (UNDECIDED, "undecided")):
            axes[-1].plot([], [], "s", color=colour, label=word)
        axes[-1].legend(fontsize=8)
        return figures.save(figure, path)


def matrix(
    axis: Any, names: Sequence[str], values: np.ndarray, colours: Any, top: float, title: str
) -> None:
    """Draw a matrix [G, G] with its numbers; NaN is grey. SIGNED maps start at -top, not 0."""
    low = -top if colours is SIGNED else 0.0
    axis.set_facecolor("#e9ebed")
    axis.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=top)
    for i, j in np.argwhere(np.isfinite(values)):
        text = f"{values[i, j]:+.2f}" if colours is SIGNED else f"{values[i, j]:.1f}"
        dark = abs(values[i, j]) > 0.65 * top and colours is SIGNED
        axis.text(j, i, text, ha="center", va="center", fontsize=8, color="w" if dark else None)
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=10)


def draw(
    directory: Path,
    names: Sequence[str],
    comparisons: Sequence[GroupComparison],
    summaries: Mapping[str, GradientSummary],
    transfer_effects: Sequence[TransferEffect],
) -> dict[str, Path]:
    """Draw every figure that the results allow; return {name: path}."""
    paths = {}
    if comparisons:
        paths["pairs"] = pairs(directory / "pairs.png", names, comparisons)
        if probed := [p for p in comparisons if any(np.isfinite(d.across) for d in p.dimensions)]:
            paths["dimensions"] = dimensions(directory / "dimensions.png", probed)
    for variant, summary in summaries.items():
        path = directory / f"gradients_{variant}.png"
        paths[f"gradients {variant}"] = gradients(path, summary)
    if transfer_effects:
        paths["effects"] = effects(directory / "effects.png", transfer_effects)
    return paths


def _label(effect: TransferEffect) -> str:
    if effect.kind == "from":
        return f"{effect.source} → {effect.group}"
    return f"{effect.kind}: {effect.group}"


def _top(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return max(3.0, float(finite.max())) if len(finite) else 3.0
