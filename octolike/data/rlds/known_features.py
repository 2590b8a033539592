"""Untrusted metadata of a dataset: checked before tensorflow_datasets reads it.

tensorflow_datasets imports the module that a features.json names, which executes it, and joins the
file names of dataset_info.json to the directory. So only its own feature classes are allowed, and
those that this process has imported already; and only files of the dataset's own directory. It
reads every file with the labels of a class, even a pipe; and TensorFlow ends the process for some
shapes of tensors.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

from octolike import files, terminal
from octolike.errors import DataError

LARGEST = 32 << 20  # bytes of a JSON file: metadata of real datasets has kilobytes
MOST_SHARDS = 100_000  # of a split: tensorflow_datasets takes a minute for a million
MOST_EPISODES = 100_000_000  # of a split: there is a byte of memory for each
MOST_FIELDS = 2000  # of a features.json: a hundred fields take a second to trace
MOST_NUMBERS = 1 << 28  # of one step, all fields together: 1 GiB of float32
MOST_AXES = 16  # of a field; numpy permits 64
TEMPLATE = re.compile(
    r"([^{}]|\{(DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\}){1,1000}"
)
OWN = "tensorflow_datasets.core.features."
CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
PROTO_KEYS = ("proto_cls",)


def open_builder(directory: str) -> tfds.core.DatasetBuilder:
    """Return tfds's builder of a directory after the checks; DataError in one line for others."""
    _check_files(directory)
    for name in ("features.json", "dataset_info.json"):
        path = f"{directory}/{name}"
        if tf.io.gfile.exists(path):
            data = read_json(path)
            check_metadata(data, path)
            _check_shards(data, path)
            _check_shapes(data, path)
    builder = tfds.builder_from_directory(directory)
    root = str(directory).rstrip("/")
    for split in builder.info.splits.values():
        lengths = split.shard_lengths
        if min(lengths, default=0) < 0 or sum(lengths) > MOST_EPISODES:
            raise DataError(
                f"{directory}/dataset_info.json states shards of {min(lengths):,} to "
                f"{max(lengths):,} episodes; expected at most {MOST_EPISODES:,} in all"
            )
        for shard in split.filepaths:
            folder, _, name = str(shard).rpartition("/")
            is_plain = name.isprintable() and name not in ("", ".", "..")
            if folder.rstrip("/") != root or not is_plain:
                raise DataError(
                    f"{directory}/dataset_info.json names the file {str(shard)!r:.200}, which is "
                    "not in the dataset's directory"
                )
    return builder


def read_json(path: str) -> Any:
    """Return the content of a JSON file, local or in a bucket.

    Raises DataError for a huge or deep one, one with the same key twice, a pipe or a device.
    """
    if not files.is_remote(path) and not files.is_regular(path):
        raise DataError(f"{path} is not a regular file; copy the dataset again")
    size = tf.io.gfile.stat(path).length
    if size > LARGEST:
        raise DataError(f"{path} has {size:,} bytes; expected at most {LARGEST:,}")
    with tf.io.gfile.GFile(path, "rb") as file:
        content = file.read()
    try:
        return json.loads(content, object_pairs_hook=_unique)
    except RecursionError:
        raise DataError(f"{path} is nested too deeply; copy the dataset again") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); copy the dataset again") from None


def check_metadata(data: Any, path: str) -> None:
    """Raise DataError if a features.json names a class that is not one of tensorflow_datasets."""
    registered = tfds.features.FeatureConnector._registered_features
    for key, name in _class_names(data):
        is_tfds = (
            name.startswith(OWN) if key in CLASS_KEYS else name.startswith("tensorflow_datasets.")
        )
        if not is_tfds and name not in registered:
            raise DataError(
                f"{path} names the class {name!r:.200}, and reading it would execute that module; "
                f"expected a class of {OWN[:-1]}. If you trust it, import the module first"
            )


def check_path(path: str) -> None:
    """Raise DataError for a path that could not be printed in one line, or controls a terminal."""
    if terminal.escape(path) != path or len(path.splitlines()) > 1:
        raise DataError(f"the path {path!r} has control characters; rename the directory")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; ValueError for a key twice: readers differ in their choice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it has the key {twice!r:.80} twice")
    return result


def _check_files(directory: str) -> None:
    """Raise DataError for pipes, devices and giant text files in a local dataset's directory."""
    if files.is_remote(directory) or not os.path.isdir(directory):
        return
    with os.scandir(directory) as entries:
        for entry in entries:  # without a request per shard
            if entry.is_symlink() and not os.path.exists(entry.path):
                continue
            if not (entry.is_file() or entry.is_dir()):
                raise DataError(
                    f"{directory} holds {entry.name!r:.200}, a pipe or device; expected files: "
                    "remove it, or copy the dataset again"
                )
            if entry.name.endswith(".txt") and (size := os.path.getsize(entry.path)) > LARGEST:
                raise DataError(
                    f"{directory}/{entry.name} has {size:,} bytes; expected at most {LARGEST:,}"
                )


def _check_shards(data: Any, path: str) -> None:
    """Raise DataError for too many shards, or a file name that is made of more than its parts."""
    splits = data.get("splits") if isinstance(data, dict) else None
    for split in splits if isinstance(splits, list) else ():
        if not isinstance(split, dict):
            continue
        for key in ("shardLengths", "shard_lengths"):
            shards = split.get(key)
            if isinstance(shards, list) and len(shards) > MOST_SHARDS:
                raise DataError(
                    f"{path} has {len(shards):,} shards; expected at most {MOST_SHARDS:,}"
                )
        for key in ("filepathTemplate", "filepath_template"):
            template = split.get(key, "")
            if template and not (isinstance(template, str) and TEMPLATE.fullmatch(template)):
                raise DataError(
                    f"{path} names its shards {template!r:.200}; expected a file name with "
                    "{DATASET}, {SPLIT}, {FILEFORMAT}, {SHARD_INDEX}, {NUM_SHARDS} or "
                    "{SHARD_X_OF_Y}"
                )


def _check_shapes(data: Any, path: str) -> None:
    """Raise DataError for more fields or numbers per step than any robot has."""
    fields, numbers = 0, 0
    for node in _objects(data):
        fields += any(isinstance(node.get(key), str) for key in CLASS_KEYS)
        shape = node.get("shape")
        if isinstance(shape, dict):
            shape = shape.get("dimensions")
        if not isinstance(shape, list):
            continue
        sizes = [
            int(x) for x in shape if isinstance(x, (int, str)) and re.fullmatch(r"\d+", str(x)[:20])
        ]
        numbers += math.prod(sizes) if len(shape) <= MOST_AXES else 0
        if len(shape) > MOST_AXES or numbers > MOST_NUMBERS:
            raise DataError(
                f"{path} has a field of shape {str(shape)[:80]}; expected at most {MOST_AXES} "
                f"axes, and {MOST_NUMBERS:,} numbers in all fields of a step together"
            )
    if fields > MOST_FIELDS:
        raise DataError(f"{path} has {fields:,} fields; expected at most {MOST_FIELDS:,}")


def _class_names(data: Any) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of every text in JSON data under a key that may name a class."""
    for node in _objects(data):
        for key, value in node.items():
            # Fields of a dataset may have these names, too: their values are objects.
            if isinstance(value, str) and (key in PROTO_KEYS or key in CLASS_KEYS):
                yield key, value


def _objects(data: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in JSON data."""
    nodes = [data]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            yield node
            nodes.extend(node.values())
        elif isinstance(node, list):
            nodes.extend(node)
