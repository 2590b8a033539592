"""LeRobot datasets, versions 2.0, 2.1 and 3.0: parquet, with videos or images in the parquet.

v2: data/chunk-*/episode_*.parquet and videos/chunk-*/<key>/episode_*.mp4, one per episode;
    meta/tasks.jsonl, episodes.jsonl.
v3: several episodes per parquet file and per video, with their ranges in meta/episodes/*.parquet;
    meta/tasks.parquet.

observation.images.<camera> → observation.<camera>; observation.<key> → observation.<key>; action or
actions → action, action.<part> → a dict of parts; next.reward → reward; next.done → is_terminal;
next.success → episode_metadata.success (at any step); any other column, such as openpi's image and
state, belongs to the observation. The task is the instruction; fps the control rate.

A row has the video frame at its timestamp (`video`), wherever it stands among the rows. Depth is
stored as depth if its scale is known, or left out.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from octolike import files
from octolike.data.onboarding.convert import recording
from octolike.data.onboarding.convert.columns import Columns, is_depth_name, short_names
from octolike.data.onboarding.convert.frame_encoding import ConvertOptions
from octolike.data.onboarding.convert.recording import EpisodeLocation
from octolike.data.onboarding.convert.video import VideoListing, list_frames, read_frames
from octolike.errors import DataError

# Paths if meta/info.json has none.
DATA = {
    2: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    3: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
VIDEO = {
    2: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    3: "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
STEPS = {
    "action": "action",
    "actions": "action",
    "next.reward": "reward",
    "reward": "reward",
    "next.done": "is_terminal",
    "done": "is_terminal",
    "next.success": "success",
    "success": "success",
}
MOST_ROWS = 16 * recording.MOST_STEPS  # of a parquet file
# Columns without measurements.
COUNTERS = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
# Keys of a depth video's scale in meta/info.json, which this reader does not undo.
SCALES = ("depth_min", "depth_max", "shift", "use_log")


@dataclass(frozen=True)
class LeRobotRecording:
    """The directory of a dataset, with meta/info.json."""

    path: Path
    options: ConvertOptions

    def episodes(self) -> list[EpisodeLocation]:
        """Return the episodes, with their split if meta/info.json has several."""
        splits = {k: v for k, v in self._info.get("splits", {}).items() if ":" in str(v)}
        result = []
        for i in sorted(self._episodes):
            split = ""
            for name, text in splits.items() if len(splits) > 1 else ():
                first, last = (int(x) for x in text.split(":"))
                if first <= i < last:
                    split = "train" if name == "train" else "val"
            result.append(EpisodeLocation("episode", str(i), split))
        if not result:
            raise DataError(f"{self.path}/meta lists no episodes")
        return result

    def metadata(self) -> dict[str, Any]:
        """Return the control rate, and the names of the dimensions of action and observation."""
        names = {}
        for key, feature in self._features.items():
            flat = _names(feature.get("names"))
            if flat and feature["dtype"] not in ("image", "video", "string"):
                role, name = self._roles[key]
                names[name if role == "observation" else f"{role}.{name}".rstrip(".")] = flat
        return {"control_hz": float(self._info["fps"]), "names": names}

    def read(self, location: EpisodeLocation) -> dict[str, Any]:
        """Return one episode."""
        source, index = str(location), int(location.key)
        table = self._table(index, source)
        columns = Columns(self.options, source)
        times = self._times(table, columns)
        steps: dict[str, Any] = {}
        metadata: dict[str, Any] = {}
        instructions = self._instructions(table, index)
        for key, feature in self._features.items():
            role, name = self._roles[key]
            if role == "":
                text_remedy = f"a text: use it with --field language_instruction={key}"
                columns.left_out[key] = text_remedy if feature["dtype"] == "string" else name
            elif role == "counter":
                continue
            elif feature["dtype"] == "video":
                self._add_video(columns, key, name, index, times)
            elif key not in table.column_names:
                raise DataError(
                    f"{source}: column {key} of meta/info.json is not in its parquet file, which "
                    f"has {', '.join(table.column_names)}"
                )
            elif feature["dtype"] == "image":
                columns.add_frames(name, self._images(table[key], source))
            elif feature["dtype"] == "string":
                texts = [recording.text(x) for x in table[key].to_pylist()]
                if role == "instruction":
                    # A text that --field names comes before the task of the dataset.
                    named = any(path == key for _, path in self.options.fields)
                    pairs = zip(*(texts, instructions)[:: 1 if named else -1], strict=True)
                    instructions = [a or b for a, b in pairs]
                else:
                    steps[name] = np.array(texts, np.str_)
            elif role == "observation":
                numbers = _numbers(table[key])
                if numbers is None:
                    columns.left_out[key] = "not one array of numbers per step"
                else:
                    columns.add(name, numbers)
            else:
                _add_step(steps, metadata, role, name, table[key], source)
        for key in set(table.column_names) - set(self._features) - COUNTERS:
            columns.left_out[key] = "not in meta/info.json"
        return recording.episode(steps, columns, instructions, metadata)

    def _add_video(
        self, columns: Columns, key: str, name: str, index: int, times: np.ndarray
    ) -> None:
        """Add the frames of a video at the times of the rows, seconds in the episode."""
        place = f"{columns.source}, camera {name}"
        row, feature = self._episodes[index], self._features[key]
        try:
            listing = list_frames(self._episode_path(VIDEO, "video_path", index, key))
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        start = float(row.get(f"videos/{key}/from_timestamp") or 0.0)
        end = float(row.get(f"videos/{key}/to_timestamp") or np.inf)
        if reason := _unusable_depth(name, feature, listing):
            columns.left_out[key] = reason
            return
        if (np.diff(times) <= 0).any():
            step = int(np.argmax(np.diff(times) <= 0))
            raise DataError(
                f"{place}: timestamp {times[step]:.3f} s of step {step} is followed by "
                f"{times[step + 1]:.3f} s, so its frames cannot be found"
            )
        numbers = listing.nearest(start + times, place, start, end)
        add = columns.add_depth if listing.is_depth else columns.add_frames
        add(name, read_frames(listing, numbers, place))
        first, last = np.searchsorted(listing.times, [start - 1e-3, end - listing.interval / 2])
        rate, fps = 1 / listing.interval, float(self._info["fps"])
        if np.isfinite(listing.interval) and abs(rate - fps) > 0.01 * fps:
            columns.changed[name] = (
                f"a video of {rate:.3g} frames per second for rows of {fps:g}: each row has the "
                "frame nearest in time"
            )
        elif len(np.unique(numbers)) < last - first:
            columns.changed[name] = "frames without a row: each row has the frame at its timestamp"

    def _times(self, table: pa.Table, columns: Columns) -> np.ndarray:
        """Return the seconds of the rows since the start of the episode's video: float64 [T]."""
        fps = float(self._info["fps"])
        for key, scale in (("timestamp", 1.0), ("frame_index", fps)):
            if key in table.column_names:
                times = np.array(table[key].to_pylist(), np.float64).reshape(-1) / scale
                break
        else:
            times = np.arange(table.num_rows) / fps
        if "timestamp" not in table.column_names:
            columns.changed["timestamp"] = f"missing: computed from {fps:g} rows per second"
        elif len(times) > 1 and abs(np.median(np.diff(times)) * fps - 1) > 0.01:
            columns.changed["timestamp"] = (
                f"{1 / np.median(np.diff(times)):.3g} rows per second by their timestamps, but "
                f"meta/info.json has {fps:g}, which becomes the control rate; see --hz"
            )
        elif len(times) > 1 and (np.diff(times) * fps > 1.5).any():
            columns.changed["timestamp"] = "gaps between rows, from cut rows: actions jump there"
        return times

    def _instructions(self, table: pa.Table, index: int) -> list[str]:
        """Return the task of every row."""
        if "task_index" in table.column_names:
            return [self._tasks.get(i, "") for i in table["task_index"].to_pylist()]
        tasks = list(self._episodes[index].get("tasks") or [""])
        return [str(tasks[0])] * table.num_rows

    @cached_property
    def _roles(self) -> dict[str, tuple[str, str]]:
        """Return {column: (role, name)}; the role "" has the reason why the column is left out."""
        renamed = {path: field for field, path in self.options.fields}
        if missing := sorted(set(renamed) - set(self._features)):
            raise DataError(
                f"{self.path} has no column {missing[0]!r} (--field); it has "
                f"{', '.join(self._features)}"
            )
        keys = {key: renamed.get(key, key) for key in self._features}
        roles = {key: _role(target, set(keys.values())) for key, target in keys.items()}
        observation = [keys[k] for k, (role, _) in roles.items() if role == "observation"]
        names = short_names(observation, ".")
        return {
            key: (role, names[keys[key]] if role == "observation" else name)
            for key, (role, name) in roles.items()
        }

    @cached_property
    def version(self) -> int:
        """Return the major version, 2 or 3."""
        text = str(self._info.get("codebase_version", ""))
        number = text.lstrip("v").partition(".")[0]
        if number not in ("2", "3"):
            raise DataError(
                f"{self.path}: codebase_version is {text!r}; supported are 2.0, 2.1 and 3.0. "
                "LeRobot has a script to convert older ones"
            )
        return int(number)

    @cached_property
    def _info(self) -> dict[str, Any]:
        path = self.path / "meta" / "info.json"
        if not path.is_file():
            raise DataError(f"{self.path} has no meta/info.json: it is not a LeRobot dataset")
        info = _parse_json(path, path.read_text())
        info = info if isinstance(info, dict) else {}
        if missing := [k for k in ("features", "fps") if k not in info]:
            raise DataError(f"{path} lacks {', '.join(missing)}")
        if not isinstance(info["features"], dict):
            raise DataError(f"{path}: features is {info['features']!r:.80}; expected an object")
        if not isinstance(info["fps"], (int, float)) or not 0 < info["fps"] < np.inf:
            raise DataError(f"{path}: fps is {info['fps']!r:.80}; expected a positive number")
        return info

    @property
    def _features(self) -> dict[str, Any]:
        return self._info["features"]

    @cached_property
    def _tasks(self) -> dict[int, str]:
        if self.version == 2:
            rows = _read_jsonl(self.path / "meta" / "tasks.jsonl")
            return {r["task_index"]: r["task"] for r in rows}
        table = _read_parquet(self.path / "meta" / "tasks.parquet")
        names = [n for n in table.column_names if n != "task_index"]  # the name of the index varies
        if not names:
            raise DataError(f"{self.path}/meta/tasks.parquet has no column of tasks")
        name = "task" if "task" in names else names[0]
        return dict(zip(table["task_index"].to_pylist(), table[name].to_pylist(), strict=True))

    @cached_property
    def _episodes(self) -> dict[int, dict[str, Any]]:
        meta = self.path / "meta"
        if self.version == 2:
            return {r["episode_index"]: r for r in _read_jsonl(meta / "episodes.jsonl")}
        result: dict[int, dict[str, Any]] = {}
        for file in sorted((meta / "episodes").rglob("*.parquet")):
            schema = _read_schema(file)
            columns = [n for n in schema.names if not n.startswith("stats/")]
            result |= {
                r["episode_index"]: r for r in _read_parquet(file, columns=columns).to_pylist()
            }
        return result

    def _episode_path(
        self, pattern: Mapping[int, str], key: str, index: int, video: str = ""
    ) -> Path:
        """Return the path of the numbers of an episode, or of its video of a camera."""
        text = self._info.get(key) or pattern[self.version]
        row = self._episodes[index]
        prefix = f"videos/{video}" if video else "data"
        chunk, number = (row.get(f"{prefix}/{k}", 0) for k in ("chunk_index", "file_index"))
        try:
            values = {
                "episode_chunk": index // int(self._info.get("chunks_size", 1000)),
                "episode_index": index,
                "chunk_index": chunk,
                "file_index": number,
                "video_key": video,
            }
            name = _filled(text, values)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise DataError(f"{self.path}/meta/info.json: {key} {text!r:.200}: {error}") from None
        try:
            return Path(files.child(self.path, name))
        except ValueError as error:
            raise DataError(
                f"{self.path}/meta/info.json: {key} {text!r:.200}: {error}; if it is a link, copy "
                "the dataset with cp -rL"
            ) from None

    def _image_file(self, name: str, source: str) -> bytes:
        try:
            path = files.child(self.path, name)
            recording.check_regular(Path(path))
            return path.read_bytes()
        except (ValueError, OSError) as error:
            raise DataError(f"{source}: {error}") from None

    def _table(self, index: int, source: str) -> pa.Table:
        path = self._episode_path(DATA, "data_path", index)
        table = _read_parquet(path, filters=[("episode_index", "==", index)])
        # in order of time; the file may have another order
        if "frame_index" in table.column_names:
            table = table.sort_by("frame_index")
        expected = self._episodes[index].get("length", table.num_rows)
        recording.check_steps(table.num_rows, source)
        if table.num_rows != expected:
            raise DataError(f"{source}: {path} has {table.num_rows} steps, meta has {expected}")
        return table

    def _images(self, column: pa.ChunkedArray, source: str) -> Iterator[bytes]:
        for t, image in enumerate(column):
            image = image.as_py()
            data = image["bytes"] if isinstance(image, dict) else image
            if not data and isinstance(image, dict) and image.get("path"):
                data = self._image_file(image["path"], source)
            if not data:
                raise DataError(f"{source}: no image at step {t}")
            yield data


