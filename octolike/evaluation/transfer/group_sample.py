"""Groups to compare: a group is a dataset or a task, represented by steps of its episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

MIN_EPISODES = 4


@dataclass(frozen=True)
class GroupTraits:
    """The traits of a dataset spec that decide whether data can be shared."""

    action: tuple[str, ...]
    units: tuple[str, ...]
    absolute: tuple[bool, ...]
    proprio: tuple[str, ...]
    cameras: tuple[str, ...]
    control_hz: float
    gripper: str
    robot: str
    end_effector: str


@dataclass(frozen=True, eq=False)
class GroupSample:
    """n steps of a group.

    action: float [n, A], proprio: float [n, P] or None, both in robot units; images: float
    [n, s, s, 3] in 0 to 1, or None; episode: int [n]; instruction, task: str [n], "" for none.
    """

    name: str
    traits: GroupTraits
    action: np.ndarray
    proprio: np.ndarray | None
    images: np.ndarray | None
    episode: np.ndarray
    instruction: np.ndarray
    task: np.ndarray

    def __len__(self) -> int:
        return len(self.action)

    @property
    def is_second_half(self) -> np.ndarray:
        """Mask [n]: True for the steps of every other episode."""
        return np.unique(self.episode, return_inverse=True)[1] % 2 == 1

    def take(self, index: np.ndarray) -> GroupSample:
        """Return a selection of the steps, by indices or by a mask."""
        names = ("action", "proprio", "images", "episode", "instruction", "task")
        arrays = {name: getattr(self, name) for name in names}
        selected: dict[str, Any] = {k: x[index] for k, x in arrays.items() if x is not None}
        return replace(self, **selected)

    def halves(self) -> tuple[GroupSample, GroupSample]:
        """Return two samples with alternating episodes."""
        return self.take(~self.is_second_half), self.take(self.is_second_half)


def traits_of(spec: Any) -> GroupTraits:
    """Return the traits of a dataset spec (octolike.data.specs.spec.DatasetSpec)."""
    return GroupTraits(
        action=tuple(spec.action.names),
        units=tuple(spec.action.units),
        absolute=tuple(spec.action.absolute),
        proprio=tuple(spec.proprio.names) if spec.proprio else (),
        cameras=tuple(spec.cameras),
        control_hz=spec.control_hz,
        gripper=spec.gripper,
        robot=spec.robot,
        end_effector=spec.end_effector,
    )


def group_samples(
    excerpts: Sequence[tuple[Any, Sequence[Any]]], max_tasks: int = 12
) -> list[GroupSample]:
    """Return a sample per dataset; of a single dataset, a sample per task, most frequent first.

    Args:
        excerpts: specs and episodes of each (octolike.data.pipeline.decoded_episodes).
        max_tasks: number of tasks of a single dataset. A task is an episode's label up to the
            first "/", or else its instruction.

    Raises:
        ValueError: fewer than two groups.
    """
    if len(excerpts) > 1:
        return [group_sample(spec.name, spec, episodes) for spec, episodes in excerpts]
    spec, episodes = excerpts[0]
    tasks: dict[str, list[Any]] = {}
    for e in episodes:
        tasks.setdefault(e.label.partition("/")[0] or e.instruction, []).append(e)
    counts = {task: len(x) for task, x in tasks.items() if task and len(x) >= MIN_EPISODES}
    names = sorted(counts, key=lambda task: -counts[task])[:max_tasks]
    if len(names) < 2:
        raise ValueError(
            f"{spec.name} is one dataset, with {len(names)} tasks of at least {MIN_EPISODES} of "
            f"{len(episodes)} episodes; a comparison needs two: read more --episodes"
        )
    return [group_sample(name, spec, tasks[name]) for name in names]


def group_sample(name: str, spec: Any, episodes: Sequence[Any]) -> GroupSample:
    """Return the steps of a group's episodes; images and proprio only if all episodes have them."""
    lengths = [len(e.action) for e in episodes]
    camera = next(iter(episodes[0].images), None) if episodes else None
    has_images = all(camera in e.images for e in episodes)
    has_proprio = all(e.proprio is not None for e in episodes)
    images = [e.images[camera] for e in episodes] if has_images else []
    return GroupSample(
        name=name,
        traits=traits_of(spec),
        action=np.concatenate([e.action for e in episodes]),
        proprio=np.concatenate([e.proprio for e in episodes]) if has_proprio else None,
        images=np.concatenate(images) / np.float32(255) if has_images else None,
        episode=np.repeat(np.arange(len(episodes)), lengths),
        instruction=np.repeat([e.instruction for e in episodes], lengths),
        task=np.repeat([e.label for e in episodes], lengths),
    )
