"""Figures that may fail: a figure must not end a run or an evaluation.

Failures are counted; the cause of each is printed once.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from octolike import files

_Picture = TypeVar("_Picture")


class PictureAttempts:
    """Draws figures; `failures` counts those that were not drawn, by cause."""

    def __init__(self) -> None:
        self.failures: collections.Counter[str] = collections.Counter()

    def draw(
        self, title: str, function: Callable[..., _Picture], *arguments: Any
    ) -> _Picture | None:
        """Return function(*arguments); None, after counting the cause, if it raises."""
        try:
            return function(*arguments)
        except Exception as error:  # of matplotlib, Pillow, fonts, the disk
            cause = files.cause(error)
            self.failures[cause] += 1
            if self.failures[cause] == 1:
                print(f"{title} was not drawn: {cause} (printed once)", file=sys.stderr)
            return None

    def summary(self) -> str:
        """Return a sentence on the failures; "" without any."""
        if not self.failures:
            return ""
        causes = "; ".join(f"{n} × {cause}" for cause, n in self.failures.items())
        return f"{self.failures.total()} figures were not drawn: {causes}"
