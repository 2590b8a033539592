"""The interface of recordings in any format, and the conversion of one episode."""

from __future__ import annotations

import contextlib
import re
import traceback
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from octolike import files
from octolike.config import ConfigError
from octolike.data.onboarding.convert.columns import FLOATS, Columns
from octolike.data.onboarding.convert.frame_encoding import ConvertOptions
from octolike.data.rlds.writer import EncodedImage
from octolike.errors import DataError

# What parsers raise for a malformed file, next to DataError.
MALFORMED = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(RuntimeError, MemoryError, OSError, zlib.error),
)
LARGEST = 64 << 30  # bytes of an HDF5 array or an npz file: more is a decompression bomb
MOST_STEPS = 1_000_000  # of an episode: five hours at 50 per second
ACTIONS = ("action", "actions")
REMARKS = ("left_out", "changed")  # keys of an episode: {column: reason or form}
POOR, FINE = 1e-3, 1e-5  # of the range of a column, and as it is: finer steps are not stated
# Keys of the instruction in recordings.
INSTRUCTIONS = ("language_instruction", "instruction", "natural_language_instruction", "language")
FURTHER = re.compile(rf"({'|'.join(INSTRUCTIONS)})_\d+")  # of a second and third wording


@dataclass(frozen=True)
class EpisodeLocation:
    """The location of an episode in a recording.

    file: relative to the path of the recording, or its own name; key: of the episode in the file;
    split: split of the recording, or "".
    """

    file: str
    key: str = ""
    split: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.key}" if self.key else self.file


class Recording(Protocol):
    """A file or folder of episodes in one format."""

    @property
    def path(self) -> Path:
        """Return the file or folder."""

    @property
    def options(self) -> ConvertOptions:
        """Return the options for reading episodes."""

    def episodes(self) -> list[EpisodeLocation]:
        """Return the episodes, in a fixed order."""

    def read(self, location: EpisodeLocation) -> dict[str, Any]:
        """Return an episode for octolike.data.rlds.writer; DataError for a bad one."""

    def metadata(self) -> dict[str, Any]:
        """Return the known facts: {"control_hz": …, "names": {field: names of its dimensions}}."""


@contextlib.contextmanager
def checked(place: str) -> Iterator[None]:
    """Raise DataError, naming the place, for whatever parsers raise for a malformed file."""
    try:
        yield
    except (DataError, ConfigError):
        raise
    except MALFORMED as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        source = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise DataError(f"{place} cannot be read: {files.cause(error)} ({source})") from error


