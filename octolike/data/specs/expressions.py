"""Expressions over raw fields: how a dataset spec computes actions and proprio.

    action.world_vector                          a field as stored: [T] or [T, n]
    observation['present/xyz'][0:3]              columns of a field with any name
    next(observation.state[0:3]) - observation.state[0:3]
    1 - clip(action[-1:], 0, 1)

`action`, `observation` and `step` (any field of the steps) are the episode's arrays over T steps.
Numbers and + - * / have their usual meaning, and `FUNCTIONS` lists the functions. The result is as
long as its shortest operand, so `next` drops the last step. Other Python syntax is rejected.
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


def evaluate(expressions: Sequence[str], steps: Mapping[str, Any]) -> np.ndarray:
    """Return the values of the expressions, concatenated to float32 [T', dims].

    steps: nested dict of arrays over T steps; T' ≤ T. Raises KeyError for a missing field and
    ValueError for a text that is not an expression.
    """
    length = len(steps["is_first"])
    values = [np.asarray(_value(_parse(x), steps, length), np.float32) for x in expressions]
    return np.concatenate(_trim([_as_columns(v) for v in values]), axis=1)


def check_expression(expression: str) -> None:
    """Raise ValueError if a text is not an expression of this language."""
    names = (*ROOTS, *FUNCTIONS)
    for node in ast.walk(_parse(expression)):
        if isinstance(node, ast.Call):
            _function_name(node)
        elif isinstance(node, ast.Name) and node.id not in names:
            raise ValueError(f"{expression!r}: unknown name {node.id!r}; use {', '.join(names)}")


def functions_used(expressions: Sequence[str]) -> dict[str, Callable[..., np.ndarray]]:
    """Return the functions that the expressions call, by name and sorted."""
    nodes = [node for x in expressions for node in ast.walk(_parse(x))]
    names = {_function_name(node) for node in nodes if isinstance(node, ast.Call)}
    return {name: FUNCTIONS[name] for name in sorted(names)}


def next_step(x: np.ndarray) -> np.ndarray:
    """Return the values at the next step, one step fewer: the last step has no successor."""
    return x[1:]


def wrap_angle(x: np.ndarray) -> np.ndarray:
    """Return angles in radians, wrapped into (−π, π]."""
    return x - 2 * np.pi * np.ceil((x - np.pi) / (2 * np.pi))


def relative_to_absolute(x: np.ndarray, threshold: float = 0.1) -> np.ndarray:
    """Return gripper states [T, 1], 1 open and 0 closed, from events: > 0 closes, < 0 opens.

    Values within ± threshold keep the state. Before the first event, the state is the opposite of
    the one that the event leads to; without any event, the gripper is open.
    """
    events = np.where(x > threshold, 0.0, np.where(x < -threshold, 1.0, np.nan)).reshape(-1)
    event_steps = np.flatnonzero(~np.isnan(events))
    if not len(event_steps):
        return np.ones((len(events), 1), np.float32)
    last = np.searchsorted(event_steps, np.arange(len(events)), side="right") - 1
    initial = 1 - events[event_steps[0]]
    state = np.where(last < 0, initial, events[event_steps[np.maximum(last, 0)]])
    return np.where(np.isfinite(np.reshape(x, -1)), state, np.nan)[:, None].astype(np.float32)


def binarize_gripper(x: np.ndarray, low: float = 0.05, high: float = 0.95) -> np.ndarray:
    """Return gripper commands [T] or [T, 1] as 0 (closed) or 1 (open).

    Above `high` is open, below `low` is closed. In between, the gripper is moving and takes the
    value of the next extreme; if no extreme follows, it is open if the last command is above 0.5.
    A non-finite command becomes NaN, and so do the values before it that would take its value.
    """
    flat = np.reshape(x, -1)
    moving = (low <= flat) & (flat <= high)
    extreme = np.where(np.isfinite(flat), flat > high, np.nan)
    result, state = np.empty(len(flat), np.float32), float(flat[-1] > 0.5)
    for t in reversed(range(len(flat))):
        state = state if moving[t] else extreme[t]
        result[t] = state
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


def decompress_floats(x: Sequence[bytes], count: float) -> np.ndarray:
    """Return float32 [T, count] from T zlib-compressed strings of little-endian float32."""
    rows = [np.frombuffer(zlib.decompress(b), "<f4") for b in np.reshape(x, -1).tolist()]
    return np.stack(rows).reshape(len(rows), int(count))


def zeros(count: float, length: int) -> np.ndarray:
    """Return `count` columns of zeros over `length` steps."""
    return np.zeros((length, int(count)))


def ones(count: float, length: int) -> np.ndarray:
    """Return `count` columns of ones over `length` steps."""
    return np.ones((length, int(count)))


FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "next": next_step,
    "wrap": wrap_angle,
    "clip": np.clip,
    "rel2abs": relative_to_absolute,
    "binarize": binarize_gripper,
    "quat_to_euler": quaternion_to_euler,
    "zlib_f32": decompress_floats,
    "zeros": zeros,
    "ones": ones,
}
ROOTS = ("action", "observation", "step")


@lru_cache(maxsize=1024)
def _parse(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is not an expression: {error.msg}") from None


def _value(node: ast.expr, steps: Mapping[str, Any], length: int) -> Any:
    path = _path(node)
    if path is not None:
        return _field(steps, path)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, steps, length)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        operands = _trim([_value(x, steps, length) for x in (node.left, node.right)])
        return _OPERATORS[type(node.op)](*operands)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        x = _as_columns(np.asarray(_value(node.value, steps, length)))
        return x[:, _column(node.slice.lower) : _column(node.slice.upper)]
    if isinstance(node, ast.Call):
        name = _function_name(node)
        arguments = [_value(argument, steps, length) for argument in node.args]
        if name in ("zeros", "ones"):
            arguments.append(length)
        return FUNCTIONS[name](*arguments)
    raise ValueError(f"{ast.unparse(node)!r} is not supported in an expression over fields")


def _path(node: ast.AST) -> tuple[str, ...] | None:
    """Return the path of a field under steps, () for the steps; None for any other node."""
    if isinstance(node, ast.Name) and node.id in ROOTS:
        return () if node.id == "step" else (node.id,)
    key: object
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
    return x if x.dtype.kind in "OSU" else _as_columns(x.astype(np.float32))


def _as_columns(x: np.ndarray) -> np.ndarray:
    """Return an array over T ≥ 0 steps as [T, n]."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _trim(values: list[Any]) -> list[Any]:
    """Return the arrays, trimmed to the length of the shortest, and the numbers as they are."""
    arrays = [v for v in values if np.ndim(v)]
    shortest = min(map(len, arrays), default=0)
    return [v[:shortest] if np.ndim(v) else v for v in values]


def _column(node: ast.expr | None) -> int | None:
    if node is None:
        return None
    value = ast.literal_eval(node)
    if not isinstance(value, int):
        raise ValueError(f"{value!r} is not a column number")
    return value


def _function_name(node: ast.Call) -> str:
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    if name not in FUNCTIONS:
        raise ValueError(f"unknown function {name!r}; use {', '.join(FUNCTIONS)}")
    if node.keywords:
        raise ValueError(f"function {name!r} does not take keyword arguments")
    return name