def _filled(template: Any, values: Mapping[str, Any]) -> str:
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


def _role(key: str, keys: set[str]) -> tuple[str, str]:
    """Return (role, name) of a column; for the role "", the name is the reason to leave it out."""
    parent, _, part = key.partition(".")
    if key in COUNTERS:
        return "counter", ""
    if key in recording.INSTRUCTIONS:
        return "instruction", ""
    if key in STEPS:
        return STEPS[key], ""
    if parent in ("action", "actions"):
        name = part.replace(".", "_")
        has_full_action = keys & {"action", "actions"}
        return ("extra", f"action_{name}") if has_full_action else ("action", name)
    if parent in ("observation", "observations"):
        return "observation", ""
    if parent == "next":
        return "", "of the next step; rewards, done and success are read"
    if parent == "annotation" or key.endswith("_index"):
        return "", "an index into a table of annotations"
    if key.startswith(recording.INSTRUCTIONS):
        return "extra", key.replace(".", "_")
    return "observation", ""


def _add_step(
    steps: dict[str, Any],
    metadata: dict[str, Any],
    role: str,
    name: str,
    column: pa.ChunkedArray,
    source: str,
) -> None:
    """Add a column to the steps, or the success to the metadata."""
    x = _numbers(column)
    if x is None:
        raise DataError(f"{source}: {name or role} is not one array of numbers per step")
    if role == "success":
        metadata["success"] = bool(x.any())
    elif role in ("reward", "is_terminal"):
        x = x.reshape(len(x))
        steps[role] = x.astype(bool) if role == "is_terminal" else x.astype(np.float32)
    elif role == "extra":
        steps[name] = x
    elif name:
        steps.setdefault(role, {})[name] = x
    else:
        steps[role] = x


