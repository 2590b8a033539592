"""Figures of a survey: histograms of lengths and actions, contact sheets of the cameras."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from octolike import files
from octolike.data.onboarding.infer_spec import InferredSpec, join_fields
from octolike.data.onboarding.survey import Survey
from octolike.plain_figure import PlainFigure


def histograms(survey: Survey, spec: InferredSpec) -> Figure:
    """Return a figure of episode lengths and of each action dimension (gripper included)."""
    action = np.concatenate(join_fields(survey, spec.action)) if spec.action else np.zeros((0, 0))
    count = 1 + action.shape[1]
    columns = min(4, count)
    rows = -(-count // columns)
    figure = PlainFigure(figsize=(3 * columns, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    axes[0].hist(survey.lengths, bins=30, color="0.35")
    axes[0].set_title("steps per episode", fontsize=9)
    for i, name in enumerate(spec.action_names):
        x = action[:, i]
        axes[1 + i].hist(x[np.isfinite(x)], bins=50, color="C0", log=True)
        kind = "absolute" if spec.absolute[i] else "delta"
        axes[1 + i].set_title(f"action {i}: {name} ({kind})", fontsize=9)
    for axis in axes[count:]:
        axis.axis("off")
    for axis in axes:
        axis.tick_params(labelsize=7)
    return figure


def contact_sheet(survey: Survey, key: str) -> Figure:
    """Return a figure of a camera's frames: an episode per row, time to the right."""
    rows = survey.images[key]
    columns = max(len(r) for r in rows)
    figure = PlainFigure(figsize=(1.8 * columns, 1.8 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, frames in zip(axes, rows, strict=True):
        for axis, frame in zip(line, frames, strict=True):
            axis.axis("off")
            if frame:
                axis.imshow(tf.io.decode_image(frame, expand_animations=False).numpy().squeeze())
    figure.suptitle(f"{key}: from the first step to the last", fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG and return its path."""
    with files.replacing(path) as part:
        figure.savefig(part, dpi=110)
    return path
