"""Figures of a run: learning curves, success bars, film strips, action chunks, videos.

Every function takes plain arrays and result rows, writes one file, and returns its path.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image, ImageDraw, ImageFont

from octolike import files
from octolike.evaluation.statistics import SuccessRate
from octolike.evaluation.success import split_name
from octolike.plain_figure import PlainFigure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, FAINT, GRID = "#22262b", "#7b828a", "#e4e6e9"
SUCCESS, FAILURE, FLOOR = "#2e8b57", "#c2452d", "#b4b9bf"
PREDICTED, DEMONSTRATED = "#2a6fb0", "#22262b"
SPLIT_COLOURS = {
    "train": "#2a6fb0",
    "held_out_combination": "#e08a2e",
    "held_out_phrasing": "#4a9d8e",
    "held_out_family": "#8c62a8",
    "counterfactual": "#c2555f",
    "distractors": "#7a8b99",
}
OTHER_COLOURS = ("#a1623a", "#6b8e23", "#b0467f")
STYLE: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "text.parse_math": False,  # names and instructions may contain "$"
}
DPI = 144


@dataclass(frozen=True)
class VideoClip:
    """An episode's result row and its images, each uint8 [h, w, 3], after `steps` steps."""

    row: Mapping[str, Any]
    images: Sequence[np.ndarray]
    steps: Sequence[int]

    @property
    def verdict(self) -> str:
        """'success after 12 steps', or 'failure: ' and the reason."""
        if self.row["success"]:
            return f"success after {self.row['steps']} steps"
        return f"failure: {self.row['failure']}"


@dataclass(frozen=True)
class ChunkComparison:
    """Demonstrated and predicted action chunks of n validation frames, in the robot's units.

    images: uint8 [n, h, w, 3]; instructions: n; names: of the A action dimensions; demonstrated:
    [n, H, A]; mask: bool [n, H, A], False past the end of the demonstration; predicted:
    [n, S, H, A], S samples each.
    """

    images: np.ndarray
    instructions: Sequence[str]
    names: Sequence[str]
    demonstrated: np.ndarray
    mask: np.ndarray
    predicted: np.ndarray


def split_colour(split: str, index: int = 0) -> str:
    """Return the colour of a split; `index` selects the colour of an unknown split."""
    return SPLIT_COLOURS.get(split, OTHER_COLOURS[index % len(OTHER_COLOURS)])


def learning_curves(
    path: Path,
    train: Sequence[tuple[float, float]],
    validation: Mapping[str, Sequence[tuple[float, float]]],
    action_error: Mapping[str, Sequence[tuple[float, float]]],
    seconds: float | None,
) -> Path:
    """Draw the losses over optimiser steps, and in a second panel the error of sampled actions.

    Args:
        path: the PNG file.
        train: (step, loss).
        validation: {dataset: (step, loss) on held-out demonstrations}.
        action_error: {dataset: (step, error)}; the second panel is drawn only if not empty.
        seconds: training time so far, for the title.
    """
    panels = 2 if action_error else 1
    with matplotlib.rc_context(STYLE):
        figure, axes = new(5.2 * panels if panels > 1 else 7.4, 3.5, 1, panels)
        if train:
            steps, losses = np.array(train, float).T
            axes[0].plot(steps, losses, color=INK, alpha=0.18, lw=1)
            axes[0].plot(steps, _smooth(losses), color=INK, lw=1.8, label="training, smoothed")
        for axis, curves in zip(axes, (validation, action_error)):
            for i, (name, curve) in enumerate(curves.items()):
                steps, values = np.array(curve, float).T
                colour = list(SPLIT_COLOURS.values())[i % len(SPLIT_COLOURS)]
                axis.plot(steps, values, "o-", color=colour, ms=4, lw=1.8, label=f"held-out {name}")
        time = f", {duration(seconds)} of training" if seconds else ""
        axes[0].set(title=f"Loss{time}", ylabel="loss")
        _scale(axes[0], [v for c in (train, *validation.values()) for _, v in c])
        if action_error:
            axes[1].set(title="Error of sampled actions", ylabel="normalised units")
            axes[1].set_ylim(bottom=0)
        for axis in axes:
            axis.set_xlabel("optimiser step")
            axis.set_xlim(left=0)
            axis.legend()
        return save(figure, path)


