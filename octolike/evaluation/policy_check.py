"""The report of both checks of a policy: `replay_check` and `frame_check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from octolike import files
from octolike.evaluation import figures
from octolike.evaluation.frame_check import FrameComparison, draw_errors, frame_table
from octolike.evaluation.replay_check import (
    DemonstrationReplays,
    draw_drift,
    replay_faults,
    replay_table,
)


@dataclass(frozen=True)
class CheckReport:
    """Both checks.

    simulator: its kind; why_no_replay: a sentence, if no demonstration was replayed.
    """

    replays: Sequence[DemonstrationReplays] = ()
    compared: Sequence[FrameComparison] = ()
    simulator: str = ""
    why_no_replay: str = ""

    @property
    def faults(self) -> list[str]:
        """A sentence for each fault; empty if policy, training and simulator agree."""
        return self._replay_faults[0] + [fault for c in self.compared for fault in c.faults]

    @property
    def remarks(self) -> list[str]:
        """Replays that diverge from their recording, few enough to be explained by rounding."""
        return self._replay_faults[1]

    @property
    def _replay_faults(self) -> tuple[list[str], list[str]]:
        return replay_faults(self.replays, clipped=any(c.clipped for c in self.compared))

    def table(self) -> str:
        """Return both checks for a terminal."""
        lines = [self.why_no_replay]
        if self.replays:
            lines = [f"(a) recorded actions replayed in their simulator: {self.simulator}"]
            lines += [replay_table(self.replays)]
            lines += [f"  remark: {r}" for r in self.remarks]
        for c in self.compared:
            lines += ["", frame_table(c)]
        faults = [f"DIFFERENT: {f}" for f in self.faults]
        return "\n".join([*lines, "", *(faults or ["no differences"])])

    def write(self, directory: Path) -> Path:
        """Write check_policy.json and check_policy.png; return the figure's path."""
        files.write_json(directory / "check_policy.json", self.to_json())
        return draw(self, directory / "check_policy.png")

    def to_json(self) -> dict[str, Any]:
        """Return plain data for check_policy.json."""
        return {
            "faults": self.faults,
            "remarks": self.remarks,
            "simulator": self.simulator,
            "why_no_replay": self.why_no_replay,
            "replays": [r.to_json() for r in self.replays],
            "inputs": [c.to_json() for c in self.compared],
        }


def draw(report: CheckReport, path: Path) -> Path:
    """Draw the drift of replays, and per dataset the error per dimension and per step."""
    panels = bool(report.replays) + 2 * len(report.compared)
    with matplotlib.rc_context(figures.STYLE):
        figure, axes = figures.new(4.6 * panels, 3.6, 1, panels)
        next_axis = iter(axes)
        if report.replays:
            draw_drift(next(next_axis), report.replays)
        for c in report.compared:
            draw_errors(next(next_axis), next(next_axis), c)
        return figures.save(figure, path)
