"""Find suspicious values of the columns of a field, of actions, or of actions and states together.

    field_problems("observation.state", episodes)          # [T, dims] of each episode
    action_problems(spec, actions, states)

Each finding is a sentence with the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from octolike.data.onboarding.infer_representation import repeated_states
from octolike.data.onboarding.infer_spec import InferredSpec
from octolike.data.onboarding.infer_targets import leading_states

# {the length of a turn: (its name, the kind of the values)}
TURNS = {
    2 * np.pi: ("2π", "angles that wrap at ±π"),
    360.0: ("360", "degrees that wrap"),
    4096.0: ("4096", "steps of a motor that wrap"),
}
SIN_COS = "data.proprio_representation=sin_cos"
REMEDIES = {
    "2π": f"unwrap them, or show proprio as sine and cosine: {SIN_COS}",
    "360": f"unwrap them, or convert them to radians in standardize, for {SIN_COS}",
    "4096": "unwrap them in standardize",
}
NEARLY = 0.9  # of a turn: a jump, and the range of values that wrap
ROUNDING = 1.005  # of a turn: the largest range of values that wrap
FEW = 5  # values of a column: a switch or a number of choices, not a motion
ENOUGH = 20  # steps: fewer of them have few values by chance
PADDED = 5.0  # times the usual motion: a jump to zeros


def field_problems(field: str, episodes: Sequence[np.ndarray]) -> list[str]:
    """Return the problems of a field: not finite, constant, jumping or wrapping values."""
    problems, values = [], np.concatenate(episodes)
    bad = [i for i, x in enumerate(episodes) if not np.isfinite(x).all()]
    if bad:
        problems.append(f"{field}: not finite in {len(bad)} episodes, the first is {bad[0]}")
        values = values[np.isfinite(values).all(1)]
    if not len(values):
        return problems
    constant = np.flatnonzero(np.ptp(values, axis=0) == 0)
    if len(constant):
        problems.append(f"{field}: dimensions {constant.tolist()} never change")
    steps = [np.abs(np.diff(x, axis=0)) for x in episodes if len(x) > 1 and np.isfinite(x).all()]
    if not steps:
        return problems
    moves = np.concatenate(steps)
    wraps: list[int] = []
    for turn, (name, kind) in TURNS.items():
        is_wrap = (np.ptp(values, axis=0) <= ROUNDING * turn) & (moves > NEARLY * turn).any(axis=0)
        if found := np.flatnonzero(is_wrap & ~_is_binary(values)).tolist():
            wraps += found
            problems.append(
                f"{field}: dimensions {found} jump by about {name}: {kind}; {REMEDIES[name]}"
            )
    typical = np.quantile(moves, 0.99, axis=0)
    high = (moves > 10 * np.maximum(typical, 1e-6)) & ~_is_binary(values) & (typical > 0)
    jumps = [d for d in np.flatnonzero(high.any(0)).tolist() if d not in wraps]
    if jumps:
        problems.append(
            f"{field}: jumps in dimensions {jumps}, larger than 10 times the 99th percentile"
        )
    return problems


def action_problems(
    spec: InferredSpec, actions: Sequence[np.ndarray], states: Sequence[np.ndarray]
) -> list[str]:
    """Return the problems of the actions [T, A], and of their relation to the states [T, S]."""
    if not actions:
        return []
    return [
        *_alternatives(spec.action),
        *_repeated(spec, actions, states),
        *_late(spec, actions, states),
        *_turns(spec, actions),
        *_switches(spec, actions),
        *_padding(spec, actions, states),
        *_idle(spec, actions),
    ]


def _is_binary(values: np.ndarray) -> np.ndarray:
    return np.array([len(np.unique(c)) <= 2 for c in values.T], bool)


def _alternatives(fields: Sequence[str]) -> list[str]:
    """Return a sentence if the parts of an action are positions and velocities of one motion."""
    words = {"position": "position", "positions": "position", "pos": "position"}
    words |= {"velocity": "velocity", "velocities": "velocity", "vel": "velocity"}
    kinds: dict[str, dict[str, str]] = {}
    for field in fields:
        *stem, last = field.rpartition(".")[2].split("_")
        if last in words:
            kinds.setdefault("_".join(stem), {})[words[last]] = field
    both: Mapping[str, Mapping[str, str]] = {k: v for k, v in kinds.items() if len(v) > 1}
    if not both:
        return []
    names = ", ".join(f for pair in both.values() for f in pair.values())
    return [
        f"action: {names} are positions and velocities of one motion: choose the part that the "
        "robot executes, in standardize or with octolike convert --field action=PATH"
    ]


def _repeated(
    spec: InferredSpec, actions: Sequence[np.ndarray], states: Sequence[np.ndarray]
) -> list[str]:
    layouts = spec.action_layout.layout, spec.proprio_layout.layout
    repeated = repeated_states(*layouts, actions, states)
    if not repeated:
        return []
    return [
        f"action: {', '.join(repeated)} equal the states of the same step, or nearly: a policy "
        "learns to stay where it is; in standardize, use the next step's state as the action"
    ]


def _late(
    spec: InferredSpec, actions: Sequence[np.ndarray], states: Sequence[np.ndarray]
) -> list[str]:
    """Return a sentence if the states make the changes before the actions command them."""
    matches, absolute = spec.action_layout.matches, spec.absolute
    names = spec.action_names
    late = leading_states(actions, states, matches)
    found = [(names[d], *late[d]) for d in sorted(late) if not absolute[d]]
    if not found:
        return []
    listed = ", ".join(
        f"{name} ({before:.2f}, {after:.2f} after it)" for name, before, after in found
    )
    return [
        f"action: the states make these changes in the step before their action, by the "
        f"correlations: {listed}. Was the observation recorded after the action? Then shift the "
        "actions by a step in standardize: a policy would learn the past motion"
    ]


def _turns(spec: InferredSpec, actions: Sequence[np.ndarray]) -> list[str]:
    """Return a sentence on changes of a whole turn: differences of angles that wrap."""
    x, problems = np.concatenate(actions), []
    size = np.abs(x[np.isfinite(x).all(axis=1)])
    if not len(size):
        return []
    for turn, (name, _) in TURNS.items():
        is_turn = (size > NEARLY * turn) & (size <= ROUNDING * turn)
        usual = np.where(is_turn, 0, size).max(axis=0)
        found = is_turn.any(axis=0) & (size.max(axis=0) <= ROUNDING * turn) & (usual < turn / 2)
        found &= ~np.array(spec.absolute, bool) & ~_is_binary(x)
        if names := [spec.action_names[d] for d in np.flatnonzero(found)]:
            count = int(is_turn[:, found].any(axis=1).sum())
            problems.append(
                f"action: {', '.join(names)} change by about {name} in {count} of {len(x)} steps: "
                "differences of angles that wrap; add or subtract a turn in standardize"
            )
    return problems


def _switches(spec: InferredSpec, actions: Sequence[np.ndarray]) -> list[str]:
    """Return a sentence on columns with few values that are not known as grippers."""
    x = np.concatenate(actions)
    problems: dict[str, list[str]] = {}
    for d, name in enumerate(spec.action_names) if len(x) >= ENOUGH else ():
        values, counts = np.unique(x[:, d], return_counts=True)
        if d in spec.grippers or not 2 <= len(values) <= FEW or not np.isfinite(values).all():
            continue
        pairs = zip(values, counts, strict=True)
        rare = [f"{v:g} in {n} of {len(x)} steps" for v, n in pairs if n <= 0.05 * len(x)]
        text = ", ".join(f"{v:g}" for v in values) + (f" ({', '.join(rare)})" if rare else "")
        problems.setdefault(text, []).append(name)
    return [
        f"action: only the values {text} occur in {', '.join(names)}: grippers or switches? Then "
        "set absolute=True and normalization='share' for them in the spec"
        for text, names in problems.items()
    ]


def _padding(
    spec: InferredSpec, actions: Sequence[np.ndarray], states: Sequence[np.ndarray]
) -> list[str]:
    """Return a sentence on episodes that end with rows of zeros, added to give them one length."""
    count, longest = 0, 0
    targets = bool(np.mean(spec.absolute) > 0.5)
    for i, x in enumerate(actions):
        rows = x if targets or not states else np.concatenate([x, states[i]], axis=1)
        nonzero = np.flatnonzero((rows != 0).any(axis=1))
        zeros = len(rows) - (nonzero[-1] + 1 if len(nonzero) else 0)
        if not zeros or zeros == len(rows) or len(nonzero) < 3:
            continue
        moves = np.linalg.norm(np.diff(rows[: len(rows) - zeros], axis=0), axis=1)
        if np.linalg.norm(rows[nonzero[-1]]) > PADDED * np.median(moves):
            count, longest = count + 1, max(longest, zeros)
    if not count:
        return []
    parts = "actions" if targets or not states else "actions and states"
    return [
        f"action: {count} of {len(actions)} episodes end with up to {longest} steps of zeros for "
        f"{parts}, far from the step before: padding, which would be learned; cut these steps"
    ]


def _idle(spec: InferredSpec, episodes: Sequence[np.ndarray]) -> list[str]:
    """Return sentences on idle steps, and on grippers that never move."""
    problems, idle, total = [], 0, 0
    moving = [i for i in range(episodes[0].shape[1]) if i not in spec.grippers]
    absolute = all(spec.absolute[i] for i in moving)
    scale = np.concatenate(episodes)[:, moving].std(0) + 1e-12
    for x in episodes:
        motion = np.diff(x[:, moving], axis=0) if absolute else x[:, moving]
        idle, total = idle + int((np.abs(motion) < 1e-3 * scale).all(1).sum()), total + len(motion)
    if total and idle > 0.1 * total:
        problems.append(f"{idle / total:.0%} of the steps are idle: the actions command no motion")
    for i in spec.grippers:
        still = sum(np.ptp(x[:, i]) == 0 for x in episodes)
        if still:
            problems.append(f"the gripper (dimension {i}) never moves in {still} episodes")
    return problems
