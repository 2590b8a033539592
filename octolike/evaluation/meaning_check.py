"""Check of the meaning of a policy's numbers on recorded frames: sides, and recorded ranges.

sides      of grippers and other two-valued actions: the share of actions on the demonstrated
           side, next to that of a policy that always takes the more frequent one
commands   outside the demonstrated range of actions, and how far at most
proprio    far outside the range of the record: other units, or another order
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octolike import ranges
from octolike.embodiment import MIN_SPREAD, Embodiment

FAULT = 0.05  # share of the frames with proprio far outside the record: another unit
ROUNDING = 0.01  # of the range, for commands


@dataclass
class MeaningCheck:
    """The counts of one dataset; {dimension: (numbers)} over all frames added so far.

    sides: (right, upper, all) of the demonstrated actions; commands: (outside, all); farthest: the
    largest distance of a command to its range, in lengths of it; proprio: (far outside, all, an
    example, recorded minimum, recorded maximum). Dimensions that never moved have no range.
    """

    sides: dict[str, np.ndarray] = field(default_factory=dict)
    commands: dict[str, np.ndarray] = field(default_factory=dict)
    farthest: dict[str, float] = field(default_factory=dict)
    proprio: dict[str, np.ndarray] = field(default_factory=dict)

    def add(
        self, record: Embodiment, frames: Any, samples: np.ndarray, learned: np.ndarray
    ) -> None:
        """Add frames (frame_check.FrameBatch) and their sampled actions.

        samples: [n, S, H, A] in robot units; learned: the same as they are learned, [n, S, H, A'].
        """
        names = record.learned.names
        mask = frames.batch["action_mask"][:, -1, :, : len(names)]
        valid = np.broadcast_to(mask[:, None], learned.shape)
        middle = record.unnormalize_action(ranges.middles(record)[None])[0]
        stored = set(record.action.names if record.transform is None else record.transform.stored)
        for d in np.flatnonzero(ranges.sided(record)).tolist():
            if names[d] not in stored:
                continue  # a change of something two-valued has no sides
            robot, inside = record.action.names.index(names[d]), valid[..., d]
            above = samples[..., robot] > middle[d]
            expected = np.broadcast_to(frames.actions[:, None, :, robot] > middle[d], above.shape)
            counts = [(above == expected)[inside].sum(), expected[inside].sum(), inside.sum()]
            _add(self.sides, names[d], counts)
        if record.action_statistics is not None:
            s = record.action_statistics
            excess = ranges.outside(learned, s)
            for d in np.flatnonzero(s.max - s.min > MIN_SPREAD).tolist():
                distances = excess[..., d][valid[..., d]]
                _add(self.commands, names[d], [(distances > ROUNDING).sum(), len(distances)])
                largest = float(distances.max(initial=0.0))
                self.farthest[names[d]] = max(self.farthest.get(names[d], 0.0), largest)
        self._add_proprio(record, frames)

    def _add_proprio(self, record: Embodiment, frames: Any) -> None:
        values = [o.get("proprio") for o in frames.observations]
        newest = [np.atleast_2d(x)[-1] for x in values if x is not None]
        s = record.proprio_statistics
        if not newest or s is None or record.proprio is None:
            return
        x = np.stack(newest)
        far = ranges.far_outside(x, record)
        for d, name in enumerate(record.proprio.names):
            _add(self.proprio, name, [far[:, d].sum(), len(x), 0, 0, 0])
            if far[:, d].any():
                self.proprio[name][2:] = x[far[:, d], d][-1], s.min[d], s.max[d]

    @property
    def faults(self) -> list[str]:
        """A sentence for each dimension of proprio that is often far outside the record's range."""
        return [
            f"proprio {name} is far outside the record's range in {far / total:.0%} of the frames: "
            f"{example:.4g}, recorded {low:.4g} to {high:.4g}; other units or another order"
            for name, (far, total, example, low, high) in self.proprio.items()
            if far > FAULT * total
        ]

    def lines(self) -> list[str]:
        """Return a line per two-valued dimension, and one on commands outside the range."""
        lines = []
        for name, (right, upper, total) in self.sides.items():
            majority = max(upper, total - upper) / max(total, 1)
            better = "" if right / max(total, 1) > majority else "; not better than that"
            lines.append(
                f"{name}: {right / max(total, 1):.1%} of the actions on the demonstrated side; "
                f"always the more frequent side: {majority:.1%}{better}"
            )
        outside = [
            f"{k} {n / total:.1%} (by up to {self.farthest[k]:.0%} of it)"
            for k, (n, total) in self.commands.items()
            if n
        ]
        if outside:
            lines.append(f"commands outside the demonstrated range: {', '.join(outside)}")
        few = [f"{k} {int(n[0])} of {int(n[1])}" for k, n in self.proprio.items() if n[0]]
        if few:
            lines.append(f"frames with proprio far outside the record's range: {', '.join(few)}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return plain data for check_policy.json."""
        return {
            "sides": {
                k: {"right": right / max(n, 1), "majority": max(upper, n - upper) / max(n, 1)}
                for k, (right, upper, n) in ((k, v.tolist()) for k, v in self.sides.items())
            },
            "commands_outside": {k: float(a / max(b, 1)) for k, (a, b) in self.commands.items()},
            "commands_outside_by": dict(self.farthest),
            "proprio_outside": {k: float(v[0] / max(v[1], 1)) for k, v in self.proprio.items()},
        }


def _add(counts: dict[str, np.ndarray], name: str, new: list[Any]) -> None:
    counts[name] = counts.get(name, np.zeros(len(new))) + np.array(new, np.float64)