def success_bars(
    path: Path,
    table: Mapping[str, Mapping[str, Mapping[str, SuccessRate]]],
    title: str = "Success rate in closed loop",
) -> Path:
    """Draw success per skill and split with 95 % intervals, next to the untrained rate in grey.

    table: as returned by `success.rate_table`.
    """
    trained = table["trained"]
    splits = list(trained)
    skills = list(dict.fromkeys(k for rates in trained.values() for k in rates if k != "all"))
    skills += ["all"] if len(skills) > 1 else []
    width = 0.8 / len(splits)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new(max(8.0, 1.6 + 1.25 * len(skills)), 3.9, 1)
        for i, split in enumerate(splits):
            for j, skill in enumerate(skills):
                if (rate := trained[split].get(skill)) and rate.episodes:
                    untrained = table.get("untrained", {}).get(split, {}).get(skill)
                    left = j - 0.4 + i * width
                    share = 0.62 if untrained else 0.9
                    _bar(axis, left, width * share, rate, split_colour(split, i), INK)
                    if untrained and untrained.episodes:
                        _bar(axis, left + width * share, width * 0.28, untrained, FLOOR, FAINT)
                    place = (left + width * share / 2, rate.interval[1] + 0.015)
                    axis.text(*place, f"{rate.rate:.0%}", ha="center", fontsize=7.5)
            axis.bar(0, 0, color=split_colour(split, i), label=split_name(split))
        if "untrained" in table:
            axis.bar(0, 0, color=FLOOR, label="untrained network")
        axis.set_xticks(range(len(skills)), [s if s != "all" else "all skills" for s in skills])
        axis.set(title=title, ylabel="successful episodes", ylim=(0, 1.08))
        axis.set_yticks(np.linspace(0, 1, 6), [f"{v:.0%}" for v in np.linspace(0, 1, 6)])
        axis.grid(axis="x", visible=False)
        if "all" in skills and len(skills) > 2:
            axis.axvline(len(skills) - 1.5, color=FAINT, lw=0.8, ls=":")
        axis.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.1), handlelength=1.1)
        return save(figure, path)


def film_strips(path: Path, clips: Sequence[VideoClip], title: str, frames: int = 6) -> Path:
    """Draw one row of images per episode, with the instruction and the outcome above it."""
    side, gap, above = 1.7, 0.08, 0.62  # inches: an image, between images, above a row
    width, height = frames * (side + gap) + gap, len(clips) * (side + above) + 0.45
    with matplotlib.rc_context(STYLE):
        figure = PlainFigure(figsize=(width, height), facecolor="white")
        figure.text(gap / width, 1 - 0.12 / height, title, weight="bold", size=13, va="top")
        for i, clip in enumerate(clips):
            indices = np.unique(np.linspace(0, len(clip.images) - 1, frames).round().astype(int))
            bottom = height - 0.25 - (i + 1) * (side + above)
            for j, index in enumerate(indices):
                left = gap + j * (side + gap)
                box = (left / width, bottom / height, side / width, side / height)
                axis = figure.add_axes(box, xticks=[], yticks=[])
                axis.imshow(clip.images[index], interpolation="lanczos")
                axis.text(
                    0.03, 0.03, f"step {clip.steps[index]}", transform=axis.transAxes, size=7.5
                )
                colour = SUCCESS if clip.row["success"] else FAILURE
                for spine in axis.spines.values():
                    spine.set(visible=index == indices[-1], color=colour, linewidth=3)
            line = (bottom + side + 0.07) / height
            words = f"“{shorten(clip.row['instruction'])}”"
            figure.text(gap / width, line, words, size=10.5, weight="bold")
            verdict = f"{clip.verdict} · {split_name(clip.row['split'])}"
            figure.text(1 - gap / width, line, verdict, size=9, color=colour, ha="right")
        return save(figure, path)


def action_chunks(path: Path, chunks: ChunkComparison) -> Path:
    """Draw demonstrated and predicted actions: a row per frame, a column per dimension."""
    moving = _moving(chunks)
    count, columns = len(chunks.images), 1 + len(moving)
    steps = np.arange(chunks.demonstrated.shape[1])
    with matplotlib.rc_context(STYLE | {"font.size": 8, "axes.titlesize": 9}):
        figure, axes = new(1.65 * columns + 0.3, 1.75 * count + 0.7, count, columns)
        figure.suptitle(
            "Predicted and demonstrated action chunks on held-out frames",
            fontweight="bold",
            fontsize=12,
            x=0.01,
            ha="left",
        )
        rows = np.reshape(axes, (count, columns))
        limits = [_limits(chunks, dim) for dim in moving]
        for i, row in enumerate(rows):
            row[0].imshow(chunks.images[i], interpolation="lanczos")
            row[0].set(xticks=[], yticks=[])
            row[0].spines[:].set_visible(False)
            words = textwrap.fill(shorten(chunks.instructions[i]) or "(no instruction)", 24)
            row[0].set_xlabel(words, fontsize=8, labelpad=3)
            for axis, dim, limit in zip(row[1:], moving, limits):
                predicted = chunks.predicted[i, :, :, dim].T
                axis.plot(steps, predicted, color=PREDICTED, alpha=0.45, lw=1)
                actions = np.where(chunks.mask[i, :, dim], chunks.demonstrated[i, :, dim], np.nan)
                axis.plot(steps, actions, "o-", color=DEMONSTRATED, ms=3, lw=1.4)
                axis.set(ylim=limit, xlim=(-0.3, steps[-1] + 0.3))
                axis.set_xticks(steps, [str(s) if i == count - 1 else "" for s in steps])
                if i == 0:
                    axis.set_title(chunks.names[dim])
                if i == count - 1:
                    axis.set_xlabel("steps ahead")
        samples = chunks.predicted.shape[1]
        handles = [rows[0][1].lines[-1], rows[0][1].lines[0]]
        labels = ["demonstrated", f"predicted ({samples} samples)"]
        figure.legend(handles, labels, ncols=2, loc="outside lower right", fontsize=9)
        return save(figure, path)


