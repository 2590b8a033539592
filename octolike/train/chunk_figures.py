"""Figure of predicted and demonstrated action chunks: workdir/pictures/chunks_<step>.png.

One row per held-out example, one column per action dimension; the x axis is the step of the chunk,
the y axis is in the robot's units. All rows of a robot share the y range of a dimension, which
covers demonstrations and predictions: a prediction that hardly moves looks flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from octolike import files
from octolike.embodiment import Embodiment
from octolike.plain_figure import PlainFigure

FOLDER = "pictures"
DEMONSTRATED, PREDICTED = "0.25", "C1"  # colours


class ActionChunk(NamedTuple):
    """A demonstrated action chunk and the policy's prediction.

    Attributes:
        demonstrated: float [H, A], the robot's own dimensions; NaN past the episode's end.
        predicted: float [H, A].
        names: names of the dimensions.
        units: units of the dimensions.
        titles: robot, dataset, task.
    """

    demonstrated: np.ndarray
    predicted: np.ndarray
    names: tuple[str, ...]
    units: tuple[str, ...]
    titles: tuple[str, ...]

    @classmethod
    def from_normalized(
        cls,
        robot: Embodiment,
        demonstrated: np.ndarray,
        predicted: np.ndarray,
        valid: np.ndarray,
        titles: Sequence[str],
    ) -> ActionChunk:
        """Return the chunk in the units of the learned actions.

        Args:
            robot: the robot.
            demonstrated: normalised actions [H, A], padded as in a batch.
            predicted: normalised actions [H, A], padded as in a batch.
            valid: bool [H].
            titles: dataset, task.
        """
        layout, units = robot.learned, robot.learned.units
        pair = np.stack([demonstrated, predicted])[..., : len(layout)].astype(np.float32)
        if robot.action_statistics is not None:
            pair = robot.unnormalize_action(pair)
        else:
            units = tuple("normalised" if n else u for n, u in zip(layout.normalized, units))
        demonstrated = np.where(valid[:, None], pair[0], np.nan)
        return cls(demonstrated, pair[1], layout.names, units, (robot.name, *titles))


def draw_chunks(chunks: Sequence[ActionChunk], step: int) -> Figure:
    """Return the figure of chunks, one per row."""
    columns = max(len(c.names) for c in chunks)
    size = (1.9 * columns + 0.6, 1.7 * len(chunks) + 0.7)
    figure = PlainFigure(figsize=size, layout="constrained")
    grid = figure.subplots(len(chunks), columns, squeeze=False)
    robots = {c.titles[0] for c in chunks}
    limits = {r: _limits([c for c in chunks if c.titles[0] == r]) for r in robots}
    for row, chunk in enumerate(chunks):
        for column, axis in enumerate(grid[row]):
            if column >= len(chunk.names):
                axis.axis("off")
                continue
            _draw_dimension(axis, chunk, column, limits[chunk.titles[0]][column])
        _, dataset, task = chunk.titles
        short_task = task if len(task) <= 60 else task[:59] + "…"
        label = f"{dataset}: {short_task}" if short_task else dataset
        grid[row, 0].annotate(
            label, (0, 1), (0, 16), "axes fraction", textcoords="offset points", fontsize=8
        )
    for axis in grid[-1]:
        axis.set_xlabel("step of the chunk", fontsize=7)
    entries = grid[0, 0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside upper right", ncols=2, fontsize=8)
    figure.suptitle(f"held-out chunks, step {step}", fontsize=10, x=0.02, ha="left")
    return figure


def save_figure(chunks: Sequence[ActionChunk], step: int, workdir: files.PathLike) -> files.Path:
    """Write the figure of a validation's chunks under `workdir` and return its path."""
    path = files.as_path(workdir) / FOLDER / f"chunks_{step}.png"
    with files.replacing(path) as part:
        draw_chunks(chunks, step).savefig(part, dpi=110)
    return path


def _draw_dimension(axis: Axes, chunk: ActionChunk, i: int, limits: tuple[float, float]) -> None:
    steps = np.arange(1, len(chunk.predicted) + 1)
    demonstrated = chunk.demonstrated[:, i]
    axis.plot(steps, demonstrated, "o-", color=DEMONSTRATED, ms=3.5, lw=1.2, label="demonstrated")
    axis.plot(steps, chunk.predicted[:, i], "x--", color=PREDICTED, ms=4, lw=1.2, label="predicted")
    unit = f" [{chunk.units[i]}]" if chunk.units[i] else ""
    axis.set_title(f"{chunk.names[i]}{unit}", fontsize=8, loc="left", pad=3)
    axis.set_ylim(*limits)
    axis.set_xlim(0.7, len(steps) + 0.3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axis.tick_params(labelsize=6)
    axis.grid(alpha=0.25)


def _limits(chunks: Sequence[ActionChunk]) -> list[tuple[float, float]]:
    """Return (low, high) of each dimension over chunks of one robot, with a margin."""
    values = np.concatenate([x for c in chunks for x in (c.demonstrated, c.predicted)])
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    margin = np.maximum(0.08 * (high - low), 1e-3)
    return list(zip((low - margin).tolist(), (high + margin).tolist()))
