"""The table of faults: outcomes of runs, counted."""

from __future__ import annotations

import collections

from octolike.tables import text_table

EXACT, REFUSED, LOST, SILENT = "resumed exactly", "refused clearly", "lost", "silently wrong"
OUTCOMES = (EXACT, REFUSED, LOST, SILENT)


class Tally:
    """Counts outcomes per fault.

    resumed exactly: the result equals that without the fault, bit for bit. refused clearly: an
    error in one line. lost: another error, or work that should have survived. silently wrong:
    another result without an error.
    """

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[str]] = {}
        self.notes: list[str] = []

    def add(self, fault: str, outcome: str, note: str = "", times: int = 1) -> None:
        """Count an outcome; note: of one that must not happen, printed under the table."""
        self.counts.setdefault(fault, collections.Counter())[outcome] += times
        if outcome in (LOST, SILENT):
            self.notes.append(f"{outcome}: {fault}: {note}")

    def total(self, *outcomes: str) -> int:
        """Return how often these outcomes occurred; of all faults."""
        return sum(counts[o] for counts in self.counts.values() for o in outcomes)

    def table(self) -> str:
        """Return the table, a row per fault, and the notes."""
        rows = [
            (fault, counts.total(), *(counts[o] for o in OUTCOMES))
            for fault, counts in self.counts.items()
        ]
        total = [sum(row[i] for row in rows) for i in range(1, len(OUTCOMES) + 2)]
        lines = text_table([*rows, ("all", *total)], ("fault", "times", *OUTCOMES), "lr")
        return "\n".join([lines, *self.notes])


def is_one_line(error: BaseException) -> bool:
    """Return whether an error can be shown to a user as it is."""
    return "\n" not in str(error).strip() and len(str(error)) < 3000
