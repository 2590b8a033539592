"""The instruction, the success and the other attributes of an episode in an HDF5 file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from octolike import files
from octolike.data.onboarding.convert import recording
from octolike.data.onboarding.convert.columns import is_encoded

OBSERVATIONS = ("observation", "observations", "obs")
READ = (*recording.INSTRUCTIONS, "problem_info", "ep_meta", "env_args", "success")
LONGEST = 60  # characters of an attribute's text in a remark


def attributes_of(*groups: Any) -> dict[str, Any]:
    """Return the attributes of an episode and of the groups around it; inner ones come last."""
    return {name: value for group in reversed(groups) for name, value in group.attrs.items()}


def unread_attributes(attributes: Mapping[str, Any]) -> dict[str, str]:
    """Return {attribute: reason} for the attributes that are not part of the dataset."""
    result = {}
    for name, value in attributes.items():
        if name in READ:
            continue
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        is_text = isinstance(text, str) and 0 < len(text) <= LONGEST and not text.startswith("<")
        remedy = f"--field language_instruction={name}, if {text!r} is the instruction"
        result[f"attribute {name}"] = remedy if is_text else "of the file, not of the steps"
    return result


def success_of(attributes: Mapping[str, Any], place: str) -> dict[str, bool]:
    """Return {"success": whether the episode succeeded} if an attribute says so, or {}."""
    if "success" not in attributes:
        return {}
    return {"success": recording.flag(attributes["success"], f"{place}: attribute success")}


def instruction_of(group: Any, length: int) -> Any:
    """Return the instruction of a group, "" for none, or a list of one per step."""
    for name in recording.INSTRUCTIONS:
        if name in group.attrs:
            return recording.text(group.attrs[name])
        for path in _datasets_named(group, name):
            values = np.ravel(group[path][()])
            if len(values) == length and length > 1:
                return list(values)
            if len(values):
                return recording.text(values[0])
    # LIBERO's and RoboCasa's names.
    for name, key in (("problem_info", "language_instruction"), ("ep_meta", "lang")):
        if name in group.attrs:
            text = json.loads(group.attrs[name]).get(key, "")
            return " ".join(text) if isinstance(text, list) else text
    return ""


def _datasets_named(group: Any, name: str) -> Iterator[str]:
    """Yield the paths of texts with a name, at the group itself or in its observation."""
    for path in (name, *(f"{parent}/{name}" for parent in OBSERVATIONS)):
        node = group.get(path)
        is_text = isinstance(node, h5py.Dataset) and node.dtype.kind in "OSU"
        if is_text and not is_encoded(np.atleast_1d(node[()])):
            yield path


def droid_task(directory: Path) -> str:
    """Return the task in the metadata that DROID keeps next to a trajectory, "" for none."""
    for path in sorted(directory.glob("metadata_*.json")):
        try:
            return str(json.loads(files.read_text(path)).get("current_task") or "")
        except (ValueError, AttributeError, RecursionError):
            return ""
    return ""