def episode(
    steps: Mapping[str, Any], columns: Columns, instruction: Any, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the episode of an action and further steps, and of the columns of the observation.

    steps: "action" [T, A] or a dict of arrays, and other fields [T, ...]; instruction: one string
    or T of them; options.instruction replaces empty ones. Numbers become float32, int64 or bool.
    The result has, next to its steps and metadata, the columns' remarks: left_out and changed.

    Raises DataError if there is no action or no step, if lengths differ, or if a number is not
    finite.
    """
    options, source = columns.options, columns.source
    steps = _measurements(steps, columns)
    numbers = {**steps, "observation": columns.numbers}
    if "action" not in steps:
        names = (*flat(numbers), *columns.cameras, *columns.left_out)
        keys = ", ".join(sorted(names)) or "nothing"
        reasons = [f" ({columns.left_out[k]})" for k in ACTIONS if k in columns.left_out]
        raise DataError(
            f"{source} has no action{''.join(reasons)}; found: {keys}. Name it: --field action=NAME"
        )
    if not columns.numbers and not columns.cameras:
        reasons = [f"{name} ({reason})" for name, reason in columns.left_out.items()]
        raise DataError(f"{source} has no observation; left out: {', '.join(reasons) or 'nothing'}")
    lengths = {k: len(v) for k, v in flat(numbers).items()}
    lengths |= {f"observation.{k}": len(v) for k, v in columns.cameras.items()}
    length = next(n for k, n in lengths.items() if k == "action" or k.startswith("action."))
    if len(set(lengths.values())) > 1 or not length:
        raise DataError(f"{source}: {_lengths(lengths)}; expected one length above 0")
    for key, x in flat(numbers).items():
        if np.issubdtype(np.asarray(x).dtype, np.floating) and not np.isfinite(x).all():
            t = np.argwhere(~np.isfinite(x))[0][0]
            raise DataError(
                f"{source}: {key} at step {t} is not finite; cut such rows, or leave such episodes "
                "out with --drop-bad"
            )
        if remark := _loss(x, f"{source}: {key}"):
            columns.change(key, remark)
    result = _map(numbers, to_storage_type)
    result["observation"] |= columns.cameras
    result["language_instruction"] = _instructions(instruction, options, length)
    for key, x in result.items():
        if isinstance(x, np.ndarray) and x.dtype.kind == "U" and any("\ufffd" in t for t in x):
            columns.change(key, "bytes that are not UTF-8 became \ufffd: encode the texts as UTF-8")
    hz = {"control_hz": np.float32(options.control_hz)} if options.control_hz else {}
    return {
        "steps": result,
        "episode_metadata": {**metadata, **hz, "source": source},
        "left_out": dict(columns.left_out),
        "changed": dict(columns.changed),
    }


COUNTER = re.compile(r"(^|_)(index|idx|counter|frame_id)$")


def _measurements(steps: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Return the steps without parts that have no values or count the rows; they are left out."""

    def reason(name: str, x: Any) -> str:
        x = np.asarray(x)
        if 0 in x.shape[1:]:
            return f"{x.dtype} {list(x.shape[1:])} has no values"
        # Other arrays of this name, such as the number of a tool, are measurements.
        steps = np.diff(x, axis=0) if x.dtype.kind in "iu" and x.size == len(x) else np.zeros(1)
        is_counter = len(steps) == 0 or (steps.min() == steps.max() and steps.min() > 0)
        return "a counter of the rows" if COUNTER.search(name) and is_counter else ""

    result = dict(steps)
    for key, part in steps.items():
        if isinstance(part, Mapping):
            reasons = {name: reason(name, x) for name, x in part.items()}
            result[key] = {name: x for name, x in part.items() if not reasons[name]}
            columns.left_out |= {f"{key}.{k}": text for k, text in reasons.items() if text}
        elif text := reason("" if key == "action" else key, part):
            del result[key]
            columns.left_out[key] = text
    for name in list(columns.numbers):
        if text := reason(name, columns.numbers[name]):
            del columns.numbers[name]
            columns.left_out[name] = text
    return {k: v for k, v in result.items() if not (isinstance(v, Mapping) and not v)}


def _loss(x: Any, place: str) -> str:
    """Return a remark on float64 values that float32 distinguishes poorly; "" for others.

    Raises DataError for values that the stored type cannot hold.
    """
    x = np.asarray(x)
    if x.dtype == np.uint64 and x.max(initial=0) > np.iinfo(np.int64).max:
        raise DataError(f"{place} has values up to {x.max()}; expected at most 2^63 - 1")
    if x.dtype.kind != "f" or x.dtype.itemsize <= 4 or not x.size:
        return ""
    largest = np.abs(x).max()
    if largest > np.finfo(np.float32).max:
        raise DataError(f"{place} has values up to {largest:.3g}; expected those of float32")
    span, unit = float(np.ptp(x)), float(np.spacing(np.float32(largest)))
    if unit <= max(POOR * span, FINE):
        return ""
    return f"values up to {largest:.4g} as float32, which keeps steps of {unit:.3g}"


def to_storage_type(x: Any) -> np.ndarray:
    """Return numbers as bool, uint8, int64 or float32; texts as they are."""
    x = np.asarray(x)
    if x.dtype == bool or x.dtype == np.uint8 or x.dtype.kind == "U":
        return x
    return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float32)


