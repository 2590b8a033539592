"""Untrusted metadata of a dataset: checked before tensorflow_datasets reads it.

tensorflow_datasets imports the module that a features.json names, which executes it, and joins the
file names of dataset_info.json to the directory. So only its own feature classes are allowed, and
those that this process has imported already; and only files of the dataset's own directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.errors import DataError

LARGEST = 32 << 20  # bytes of a JSON file: metadata of real datasets has kilobytes
MOST_SHARDS = 100_000  # of a split: tensorflow_datasets takes a minute for a million
MOST_EPISODES = 100_000_000  # of a split: there is a byte of memory for each
OWN = "tensorflow_datasets.core.features."
CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
PROTO_KEYS = ("proto_cls",)


def open_builder(directory: str) -> tfds.core.DatasetBuilder:
    """Return tfds's builder of a directory after the checks; DataError in one line for others."""
    for name in ("features.json", "dataset_info.json"):
        path = f"{directory}/{name}"
        if tf.io.gfile.exists(path):
            data = read_json(path)
            check_metadata(data, path)
            _check_shards(data, path)
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
    """Return the content of a JSON file, local or in a bucket; DataError for a huge or deep one."""
    size = tf.io.gfile.stat(path).length
    if size > LARGEST:
        raise DataError(f"{path} has {size:,} bytes; expected at most {LARGEST:,}")
    with tf.io.gfile.GFile(path, "rb") as file:
        content = file.read()
    try:
        return json.loads(content)
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


def _check_shards(data: Any, path: str) -> None:
    splits = data.get("splits") if isinstance(data, dict) else None
    for split in splits if isinstance(splits, list) else ():
        shards = split.get("shardLengths") if isinstance(split, dict) else None
        if isinstance(shards, list) and len(shards) > MOST_SHARDS:
            raise DataError(f"{path} has {len(shards):,} shards; expected at most {MOST_SHARDS:,}")


def _class_names(data: Any) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of every text in JSON data under a key that may name a class."""
    nodes = [data]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            for key, value in node.items():
                # Fields of a dataset may have these names, too: their values are objects.
                if isinstance(value, str) and (key in PROTO_KEYS or key in CLASS_KEYS):
                    yield key, value
                nodes.append(value)
        elif isinstance(node, list):
            nodes.extend(node)
