"""Streams and results of learning a mix by group DRO (scripts/learn_mix.py).

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
    """A data source with another training stream: `wrap` of the source's own."""

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
    """Batches that note the last errors they are told, in a JSON file."""

    def __init__(self, batches: RldsStream, over: str, notes: Path) -> None:
        """over: "dataset" or "task", whose errors count."""
        self._batches, self._over, self._notes = batches, over, notes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __next__(self) -> Any:
        return next(self._batches)

    def feedback(self, datasets: Mapping[str, float], tasks: Mapping[str, float]) -> None:
        """Note the errors."""
        files.write_json(self._notes, self._own(datasets, tasks), indent=None)

    def _own(self, datasets: Mapping[str, float], tasks: Mapping[str, float]) -> dict[str, float]:
        return dict(datasets if self._over == "dataset" else tasks)


class ProxyStream(ReferenceStream):
    """Batches whose shares follow the excess over a reference; a line of JSON notes them."""

    def __init__(
        self, batches: RldsStream, over: str, notes: Path, reference: Mapping[str, float]
    ) -> None:
        super().__init__(batches, over, notes)
        self._reference = reference

    def feedback(self, datasets: Mapping[str, float], tasks: Mapping[str, float]) -> None:
        """Pass on what exceeds the reference."""
        found = self._own(datasets, tasks)
        excess = {k: v - self._reference[k] for k, v in found.items() if k in self._reference}
        self._batches.feedback(excess, excess)
        line = {"batches": self._batches.state()["batches"], "shares": self._batches.shares()}
        with self._notes.open("a") as file:
            file.write(json.dumps(line) + "\n")


def average_shares(notes: Path) -> dict[str, float]:
    """Return the mean of the shares that a proxy noted; of what a resumed run noted twice, once."""
    rows = [json.loads(line) for line in notes.read_text().splitlines()]
    once = {row["batches"]: row["shares"] for row in rows}
    return {name: float(np.mean([r[name] for r in once.values()])) for name in rows[0]["shares"]}


def write_mix(learned: Mapping[str, float], directory: Path) -> str:
    """Write shares as a line for data.mix, JSON and a picture; return the line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    line = ",".join(f"{name}={share:.4f}" for name, share in learned.items())
    files.write_text(directory / "mix.txt", line + "\n")
    files.write_json(directory / "mix.json", dict(learned))
    names = sorted(learned, key=learned.__getitem__)[-40:]
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.25 * len(names)), layout="constrained")
    axes.barh(names, [learned[name] for name in names])
    axes.set_xlabel("learned share of the examples (group DRO)")
    with files.replacing(directory / "mix.png") as part:
        figure.savefig(part, dpi=150)
    pyplot.close(figure)
    return line
