"""A robot with recordings in a layout of its own: record them, and act with the finetuned policy.

    python examples/your_robot.py record recordings
    python examples/your_robot.py act runs/mine

The commands in between are in docs/your_robot.md. Replace `Arm` by the driver of your robot.
"""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np

from octolike.policy import Policy

JOINTS, SIDE = 4, 64


class Arm:
    """A stand-in for the driver of a robot: joints that follow their targets, and a camera."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.joints = self._rng.uniform(-1, 1, JOINTS).astype(np.float32)

    def picture(self) -> np.ndarray:
        """Return the camera's picture, uint8 [h, w, 3]: a mark at the place of two joints."""
        picture = np.full((SIDE, SIDE, 3), 30, np.uint8)
        row, column = ((self.joints[:2] + 1.5) / 3 * (SIDE - 8)).astype(int)
        picture[row : row + 8, column : column + 8] = (200, 60, 60)
        return picture

    def command(self, target: np.ndarray) -> None:
        """Move towards the target, radians."""
        self.joints = self.joints + 0.5 * (np.asarray(target, np.float32) - self.joints)


def record(folder: Path, episodes: int = 8, steps: int = 20) -> None:
    """Write one HDF5 file of several episodes, in a layout that no converter knows."""
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "session.hdf5", "w") as file:
        for i in range(episodes):
            arm, rows = Arm(i), []
            for _ in range(steps):
                target = 0.8 * arm.joints
                rows.append((target, arm.joints, arm.picture()))
                arm.command(target)
            targets, joints, pictures = (np.stack(x) for x in zip(*rows, strict=True))
            file[f"run_{i}/command/joints"] = targets
            file[f"run_{i}/robot/joints"] = joints
            file[f"run_{i}/camera/front"] = pictures
            file[f"run_{i}/camera/intrinsics"] = np.eye(3)


def act(run: str, steps: int = 10) -> np.ndarray:
    """Execute a run's policy on the arm; return the commands, float32 [steps, JOINTS]."""
    policy = Policy.load(run)
    task = policy.create_task(instruction="reach the mark")
    arm, commands = Arm(seed=100), []
    while len(commands) < steps:
        observation = dict.fromkeys(policy.observation_keys)  # None: a sensor this robot lacks
        observation |= {"image_primary": arm.picture(), "proprio": arm.joints}
        chunk = policy.sample_actions(observation, task, seed=len(commands))
        for target in chunk[:2]:  # then look again
            arm.command(target)
            commands.append(target)
            print(f"step {len(commands)}: {np.round(target, 3)}", flush=True)
    return np.stack(commands[:steps])


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "act"):
        sys.exit("usage: your_robot.py record FOLDER | act RUN")
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]))
    else:
        act(sys.argv[2])
