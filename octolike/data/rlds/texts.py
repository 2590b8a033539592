"""Texts of parsed steps, such as the instruction: in numpy and in the graph.

A path leads to a field of the steps ("observation.task.text") or of the episode
("episode.instruction"). Of a field that lists several texts, a number chooses one, "" if the
list is shorter: "language_instruction.0", "language_instruction.1".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.data.rlds.fields import IS_FIRST
from octolike.data.rlds.record_fields import EPISODE, Path


def is_text_list(feature: Any) -> bool:
    """Return whether a feature lists texts: a sequence of them, or an array of strings."""
    if isinstance(feature, tfds.features.Sequence):
        return isinstance(feature.feature, tfds.features.Text) or is_text_list(feature.feature)
    shape = getattr(feature, "shape", None)
    return shape not in (None, (), (1,)) and tf.as_dtype(feature.np_dtype) == tf.string


def split_path(tree: Mapping[str, Any], name: str) -> tuple[Path, int | None]:
    """Return (keys, number) of a path in a tree of features or values; no number: None.

    The keys that the tree does not have are kept: the caller reports them.
    """
    node: Any = tree
    keys = tuple(name.split("."))
    for i, key in enumerate(keys):
        if not isinstance(node, Mapping):
            is_number = i == len(keys) - 1 and key.isdecimal()
            return (keys[:i], int(key)) if is_number else (keys, None)
        if key not in node:
            return keys, None
        node = node[key]
    return keys, None


def has_path(tree: Mapping[str, Any], name: str) -> bool:
    """Return whether a tree of features has a path."""
    node: Any = tree
    for key in split_path(tree, name)[0]:
        if not isinstance(node, Mapping) or key not in node:
            return False
        node = node[key]
    return True


def value_at(steps: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path; KeyError with the path if it is missing."""
    return _value(steps, tuple(path.split(".")), path)


def texts_at(steps: Mapping[str, Any], name: str) -> list[str]:
    """Return the T texts at a path of parsed steps; one of the episode is repeated."""
    keys, number = split_path(steps, name)
    value, count = _value(steps, keys, name), len(steps[IS_FIRST])
    if keys[0] == EPISODE:
        value = np.reshape(value, -1)
        return (decode_texts(value[number or 0 :][:1]) or [""]) * count
    if number is not None:
        value = np.array([row[number] if number < len(row) else b"" for row in value], object)
    if np.ndim(value) > 1 and np.asarray(value).dtype.kind not in "iu":
        value = np.reshape(value, -1)  # stored as [T, 1]
    return decode_texts(value)


def first_text(steps: Mapping[str, Any], path: str) -> str:
    """Return the first non-blank text at a path of an episode; "" without one or without a path."""
    texts = texts_at(steps, path) if path else []
    return next(filter(None, (x.strip() for x in texts)), "")


def decode_texts(x: Any) -> list[str]:
    """Return the texts of bytes [T], or of code points [T, n] terminated by a zero."""
    x = np.asarray(x)
    if x.dtype.kind in "iu":
        return ["".join(map(chr, row[: (*np.flatnonzero(row == 0), len(row))[0]])) for row in x]
    return [t.decode("utf-8", errors="replace") for t in x.tolist()]


def graph_texts(steps: Mapping[str, Any], name: str, count: tf.Tensor) -> tf.Tensor:
    """Return the texts at a path of parsed steps, string [count], without blanks around them.

    Stored as strings [T], lists of strings, code points [T, n] terminated by a zero, or as one
    text of the episode, which is repeated.
    """
    keys, number = split_path(steps, name)
    value = _value(steps, keys, name)
    if value.dtype != tf.string:
        value = tf.strings.unicode_encode(tf.cast(value, tf.int32), "UTF-8")
        value = tf.strings.regex_replace(value, r"(?s)\x00.*", "")
    if keys[0] == EPISODE:
        chosen = tf.reshape(value, [-1])[number or 0 :]
        value = tf.repeat(tf.concat([chosen[:1], [""]], 0)[:1], count)
    elif isinstance(value, tf.RaggedTensor):
        column = value[:, number : (number or 0) + 1]
        value = column.to_tensor("", shape=[None, 1])
    elif number is not None:
        value = tf.concat([value, tf.fill([tf.shape(value)[0], 1], "")], axis=1)
        value = value[:, min(number, value.shape[1] - 1)]
    return tf.strings.strip(tf.reshape(value, [-1])[:count])


def _value(steps: Mapping[str, Any], keys: Path, name: str) -> Any:
    value: Any = steps
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            raise KeyError(name)
        value = value[key]
    return value
