"""Reads the files of a LeRobot dataset: JSON, parquet, and columns of parquet tables."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from octolike.data.onboarding.convert import recording
from octolike.data.onboarding.convert.columns import is_depth_name
from octolike.data.onboarding.convert.video import VideoListing
from octolike.errors import DataError

MOST_ROWS = 16 * recording.MOST_STEPS  # of a parquet file
# Keys of a depth video's scale in meta/info.json, which this reader does not undo.
SCALES = ("depth_min", "depth_max", "shift", "use_log")


def filled(template: Any, values: Mapping[str, Any]) -> str:
    """Return a path template of meta/info.json with its fields filled in.

    Raises ValueError for other fields, and for formats other than a short number's: a width of a
    billion digits would fill the memory.
    """
    if not isinstance(template, str):
        raise ValueError("expected text")
    for _, field, form, conversion in string.Formatter().parse(template):
        if field is None:
            continue
        if field not in values or conversion or not re.fullmatch(r"(0?\d?\dd)?", form or ""):
            raise ValueError(f"unknown field {{{field}:{form}}} (fields: {', '.join(values)})")
    return template.format(**values)


def unusable_depth(name: str, feature: Mapping[str, Any], listing: VideoListing) -> str:
    """Return why the depth of a video cannot be recovered; "" for usable depth and for a camera."""
    info = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    scaled = [k for k in info if k.rpartition(".")[2] in SCALES]
    if listing.is_depth and not scaled:
        return ""
    if listing.is_depth or info.get("video.is_depth_map") or is_depth_name(name):
        kind = f"scaled by {', '.join(scaled)}" if scaled else f"in 8 bits ({listing.pixel_format})"
        return f"a depth video {kind}, not a camera; its metres cannot be recovered"
    return ""


def array_of(column: pa.ChunkedArray) -> np.ndarray | None:
    """Return a column as an array [T, ...]; None if it is not one array of numbers per step."""
    try:
        x = np.array(column.to_pylist())
    except ValueError:
        return None
    return x if x.dtype.kind in "fiub" else None


def describe_ragged(column: pa.ChunkedArray) -> str:
    """Return why a column is not one array of numbers per step, with the first odd row."""
    rows = column.to_pylist()
    first = next((t for t, row in enumerate(rows) if row is None), None)
    if first is not None:
        return f"is missing at step {first}"
    sizes = [np.size(row) for row in rows]
    odd = next((t for t, size in enumerate(sizes) if size != sizes[0]), 0)
    return (
        f"has {sizes[odd]} values at step {odd} and {sizes[0]} at step 0"
        if odd
        else "is not one array of numbers per step"
    )


def part_names(
    path: Path, widths: Mapping[str, int]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the names of columns by GR00T's meta/modality.json, and remarks on its faults.

    It names the parts of a column by their first dimension and their end. Dimension i of no part is
    called unnamed_i; a column whose parts overlap or do not fit gets no names.

    Args:
        path: the file, which may be absent.
        widths: {column: number of its dimensions}, of the columns to name.

    Returns:
        {column: names of its dimensions}, {column: remark}; both {} without the file.
    """
    names: dict[str, list[str]] = {}
    remarks: dict[str, str] = {}
    if not path.is_file():
        return names, remarks
    modality = parse_json(path, path.read_text())
    for group, usual in (("state", "observation.state"), ("action", "action")):
        parts = modality.get(group, {}) if isinstance(modality, dict) else {}
        columns: dict[str, list[tuple[Any, Any, Any]]] = {}
        for name, part in parts.items() if isinstance(parts, dict) else ():
            span = (part.get("start"), part.get("end")) if isinstance(part, dict) else ()
            if len(span) == 2 and all(type(x) is int and 0 <= x < 10_000 for x in span):
                columns.setdefault(part.get("original_key") or usual, []).append((*span, name))
        for column in columns.keys() & widths.keys():
            flat = [""] * widths[column]
            for start, end, name in sorted(columns[column]):
                if not start < end <= len(flat) or any(flat[start:end]):
                    remarks[column] = f"meta/modality.json: part {name} overlaps or does not fit"
                    break
                several = [f"{name}_{i}" for i in range(end - start)]
                flat[start:end] = several if len(several) > 1 else [name]
            else:
                missing = [i for i, text in enumerate(flat) if not text]
                if missing:
                    indices = ", ".join(map(str, missing))
                    remarks[column] = f"dimensions without a name in meta/modality.json: {indices}"
                names[column] = [text or f"unnamed_{i}" for i, text in enumerate(flat)]
    return names, remarks


def overlapping(rows: Mapping[int, Mapping[str, Any]], video: str, slack: float) -> dict[int, int]:
    """Return {episode: another one that claims the same frames of a video file}.

    rows: of meta/episodes, with the ranges of LeRobot 3, in seconds; slack: how far two may overlap
    by rounding.
    """
    spans: dict[tuple[Any, ...], list[tuple[float, float, int]]] = {}
    prefix = f"videos/{video}"
    for episode, row in rows.items():
        begin, end = (row.get(f"{prefix}/{k}_timestamp") for k in ("from", "to"))
        if begin is not None and end is not None:
            file = tuple(row.get(f"{prefix}/{k}_index") for k in ("chunk", "file"))
            spans.setdefault(file, []).append((float(begin), float(end), episode))
    result: dict[int, int] = {}
    for of_file in spans.values():
        of_file.sort()
        for (_, end, one), (begin, _, other) in pairwise(of_file):
            if begin < end - slack:
                result |= {one: other, other: one}
    return result


def column_names(names: Any) -> list[str]:
    """Return the names of the dimensions of a feature, from a list, a dict of lists or None."""
    if isinstance(names, dict):
        names = [n for v in names.values() for n in (v if isinstance(v, list) else [v])]
    return [str(n) for n in names or []]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one per line; DataError if it is missing or malformed."""
    if not path.exists():
        raise DataError(f"{path} is missing; copy the dataset again")
    recording.check_regular(path)
    return [parse_json(path, line) for line in path.read_text().splitlines() if line.strip()]


def by_episode(meta: Path, rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the rows of meta/episodes by their episode_index.

    Raises DataError for a row without one, and for an index that two different rows have.
    """
    result: dict[int, dict[str, Any]] = {}
    for row in rows:
        index = row.get("episode_index") if isinstance(row, Mapping) else None
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise DataError(
                f"{meta}: an episode has the episode_index {index!r:.80}; expected a number from 0"
            )
        if result.setdefault(index, dict(row)) != row:
            raise DataError(
                f"{meta} lists episode {index} twice, with different values; remove the wrong row"
            )
    return result


def parse_json(path: Path, text: str) -> Any:
    """Return the value of a JSON text; path: of its file, for the DataError of a malformed one."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}; copy the dataset again") from None


def read_parquet(path: Path, **options: Any) -> pa.Table:
    """Return the table of a parquet file; DataError if it cannot be read or has too many rows.

    options: of `pyarrow.parquet.read_table`, to read a part.
    """
    recording.check_regular(path)
    try:
        rows = pq.read_metadata(path).num_rows
        if rows > MOST_ROWS:
            raise DataError(f"{path} has {rows:,} rows; expected at most {MOST_ROWS:,}")
        return pq.read_table(path, partitioning=None, **options)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}; copy the dataset again") from None


def read_schema(path: Path) -> pa.Schema:
    """Return the columns of a parquet file and their types; DataError if it cannot be read."""
    recording.check_regular(path)
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}; copy the dataset again") from None
