"""Small recordings in other people's formats, made from nothing."""

import json
from pathlib import Path

import h5py
import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

STEPS, SIDE, FPS = 6, 16, 10


def numbers(episode: int, dims: int = 14, steps: int = STEPS) -> np.ndarray:
    """Return float32 [steps, dims] that encode episode, step and dimension."""
    t, d = np.arange(steps)[:, None], np.arange(dims)
    return (episode + 0.1 * t + 0.01 * d).astype(np.float32)


def frames(episode: int, steps: int = STEPS, side: int = SIDE) -> np.ndarray:
    """Return uint8 [steps, side, side, 3]: grey that encodes episode and step."""
    grey = (10 + 40 * episode + 5 * np.arange(steps)).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (steps, side, side, 3)).copy()


def jpegs(episode: int) -> list[bytes]:
    return [tf.io.encode_jpeg(f).numpy() for f in frames(episode)]


def aloha(root: Path, count: int = 4, *, compressed: bool = False) -> Path:
    """Write ALOHA's layout: a file per episode."""
    root.mkdir(parents=True)
    for i in range(count):
        with h5py.File(root / f"episode_{i}.hdf5", "w") as file:
            file["action"] = numbers(i)
            file["observations/qpos"] = numbers(i) + 0.5
            file["observations/qvel"] = numbers(i) * 0
            for camera in ("cam_high", "cam_left_wrist"):
                if compressed:
                    coded = jpegs(i)
                    size = max(map(len, coded)) + 7
                    rows = [np.frombuffer(c.ljust(size, b"\0"), np.uint8) for c in coded]
                    file[f"observations/images/{camera}"] = np.stack(rows)
                else:
                    file[f"observations/images/{camera}"] = frames(i)
            if compressed:
                file["compress_len"] = np.zeros((2, STEPS))
    return root


def robomimic(path: Path, count: int = 4) -> Path:
    """Write robomimic's layout: a file with demos, one of them held out."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        data.attrs["problem_info"] = json.dumps({"language_instruction": "stack the cubes"})
        for i in range(count):
            demo = data.create_group(f"demo_{i}")
            demo["actions"] = numbers(i, 7).astype(np.float64)
            demo["rewards"] = np.eye(STEPS)[-1]
            demo["dones"] = np.eye(STEPS, dtype=np.int64)[-1]
            demo["states"] = numbers(i, 30)
            demo["obs/robot0_eef_pos"] = numbers(i, 3)
            demo["obs/agentview_image"] = frames(i)
        file["mask/train"] = np.array([f"demo_{i}".encode() for i in range(count - 1)])
        file["mask/valid"] = np.array([f"demo_{count - 1}".encode()])
    return path


def npz(root: Path, count: int = 4, **more) -> Path:
    """Write a file per episode with the documented keys."""
    root.mkdir(parents=True)
    for i in range(count):
        arrays = {
            "action": numbers(i, 7),
            "observation.state": numbers(i, 7),
            "image_primary": frames(i),
            "language_instruction": f"do {i}",
            "success": True,
            "control_hz": 10.0,
        }
        np.savez(root / f"episode_{i}.npz", **arrays | more)
    return root


def video(path: Path, pictures: np.ndarray, fps: float = FPS, **options) -> None:
    """Write a small mp4, or another file by the options of imageio-ffmpeg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    side = pictures.shape[1]
    writer = imageio_ffmpeg.write_frames(
        str(path), (side, side), fps=fps, macro_block_size=1, **options
    )
    writer.send(None)
    for picture in pictures:
        writer.send(np.ascontiguousarray(picture))
    writer.close()


