"""The directory of a dataset: finding it, reading its metadata, listing its shards."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.data.rlds import known_features, record_files
from octolike.data.rlds.record_files import one_line
from octolike.data.specs.spec import DatasetSpec
from octolike.errors import DataError


class MissingDatasetError(DataError):
    """The directory of a dataset does not exist."""


def find_directory(spec: DatasetSpec, root: str) -> str:
    """Return the directory of a dataset's version; DataError lists the existing ones."""
    parent = f"{root.rstrip('/')}/{spec.name}"
    known_features.check_path(parent)
    if spec.folder and tf.io.gfile.isdir(released := f"{root.rstrip('/')}/{spec.folder}"):
        parent = released
    directory = f"{parent}/{spec.version or _only_version(parent)}"
    if tf.io.gfile.exists(f"{directory}/features.json"):
        return directory
    if not root or not tf.io.gfile.isdir(root):
        raise DataError(
            f"data.root {root!r} is not a directory; set it to the one that holds {spec.name}/"
        )
    for unfinished in (directory, f"{directory}.incomplete"):
        if tf.io.gfile.isdir(unfinished):
            raise DataError(
                f"{spec.name}: {unfinished} is incomplete; run the program that writes it to the "
                "end"
            )
    existing = parent if tf.io.gfile.isdir(parent) else root
    names = ", ".join(sorted(x.rstrip("/") for x in tf.io.gfile.listdir(existing))[:20])
    raise MissingDatasetError(
        f"{spec.name}: {directory} does not exist; {existing} has: {names or 'nothing'}. Set "
        f"data.root to the directory that holds {spec.name}/{spec.version}"
    )


def _only_version(directory: str) -> str:
    """Return the only version on disk, for a spec without one; a placeholder if there are more."""
    names = tf.io.gfile.listdir(directory) if tf.io.gfile.isdir(directory) else []
    versions = [v.rstrip("/") for v in names if v[:1].isdigit() and "incomplete" not in v]
    return versions[0] if len(versions) == 1 else "<version>"


def read_info(name: str, directory: str) -> tfds.core.DatasetInfo:
    """Return the metadata of a dataset in TFRecord files; DataError for others."""
    try:
        info = known_features.open_builder(directory).info
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:  # tfds raises whatever its parsers raise
        raise DataError(
            f"{name}: features.json or dataset_info.json in {directory} cannot be read: "
            f"{one_line(error)}; copy the dataset again"
        ) from error
    record_files.check_format(info, name, directory)
    return info


def stamp_shards(
    name: str, directory: str, paths: Sequence[str], split: str
) -> list[tuple[str, int, str]]:
    """Return (file name, bytes, time or version of the last change) of each shard.

    Raises DataError for missing shards.
    """
    listing = record_files.list_directory(directory)
    names = [path.rpartition("/")[2] for path in paths]
    missing = [path for path, file in zip(paths, names, strict=True) if file not in listing]
    if missing:
        raise DataError(
            f"{name}: {len(missing)} of {len(paths)} shards of split {split!r} are missing, the "
            f"first is {missing[0]}; copy the dataset again"
        )
    return [(file, *listing[file]) for file in names]