def video(path: Path, clip: VideoClip, fps: float = 5.0, size: int = 224) -> Path:
    """Write a GIF with the instruction above, the outcome below, and a pause at the end."""
    font = ImageFont.truetype(findfont("DejaVu Sans"), 12)
    verdict = ImageFont.truetype(findfont("DejaVu Sans:bold"), 11)
    words = textwrap.wrap(f"“{shorten(clip.row['instruction'])}”", 32)
    top, bottom = 8 + 15 * len(words), 22
    colour = SUCCESS if clip.row["success"] else FAILURE
    frames = []
    for index, image in enumerate(clip.images):
        frame = Image.new("RGB", (size, size + top + bottom), "white")
        scaled = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
        frame.paste(scaled, (0, top))
        draw = ImageDraw.Draw(frame)
        draw.multiline_text((6, 3), "\n".join(words), fill=INK, font=font, spacing=2)
        last = index == len(clip.images) - 1
        text, ink = (clip.verdict, colour) if last else (f"step {clip.steps[index]}", FAINT)
        draw.text((6, top + size + 4), text, fill=ink, font=verdict)
        if last:
            draw.rectangle((0, top, size - 1, top + size - 1), outline=colour, width=4)
        frames.append(frame)
    # One palette for the whole video, from its first and last frame, avoids flicker.
    ends = Image.new("RGB", (size, 2 * frames[0].height))
    ends.paste(frames[0], (0, 0))
    ends.paste(frames[-1], (0, frames[0].height))
    palette = ends.quantize(128)
    paletted = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    step = round(1000 / fps)
    durations = [step] * (len(paletted) - 1) + [1600]
    with files.replacing(path) as part:
        paletted[0].save(
            part, save_all=True, append_images=paletted[1:], duration=durations, loop=0
        )
    return path


def shorten(text: str, longest: int = 200) -> str:
    """Return a text that fits into a figure."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def duration(seconds: float) -> str:
    """Return a readable duration: '45 s', '7.5 min', '2.3 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def new(width: float, height: float, rows: int, columns: int = 1) -> tuple[Figure, list[Any]]:
    """Return a white figure with the given size in inches, and its axes row by row."""
    # pyplot would keep the figure alive and might need a display
    figure = PlainFigure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG and return its path."""
    with files.replacing(path) as part:
        figure.savefig(part, dpi=DPI)
    return path


def _scale(axis: Any, values: Sequence[float]) -> None:
    """Make the axis logarithmic, with plain tick labels, if the values span a large range."""
    if values and min(values) > 0 and max(values) > 8 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def _bar(axis: Any, left: float, width: float, rate: SuccessRate, colour: str, ink: str) -> None:
    low, high = rate.interval
    axis.bar(left + width / 2, rate.rate, width, color=colour)
    errors = [[rate.rate - low], [high - rate.rate]]
    axis.errorbar(left + width / 2, rate.rate, errors, color=ink, lw=1, capsize=2, zorder=3)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the running mean over a tenth of the curve; the window is narrower at its start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(index, max(1, len(values) // 20))
    end = np.minimum(index + reach + 1, len(values))
    return (total[end] - total[index - reach]) / (end - index + reach)


def _moving(chunks: ChunkComparison) -> list[int]:
    """Return the action dimensions that change in the demonstrations; all if none does."""
    actions = np.where(chunks.mask, chunks.demonstrated, np.nan)
    spread = np.nanmax(actions, (0, 1)) - np.nanmin(actions, (0, 1))
    moving = [int(d) for d in np.flatnonzero(spread > 1e-4)]
    return moving or list(range(len(chunks.names)))


def _limits(chunks: ChunkComparison, dim: int) -> tuple[float, float]:
    demonstrated = chunks.demonstrated[..., dim][chunks.mask[..., dim]]
    values = np.concatenate([demonstrated.ravel(), chunks.predicted[..., dim].ravel()])
    pad = 0.08 * max(np.ptp(values), 1e-3)
    return float(values.min() - pad), float(values.max() + pad)