def check_regular(path: Path) -> None:
    """Raise DataError for a missing file, and for a pipe or a device, which may never end."""
    if not path.exists():
        raise DataError(f"{path} is missing; copy the recording again")
    if not files.is_regular(path):
        raise DataError(f"{path} is not a regular file; copy the recording again")


def check_steps(count: int, source: str) -> int:
    """Return the number of steps of an episode; DataError for more than MOST_STEPS."""
    if count > MOST_STEPS:
        raise DataError(f"{source} has {count:,} steps; expected at most {MOST_STEPS:,}")
    return count


YES = ("true", "yes", "1", "success", "successful", "succeeded")
NO = ("false", "no", "0", "failure", "fail", "failed", "")


def flag(values: Any, place: str) -> bool:
    """Return whether any value is true: a flag of the episode, or one of each step.

    values: booleans, numbers, or texts of `YES` and `NO`. Raises DataError for others.
    """
    results = []
    for x in np.ravel(np.asarray(values, object)):
        word = text(x).strip().lower() if isinstance(x, str | bytes) else ""
        if isinstance(x, str | bytes) and word not in (*YES, *NO):
            raise DataError(f"{place} is {text(x)[:60]!r}; expected true or false")
        is_nan = isinstance(x, float | np.floating) and np.isnan(x)  # else it would be true
        if x is None or is_nan or not isinstance(x, str | bytes | bool | int | float | np.generic):
            raise DataError(f"{place} is {x!r:.60}; expected true or false")
        results.append(word in YES if isinstance(x, str | bytes) else bool(x))
    return any(results)


def text(x: Any) -> str:
    """Return a string from a string, bytes, an array of one element, or None."""
    x = x.item() if isinstance(x, np.ndarray | np.generic) and np.size(x) == 1 else x
    return x.decode("utf-8", "replace") if isinstance(x, bytes) else str(x or "")


def texts(values: Any, steps: int) -> np.ndarray:
    """Return a text of each step, str [steps], from one text of the episode or one of each step."""
    items = [text(x) for x in np.ravel(values)]
    return np.array(items if len(items) == steps else items[:1] * steps, np.str_)


RANGE = " range"  # of float images, in a signature; episodes of black ones have none


def signature(episode: Mapping[str, Any]) -> dict[str, str]:
    """Return {field: type and shape of a step}; it must be the same for all episodes."""
    result = {}
    for key, x in flat(episode["steps"]).items():
        if isinstance(x, EncodedImage):
            result[key] = f"{x.format} image {tuple(x.shape)}" + x.pixels.replace("uint8", "")
        elif np.asarray(x).dtype.kind in "USO":
            result[key] = "text"
        else:
            result[key] = f"{np.asarray(x).dtype} {np.shape(x)[1:]}"
    changed = episode.get("changed", {})
    rows = changed.get("observation", "one observation per action")
    # The range of float images is read off each episode; a dark one must not become bright.
    scales = {
        f"observation.{name}{RANGE}": part
        for name, text in changed.items()
        for part in text.split("; ")
        if part.startswith(FLOATS)
    }
    return (
        result
        | scales
        | {f"episode_metadata.{k}": "" for k in episode["episode_metadata"]}
        | {"length": rows}
    )


def _instructions(instruction: Any, options: ConvertOptions, steps: int) -> Any:
    if isinstance(instruction, list):
        texts = [text(x).strip() or options.instruction for x in instruction]
        if len(texts) != steps:
            raise DataError(f"{len(texts)} instructions for {steps} steps")
        return np.array(texts, dtype=np.str_)
    return np.array([text(instruction).strip() or options.instruction] * steps, dtype=np.str_)


def _lengths(lengths: Mapping[str, int]) -> str:
    return "lengths " + ", ".join(f"{k} {n}" for k, n in sorted(lengths.items()))


def _map(tree: Mapping[str, Any], function: Any) -> dict[str, Any]:
    return {
        k: _map(v, function) if isinstance(v, Mapping) else function(v) for k, v in tree.items()
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dict by their dotted paths."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
