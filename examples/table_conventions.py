"""One table, six robots: the same demonstrations in other units, as a lab would have recorded them.

    octolike collect --config representations
    python examples/table_conventions.py record percent DATASET recordings
        DATASET: runs/representations/data/tabletop
    octolike convert --source recordings --target data --name table_percent --hz 5
        --field action=command --field state=arm/state
        --field table=camera/table --field wrist=camera/hand       (not for the convention trimmed)
    octolike inspect_data data/table_percent                       writes table_percent.py
    octolike train --config representations --config.data.specs=table_percent.py
        --config.data.mix=table_percent --config.data.root=data --config.data.tasks=instruction
        --config.workdir=runs/percent
    octolike check_policy runs/percent
    python examples/table_conventions.py act percent runs/percent --episodes 50
    python examples/table_conventions.py compare original=… percent=…    the files that act writes,
        several of one convention with commas in between: further seeds of training

Conventions: original; metres, percent (of the gripper: its width in metres, or 0 to 100); joints
(targets of the table's six joints in place of changes; inspect_data recommends
--config.data.representation=delta for them); degrees; trimmed (LeRobot 3.0: videos with idle frames
at the start of each episode, without rows). The driver undoes them, so a policy should
succeed as often as that of the original. `act` plays the same scenes for every run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from octolike.evaluation.statistics import OutcomeGrid

SKILLS = ("touch", "lift")
HZ, IDLE = 5, 4  # rows per second; idle frames in front of each trimmed episode
EPISODES_PER_VIDEO = 50
WIDTH = 0.08  # metres between the open fingers
FIRST_SEED = 1_000_000  # as octolike evaluate


class Convention(NamedTuple):
    """The robot's convention, relative to the table's.

    scale: factor on the table's numbers in commands and states, for x y z roll pitch yaw gripper.
    targets: commands are targets, not changes.
    """

    scale: np.ndarray = np.ones(7)
    targets: bool = False

    def command(self, action: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Return the robot's commands of the table's actions [..., 7] at its states [..., 7]."""
        moved = action + state * np.array([self.targets] * 6 + [False])
        return (moved * self.scale).astype(np.float32)

    def action(self, command: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Return the table's actions of the robot's commands: the inverse of `command`."""
        moved = command / self.scale - state * np.array([self.targets] * 6 + [False])
        return moved.astype(np.float32)

    def state(self, state: np.ndarray) -> np.ndarray:
        """Return the robot's states of the table's."""
        return (state * self.scale).astype(np.float32)


def _scaled(dims: slice, factor: float) -> np.ndarray:
    scale = np.ones(7)
    scale[dims] = factor
    return scale


GRIPPER, ANGLES = slice(6, 7), slice(3, 6)
CONVENTIONS = {
    "original": Convention(),
    "metres": Convention(_scaled(GRIPPER, WIDTH)),
    "percent": Convention(_scaled(GRIPPER, 100)),
    "joints": Convention(targets=True),
    "degrees": Convention(_scaled(ANGLES, 180 / np.pi)),
    "trimmed": Convention(),
}


class Demonstration(NamedTuple):
    """Commands and states float32 [T, 7] of a robot, pictures {camera: uint8 [T, h, w, 3]}."""

    command: np.ndarray
    state: np.ndarray
    pictures: dict[str, np.ndarray]
    instruction: str


def demonstrations(dataset: Path, convention: Convention) -> Iterator[Demonstration]:
    """Yield the demonstrations of octolike collect in a robot's convention."""
    import tensorflow_datasets as tfds  # not in act: rendering and tensorflow exclude each other

    directory = max(p for p in (dataset, *dataset.glob("*")) if (p / "features.json").is_file())
    for episode in tfds.builder_from_directory(directory).as_dataset("train"):
        steps = list(episode["steps"].as_numpy_iterator())
        observations = [s["observation"] for s in steps]
        action, state = (
            np.stack(x) for x in ([s["action"] for s in steps], [o["state"] for o in observations])
        )
        pictures = {
            name: np.stack([o[key] for o in observations])
            for name, key in (("table", "image_primary"), ("hand", "image_wrist"))
        }
        text = steps[0]["language_instruction"].decode()
        yield Demonstration(
            convention.command(action, state), convention.state(state), pictures, text
        )


def write_hdf5(folder: Path, episodes: Iterator[Demonstration]) -> int:
    """Write one HDF5 file in a layout that no converter knows; return the number of episodes."""
    import h5py

    folder.mkdir(parents=True)
    count = 0
    with h5py.File(folder / "session.hdf5", "w") as file:
        for count, d in enumerate(episodes, 1):
            run = file.create_group(f"run_{count - 1}")
            run.attrs["language_instruction"] = d.instruction
            run["command"], run["arm/state"] = d.command, d.state
            for name, pictures in d.pictures.items():
                run[f"camera/{name}"] = pictures
    return count


def write_lerobot(folder: Path, episodes: Iterator[Demonstration]) -> int:
    """Write LeRobot 3.0 with videos that start with idle frames without rows."""
    import imageio_ffmpeg
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: dict[str, list[Any]] = {k: [] for k in _columns()}
    meta: list[dict[str, Any]] = []
    tasks: dict[str, int] = {}
    writers: dict[str, Any] = {}
    clock = dict.fromkeys(("table", "wrist"), 0)
    shapes: dict[str, list[int]] = {}
    for index, d in enumerate(episodes):
        number = index // EPISODES_PER_VIDEO
        row: dict[str, Any] = {
            "episode_index": index,
            "tasks": [d.instruction],
            "length": len(d.command),
            "data/chunk_index": 0,
            "data/file_index": 0,
        }
        for name, pictures in zip(("table", "wrist"), d.pictures.values(), strict=True):
            key = f"observation.images.{name}"
            path = folder / f"videos/{key}/chunk-000/file-{number:03d}.mp4"
            if not path.exists():
                if name in writers:
                    writers[name].close()
                path.parent.mkdir(parents=True, exist_ok=True)
                shapes[name], clock[name] = list(pictures.shape[1:]), 0
                writers[name] = imageio_ffmpeg.write_frames(
                    str(path), pictures.shape[2:0:-1], fps=HZ, macro_block_size=1, quality=9
                )
                writers[name].send(None)
            frames = np.concatenate([np.repeat(pictures[-1:], IDLE, 0), pictures])
            for frame in frames:
                writers[name].send(np.ascontiguousarray(frame))
            row |= {
                f"videos/{key}/chunk_index": 0,
                f"videos/{key}/file_index": number,
                f"videos/{key}/from_timestamp": clock[name] / HZ,
                f"videos/{key}/to_timestamp": (clock[name] + len(frames)) / HZ,
            }
            clock[name] += len(frames)
        meta.append(row)
        task, length = tasks.setdefault(d.instruction, len(tasks)), len(d.command)
        rows["action"] += list(d.command)
        rows["observation.state"] += list(d.state)
        rows["timestamp"] += list(((np.arange(length) + IDLE) / HZ).astype(np.float32))
        rows["frame_index"] += range(length)
        rows["episode_index"] += [index] * length
        rows["task_index"] += [task] * length
    for writer in writers.values():
        writer.close()
    features = {k: {"dtype": d, "shape": [n], "names": None} for k, (d, n) in _columns().items()}
    for name, shape in shapes.items():
        features[f"observation.images.{name}"] = {"dtype": "video", "shape": shape, "names": None}
    info = {"codebase_version": "v3.0", "fps": HZ, "chunks_size": 1000, "features": features}
    for part in ("meta/episodes/chunk-000", "data/chunk-000"):
        (folder / part).mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    table = pa.table({"task_index": list(tasks.values()), "task": list(tasks)})
    pq.write_table(table, folder / "meta/tasks.parquet")
    pq.write_table(pa.Table.from_pylist(meta), folder / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(pa.table(rows), folder / "data/chunk-000/file-000.parquet")
    return len(meta)


def _columns() -> dict[str, tuple[str, int]]:
    return {
        "action": ("float32", 7),
        "observation.state": ("float32", 7),
        "timestamp": ("float32", 1),
        "frame_index": ("int64", 1),
        "episode_index": ("int64", 1),
        "task_index": ("int64", 1),
    }


def act(convention: Convention, run: str, episodes: int, execute: int = 2) -> list[dict[str, Any]]:
    """Play the run's policy through the robot's driver; return a row per episode."""
    from octolike.envs.registry import make_env
    from octolike.policy import Policy

    policy = Policy.load(run)
    env = make_env({"kind": "tabletop", "primary_size": 64, "wrist_size": 48})
    cameras = {"image_primary": "image_primary", "image_wrist": "image_wrist"}
    rows = []
    for seed in range(FIRST_SEED, FIRST_SEED + episodes):
        for skill in SKILLS:
            options = {"split": "train", "skills": [skill]}
            observation, info = env.reset(seed=seed, options=options)
            task, ended, t = policy.create_task(instruction=info["instruction"]), False, 0
            while not ended:
                inputs = {k: observation[v] for k, v in cameras.items()}
                inputs["proprio"] = convention.state(observation["proprio"])
                for command in policy.sample_actions(inputs, task, seed=1000 * seed + t)[:execute]:
                    action = convention.action(command, observation["proprio"])
                    observation, _, done, late, info = env.step(action)
                    ended, t = done or late, t + 1
                    if ended:
                        break
            rows.append({"skill": skill, "seed": seed, "success": bool(info["success"])})
    return rows


def read_results(files: str) -> OutcomeGrid:
    """Return the outcomes of the files (with commas in between), one seed of training each."""
    from octolike.evaluation.statistics import OutcomeGrid

    seeds = [
        {(row["skill"], row["seed"]): row["success"] for row in json.loads(Path(file).read_text())}
        for file in files.split(",")
    ]
    return OutcomeGrid.from_seeds(seeds, {layout: layout[0] for seed in seeds for layout in seed})


def compare(results: dict[str, OutcomeGrid]) -> Iterator[str]:
    """Yield a line per convention: its success, and its difference to that of the first one.

    The last line names the number of differences that the p-values are adjusted for.
    """
    from octolike.evaluation.statistics import (
        holm,
        left_out_note,
        paired_difference,
        recipe_rate,
        seed_effect,
    )

    first, effect = next(iter(results.values())), seed_effect(results.values())
    differences = {
        name: paired_difference(grid, first, effect)
        for name, grid in results.items()
        if grid is not first
    }
    adjusted = dict(zip(differences, holm([d.p for d in differences.values()]), strict=True))
    for name, grid in results.items():
        rate, low, high = recipe_rate(grid, effect)
        skills = np.array(grid.strata)
        per_skill = ", ".join(f"{s} {grid.outcomes[:, skills == s].mean():.0%}" for s in SKILLS)
        line = f"{name}: {rate:.0%} [{low:.0%}, {high:.0%}] of {grid.outcomes.size} ({per_skill})"
        if d := differences.get(name):
            line += f"; difference {d.value:+.0%} [{d.low:+.0%}, {d.high:+.0%}], "
            line += f"adjusted p {adjusted[name]:.2g}, {d.method}"
            line += f"; {left_out_note(d.left_out)}" if d.left_out else ""
        yield line
    if differences:
        yield f"p adjusted for the whole table (Holm over {len(differences)} differences)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("record", "act"):
        sub = commands.add_parser(name)
        sub.add_argument("convention", choices=CONVENTIONS)
        sub.add_argument("source", type=Path, help="a dataset, or a run")
        if name == "record":
            sub.add_argument("folder", type=Path)
        else:
            sub.add_argument("--episodes", type=int, default=50, help="scenes per skill")
    commands.add_parser("compare").add_argument("files", nargs="+", help="name=a.json,b.json")
    args = parser.parse_args(arguments)
    if args.command == "compare":
        pairs = [text.split("=", 1) for text in args.files]
        print(*compare({name: read_results(files) for name, files in pairs}), sep="\n")
        return
    convention = CONVENTIONS[args.convention]
    if args.command == "record":
        write: Callable[..., int] = write_lerobot if args.convention == "trimmed" else write_hdf5
        count = write(args.folder, demonstrations(args.source, convention))
        print(f"{count} episodes in {args.folder}")
        return
    rows = act(convention, str(args.source), args.episodes)
    path = args.source / "table_conventions.json"
    path.write_text(json.dumps(rows))
    print(*compare({args.convention: read_results(str(path))}), path, sep="\n")


if __name__ == "__main__":
    main()
