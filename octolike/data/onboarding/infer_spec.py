"""From a survey to a row: which keys mean what, what looks wrong, and a spec file to go on with.

Everything in here is a guess from names, shapes and numbers; the spec file says so where it
matters, and a person corrects it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from octolike import files
from octolike.data.onboarding.survey import Survey
from octolike.data.rlds.fields import ACTION

LANGUAGE = ("language_instruction", "natural_language_instruction", "instruction", "language")
PROPRIO = ("state", "proprio", "qpos", "joint_positions", "robot_state", "eef_state", "cartesian")
WRIST = ("wrist", "hand", "gripper", "eye_in_hand")
SECOND = ("secondary", "side", "low", "left", "right", "image_1", "2", "back", "overhead")
POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


@dataclass(frozen=True)
class InferredSpec:
    """What a row needs.

    Attributes:
        cameras: camera: key under steps.observation.
        language: key under steps, or "".
        action, proprio: dotted fields under steps whose columns are joined; proprio may be empty.
        action_names, proprio_names: of the dimensions.
        absolute: per action dimension.
        grippers: action dimensions that are grippers. control_hz: 0 where unknown.
    """

    cameras: dict[str, str]
    language: str
    action: tuple[str, ...]
    proprio: tuple[str, ...]
    action_names: tuple[str, ...]
    proprio_names: tuple[str, ...]
    absolute: tuple[bool, ...]
    grippers: tuple[int, ...]
    control_hz: float


def infer(seen: Survey) -> InferredSpec:
    """Return the likeliest keys; what is not there stays empty."""
    language = [k for n in LANGUAGE for k in seen.texts if k.rpartition(".")[2] == n]
    actions = [k for k in seen.numbers if k == ACTION or k.startswith(f"{ACTION}.")]
    actions = actions or [k for k in seen.numbers if k.rpartition(".")[2].startswith(ACTION)][:1]
    proprio = _proprio(seen)
    action = join_fields(seen, tuple(actions))
    state = join_fields(seen, tuple(proprio))
    absolute = _absolute(action, state)
    grippers = _grippers(action, _names(seen, actions, action, absolute))
    return InferredSpec(
        cameras=_cameras(list(seen.pictures)),
        language=language[0] if language else "",
        action=tuple(actions),
        proprio=tuple(proprio),
        action_names=_names(seen, actions, action, absolute),
        proprio_names=_names(seen, proprio, state, (True,) * 7),
        absolute=tuple(a or i in grippers for i, a in enumerate(absolute)),
        grippers=grippers,
        control_hz=seen.control_hz,
    )


def join_fields(seen: Survey, fields: tuple[str, ...]) -> list[np.ndarray]:
    """Return the fields' columns side by side, one float64 [T, dims] per episode."""
    return [
        np.concatenate(parts, axis=1)
        for parts in zip(*(seen.numbers[f] for f in fields), strict=True)
    ]


def find_problems(seen: Survey, row: InferredSpec) -> list[str]:
    """Return what looks wrong, one sentence each; nothing here stops a training."""
    found = []
    if not row.action:
        found.append("no action field: a policy has nothing to learn")
    if not row.cameras:
        found.append("no camera")
    if not row.language:
        found.append("no instruction field: condition on goal images, or convert with one")
    else:
        bare = sum(not any(t.strip() for t in texts) for texts in seen.texts[row.language])
        if bare:
            found.append(f"{bare} of {seen.looked} episodes have no instruction (unlabelled)")
    short = int((seen.lengths < 3).sum())
    if short:
        found.append(f"{short} of {seen.looked} episodes have fewer than 3 steps")
    for key, count in seen.frozen.items():
        if count:
            found.append(
                f"{key}: the last image equals the first in {count} of {seen.looked} episodes "
                "(frozen camera, or nothing happens)"
            )
    for fields in (row.action, row.proprio):
        for field in fields:
            found += _field_problems(field, seen.numbers[field])
    return found + _action_problems(row, join_fields(seen, row.action) if row.action else [])


def write_spec(path: Path, seen: Survey, row: InferredSpec) -> Path:
    """Write a Python file whose DATASETS holds the row; return its path.

    Raises ValueError where there is no action to be a row's.
    """
    if not row.action:
        raise ValueError(f"{seen.directory} has no action field, so no spec can be written")
    files.write_text(path, spec_text(seen, row))
    return path


