"""Streams and results of learning a mix by group DRO (octolike learn_mix).

`ReferenceStream` records the errors fed back to it; `ProxyStream` feeds back the excess over them
and records the resulting shares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.data.pipeline.stream import RldsStream
from octolike.types import BatchStream, DataSource


class WrappedSource:
    """A data source with its training stream wrapped by `wrap`."""

    def __init__(self, source: DataSource, wrap: Callable[[BatchStream], BatchStream]) -> None:
        self._source, self._wrap = source, wrap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def train(
        self, start: Mapping[str, Any] | None = None, process: tuple[int, int] = (0, 1)
    ) -> BatchStream:
        """Return the wrapped training batches, from a saved position or from the beginning."""
        return self._wrap(self._source.train(start, process))


class ReferenceStream:
    """A training stream that writes the latest feedback to a JSON file."""

    def __init__(self, batches: RldsStream, over: str, notes: Path) -> None:
        """over: "dataset" or "task", the errors to record."""
        self._batches, self._over, self._notes = batches, over, notes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __next__(self) -> Any:
        return next(self._batches)

    def feedback(self, datasets: Mapping[str, float], tasks: Mapping[str, float]) -> None:
        """Write the errors."""
        files.write_json(self._notes, self._select(datasets, tasks), indent=None)

    def _select(
        self, datasets: Mapping[str, float], tasks: Mapping[str, float]
    ) -> dict[str, float]:
        return dict(datasets if self._over == "dataset" else tasks)


class ProxyStream(ReferenceStream):
    """A training stream with shares by the excess over a reference; it appends them as JSON."""

    def __init__(
        self, batches: RldsStream, over: str, notes: Path, reference: Mapping[str, float]
    ) -> None:
        super().__init__(batches, over, notes)
        self._reference = reference

    def feedback(self, datasets: Mapping[str, float], tasks: Mapping[str, float]) -> None:
        """Feed back the excess over the reference, and append the new shares."""
        errors = self._select(datasets, tasks)
        excess = {k: v - self._reference[k] for k, v in errors.items() if k in self._reference}
        self._batches.feedback(excess, excess)
        line = {"batches": self._batches.state()["batches"], "shares": self._batches.shares()}
        with self._notes.open("a") as file:
            file.write(json.dumps(line) + "\n")


def average_shares(notes: Path) -> dict[str, float]:
    """Return the mean of the shares of a proxy stream; repeats by a resumed run count once."""
    records = [json.loads(line) for line in notes.read_text().splitlines()]
    by_batch = {record["batches"]: record["shares"] for record in records}
    names = records[0]["shares"]
    return {name: float(np.mean([s[name] for s in by_batch.values()])) for name in names}


def write_mix(learned: Mapping[str, float], directory: Path) -> str:
    """Write shares as a line for data.mix, as JSON and as a figure; return the line."""
    from octolike.plain_figure import PlainFigure

    line = ",".join(f"{name}={share:.4f}" for name, share in learned.items())
    files.write_text(directory / "mix.txt", line + "\n")
    files.write_json(directory / "mix.json", dict(learned))
    names = sorted(learned, key=learned.__getitem__)[-40:]
    figure = PlainFigure(figsize=(7, 1 + 0.25 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [learned[name] for name in names])
    axes.set_xlabel("learned share of the examples (group DRO)")
    with files.replacing(directory / "mix.png") as part:
        figure.savefig(part, dpi=150)
    return line
