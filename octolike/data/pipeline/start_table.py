"""The table of the opened datasets, printed at the start, with a line for each peculiarity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octolike import ranges
from octolike.config import DataConfig
from octolike.data.pipeline.dataset_split import DatasetSplit
from octolike.data.rlds.graph_expressions import runs_in_python
from octolike.data.specs import catalog
from octolike.embodiment import Embodiment
from octolike.tables import text_table

_LISTED = 5  # episodes left out of a dataset that are listed one by one


def describe(
    config: DataConfig,
    training: Sequence[DatasetSplit],
    held_out: Sequence[DatasetSplit],
    embodiments: Sequence[Embodiment],
    shares: np.ndarray,
) -> list[str]:
    """Return a table of the datasets, the reasons of dropped episodes, and uncertain specs.

    shares: shares of the examples per training dataset, float [datasets].
    """
    sources, specs = [*training, *held_out], [s.spec for s in training]
    lines = [_table(sources, [f"{x:.1%}" for x in shares] + ["held out"] * len(held_out))]
    for bad in (s.index.bad for s in sources):
        lines += [f"left out: {reason}" for reason in bad[:_LISTED]]
        lines += [f"left out: {len(bad) - _LISTED} more"] if len(bad) > _LISTED else []
    for source in sources:
        lines += _filtered(source) + _unlabelled(source) + _black_frames(source) + _views(source)
    for reader in (s.reader for s in training):
        lines += filter(None, [reader.describe_held_out(), reader.channels.describe()])
    validated, of = {s.spec.name for s in held_out}, config.validation_split_of
    without = [s.name for s in specs if of(s.name) and s.name not in validated]
    if without:
        lines.append(f"no held-out episode: {', '.join(without)}")
    lines += filter(None, [catalog.describe_uncertain(specs)])
    lines += [*catalog.describe_binarised(specs), *ranges.describe(embodiments)]
    in_python = [spec.name for spec in specs if runs_in_python(spec)]
    if in_python:
        lines.append(
            f"Python functions of specs in the stream (slower, one at a time): "
            f"{', '.join(in_python)}"
        )
    return lines


def _table(sources: Sequence[DatasetSplit], shares: Sequence[str]) -> str:
    rows = []
    for source, share in zip(sources, shares, strict=True):
        i = source.index
        counts = f"{len(i.steps):,}", f"{i.steps.sum():,}", share, len(i.bad), i.filtered
        rows.append((source.reader.title, *counts, source.spec.robot))
    headers = ("dataset", "episodes", "steps", "share", "bad", "filtered", "robot")
    return text_table(rows, headers, "lrrrrrl")


def _filtered(source: DatasetSplit) -> list[str]:
    """Return the number of episodes that filters exclude, by reason, and of exact copies."""
    i, lines = source.index, []
    if i.filtered:
        reasons = ", ".join(f"{n:,} ({reason})" for reason, n in sorted(i.filtered_by.items()))
        lines.append(f"filtered: {source.reader.title}: {reasons}")
    if i.idle_steps:
        lines.append(f"idle: {i.idle_steps:,} steps of {source.reader.title} are dropped")
    copies = len(i.content) - len(np.unique(i.content))
    if copies:
        lines.append(f"copies: {copies:,} episodes of {source.reader.title} equal another one")
    return lines


def _unlabelled(source: DatasetSplit) -> list[str]:
    """Return the number of episodes without an instruction."""
    missing, total = int((~source.index.has_instruction).sum()), len(source.index.steps)
    if not missing:
        return []
    effect = "; a policy conditioned on language needs one to act" if missing == total else ""
    return [f"no instruction: {source.reader.title}: {missing:,} of {total:,} episodes{effect}"]


def _black_frames(source: DatasetSplit) -> list[str]:
    """Return a line per camera with black frames: how many, and whether it counts as absent."""
    i, lines = source.index, []
    for c, camera in enumerate(source.spec.cameras):
        black, absent = i.black_frames[:, c], int((~i.has_image[:, c]).sum())
        if black.any():
            lines.append(
                f"black frames: {source.reader.title}, {camera}: "
                f"{black.sum():,} of {i.steps.sum():,}, in {np.count_nonzero(black):,} episodes; "
                f"the camera counts as absent in the {absent:,} where most frames are black"
            )
    return lines


def _views(source: DatasetSplit) -> list[str]:
    """Return a line on cameras that are shown as others."""
    if not source.views:
        return []
    cameras = [c for c in source.cameras if c in source.views]
    has_all = source.has_views
    return [
        f"views: {source.reader.title}: {', '.join(cameras)} shows {' or '.join(source.views)}, "
        f"drawn per episode and epoch, in {has_all.sum():,} of {len(has_all):,} episodes; the "
        "others lack one"
    ]
