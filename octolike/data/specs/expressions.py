"""Expressions over raw fields: how a dataset spec computes actions and proprio.

    action.world_vector                          a field as stored: [T] or [T, n]
    observation['present/xyz'][0:3]              columns of a field with any name
    next(observation.state[0:3]) - observation.state[0:3]
    1 - clip(action[-1:], 0, 1)

`action`, `observation` and `step` (any field of the steps) are the episode's arrays over T steps.
Numbers and + - * / have their usual meaning, in float32, and `FUNCTIONS` lists the functions. The
result is as long as its shortest operand, so `next` drops the last step. Other Python syntax is
rejected.

This module evaluates expressions with numpy; `rlds/graph_expressions.py` has the same operations in
TensorFlow, for the graph that makes batches.
"""

from __future__ import annotations

import ast
import math
import operator
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

# Python's operators, which numpy arrays and TensorFlow's tensors overload.
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Operations(NamedTuple):
    """The operations of expressions on one kind of array: numpy's or TensorFlow's.

    Attributes:
        functions: name in expressions: function of arrays [T, n] and numbers.
        field: a stored field [T, ...] as float32 [T, n]; texts [T] unchanged.
        columns: an array [T, ...] as [T, n].
        length: the number of steps T of an array.
        trim: arrays as long as the shortest of them.
        concatenate: arrays [T, n] side by side: float32 [T, sum of n].
    """

    functions: Mapping[str, Callable[..., Any]]
    field: Callable[[Any], Any]
    columns: Callable[[Any], Any]
    length: Callable[[Any], Any]
    trim: Callable[[Sequence[Any]], Sequence[Any]]
    concatenate: Callable[[Sequence[Any]], Any]


def check_expression(expression: str) -> None:
    """Raise ValueError, in one line, if a text is not an expression of this language.

    An expression that passes can fail only on the data: a missing field, too few columns, another
    dtype.
    """
    _parse(expression)


def functions_used(expressions: Sequence[str]) -> dict[str, Callable[..., np.ndarray]]:
    """Return the functions that the expressions call, by name and sorted."""
    nodes = [node for x in expressions for node in ast.walk(_parse(x))]
    names = {_function_name(node) for node in nodes if isinstance(node, ast.Call)}
    return {name: FUNCTIONS[name] for name in sorted(names)}


def fields_read(expressions: Sequence[str]) -> set[tuple[str, ...]]:
    """Return the paths under steps of the fields that the expressions read."""
    return {path for x in expressions for path in _fields_under(_parse(x))}


def next_step(x: np.ndarray) -> np.ndarray:
    """Return the values at the next step, one step fewer: the last step has no successor."""
    return x[1:]


def wrap_angle(x: np.ndarray) -> np.ndarray:
    """Return angles in radians, wrapped into (−π, π]."""
    return x - 2 * np.pi * np.ceil((x - np.pi) / (2 * np.pi))


def relative_to_absolute(x: np.ndarray, threshold: float = 0.1) -> np.ndarray:
    """Return gripper states [T, 1], 1 open and 0 closed, from events: > 0 closes, < 0 opens.

    Values within ± threshold keep the state. Before the first event, the state is the opposite of
    the one that the event leads to; without any event, the gripper is open. A non-finite value
    becomes NaN.
    """
    flat = np.reshape(x, -1)
    is_event = np.abs(flat) > threshold
    states = (flat[is_event] < 0).astype(np.float32)
    initial = 1 - np.append(states, np.float32(0))[:1]
    state = np.concatenate([initial, states])[np.cumsum(is_event)]
    return np.where(np.isfinite(flat), state, np.float32(np.nan))[:, None]


def binarize_gripper(x: np.ndarray, low: float = 0.05, high: float = 0.95) -> np.ndarray:
    """Return gripper commands [T] or [T, 1] as 0 (closed) or 1 (open).

    Above `high` is open, below `low` is closed. In between, the gripper is moving and takes the
    value of the next extreme; if no extreme follows, it is open if the last command is above 0.5.
    A non-finite command becomes NaN, and so do the values before it that would take its value.
    """
    flat = np.reshape(x, -1)
    is_extreme = ~((low <= flat) & (flat <= high))
    state = np.where(np.isfinite(flat), flat > high, np.float32(np.nan))
    extremes = np.concatenate([state[is_extreme], flat[-1:] > 0.5])
    earlier: np.ndarray = np.cumsum(is_extreme) - is_extreme  # extremes before each step
    return extremes[earlier].astype(np.float32).reshape(np.shape(x))