def spec_text(seen: Survey, row: InferredSpec) -> str:
    """Return the spec file's source."""
    action, proprio = _code(row.action), _code(row.proprio)
    standard = (
        f"StandardSteps(np.float32({action}), {f'np.float32({proprio})' if proprio else None})"
    )
    gripper = "unverified: say whether 1 is open" if row.grippers else "none"
    hz = row.control_hz or 10.0
    doubt = "" if row.control_hz else "  # a guess: nothing in the data says"
    kept = tuple(i not in row.grippers for i in range(len(row.action_names)))
    state = (
        _layout(row.proprio_names, (True,) * len(row.proprio_names), None)
        if row.proprio
        else "    proprio=None,"
    )
    return f'''"""The row of {seen.name}, guessed by scripts/inspect_data.py: correct it, keep it.

    --config.data.specs=my_robot.py --config.data.mix={seen.name}     (this file's path)
"""

import numpy as np

from octolike.data.specs.catalog import DatasetSpec
from octolike.data.specs.standardize import StandardSteps
from octolike.embodiment import Layout


def standardize(steps):
    """Return actions and proprio, float32 [T, dims], of an episode's raw steps."""
    return {standard}


ROW = DatasetSpec(
    name={seen.name!r},
    version={seen.version!r},
    cameras={row.cameras!r},
    language={row.language!r},
{_layout(row.action_names, row.absolute, kept)}
{state}
    gripper={gripper!r},
    control_hz={hz:g},{doubt}
    robot={seen.name!r},
    standardize=standardize,
)

DATASETS = [ROW]
'''


def _field_problems(field: str, episodes: list[np.ndarray]) -> list[str]:
    """Return what is wrong with a field: not finite, constant, jumping, wrapping."""
    found, every = [], np.concatenate(episodes)
    bad = [i for i, x in enumerate(episodes) if not np.isfinite(x).all()]
    if bad:
        found.append(f"{field}: not finite in {len(bad)} episodes, the first is {bad[0]}")
        every = every[np.isfinite(every).all(1)]
    if not len(every):
        return found
    constant = np.flatnonzero(np.ptp(every, axis=0) == 0)
    if len(constant):
        found.append(f"{field}: dimensions {constant.tolist()} never change")
    steps = [np.abs(np.diff(x, axis=0)) for x in episodes if len(x) > 1 and np.isfinite(x).all()]
    if not steps:
        return found
    moves = np.concatenate(steps)
    wraps = [
        d
        for d in range(every.shape[1])
        if np.abs(every[:, d]).max() <= np.pi + 0.01 and (moves[:, d] > 1.8 * np.pi).any()
    ]
    if wraps:
        found.append(
            f"{field}: dimensions {wraps} jump by about 2π: angles that wrap at ±π; unwrap them, "
            "or use sine and cosine"
        )
    typical = np.quantile(moves, 0.99, axis=0)
    binary = np.array([len(np.unique(c)) <= 2 for c in every.T])
    high = (moves > 10 * np.maximum(typical, 1e-6)) & ~binary & (typical > 0)
    jumps = [d for d in np.flatnonzero(high.any(0)).tolist() if d not in wraps]
    if jumps:
        found.append(f"{field}: jumps in dimensions {jumps}, over 10 times the 99th percentile")
    return found


def _action_problems(row: InferredSpec, episodes: list[np.ndarray]) -> list[str]:
    """Return idle steps and grippers that do nothing."""
    if not episodes:
        return []
    found, idle, total = [], 0, 0
    moving = [i for i in range(episodes[0].shape[1]) if i not in row.grippers]
    absolute = all(row.absolute[i] for i in moving)
    scale = np.concatenate(episodes)[:, moving].std(0) + 1e-12
    for x in episodes:
        motion = np.diff(x[:, moving], axis=0) if absolute else x[:, moving]
        idle, total = idle + int((np.abs(motion) < 1e-3 * scale).all(1).sum()), total + len(motion)
    if total and idle > 0.1 * total:
        found.append(f"{idle / total:.0%} of the steps are idle: no motion is asked for")
    for i in row.grippers:
        still = sum(np.ptp(x[:, i]) == 0 for x in episodes)
        if still:
            found.append(f"the gripper (dimension {i}) never moves in {still} episodes")
    return found


