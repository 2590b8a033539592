"""Plain expressions over raw fields: how a dataset's row says what actions and proprio are.

    action.world_vector                          a field, as stored: [T] or [T, n]
    observation['present/xyz'][0:3]              columns of a field; other spellings of a key
    next(observation.state[0:3]) - observation.state[0:3]
    1 - clip(action[-1:], 0, 1)

`action`, `observation` and `step` (any field of the steps) are the episode's arrays over T steps;
numbers and + - * / are what they are. An episode ends where its shortest part does, so that `next`
drops the last step. `FUNCTIONS` are all there is to call. Nothing else of Python is understood.
"""

from __future__ import annotations

import ast
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
}


def evaluate(parts: Sequence[str], steps: Mapping[str, Any]) -> np.ndarray:
    """Return float32 [T', dims]: the expressions' values side by side.

    steps: nested dict of arrays over T steps; T' ≤ T. Raises KeyError for a field that is not
    there, ValueError for what is no expression.
    """
    length = len(steps["is_first"])
    values = [np.asarray(_value(_tree(part), steps, length), np.float32) for part in parts]
    return np.concatenate(_cut([_flat(v) for v in values]), axis=1)


def fields(parts: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the paths under steps of the fields that expressions read, in order."""
    found = [_path(node) for part in parts for node in ast.walk(_tree(part))]
    return list(dict.fromkeys(path for path in found if path and len(path) > 0))


def check_expression(part: str) -> None:
    """Raise ValueError where a text is no expression of this language."""
    for node in ast.walk(_tree(part)):
        if isinstance(node, ast.Call):
            _function(node)
        elif isinstance(node, ast.Name) and node.id not in (*ROOTS, *FUNCTIONS):
            raise ValueError(f"{part!r}: {node.id!r} is none of {', '.join((*ROOTS, *FUNCTIONS))}")


def following(x: np.ndarray) -> np.ndarray:
    """Return the value at the next step; the last step has none."""
    return x[1:]


def wrap_angle(x: np.ndarray) -> np.ndarray:
    """Return angles in radians, brought into (−π, π]."""
    return x - 2 * np.pi * np.ceil((x - np.pi) / (2 * np.pi))


def relative_to_absolute(x: np.ndarray, threshold: float = 0.1) -> np.ndarray:
    """Return the gripper's state, 1 open and 0 closed, from events [T, 1]: > 0 closes, < 0 opens.

    Values within ± threshold change nothing. Before the first event the state is the opposite of
    what that event asks for; with no event at all the gripper is open.
    """
    events = np.where(x > threshold, 0.0, np.where(x < -threshold, 1.0, np.nan)).reshape(-1)
    known = np.flatnonzero(~np.isnan(events))
    if not len(known):
        return np.ones((len(events), 1), np.float32)
    last = np.searchsorted(known, np.arange(len(events)), side="right") - 1
    state = np.where(last < 0, 1 - events[known[0]], events[known[np.maximum(last, 0)]])
    return np.where(np.isfinite(np.reshape(x, -1)), state, np.nan)[:, None].astype(np.float32)


def binarize_gripper(x: np.ndarray, low: float = 0.05, high: float = 0.95) -> np.ndarray:
    """Return gripper commands [T] or [T, 1] as 0 (closed) or 1 (open).

    Above `high` is open, below `low` closed; a value between is the gripper on its way, and takes
    the next extreme's. With no extreme after it: open if the last command is above the middle. What
    is not finite stays NaN, as do the values before it that would take its side.
    """
    flat = np.reshape(x, -1)
    between = (low <= flat) & (flat <= high)
    side = np.where(np.isfinite(flat), flat > high, np.nan)
    result, following = np.empty(len(flat), np.float32), float(flat[-1] > 0.5)
    for t in reversed(range(len(flat))):
        following = following if between[t] else side[t]
        result[t] = following
    return result.reshape(np.shape(x))


def quaternion_to_euler(x: np.ndarray) -> np.ndarray:
    """Return roll, pitch, yaw [T, 3] (rotation = Rz Ry Rx) of quaternions x, y, z, w [T, 4]."""
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    a, b, c, w = np.moveaxis(x / np.where(norm > 0, norm, 1), -1, 0)
    roll = np.arctan2(2 * (w * a + b * c), 1 - 2 * (a * a + b * b))
    pitch = np.arcsin(np.clip(2 * (w * b - c * a), -1, 1))
    yaw = np.arctan2(2 * (w * c + a * b), 1 - 2 * (b * b + c * c))
    return np.stack([roll, pitch, yaw], axis=-1)


def inflate(x: Sequence[bytes], count: float) -> np.ndarray:
    """Return float32 [T, count] of zlib-compressed little-endian numbers."""
    rows = [np.frombuffer(zlib.decompress(b), "<f4") for b in np.reshape(x, -1).tolist()]
    return np.stack(rows).reshape(len(rows), int(count))


FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "next": following,
    "wrap": wrap_angle,
    "clip": np.clip,
    "rel2abs": relative_to_absolute,
    "binarize": binarize_gripper,
    "quat_to_euler": quaternion_to_euler,
    "zlib_f32": inflate,
    "zeros": lambda n, length: np.zeros((length, int(n))),
    "ones": lambda n, length: np.ones((length, int(n))),
}
ROOTS = ("action", "observation", "step")


@lru_cache(maxsize=1024)
def _tree(part: str) -> ast.expr:
    try:
        return ast.parse(part, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{part!r} is no expression: {error.msg}") from None


def _value(node: ast.expr, steps: Mapping[str, Any], length: int) -> Any:
    path = _path(node)
    if path is not None:
        return _field(steps, path)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, steps, length)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        sides = _cut([_value(side, steps, length) for side in (node.left, node.right)])
        return _OPERATORS[type(node.op)](*sides)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        x = _flat(np.asarray(_value(node.value, steps, length)))
        return x[:, _bound(node.slice.lower) : _bound(node.slice.upper)]
    if isinstance(node, ast.Call):
        given = [_value(argument, steps, length) for argument in node.args]
        made = _function(node) in ("zeros", "ones")
        return FUNCTIONS[_function(node)](*given, *([length] if made else []))
    raise ValueError(f"{ast.unparse(node)!r} is not understood in an expression over fields")


def _path(node: ast.AST) -> tuple[str, ...] | None:
    """Return the path under steps of a field, () for the steps themselves; None for the rest."""
    if isinstance(node, ast.Name) and node.id in ROOTS:
        return () if node.id == "step" else (node.id,)
    if isinstance(node, ast.Attribute):
        parent, key = _path(node.value), node.attr
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        parent, key = _path(node.value), node.slice.value
    else:
        return None
    return None if parent is None or not isinstance(key, str) else (*parent, key)


def _field(steps: Mapping[str, Any], path: tuple[str, ...]) -> np.ndarray:
    x: Any = steps
    for key in path:
        if not isinstance(x, Mapping) or key not in x:
            raise KeyError(".".join(path))
        x = x[key]
    x = np.asarray(x)
    return x if x.dtype.kind in "OSU" else _flat(x.astype(np.float32))


def _flat(x: np.ndarray) -> np.ndarray:
    """Return [T, n] of an array over T steps, of which there may be none."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _cut(values: list[Any]) -> list[Any]:
    """Return arrays over steps cut to the shortest; numbers stay."""
    arrays = [v for v in values if np.ndim(v)]
    shortest = min(map(len, arrays), default=0)
    return [v[:shortest] if np.ndim(v) else v for v in values]


def _bound(node: ast.expr | None) -> int | None:
    if node is None:
        return None
    value = ast.literal_eval(node)
    if not isinstance(value, int):
        raise ValueError(f"{value!r} is no column")
    return value


def _function(node: ast.Call) -> str:
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    if name not in FUNCTIONS or node.keywords:
        raise ValueError(f"{name!r} is none of the functions {', '.join(FUNCTIONS)}")
    return name
