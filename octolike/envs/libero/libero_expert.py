"""Scripted experts for LIBERO's tasks, and demonstrations in the layout of the public conversions.

An expert is a generator of hand targets (`libero_skills`); a servo turns the present target into an
action. Demonstrations start from arrangements drawn from a task's regions, never from one of the
benchmark's initial states. The rollout renders nothing; only the steps of a success are rendered,
from stored joint positions (`libero_sim.LazyCameras`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from octolike.envs.libero.libero_env import LiberoEnv, proprio
from octolike.envs.libero.libero_scene import Scene
from octolike.envs.libero.libero_skills import Target, plan

MOVE_SCALE, TURN_SCALE = 0.05, 0.5  # metres, radians: of an action of 1
DEVIATION = np.array([0.15] * 3 + [0.05] * 3)  # of executed actions, per unit of noise
KICK, KICK_STEPS = 0.7, 4  # size and length of a push away from the path
KICK_SHARE = 0.03  # of the steps without a grasp begin a kick, per unit of noise
IDLE = 1e-4  # the public conversions leave out steps with smaller moves and an unchanged gripper
_GAIN = 1.5


def collect_episode(
    env: LiberoEnv, seed: int, split: str, skills: Sequence[str], noise: float
) -> dict[str, Any]:
    """Record one demonstration; the caller drops those with `success` False, which have no images.

    The label `action` is the expert's action in each visited state; `executed_action` is the label
    plus noise. Both as the public conversions store them: the gripper is -1 to open and 1 to close.
    Steps with an idle label are neither executed nor recorded, whatever noise they would have had.

    Returns:
        {"steps": {"observation": {"image", "wrist_image": uint8 [T, h, w, 3], "state": float32
        [T, 8], "joint_state": float32 [T, 7]}, "action": float32 [T, 7], "executed_action": float32
        [T, 7], "language_instruction": str}, "episode_metadata": {"file_path": str, "seed": int,
        "task": str, "skill": str, "split": str, "success": bool, "idle": int}}
    """
    env.reset(seed=seed, options={"split": split, "skills": list(skills)})
    rng = np.random.default_rng([seed, 1])
    frames, states, joints = [], [], []
    labels: list[np.ndarray] = []
    executed: list[np.ndarray] = []
    scene, idle, kick, push = Scene(env.sim.env), 0, 0, np.zeros(6)
    info: dict[str, Any] = {"success": False}
    for target in plan(scene, rng, noise):
        label = servo(scene, target)
        if kick == 0 and not target.is_delicate and rng.random() < KICK_SHARE * noise:
            kick, push = KICK_STEPS, np.append(rng.uniform(-KICK, KICK, 3), np.zeros(3))
        action = label.copy()
        action[:6] += rng.normal(scale=DEVIATION * noise * (0.3 if target.is_delicate else 1))
        action[:6] += push * (kick > 0)
        action = np.clip(action, -1, 1).astype(np.float32)
        kick = max(kick - 1, 0)
        if is_idle(label, labels[-1] if labels else None):
            idle += 1
            continue
        frames.append(env.sim.frame())
        states.append(proprio(env.sim.raw))
        joints.append(np.asarray(env.sim.raw["robot0_joint_pos"], np.float32))
        labels.append(label.astype(np.float32))
        executed.append(action)
        *_, terminated, truncated, info = env.act(to_env(action))
        if terminated or truncated:
            break
    metadata = {
        "file_path": f"octolike/{split}/{env.skill}/{seed}",
        "seed": int(seed),
        "task": env.skill,
        "skill": env.skill,
        "split": split,
        "success": bool(info["success"]),
        "idle": idle,
    }
    if not info["success"]:
        return {"steps": {}, "episode_metadata": metadata}
    images = [env.images(frame) for frame in frames]
    observation = {
        "image": np.stack([x["image_primary"] for x in images]),
        "wrist_image": np.stack([x["image_wrist"] for x in images]),
        "state": np.stack(states),
        "joint_state": np.stack(joints),
    }
    steps = {
        "observation": observation,
        "action": np.stack(labels),
        "executed_action": np.stack(executed),
        "language_instruction": env.instruction,
    }
    return {"steps": steps, "episode_metadata": metadata}


def goal(env: Any, seed: int, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the cameras' images, uint8 [h, w, 3], at the end of the expert's episode.

    The environment stays in that state: reset it before the policy's episode. RuntimeError if the
    expert fails.
    """
    inner = env.unwrapped
    episode = collect_episode(inner, seed, options["split"], options["skills"], 0.0)
    if not episode["episode_metadata"]["success"]:
        raise RuntimeError(f"the expert cannot finish {options['skills']} with seed {seed}")
    observation = episode["steps"]["observation"]
    return {
        "image_primary": observation["image"][-1],
        "image_wrist": observation["wrist_image"][-1],
    }


def servo(scene: Scene, target: Target) -> np.ndarray:
    """Return the action towards a target: float64 [7], the gripper -1 to open, 1 to close."""
    position, rotation = scene.hand()
    move = _GAIN * (target.position - position) / MOVE_SCALE
    move *= target.speed / max(float(np.abs(move).max()), target.speed)
    turn = Rotation.from_matrix(target.rotation @ rotation.T).as_rotvec()
    turn = np.clip(_GAIN * turn / TURN_SCALE, -0.5, 0.5)
    return np.concatenate([move, turn, [1.0 if target.is_closed else -1.0]])


def is_idle(label: np.ndarray, previous: np.ndarray | None) -> bool:
    """Return whether the public conversions leave out a step with this label.

    previous: the label of the last recorded step; None before the first, whose gripper then does
    not count.
    """
    is_unchanged = previous is None or label[6] == previous[6]
    return bool(np.linalg.norm(label[:6]) < IDLE and is_unchanged)


def to_env(action: np.ndarray) -> np.ndarray:
    """Return a stored action as LiberoEnv takes it: 1 opens the gripper, 0 closes it."""
    return np.append(action[:6], (1 - action[6]) / 2)