def quaternion_to_euler(x: np.ndarray) -> np.ndarray:
    """Return roll, pitch, yaw [T, 3] (rotation = Rz Ry Rx) of quaternions x, y, z, w [T, 4]."""
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    a, b, c, w = np.moveaxis(x / np.where(norm > 0, norm, 1), -1, 0)
    roll = np.arctan2(2 * (w * a + b * c), 1 - 2 * (a * a + b * b))
    pitch = np.arcsin(np.clip(2 * (w * b - c * a), -1, 1))
    yaw = np.arctan2(2 * (w * c + a * b), 1 - 2 * (b * b + c * c))
    return np.stack([roll, pitch, yaw], axis=-1).astype(np.float32)


def decompress_floats(x: Sequence[bytes], count: float) -> np.ndarray:
    """Return float32 [T, count] from T zlib-compressed strings of little-endian float32."""
    rows = [np.frombuffer(zlib.decompress(b), "<f4") for b in np.reshape(x, -1).tolist()]
    return np.stack(rows).reshape(len(rows), int(count))


def zeros(count: float, length: int) -> np.ndarray:
    """Return `count` columns of zeros over `length` steps."""
    return np.zeros((length, int(count)), np.float32)


def ones(count: float, length: int) -> np.ndarray:
    """Return `count` columns of ones over `length` steps."""
    return np.ones((length, int(count)), np.float32)


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
CONSTANTS = ("zeros", "ones")  # functions of a number of columns alone
# Least and most arguments; the first is a field, except for CONSTANTS, and the others are numbers.
_ARGUMENTS = {
    "clip": (3, 3),
    "rel2abs": (1, 2),
    "binarize": (1, 3),
    "zlib_f32": (2, 2),
}
_COLUMNS = {"zlib_f32": 1, **dict.fromkeys(CONSTANTS, 0)}  # which argument is a number of columns
_ONE_COLUMN = ("rel2abs", "binarize")  # they follow one gripper over the steps
LARGEST_WIDTH = 1024  # columns that an expression may make
LONGEST, DEEPEST = 4000, 50  # characters of an expression, and levels of its nesting


