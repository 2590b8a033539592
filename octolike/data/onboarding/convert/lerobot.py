"""LeRobot datasets, versions 2.0, 2.1 and 3.0: parquet, with videos or images in the parquet.

v2: data/chunk-*/episode_*.parquet and videos/chunk-*/<key>/episode_*.mp4, one per episode;
    meta/tasks.jsonl, episodes.jsonl.
v3: several episodes per parquet file and per video, with their ranges in meta/episodes/*.parquet;
    meta/tasks.parquet.

observation.images.<camera> → observation.<camera>; observation.<key> → observation.<key>; action;
next.reward → reward; next.done → is_terminal; next.success → episode_metadata.success (at any
step). The task is the instruction; fps the control rate. Videos are decoded by the ffmpeg of
imageio-ffmpeg, frame by frame, AV1 included.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from octolike.data.onboarding.convert import recording
from octolike.data.onboarding.convert.recording import ConvertOptions, EpisodeLocation
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
RENAMED = {"action": "action", "next.reward": "reward", "next.done": "is_terminal"}
# Columns without measurements.
COUNTERS = {"timestamp", "frame_index", "episode_index", "index", "task_index", "next.success"}


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
            if key == "action" or key.startswith("observation."):
                flat = _names(feature.get("names"))
                if flat and feature["dtype"] not in ("image", "video"):
                    names[key.removeprefix("observation.").replace(".", "_")] = flat
        return {"control_hz": float(self._info["fps"]), "names": names}

    def read(self, location: EpisodeLocation) -> dict[str, Any]:
        """Return one episode."""
        source, index = str(location), int(location.key)
        table = self._table(index, source)
        steps: dict[str, Any] = {"observation": {}}
        cameras, metadata = {}, {}
        frames: Iterator[np.ndarray | bytes]
        for key, feature in self._features.items():
            name = key.removeprefix("observation.").removeprefix("images.").replace(".", "_")
            if feature["dtype"] == "video":
                frames = self._video(key, feature, index, table.num_rows, source)
                cameras[name] = recording.encode(frames, self.options, f"{source}, camera {name}")
                continue
            if key in COUNTERS - {"next.success"}:
                continue
            if key not in table.column_names:
                raise DataError(
                    f"{source}: column {key} of meta/info.json is not in its parquet file, which "
                    f"has {', '.join(table.column_names)}"
                )
            if feature["dtype"] == "image":
                frames = self._images(table[key], source)
                cameras[name] = recording.encode(frames, self.options, f"{source}, camera {name}")
            elif feature["dtype"] == "string":
                continue
            elif key == "next.success":
                metadata["success"] = bool(_numbers(table[key], key, source).any())
            elif key in RENAMED:
                steps[RENAMED[key]] = _numbers(table[key], key, source)
            elif key.startswith("observation."):
                steps["observation"][name] = _numbers(table[key], key, source)
        for key in ("reward", "is_terminal"):
            if key in steps:
                steps[key] = steps[key].reshape(table.num_rows)
        if "is_terminal" in steps:
            steps["is_terminal"] = steps["is_terminal"].astype(bool)
        instructions = [self._tasks.get(i, "") for i in table["task_index"].to_pylist()]
        return recording.episode(steps, cameras, instructions, self.options, metadata, source)

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
        if missing := [k for k in ("features", "fps") if k not in info]:
            raise DataError(f"{path} lacks {', '.join(missing)}")
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
        return self.path / text.format(
            episode_chunk=index // int(self._info.get("chunks_size", 1000)),
            episode_index=index,
            chunk_index=chunk,
            file_index=number,
            video_key=video,
        )

    def _table(self, index: int, source: str) -> pa.Table:
        path = self._episode_path(DATA, "data_path", index)
        table = _read_parquet(path, filters=[("episode_index", "==", index)])
        # in order of time; the file may have another order
        if "frame_index" in table.column_names:
            table = table.sort_by("frame_index")
        expected = self._episodes[index].get("length", table.num_rows)
        if table.num_rows != expected:
            raise DataError(f"{source}: {path} has {table.num_rows} steps, meta has {expected}")
        return table

    def _images(self, column: pa.ChunkedArray, source: str) -> Iterator[bytes]:
        for t, image in enumerate(column):
            image = image.as_py()
            data = image["bytes"] if isinstance(image, dict) else image
            if not data and isinstance(image, dict) and image.get("path"):
                data = (self.path / image["path"]).read_bytes()
            if not data:
                raise DataError(f"{source}: no image at step {t}")
            yield data

    def _video(
        self, key: str, feature: Mapping[str, Any], index: int, steps: int, source: str
    ) -> Iterator[np.ndarray]:
        path = self._episode_path(VIDEO, "video_path", index, key)
        if not path.is_file():
            raise DataError(f"{source}: its video {path} is missing")
        start = float(self._episodes[index].get(f"videos/{key}/from_timestamp") or 0.0)
        yield from video_frames(path, start, steps, float(self._info["fps"]), source)


def video_frames(
    path: Path, start: float, count: int, fps: float, source: str
) -> Iterator[np.ndarray]:
    """Yield `count` frames, uint8 [h, w, 3], of a video from `start` seconds.

    Raises DataError for a video that cannot be decoded or has fewer frames.
    """
    # Half a frame early, so that rounding does not skip the frame at `start`.
    seek = ["-ss", f"{max(start - 0.5 / fps, 0):.6f}"] if start else []
    output = ["-frames:v", str(count), "-fps_mode", "passthrough"]
    frames = 0
    stream = imageio_ffmpeg.read_frames(str(path), input_params=seek, output_params=output)
    try:
        width, height = next(stream)["size"]
        for data in stream:
            frames += 1
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
            if frames == count:
                break
    except (OSError, RuntimeError, ValueError, StopIteration) as error:
        reason = str(error).strip().splitlines()[-1:] or ["no frames"]
        raise DataError(f"{source}: {path} cannot be decoded: {reason[0]}") from None
    finally:
        stream.close()
    if frames < count:
        raise DataError(f"{source}: {path} has {frames} frames from {start:.3f} s, not {count}")


def _numbers(column: pa.ChunkedArray, key: str, source: str) -> np.ndarray:
    """Return a column as an array [T, ...]."""
    values = column.to_pylist()
    try:
        x = np.array(values)
    except ValueError:
        x = np.array(values, dtype=object)
    if x.dtype.kind not in "fiub":
        raise DataError(f"{source}: {key} is not one array of numbers per step")
    return x


def _names(names: Any) -> list[str]:
    """Return the names of the dimensions of a feature, from a list, a dict of lists or None."""
    if isinstance(names, dict):
        names = [n for v in names.values() for n in (v if isinstance(v, list) else [v])]
    return [str(n) for n in names or []]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path} is missing; copy the dataset again")
    return [_parse_json(path, line) for line in path.read_text().splitlines() if line.strip()]


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}; copy the dataset again") from None


def _read_parquet(path: Path, **options: Any) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None, **options)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}; copy the dataset again") from None


def _read_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}; copy the dataset again") from None
