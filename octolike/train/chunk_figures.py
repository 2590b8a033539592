"""A picture of predicted against demonstrated action chunks: workdir/pictures/chunks_<step>.png.

A held-out example per row, an action dimension per column, the chunk's steps to the right, in the
robot's units. A dimension has one scale over all rows of a robot, that of everything demonstrated
and predicted there: a prediction that is flat where the demonstrations move looks flat.
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

FOLDER = "pictures"
TRUE, PREDICTED = "0.25", "C1"


class Chunk(NamedTuple):
    """One example: what was done and what a policy would do.

    true, predicted: float [H, A] of one robot's dimensions; true is NaN past the episode's end.
    names, units: of the dimensions. titles: robot, dataset, task.
    """

    true: np.ndarray
    predicted: np.ndarray
    names: tuple[str, ...]
    units: tuple[str, ...]
    titles: tuple[str, ...]

    @classmethod
    def of(
        cls,
        robot: Embodiment,
        true: np.ndarray,
        predicted: np.ndarray,
        valid: np.ndarray,
        titles: Sequence[str],
    ) -> Chunk:
        """Return the chunk of normalised actions [H, A of the batch]; valid: bool [H]."""
        layout, units = robot.action, robot.action.units
        pair = np.stack([true, predicted])[..., : len(layout)].astype(np.float32)
        if robot.action_statistics is not None:
            pair = robot.unnormalize_action(pair)
        else:
            units = tuple("normalised" if n else u for n, u in zip(layout.normalized, units))
        done = np.where(valid[:, None], pair[0], np.nan)
        return cls(done, pair[1], layout.names, units, (robot.name, *titles))


def draw(chunks: Sequence[Chunk], step: int) -> Figure:
    """Return the figure of chunks, one per row."""
    columns = max(len(c.names) for c in chunks)
    size = (1.9 * columns + 0.6, 1.7 * len(chunks) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
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
        words = task if len(task) <= 60 else task[:59] + "…"
        label = f"{dataset}: {words}" if words else dataset
        grid[row, 0].annotate(
            label, (0, 1), (0, 16), "axes fraction", textcoords="offset points", fontsize=8
        )
    for axis in grid[-1]:
        axis.set_xlabel("step of the chunk", fontsize=7)
    entries = grid[0, 0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside upper right", ncols=2, fontsize=8)
    figure.suptitle(f"held-out chunks, step {step}", fontsize=10, x=0.02, ha="left")
    return figure


def save(chunks: Sequence[Chunk], step: int, workdir: files.PathLike) -> files.Path:
    """Write the picture of chunks of a validation under `workdir` and return its path."""
    path = files.as_path(workdir) / FOLDER / f"chunks_{step}.png"
    with files.replacing(path) as part:
        draw(chunks, step).savefig(part, dpi=110)
    return path


def _draw_dimension(axis: Axes, chunk: Chunk, i: int, limits: tuple[float, float]) -> None:
    steps = np.arange(1, len(chunk.true) + 1)
    axis.plot(steps, chunk.true[:, i], "o-", color=TRUE, ms=3.5, lw=1.2, label="demonstrated")
    axis.plot(steps, chunk.predicted[:, i], "x--", color=PREDICTED, ms=4, lw=1.2, label="predicted")
    unit = f" [{chunk.units[i]}]" if chunk.units[i] else ""
    axis.set_title(f"{chunk.names[i]}{unit}", fontsize=8, loc="left", pad=3)
    axis.set_ylim(*limits)
    axis.set_xlim(0.7, len(steps) + 0.3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axis.tick_params(labelsize=6)
    axis.grid(alpha=0.25)


def _limits(chunks: Sequence[Chunk]) -> list[tuple[float, float]]:
    """Return (low, high) of each dimension over chunks of one robot, with a margin."""
    both = np.concatenate([x for c in chunks for x in (c.true, c.predicted)])
    low, high = np.nanmin(both, axis=0), np.nanmax(both, axis=0)
    margin = np.maximum(0.08 * (high - low), 1e-3)
    return list(zip((low - margin).tolist(), (high + margin).tolist()))