def _cameras(keys: list[str]) -> dict[str, str]:
    """Name up to three cameras: the wrist's by its name, then the others in order."""
    names = [k.removeprefix("observation.") for k in keys if k.startswith("observation.")]
    names = [n for n in names if "depth" not in n.lower()]
    wrist = [n for n in names if any(w in n.lower() for w in WRIST)]
    others = [n for n in names if n not in wrist]
    others.sort(key=lambda n: (any(s in n.lower() for s in SECOND), n))
    if not others and len(wrist) > 1:
        others, wrist = wrist[:1], wrist[1:]
    result = dict(zip(("primary", "secondary"), others, strict=False))
    return result | ({"wrist": wrist[0]} if wrist else {})


def _proprio(seen: Survey) -> list[str]:
    """Return the state's field by name; else all numbers of the observation."""
    there = [k for k in seen.numbers if k.startswith("observation.")]
    named = [k for n in PROPRIO for k in there if k == f"observation.{n}"]
    return named[:1] or [k for k in there if np.concatenate(seen.numbers[k]).dtype.kind == "f"]


def _absolute(action: list[np.ndarray], state: list[np.ndarray]) -> tuple[bool, ...]:
    """Tell per dimension whether actions are targets: nearer to the next state than to its change.

    Without a state of as many dimensions: whether they change slowly against their spread.
    """
    if not action:
        return ()
    dims = action[0].shape[1]
    long = [i for i, x in enumerate(action) if len(x) > 1]
    if not long:
        return (False,) * dims
    if state and state[0].shape[1] == dims:
        target = np.concatenate([np.abs(action[i][:-1] - state[i][1:]) for i in long])
        change = np.concatenate([np.abs(action[i][:-1] - np.diff(state[i], axis=0)) for i in long])
        return tuple((np.nanmedian(target, 0) < np.nanmedian(change, 0)).tolist())
    spread = np.nanstd(np.concatenate(action), axis=0) + 1e-12
    moves = np.concatenate([np.abs(np.diff(action[i], axis=0)) for i in long])
    return tuple((np.nanmedian(moves, 0) < 0.1 * spread).tolist())


def _grippers(action: list[np.ndarray], names: tuple[str, ...]) -> tuple[int, ...]:
    """Return the dimensions named so, or the last where it stays within [-1, 1] or two values."""
    named = tuple(i for i, n in enumerate(names) if "gripper" in n.lower())
    if named or not action or action[0].shape[1] < 2:
        return named
    last = np.concatenate(action)[:, -1]
    last = last[np.isfinite(last)]
    two = len(np.unique(last)) <= 2 and len(last) and np.abs(last).max() <= 1
    return (action[0].shape[1] - 1,) if two else ()


def _names(
    seen: Survey, fields: list[str], x: list[np.ndarray], absolute: tuple[bool, ...]
) -> tuple[str, ...]:
    """Return the dimensions' names: what the converter noted, or a pose's, or numbered ones."""
    if not x:
        return ()
    dims, known = x[0].shape[1], seen.about.get("names", {})
    noted = [n for f in fields for n in known.get(f.removeprefix("observation."), [])]
    if len(noted) == dims == len(set(noted)):
        return tuple(noted)
    if dims == 14:
        one = (*(f"joint_{i}" for i in range(6)), "gripper")
        return tuple(f"{side}_{n}" for side in ("left", "right") for n in one)
    if dims == 7:
        return POSE if all(absolute[:6]) else (*(f"d{n}" for n in POSE[:6]), POSE[6])
    return tuple(f"dim_{i}" for i in range(dims))


def _layout(names: tuple[str, ...], absolute: tuple[bool, ...], kept: tuple | None) -> str:
    part = "proprio" if kept is None else "action"
    units = tuple(_unit(n) for n in names)
    return f"""    {part}=Layout(
        names={names!r},
        units={units!r},
        absolute={absolute!r},
        normalized={kept or (True,) * len(names)!r},
    ),"""


def _unit(name: str) -> str:
    bare = name.removeprefix("d")
    if bare in ("x", "y", "z"):
        return "m"
    return "rad" if bare in ("roll", "pitch", "yaw") or "joint" in name else ""


def _code(fields: tuple[str, ...]) -> str:
    """Return the expression that joins fields of `steps`."""
    parts = ["steps" + "".join(f"[{k!r}]" for k in f.split(".")) for f in fields]
    if len(parts) <= 1:
        return "".join(parts)
    flat = ", ".join(f"{p}.reshape(len({p}), -1)" for p in parts)
    return f"np.concatenate([{flat}], axis=1)"
