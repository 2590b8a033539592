"""Which checkpoints of a run stay: the newest, every so many steps, and the best validated one.

workdir/scores.json holds what validation found at each checkpoint's step, over all datasets:
{step: {"loss": …, "action_error": …}}. It outlives the checkpoints, so that the best one is known
whatever number it shall be judged by later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from octolike import files
from octolike.config import Config, ConfigError
from octolike.errors import RunError

FILE = "scores.json"


def mean(datasets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over datasets of each number that all of {dataset: {name: number}} have."""
    rows = list(datasets.values())
    shared = set.intersection(*map(set, rows)) if rows else set()
    return {k: math.fsum(row[k] for row in rows) / len(rows) for k in sorted(shared)}


def check(config: Config, validated: bool) -> None:
    """Raise ConfigError where train.keep_best would never have a number to go by."""
    t = config.train
    if not t.keep_best:
        return
    if not validated:
        raise ConfigError(
            f"train.keep_best is {t.keep_best!r}, but this run has no held-out data; name a split "
            "in data.validation_split, or set train.keep_best=''"
        )
    both = math.lcm(t.checkpoint_every, t.validate_every)
    if not 0 < both <= t.steps:
        raise ConfigError(
            f"train.keep_best is {t.keep_best!r}, but no checkpoint before the last is validated: "
            f"checkpoints come every {t.checkpoint_every} steps, validations every "
            f"{t.validate_every} (0: at the end only), of {t.steps}; make validate_every divide "
            "checkpoint_every"
        )


class Keep:
    """Decides which checkpoints stay; a preservation policy of orbax."""

    def __init__(self, workdir: files.Path, newest: int, every: int = 0, best: str = "") -> None:
        """Read the scores so far. newest: how many; every: steps, 0 none; best: by a score."""
        self._path, self._newest, self._every, self._best = workdir / FILE, newest, every, best
        self._scores: dict[int, dict[str, float]] = {}
        if self._path.exists():
            try:
                stored = json.loads(self._path.read_text(encoding="utf-8"))
                self._scores = {int(step): dict(row) for step, row in stored.items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise RunError(
                    f"{self._path} is broken ({error}); delete it: it only says which checkpoint "
                    "did best so far"
                ) from error

    def note(self, step: int, scores: Mapping[str, float], *, write: bool) -> None:
        """Take in the scores of a step, of which a better one is lower; write: to the file too."""
        self._scores[step] = {k: float(v) for k, v in scores.items()}
        if write:
            files.write_json(self._path, self._scores)

    def steps(self, steps: Sequence[int]) -> set[int]:
        """Return which of the given steps stay."""
        stay = set(sorted(steps)[-self._newest :])
        if self._every:
            stay |= {step for step in steps if step % self._every == 0}
        known = {s: self._scores.get(s, {}).get(self._best, math.nan) for s in steps}
        known = {step: score for step, score in known.items() if math.isfinite(score)}
        if known:
            stay.add(min(known, key=lambda step: (known[step], step)))
        return stay

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Answer orbax, for its records of the checkpoints there are."""
        stay = self.steps([c.step for c in checkpoints])
        return [c.step in stay for c in checkpoints]