def _field_columns(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x if x.dtype.kind in "OSU" else _as_columns(x.astype(np.float32))


def _as_columns(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _trim(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    shortest = min(map(len, arrays))
    return [x[:shortest] for x in arrays]


def _concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    if any(x.dtype.kind in "OSU" for x in arrays):
        raise ValueError("an expression reads a text, not numbers")
    return np.concatenate([np.asarray(x, np.float32) for x in arrays], axis=1)


NUMPY = Operations(FUNCTIONS, _field_columns, _as_columns, len, _trim, _concatenate)


def evaluate(
    expressions: Sequence[str], steps: Mapping[str, Any], operations: Operations = NUMPY
) -> Any:
    """Return the values of the expressions, concatenated to float32 [T', dims].

    steps: nested dict of arrays over T steps; T' ≤ T. Raises KeyError for a missing field and
    ValueError for a text that is not an expression or does not fit the fields.
    """
    values = [_evaluate_one(x, steps, operations) for x in expressions]
    return operations.concatenate(operations.trim([operations.columns(v) for v in values]))


def _evaluate_one(expression: str, steps: Mapping[str, Any], operations: Operations) -> Any:
    """Return the value of an expression; ValueError, in one line, if it does not fit the data."""
    node = _parse(expression)
    try:
        return _value(node, steps, operations)
    except (TypeError, ValueError, zlib.error) as error:  # texts, widths that do not broadcast
        raise ValueError(f"{expression!r}: {' '.join(str(error).split())[:300]}") from error


@lru_cache(maxsize=1024)
def _parse(expression: str) -> ast.expr:
    if len(expression) > LONGEST:
        raise ValueError(
            f"{expression[:40]!r}… is not an expression: it has {len(expression):,} characters, "
            f"more than {LONGEST:,}"
        )
    try:
        node = ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is not an expression: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} is not an expression: {error}") from None
    try:
        _check(node, DEEPEST)
    except ValueError as error:
        raise ValueError(f"{expression!r}: {error}") from None
    except RecursionError:  # a name with thousands of dots
        raise ValueError(f"{expression[:40]!r}… is nested too deeply") from None
    if _is_number(node):
        raise ValueError(f"{expression!r} reads no field; use zeros(n) or ones(n) for constants")
    return node


def _check(node: ast.expr, levels: int) -> None:
    """Raise ValueError for a node that `_value` cannot evaluate, or would misread."""
    if levels == 0:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    path = _path(node)
    if path == ():
        raise ValueError("step alone is not a field; write step.NAME")
    if path:
        return
    if isinstance(node, ast.Name):
        raise ValueError(f"unknown name {node.id!r}; use {', '.join((*ROOTS, *FUNCTIONS))}")
    if isinstance(node, ast.Constant):
        _number(node)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _check(node.operand, levels - 1)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        _check(node.left, levels - 1)
        _check(node.right, levels - 1)
        if _is_number(node):
            _number(node)
        elif isinstance(node.op, ast.Div) and _is_number(node.right) and not _number(node.right):
            raise ValueError(f"{ast.unparse(node)!r} divides by 0")
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        if node.slice.step is not None:
            raise ValueError(f"{ast.unparse(node)!r} skips columns; write [from:to] without a step")
        _column(node.slice.lower)
        _column(node.slice.upper)
        if _is_number(node.value):
            raise ValueError(f"{ast.unparse(node)!r} takes columns of a number")
        _check(node.value, levels - 1)
    elif isinstance(node, ast.Call):
        _check_call(node, levels)
    else:
        raise ValueError(f"{ast.unparse(node)!r} is not supported in an expression over fields")


def _check_call(node: ast.Call, levels: int) -> None:
    """Raise ValueError for another function, or arguments that it does not take."""
    name, text = _function_name(node), ast.unparse(node)
    least, most = _ARGUMENTS.get(name, (1, 1))
    if not least <= len(node.args) <= most:
        number = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"{text!r} has {len(node.args)} arguments; {name} takes {number}")
    for argument in node.args:
        _check(argument, levels - 1)
    if name not in CONSTANTS and _is_number(node.args[0]):
        raise ValueError(f"{text!r}: the first argument of {name} must be a field")
    if not all(map(_is_number, node.args[name not in CONSTANTS :])):
        raise ValueError(f"{text!r}: the other arguments of {name} must be numbers")
    if name in _COLUMNS:
        columns = _number(node.args[_COLUMNS[name]])
        if columns not in range(1, LARGEST_WIDTH + 1):
            raise ValueError(f"{text!r}: expected 1 to {LARGEST_WIDTH} columns, as a whole number")


def _is_number(node: ast.AST) -> bool:
    """Return whether the value of a checked node is a number: it reads no field."""
    parts = list(ast.walk(node))
    return not any(isinstance(x, (ast.Call, ast.Name)) for x in parts)


def _number(node: ast.expr) -> float:
    """Return the value of a node without fields; ValueError if it is not a finite number."""
    try:
        value = _value(node, {}, NUMPY)
        if isinstance(value, float) and math.isfinite(value):
            return value
    except (ZeroDivisionError, OverflowError):
        pass
    raise ValueError(f"{ast.unparse(node)[:80]!r} is not a finite number")


def _value(node: ast.expr, steps: Mapping[str, Any], operations: Operations) -> Any:
    """Return the value of a node: an array over the steps, or a float."""
    path = _path(node)
    if path is not None:
        return operations.field(_field(steps, path))
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        number: Any = node.value
        return float(number)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, steps, operations)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        operands = [_value(x, steps, operations) for x in (node.left, node.right)]
        if not any(isinstance(x, float) for x in operands):
            operands = list(operations.trim(operands))
        return _OPERATORS[type(node.op)](*operands)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        x = operations.columns(_value(node.value, steps, operations))
        return x[:, _column(node.slice.lower) : _column(node.slice.upper)]
    if isinstance(node, ast.Call):
        return _call(node, steps, operations)
    raise ValueError(f"{ast.unparse(node)!r} is not supported in an expression over fields")


def _call(node: ast.Call, steps: Mapping[str, Any], operations: Operations) -> Any:
    name = _function_name(node)
    arguments = [_value(argument, steps, operations) for argument in node.args]
    if name in CONSTANTS:
        arguments.append(operations.length(steps["is_first"]))
    elif name in _ONE_COLUMN and operations.columns(arguments[0]).shape[1] not in (1, None):
        columns = operations.columns(arguments[0]).shape[1]
        raise ValueError(f"{name} takes one column, and {ast.unparse(node)!r} has {columns}")
    return operations.functions[name](*arguments)


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


def _fields_under(node: ast.AST) -> Iterator[tuple[str, ...]]:
    path = _path(node)
    if path:
        yield path
        return
    for child in ast.iter_child_nodes(node):
        yield from _fields_under(child)


def _field(steps: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    x: Any = steps
    for key in path:
        if not isinstance(x, Mapping) or key not in x:
            raise KeyError(".".join(path))
        x = x[key]
    if isinstance(x, Mapping):
        raise ValueError(f"{'.'.join(path)} is a group of fields: {', '.join(sorted(x))}")
    return x


def _column(node: ast.expr | None) -> int | None:
    if node is None:
        return None
    sign, number = 1, node
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, number = -1, node.operand
    value = number.value if isinstance(number, ast.Constant) else None
    if type(value) is not int or value > LARGEST_WIDTH:
        raise ValueError(f"{ast.unparse(node)[:80]!r} is not a column number")
    return sign * value


def _function_name(node: ast.Call) -> str:
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    if name not in FUNCTIONS:
        raise ValueError(f"unknown function {name!r}; use {', '.join(FUNCTIONS)}")
    if node.keywords:
        raise ValueError(f"function {name!r} does not take keyword arguments")
    return name
