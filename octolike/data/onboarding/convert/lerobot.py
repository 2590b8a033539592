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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from octolike import files
from octolike.data.onboarding.convert import recording
from octolike.data.onboarding.convert.columns import Columns, short_names
from octolike.data.onboarding.convert.frame_encoding import ConvertOptions
from octolike.data.onboarding.convert.lerobot_files import (
    array_of,
    by_episode,
    column_names,
    describe_ragged,
    filled,
    overlapping,
    parse_json,
    part_names,
    read_jsonl,
    read_parquet,
    read_schema,
    unusable_depth,
)
from octolike.data.onboarding.convert.recording import EpisodeLocation
from octolike.data.onboarding.convert.video import list_frames, read_frames
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
# Columns without measurements.
COUNTERS = {"timestamp", "frame_index", "episode_index", "index", "task_index"}


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
        names: dict[str, list[str]] = {}
        for key, feature in self._features.items():
            flat = column_names(feature.get("names")) or self._parts[0].get(key, [])
            if flat and _is_numeric(feature):
                role, name = self._roles[key]
                names[name if role == "observation" else f"{role}.{name}".rstrip(".")] = flat
        return {"control_hz": float(self._info["fps"]), "names": names}

    def read(self, location: EpisodeLocation) -> dict[str, Any]:
        """Return one episode."""
        source, index = str(location), int(location.key)
        table = self._table(index, source)
        columns = Columns(self.options, source)
        times = self._times(table, columns)
        columns.changed.update(self._parts[1])
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
                self._add_images(columns, name, table[key])
            elif feature["dtype"] == "string" and role in ("instruction", "extra"):
                texts = [recording.text(x) for x in table[key].to_pylist()]
                if role == "instruction":
                    # A text that --field names comes before the task of the dataset.
                    named = any(path == key for _, path in self.options.fields)
                    pairs = zip(*(texts, instructions)[:: 1 if named else -1], strict=True)
                    instructions = [a or b for a, b in pairs]
                else:
                    steps[name] = np.array(texts, np.str_)
            elif role == "observation":
                x = array_of(table[key])
                if x is None:
                    columns.left_out[key] = describe_ragged(table[key])
                else:
                    columns.add(name, x)
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
        if (other := self._overlaps[key].get(index)) is not None:
            raise DataError(
                f"{place}: by meta/episodes, episodes {index} and {other} have the same frames of "
                "one video file, as after a faulty merge; merge the datasets again"
            )
        start = float(row.get(f"videos/{key}/from_timestamp") or 0.0)
        end = float(row.get(f"videos/{key}/to_timestamp") or np.inf)
        if reason := unusable_depth(name, feature, listing):
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

    @cached_property
    def _overlaps(self) -> dict[str, dict[int, int]]:
        slack = 0.5 / float(self._info["fps"])
        return {key: overlapping(self._episodes, key, slack) for key in self._features}

    def _times(self, table: pa.Table, columns: Columns) -> np.ndarray:
        """Return the seconds of the rows since the start of the episode's video: float64 [T]."""
        fps = float(self._info["fps"])
        has_times = "timestamp" in table.column_names and (
            table["timestamp"].null_count < table.num_rows or not table.num_rows
        )
        used = [("timestamp", 1.0)] if has_times else []
        used += [("frame_index", fps)] if "frame_index" in table.column_names else []
        times = np.arange(table.num_rows) / fps
        for key, scale in used[:1]:
            times = np.array(table[key].to_pylist(), np.float64).reshape(-1) / scale
            if not np.isfinite(times).all():
                step = int(np.argmax(~np.isfinite(times)))
                raise DataError(
                    f"{columns.source}: {key} of step {step} is missing or not finite, so its "
                    "frames cannot be found; remove the column to use the number of the frame"
                )
        steps = np.diff(times)
        if not has_times:
            columns.changed["timestamp"] = f"missing: computed from {fps:g} rows per second"
        elif len(times) > 1 and np.median(steps) > 0 and abs(np.median(steps) * fps - 1) > 0.01:
            columns.changed["timestamp"] = (
                f"{1 / np.median(steps):.3g} rows per second by their timestamps, but "
                f"meta/info.json has {fps:g}, which becomes the control rate; see --hz"
            )
        elif (steps * fps > 1.5).any():
            columns.changed["timestamp"] = "gaps between rows, from cut rows: actions jump there"
        return times

    def _instructions(self, table: pa.Table, index: int) -> list[str]:
        """Return the task of every row."""
        if "task_index" in table.column_names:
            indices = table["task_index"].to_pylist()
            unknown = sorted({i for i in indices if i not in self._tasks}, key=str)
            if unknown and not self.options.instruction:
                raise DataError(
                    f"task_index {unknown[0]} of episode {index} is not in {self.path}/meta/tasks, "
                    f"which has {', '.join(map(str, self._tasks)) or 'none'}: add it there, or use "
                    "--instruction"
                )
            return [self._tasks.get(i, "") for i in indices]
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
        info = parse_json(path, path.read_text())
        info = info if isinstance(info, dict) else {}
        if missing := [k for k in ("features", "fps") if k not in info]:
            raise DataError(f"{path} lacks {', '.join(missing)}")
        if not isinstance(info["features"], dict):
            raise DataError(f"{path}: features is {info['features']!r:.80}; expected an object")
        if not isinstance(info["fps"], (int, float)) or not 0 < info["fps"] < np.inf:
            raise DataError(f"{path}: fps is {info['fps']!r:.80}; expected a positive number")
        return info

    @cached_property
    def _parts(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Return names by GR00T's meta/modality.json, for columns without any, and remarks."""
        widths = {
            key: shape[0]
            for key, feature in self._features.items()
            if _is_numeric(feature) and not column_names(feature.get("names"))
            for shape in [feature.get("shape")]
            if isinstance(shape, list) and shape and isinstance(shape[0], int)
        }
        return part_names(self.path / "meta" / "modality.json", widths)

    @property
    def _features(self) -> dict[str, Any]:
        return self._info["features"]

    @cached_property
    def _tasks(self) -> dict[int, str]:
        if self.version == 2:
            rows = read_jsonl(self.path / "meta" / "tasks.jsonl")
            return self._unique_tasks([(r["task_index"], r["task"]) for r in rows])
        table = read_parquet(self.path / "meta" / "tasks.parquet")
        names = [n for n in table.column_names if n != "task_index"]  # the name of the index varies
        if not names:
            raise DataError(f"{self.path}/meta/tasks.parquet has no column of tasks")
        name = "task" if "task" in names else names[0]
        indices, texts = table["task_index"].to_pylist(), table[name].to_pylist()
        return self._unique_tasks(list(zip(indices, texts, strict=True)))

    def _unique_tasks(self, tasks: list[tuple[int, str]]) -> dict[int, str]:
        result: dict[int, str] = {}
        for index, task in tasks:
            if result.setdefault(index, task) != task:
                raise DataError(
                    f"{self.path}/meta/tasks has two tasks of index {index}, {result[index]!r:.80} "
                    f"and {task!r:.80}: the rows do not say which; give each its own index"
                )
        return result

    @cached_property
    def _episodes(self) -> dict[int, dict[str, Any]]:
        meta = self.path / "meta"
        if self.version == 2:
            return by_episode(meta, read_jsonl(meta / "episodes.jsonl"))
        rows: list[dict[str, Any]] = []
        for file in sorted((meta / "episodes").rglob("*.parquet")):
            schema = read_schema(file)
            columns = [n for n in schema.names if not n.startswith("stats/")]
            rows += read_parquet(file, columns=columns).to_pylist()
        return by_episode(meta, rows)

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
            name = filled(text, values)
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
        table = read_parquet(path, filters=[("episode_index", "==", index)])
        # in order of time; the file may have another order
        if "frame_index" in table.column_names:
            table = table.sort_by("frame_index")
            numbers = table["frame_index"].to_pylist()
            repeated = [a for a, b in pairwise(numbers) if a == b]
            if repeated:
                raise DataError(
                    f"{source}: {path} has frame_index {repeated[0]} twice: several recordings in "
                    "one episode; give each its own episode_index"
                )
        expected = self._episodes[index].get("length", table.num_rows)
        recording.check_steps(table.num_rows, source)
        if table.num_rows != expected:
            raise DataError(f"{source}: {path} has {table.num_rows} steps, meta has {expected}")
        return table

    def _add_images(self, columns: Columns, name: str, column: pa.ChunkedArray) -> None:
        """Add a camera: encoded images, or images as nested lists of numbers."""
        if pa.types.is_nested(column.type) and not pa.types.is_struct(column.type):
            x = array_of(column)
            if x is None:
                columns.left_out[name] = describe_ragged(column)
                return
            if x.dtype.kind in "iu" and x.min(initial=0) >= 0 and x.max(initial=0) < 256:
                x = x.astype(np.uint8)
            columns.add(name, x)
        else:
            columns.add_frames(name, self._images(column, columns.source))

    def _images(self, column: pa.ChunkedArray, source: str) -> Iterator[bytes]:
        for t, image in enumerate(column):
            image = image.as_py()
            data = image["bytes"] if isinstance(image, dict) else image
            if not data and isinstance(image, dict) and image.get("path"):
                data = self._image_file(image["path"], source)
            if not data:
                raise DataError(f"{source}: no image at step {t}")
            yield data


def _is_numeric(feature: Mapping[str, Any]) -> bool:
    return feature["dtype"] not in ("image", "video", "string")


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
    if role == "success":
        metadata["success"] = recording.flag(column.to_pylist(), f"{source}: {role}")
        return
    x = array_of(column)
    if x is None:
        raise DataError(f"{source}: {name or role} {describe_ragged(column)}")
    if role in ("reward", "is_terminal"):
        x = x.reshape(len(x))
        steps[role] = x.astype(bool) if role == "is_terminal" else x.astype(np.float32)
    elif role == "extra":
        steps[name] = x
    elif name:
        steps.setdefault(role, {})[name] = x
    else:
        steps[role] = x
