"""Infer the layout of actions or proprio from names and values, with the evidence for it.

Names (`infer_names`), targets or changes (`infer_targets`) and units (`infer_units`) follow from
the values. Nothing here is certain, so each inference states its evidence, for the user to verify.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from octolike import ranges
from octolike.data.onboarding.infer_names import ActionContext, grippers, name_columns
from octolike.data.onboarding.infer_targets import InferredTargets, infer_targets
from octolike.data.onboarding.infer_units import FULL_TURN, infer_units
from octolike.data.rlds.quantile_sketch import QuantileSketch
from octolike.embodiment import Layout, Statistics

SHARE = 0.5  # the least range of a gripper that is left as it is


@dataclass(frozen=True)
class InferredLayout:
    """The inferred meaning of the columns of a vector.

    Attributes:
        layout: layout of the columns.
        grippers: indices of the columns that are grippers.
        evidence: {"names", "units", "absolute" or "gripper": the reason for the inference}.
        doubts: sentences on columns that are unlike the usual radians, metres and shares.
        matches: for actions, the state column that each column moves, −1 for none.
    """

    layout: Layout
    grippers: tuple[int, ...] = ()
    evidence: Mapping[str, str] = dataclasses.field(default_factory=dict)
    doubts: tuple[str, ...] = ()
    matches: tuple[int, ...] = ()


def infer_layout(
    part: str,
    widths: Mapping[str, int],
    episodes: Sequence[np.ndarray],
    names: Sequence[str] = (),
    state: Sequence[np.ndarray] = (),
    state_layout: Layout | None = None,
) -> InferredLayout:
    """Return the layout of the columns of `episodes`, float [T, dims] each.

    Args:
        part: "action" or "proprio".
        widths: {field: number of its columns}, in the order of the columns.
        episodes: the columns of all fields, for each episode.
        names: names of the columns, from the file.
        state: for actions: the proprio of each episode.
        state_layout: layout of the proprio; actions without names of their own get the names of the
            state that they move, and its units.
    """
    dims = sum(widths.values())
    s = _statistics(episodes, dims)
    evidence: dict[str, str] = {}
    targets, context = InferredTargets((True,) * dims, (), ""), None
    if part == "action":
        targets = infer_targets(episodes, state, _groups(widths), ranges.is_binary(s).tolist())
        evidence["absolute"] = targets.evidence
        state_names = state_layout.names if state_layout else ()
        context = ActionContext(targets.absolute, targets.matches, state_names)
    columns = name_columns(part, widths, names, episodes, s, context)
    evidence["names"] = columns.evidence
    hands = grippers(columns.names, s)
    absolute = tuple(a or i in hands for i, a in enumerate(targets.absolute))
    raised = [columns.names[d] for d in hands if not targets.absolute[d]]
    if raised:
        evidence["absolute"] += f"; {', '.join(raised)} counts as a target, as grippers do"
    units, reason = infer_units(columns.names, absolute, hands, s, state_layout, targets.matches)
    evidence["units"] = reason or "none could be inferred"
    layout = Layout(names=columns.names, units=units, absolute=absolute, normalized=(True,) * dims)
    shares = [d for d in hands if part == "action" and _is_share(layout, s, d)]
    if hands and part == "action":
        evidence["gripper"] = "; ".join(_side(layout.names[d], s, d, d in shares) for d in hands)
    normalized = tuple(d not in shares for d in range(dims))
    kinds = tuple("share" if d in hands and d not in shares else "" for d in range(dims))
    layout = dataclasses.replace(
        layout,
        normalized=normalized,
        normalization=kinds if part == "action" and any(kinds) else (),
    )
    evidence = {k: v for k, v in evidence.items() if v}
    doubts = (*columns.doubts, *_mixed(layout, targets), *_doubts(part, layout, hands, s))
    return InferredLayout(layout, hands, evidence, doubts, targets.matches)


def _groups(widths: Mapping[str, int]) -> list[list[int]]:
    """Return the columns of each field."""
    ends = np.cumsum(list(widths.values())).tolist()
    return [list(range(end - w, end)) for w, end in zip(widths.values(), ends, strict=True)]


def _mixed(layout: Layout, targets: InferredTargets) -> list[str]:
    """Return a sentence for each field with both targets and changes."""
    sentences = []
    for group in targets.mixed:
        names = [layout.names[d] for d in group if layout.absolute[d]]
        changes = [layout.names[d] for d in group if not layout.absolute[d]]
        if names and changes:  # grippers, which count as targets, may have been all that differed
            sentences.append(
                f"action: {', '.join(names)} look like targets, but {', '.join(changes)} of the "
                "same field like changes: verify `absolute`"
            )
    return sentences


def _doubts(part: str, layout: Layout, hands: Sequence[int], s: Statistics) -> tuple[str, ...]:
    """Return sentences on columns that are unlike the usual radians, metres and shares."""
    doubts = []
    largest = np.maximum(np.abs(s.min), np.abs(s.max))
    turns = [
        layout.names[d]
        for d in range(len(layout))
        if (layout.units[d] == "deg" or not layout.units[d]) and largest[d] > FULL_TURN * 1.01
        if d not in hands
    ]
    if turns:
        doubts.append(
            f"{part}: {', '.join(turns)} exceed 2π: degrees, millimetres, percent or steps of a "
            "motor, not radians; a policy acts in the same unit, so the robot must as well"
        )
    scaled = [layout.names[d] for d in hands if layout.normalized[d]]
    if scaled and part == "action":
        doubts.append(
            f"{part}: {', '.join(scaled)}: a gripper that is not a share in [0, 1] or [-1, 1]; it "
            "is normalised to one, and commanded in its own unit"
        )
    return tuple(doubts)


def _statistics(episodes: Sequence[np.ndarray], dims: int) -> Statistics:
    """Return the statistics of all finite rows; of one row of zeros if there are none."""
    sketch = QuantileSketch(dims)
    for x in episodes:
        finite = x[np.isfinite(x).all(axis=1)]
        if len(finite):
            sketch.update(np.asarray(finite, np.float32))
    sketch.flush()
    if not sketch.steps:
        sketch.update(np.zeros((1, dims), np.float32))
    return sketch.statistics()


def _is_share(layout: Layout, s: Statistics, d: int) -> bool:
    """Return whether a column may be learned as it is: also `ranges.misfits` accepts less."""
    if 0 < s.max[d] - s.min[d] < SHARE:
        return False
    single = dataclasses.replace(layout, normalized=tuple(i != d for i in range(len(layout))))
    return not ranges.misfits(single, s, "action")


def _side(name: str, s: Statistics, d: int, is_share: bool) -> str:
    """Return the sentence on a gripper: its range, and whether it is two-valued or normalised."""
    kind = "two-valued, " if ranges.is_binary(s)[d] else ""
    effect = "left as it is" if is_share else "normalised to a share"
    high = float((s.mean[d] - s.min[d]) / max(float(s.max[d] - s.min[d]), 1e-9))
    return (
        f"{name}: {kind}{s.min[d]:.4g} to {s.max[d]:.4g}, {high:.0%} of the way up on average; "
        f"{effect}; the data do not say which end is open"
    )
