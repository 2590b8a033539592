"""The fields that a dataset spec reads, looked up in the features on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octolike.data.rlds import record_fields
from octolike.data.rlds.fields import OBSERVATION, STEPS
from octolike.data.rlds.record_fields import EPISODE, Path
from octolike.data.rlds.texts import is_text_list, split_path
from octolike.data.specs.spec import DatasetSpec
from octolike.errors import DataError


def image_paths(
    spec: DatasetSpec, fields: Mapping[str, Any], directory: str
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the paths under steps of the spec's cameras and of their depth.

    fields: record_fields.field_tree. Raises DataError for a missing field or one without images.
    """
    observation = fields[OBSERVATION]
    result: tuple[dict[str, Path], dict[str, Path]] = ({}, {})
    for paths, kind, keys in zip(
        result, ("camera {!r}", "the depth of {!r}"), (spec.cameras, spec.depth), strict=True
    ):
        for camera, key in keys.items():
            outside = key.startswith(f"{STEPS}.")  # an image next to the observation
            group, name = (fields, key.removeprefix(f"{STEPS}.")) if outside else (observation, key)
            path = record_fields.find_path(group, name)
            place = key if outside else f"{STEPS}.{OBSERVATION}.{key}"
            title = f"{spec.name}: {kind.format(camera)} should be {place}"
            if path is None:
                names = ", ".join(sorted(group)) or "no observation"
                raise DataError(f"{title}, but {directory} has {names}")
            problem = record_fields.image_problem(record_fields.get_path(group, path))
            if problem and keys is spec.cameras:
                raise DataError(
                    f"{title}, but it is {problem} in {directory}; expected images, or "
                    "uint8 arrays [height, width, 1, 3 or 4]: convert the dataset"
                )
            paths[camera] = path if outside else (OBSERVATION, *path)
    return result


def check_paths(
    spec: DatasetSpec, flags: tuple[str, ...], fields: Mapping[str, Any], directory: str
) -> None:
    """Raise DataError for an instruction or a flag that does not exist.

    flags: paths of the label and of filters, "" for none.
    """
    for name in filter(None, (*spec.language_paths, *flags)):
        node: Any = fields
        keys, number = split_path(fields, name)
        for key in keys:
            if not isinstance(node, Mapping) or key not in node:
                is_text = name in spec.language_paths
                role = "the instruction should be" if is_text else "the spec reads"
                names = ", ".join(sorted(node)) if isinstance(node, Mapping) else "a value"
                raise DataError(
                    f"{spec.name}: {role} {_shown(name)}, but {directory} has no "
                    f"{key!r} there (it has: {names})"
                )
            node = node[key]
        if name in spec.language_paths and is_text_list(node) != (number is not None):
            found = f"{spec.name}: {_shown(name)} in {directory} is"
            if number is not None:
                raise DataError(f"{found} one text: name it without .{number}")
            raise DataError(
                f"{found} a list of texts: name each of them, language=({name + '.0'!r}, "
                f"{name + '.1'!r}, ...)"
            )


def _shown(name: str) -> str:
    """Return a path under steps, or of the episode, as users know it."""
    return name if name.startswith(f"{EPISODE}.") else f"{STEPS}.{name}"
