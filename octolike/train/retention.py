"""Retention of checkpoints: the newest, every k-th step, and the best validated one.

workdir/scores.json holds the validation scores at each checkpoint's step, averaged over datasets:
{step: {"loss": …, "action_error": …}}. It outlives the checkpoints, so train.keep_best can change
to another score later.
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


def mean_scores(datasets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over datasets of each score that all of them have.

    datasets: {dataset: {score: value}}.
    """
    rows = list(datasets.values())
    shared = set.intersection(*map(set, rows)) if rows else set()
    return {k: math.fsum(row[k] for row in rows) / len(rows) for k in sorted(shared)}


def check_keep_best(config: Config, validated: bool) -> None:
    """Raise ConfigError if train.keep_best would never have a score to compare."""
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


class RetentionPolicy:
    """Decides which checkpoints are retained; a preservation policy of orbax."""

    def __init__(self, workdir: files.Path, newest: int, every: int = 0, best: str = "") -> None:
        """Read the scores so far.

        Args:
            workdir: the run directory.
            newest: number of newest checkpoints to retain.
            every: retain checkpoints at multiples of this step; 0 for none.
            best: also retain the checkpoint with the lowest value of this score.
        """
        self._path, self._newest, self._every, self._best = workdir / FILE, newest, every, best
        self._scores: dict[int, dict[str, float]] = {}
        if self._path.exists():
            try:
                stored = json.loads(self._path.read_text(encoding="utf-8"))
                self._scores = {int(step): dict(row) for step, row in stored.items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise RunError(
                    f"{self._path} is corrupted ({error}); delete it: it only records which "
                    "checkpoint was best so far"
                ) from error

    def record(self, step: int, scores: Mapping[str, float], *, write: bool) -> None:
        """Record the scores of a step (lower is better); write: also to the file."""
        self._scores[step] = {k: float(v) for k, v in scores.items()}
        if write:
            files.write_json(self._path, self._scores)

    def retained_steps(self, steps: Sequence[int]) -> set[int]:
        """Return the steps of the checkpoints to retain."""
        retained = set(sorted(steps)[-self._newest :])
        if self._every:
            retained |= {step for step in steps if step % self._every == 0}
        scores = {s: self._scores.get(s, {}).get(self._best, math.nan) for s in steps}
        scores = {step: score for step, score in scores.items() if math.isfinite(score)}
        if scores:
            retained.add(min(scores, key=lambda step: (scores[step], step)))
        return retained

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return whether to retain each checkpoint; called by orbax."""
        retained = self.retained_steps([c.step for c in checkpoints])
        return [c.step in retained for c in checkpoints]