def lerobot(
    root: Path,
    version: int,
    count: int = 4,
    *,
    images: bool = False,
    first_row: int = 0,
    repeat: int = 1,
    late: float = 0.0,
) -> Path:
    """Write LeRobot's layout 2.1 or 3.0, with videos or with images in the parquet.

    first_row: rows before it are cut, as a filter of idle steps does; the video remains.
    repeat: frames of the video per row. late: seconds added to the timestamps.
    """
    (root / "meta").mkdir(parents=True)
    camera = {"dtype": "image" if images else "video", "shape": [SIDE, SIDE, 3], "names": None}
    info = {
        "codebase_version": {2: "v2.1", 3: "v3.0"}[version],
        "fps": FPS,
        "chunks_size": 1000,
        "splits": {"train": f"0:{count}"},
        "features": {
            "action": {"dtype": "float32", "shape": [3], "names": {"motors": ["a", "b", "grip"]}},
            "observation.state": {"dtype": "float32", "shape": [3], "names": ["a", "b", "grip"]},
            "observation.images.top": camera,
            "next.done": {"dtype": "bool", "shape": [1], "names": None},
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
            "episode_index": {"dtype": "int64", "shape": [1], "names": None},
            "frame_index": {"dtype": "int64", "shape": [1], "names": None},
            "task_index": {"dtype": "int64", "shape": [1], "names": None},
        },
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    tasks = ["pick the cup", "open the drawer"]
    tables = []
    for i in range(count):
        columns = {
            "action": numbers(i, 3).tolist(),
            "observation.state": numbers(i, 3).tolist(),
            "next.done": [False] * (STEPS - 1) + [True],
            "timestamp": [np.float32(t / FPS + late) for t in range(STEPS)],
            "episode_index": [i] * STEPS,
            "frame_index": list(range(STEPS)),
            "task_index": [i % 2] * STEPS,
        }
        if images:
            columns["observation.images.top"] = [{"bytes": b, "path": ""} for b in jpegs(i)]
        tables.append(pa.table(columns).slice(first_row))
    (_write_v2 if version == 2 else _write_v3)(root, tables, tasks, 0 if images else repeat)
    return root


def _write_v2(root: Path, tables: list[pa.Table], tasks: list[str], repeat: int) -> None:
    lines = [json.dumps({"task_index": i, "task": t}) for i, t in enumerate(tasks)]
    (root / "meta/tasks.jsonl").write_text("\n".join(lines))
    rows = [{"episode_index": i, "length": len(table)} for i, table in enumerate(tables)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "data/chunk-000").mkdir(parents=True)
    for i, table in enumerate(tables):
        pq.write_table(table, root / f"data/chunk-000/episode_{i:06d}.parquet")
        if repeat:
            path = root / f"videos/chunk-000/observation.images.top/episode_{i:06d}.mp4"
            video(path, np.repeat(frames(i), repeat, 0), FPS * repeat)


def _write_v3(root: Path, tables: list[pa.Table], tasks: list[str], repeat: int) -> None:
    """Two episodes per file, their videos one behind the other."""
    pq.write_table(
        pa.table({"task_index": [0, 1], "__index_level_0__": tasks}), root / "meta/tasks.parquet"
    )
    rows, key = [], "observation.images.top"
    for i in range(len(tables)):
        rows.append(
            {
                "episode_index": i,
                "length": len(tables[i]),
                "data/chunk_index": 0,
                "data/file_index": i // 2,
                f"videos/{key}/chunk_index": 0,
                f"videos/{key}/file_index": i // 2,
                f"videos/{key}/from_timestamp": (i % 2) * STEPS / FPS,
                f"videos/{key}/to_timestamp": (i % 2 + 1) * STEPS / FPS,
                "stats/action/max": 1.0,
            }
        )
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    (root / "data/chunk-000").mkdir(parents=True)
    for i in range(0, len(tables), 2):
        both = pa.concat_tables(tables[i : i + 2])
        pq.write_table(both, root / f"data/chunk-000/file-{i // 2:03d}.parquet")
        if repeat:
            pictures = np.concatenate([frames(e) for e in range(i, min(i + 2, len(tables)))])
            path = root / f"videos/{key}/chunk-000/file-{i // 2:03d}.mp4"
            video(path, np.repeat(pictures, repeat, 0), FPS * repeat)
