"""Dataset specs in TensorFlow: standard steps of raw steps, inside the graph that makes batches.

`OPERATIONS` has the operations of `specs/expressions.py` under the same names, and
`STANDARDIZE_TWINS` the functions of `specs/standardize.py`. A test compares both with numpy for all
datasets. They work with a number of steps that is unknown when the graph is traced, and without
Python when it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from octolike.data.rlds.fields import OBSERVATION
from octolike.data.specs import standardize
from octolike.data.specs.expressions import Operations
from octolike.data.specs.spec import DatasetSpec, evaluate_parts
from octolike.data.specs.standardize import StandardSteps


def graph_standard_steps(spec: DatasetSpec, steps: Mapping[str, Any]) -> StandardSteps:
    """Return the actions float32 [T', A] and proprio float32 [T', P] or None of raw steps.

    steps: nested dict of tensors [T, ...] of one episode, from `Reader.graph_parse`; T may be
        unknown. Images are not read.

    If `runs_in_python(spec)`, the spec's function is called through tf.numpy_function: the graph
    needs this process, and the call holds the GIL. The function gets the same nested dict in numpy,
    strings as bytes, without the images and depth images of the spec and without ragged fields.

    Raises KeyError for a missing field and ValueError for a width that differs from the layout's,
    both when traced; InvalidArgumentError when run for a width that only then is known. Values that
    are not finite are returned.
    """
    if spec.standardize is None:
        standard = evaluate_parts(spec.action_from, spec.proprio_from, steps, OPERATIONS)
    elif (twin := _twin(spec)) is not None:
        standard = twin(steps)
    else:
        standard = _call_python(spec, steps)
    action = tf.ensure_shape(standard.action, (None, len(spec.action)))
    if spec.proprio is None:
        return StandardSteps(action, None)
    return StandardSteps(action, tf.ensure_shape(standard.proprio, (None, len(spec.proprio))))


def runs_in_python(spec: DatasetSpec) -> bool:
    """Return whether `graph_standard_steps` calls a Python function of the spec."""
    return spec.standardize is not None and _twin(spec) is None


def next_step(x: tf.Tensor) -> tf.Tensor:
    """Return the values at the next step, one step fewer."""
    return x[1:]


def wrap_angle(x: tf.Tensor) -> tf.Tensor:
    """Return angles in radians, wrapped into (−π, π]."""
    return x - 2 * np.pi * tf.math.ceil((x - np.pi) / (2 * np.pi))


def clip(x: tf.Tensor, low: Any, high: Any) -> tf.Tensor:
    """Return values limited to [low, high]; NaN remains."""
    return tf.where(tf.math.is_nan(x), x, tf.clip_by_value(x, low, high))


def relative_to_absolute(x: tf.Tensor, threshold: float = 0.1) -> tf.Tensor:
    """Return gripper states [T, 1], 1 open and 0 closed, from events: > 0 closes, < 0 opens."""
    flat = tf.reshape(x, [-1])
    is_event = tf.abs(flat) > threshold
    states = tf.cast(tf.boolean_mask(flat, is_event) < 0, tf.float32)
    initial = 1 - tf.concat([states, [0.0]], 0)[:1]
    state = tf.gather(tf.concat([initial, states], 0), tf.cumsum(tf.cast(is_event, tf.int32)))
    return tf.where(tf.math.is_finite(flat), state, np.nan)[:, None]


def binarize_gripper(x: tf.Tensor, low: float = 0.05, high: float = 0.95) -> tf.Tensor:
    """Return gripper commands as 0 (closed) or 1 (open); those in between take the next extreme."""
    flat = tf.reshape(x, [-1])
    is_extreme = ~((low <= flat) & (flat <= high))
    state = tf.where(tf.math.is_finite(flat), tf.cast(flat > high, tf.float32), np.nan)
    last = tf.cast(flat[-1:] > 0.5, tf.float32)
    extremes = tf.concat([tf.boolean_mask(state, is_extreme), last], 0)
    earlier = tf.cumsum(tf.cast(is_extreme, tf.int32), exclusive=True)
    return tf.reshape(tf.gather(extremes, earlier), tf.shape(x))


def quaternion_to_euler(x: tf.Tensor) -> tf.Tensor:
    """Return roll, pitch, yaw [T, 3] (rotation = Rz Ry Rx) of quaternions x, y, z, w [T, 4]."""
    x = tf.cast(x, tf.float64)
    norm = tf.sqrt(tf.reduce_sum(x * x, axis=-1, keepdims=True))
    a, b, c, w = tf.unstack(x / tf.where(norm > 0, norm, 1), num=4, axis=-1)
    roll = tf.math.atan2(2 * (w * a + b * c), 1 - 2 * (a * a + b * b))
    pitch = tf.math.asin(clip(2 * (w * b - c * a), -1, 1))
    yaw = tf.math.atan2(2 * (w * c + a * b), 1 - 2 * (b * b + c * c))
    return tf.cast(tf.stack([roll, pitch, yaw], axis=-1), tf.float32)


def decompress_floats(x: tf.Tensor, count: float) -> tf.Tensor:
    """Return float32 [T, count] from T zlib-compressed strings of little-endian float32."""
    raw = tf.io.decode_compressed(tf.reshape(x, [-1]), compression_type="ZLIB")
    rows = tf.io.decode_raw(raw, tf.float32, little_endian=True)
    return tf.reshape(rows, [tf.size(x), int(count)])


def zeros(count: float, length: tf.Tensor) -> tf.Tensor:
    """Return `count` columns of zeros over `length` steps."""
    return tf.zeros([length, int(count)])


def ones(count: float, length: tf.Tensor) -> tf.Tensor:
    """Return `count` columns of ones over `length` steps."""
    return tf.ones([length, int(count)])


def navigation(steps: Mapping[str, Any]) -> StandardSteps:
    """Return the waypoints of a mobile robot: `standardize.navigation`."""
    raw = steps.get("unthinned", steps)
    first = tf.norm(_differences(_float64(raw[OBSERVATION]["position"])[:2]))
    stored = tf.norm(_float64(raw["action"])[:1])
    position = _float64(steps[OBSERVATION]["position"])
    yaw = tf.reshape(_float64(steps[OBSERVATION]["yaw"]), [-1])
    x, y = tf.unstack(_differences(position), num=2, axis=1)
    has_scale = (first > 0) & (stored > 0)
    scale = tf.where(has_scale, stored / tf.where(has_scale, first, 1), 1)
    cos, sin = tf.cos(yaw[:-1]), tf.sin(yaw[:-1])
    body = tf.stack([cos * x + sin * y, cos * y - sin * x], axis=1)
    state = tf.concat([position, yaw[:, None]], axis=1)[:-1]
    return StandardSteps(tf.cast(scale * body, tf.float32), tf.cast(state, tf.float32))


def as_stored(steps: Mapping[str, Any]) -> StandardSteps:
    """Return `action` and `observation.state` unchanged: `standardize.as_stored`."""
    stored = steps["action"], steps[OBSERVATION]["state"]
    return StandardSteps(*(tf.cast(x, tf.float32) for x in stored))


def _twin(spec: DatasetSpec) -> Callable[[Mapping[str, Any]], StandardSteps] | None:
    # By identity: a spec's function may be an object that cannot be hashed.
    return next((twin for x, twin in STANDARDIZE_TWINS if x is spec.standardize), None)


def _call_python(spec: DatasetSpec, steps: Mapping[str, Any]) -> StandardSteps:
    hidden = {*spec.cameras.values(), *spec.depth.values()}
    observation = {k: v for k, v in steps[OBSERVATION].items() if k not in hidden}
    fields = _without_ragged({**steps, OBSERVATION: observation})
    leaves = tf.nest.flatten(fields)

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        assert spec.standardize is not None
        standard = spec.standardize(tf.nest.pack_sequence_as(fields, arrays))
        parts = standard if spec.proprio else standard[:1]
        return [np.asarray(x, np.float32) for x in parts]

    types = [tf.float32] * (2 if spec.proprio else 1)
    # A single result is returned as a tensor, not as a list.
    action, *proprio = tf.nest.flatten(tf.numpy_function(run, leaves, types))
    return StandardSteps(action, proprio[0] if proprio else None)


def _without_ragged(fields: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            result[name] = _without_ragged(value)
        elif not isinstance(value, tf.RaggedTensor):
            result[name] = value
    return result


def _field_columns(x: tf.Tensor) -> tf.Tensor:
    return x if x.dtype == tf.string else _as_columns(tf.cast(x, tf.float32))


def _as_columns(x: tf.Tensor) -> tf.Tensor:
    inner = x.shape[1:]
    width = math.prod(inner) if inner.is_fully_defined() else tf.reduce_prod(tf.shape(x)[1:])
    return tf.reshape(x, [tf.shape(x)[0], width])


def _length(x: tf.Tensor) -> tf.Tensor:
    return tf.shape(x)[0]


def _trim(arrays: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    shortest = tf.reduce_min([_length(x) for x in arrays])
    return [x[:shortest] for x in arrays]


def _concatenate(arrays: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.concat(arrays, axis=1)


def _differences(x: tf.Tensor) -> tf.Tensor:
    return x[1:] - x[:-1]


def _float64(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float64)


OPERATIONS = Operations(
    functions={
        "next": next_step,
        "wrap": wrap_angle,
        "clip": clip,
        "rel2abs": relative_to_absolute,
        "binarize": binarize_gripper,
        "quat_to_euler": quaternion_to_euler,
        "zlib_f32": decompress_floats,
        "zeros": zeros,
        "ones": ones,
    },
    field=_field_columns,
    columns=_as_columns,
    length=_length,
    trim=_trim,
    concatenate=_concatenate,
)
# Functions of specs and their twins in TensorFlow.
STANDARDIZE_TWINS = (
    (standardize.navigation, navigation),
    (standardize.as_stored, as_stored),
)