def _unusable_depth(name: str, feature: Mapping[str, Any], listing: VideoListing) -> str:
    """Return why the depth of a video cannot be recovered; "" for usable depth and for a camera."""
    info = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    scaled = [k for k in info if k.rpartition(".")[2] in SCALES]
    if listing.is_depth and not scaled:
        return ""
    if listing.is_depth or info.get("video.is_depth_map") or is_depth_name(name):
        kind = f"scaled by {', '.join(scaled)}" if scaled else f"in 8 bits ({listing.pixel_format})"
        return f"a depth video {kind}, not a camera; its metres cannot be recovered"
    return ""


def _numbers(column: pa.ChunkedArray) -> np.ndarray | None:
    """Return a column as an array [T, ...]; None if it is not one array of numbers per step."""
    try:
        x = np.array(column.to_pylist())
    except ValueError:
        return None
    return x if x.dtype.kind in "fiub" else None


def _names(names: Any) -> list[str]:
    """Return the names of the dimensions of a feature, from a list, a dict of lists or None."""
    if isinstance(names, dict):
        names = [n for v in names.values() for n in (v if isinstance(v, list) else [v])]
    return [str(n) for n in names or []]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise DataError(f"{path} is missing; copy the dataset again")
    recording.check_regular(path)
    return [_parse_json(path, line) for line in path.read_text().splitlines() if line.strip()]


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}; copy the dataset again") from None


def _read_parquet(path: Path, **options: Any) -> pa.Table:
    recording.check_regular(path)
    try:
        rows = pq.read_metadata(path).num_rows
        if rows > MOST_ROWS:
            raise DataError(f"{path} has {rows:,} rows; expected at most {MOST_ROWS:,}")
        return pq.read_table(path, partitioning=None, **options)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}; copy the dataset again") from None


def _read_schema(path: Path) -> pa.Schema:
    recording.check_regular(path)
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}; copy the dataset again") from None
