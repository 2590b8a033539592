"""Demonstrations by scripted experts: which episodes there will be, and recording them by shards.

A shard is what one worker does at a time. Its content depends on the plan alone, so any number of
workers, in any order, make the same dataset. Seeds: training counts from 0, validation from
500,000, evaluation from 1,000,000 (octolike.evaluation.suites); an episode has `TRIES` seeds of its
own, and where the expert fails with one the next is tried, so that a skill gets exactly as many
demonstrations as asked for.
"""

from __future__ import annotations

import functools
import queue
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from octolike.config import CollectConfig, ConfigError
from octolike.envs import environment
from octolike.envs.pool import CallCommand, EnvCrash, EnvPool
from octolike.envs.registry import choose_names, environment_of, kind_of, make_env, simulator

TRIES = 8
FIRST_SEEDS = {"train": 0, "val": 500_000}
LAST_SEED = 1_000_000


@dataclass(frozen=True)
class DemonstrationShard:
    """Episodes of one file: `episodes` are (skill, first seed), `index` of `total` in `split`."""

    split: str
    index: int
    total: int
    episodes: tuple[tuple[str, int], ...]


def plan(environment: Mapping[str, Any], collect: CollectConfig) -> list[DemonstrationShard]:
    """Return the shards of a dataset, skills well mixed.

    Raises ConfigError for skills or a split that are unknown, or that have no task in common.
    """
    if not collect.skills or min(collect.skills.values()) < 1:
        raise ConfigError(
            f"collect.skills is {collect.skills}; expected skill: at least one episode"
        )
    row = simulator(kind_of(environment))
    choose_names("skill", tuple(collect.skills), row.load("skills"))
    choose_names("split", (collect.split,), row.load("splits"))
    for skill in collect.skills:
        if not row.load("tasks_of")(collect.split, (skill,)):
            raise ConfigError(f"collect.split {collect.split!r} has no task of skill {skill!r}")
    counts = {
        "train": collect.skills,
        "val": {s: _validation(n, collect.validation_share) for s, n in collect.skills.items()},
    }
    shards = []
    for split, skills in counts.items():
        names = np.repeat(list(skills), list(skills.values()))
        names = np.random.default_rng(len(names)).permutation(names)
        end = FIRST_SEEDS[split] + TRIES * len(names)
        if end > (FIRST_SEEDS["val"] if split == "train" else LAST_SEED):
            raise ConfigError(f"{len(names)} {split} episodes need more seeds than are set aside")
        episodes = [(str(s), FIRST_SEEDS[split] + TRIES * i) for i, s in enumerate(names)]
        parts = [
            tuple(episodes[i : i + collect.episodes_per_shard])
            for i in range(0, len(episodes), collect.episodes_per_shard)
        ]
        shards += [DemonstrationShard(split, i, len(parts), part) for i, part in enumerate(parts)]
    return shards


def settings(environment: Mapping[str, Any], collect: CollectConfig) -> dict[str, Any]:
    """Return what the demonstrations depend on: to go on with others would mix two datasets."""
    names = ("skills", "validation_share", "noise", "episodes_per_shard")
    own = {"split": collect.split} if collect.split != "train" else {}
    robot = {"environment": environment_of(environment, collect.dataset)}
    return robot | {n: getattr(collect, n) for n in names} | own


class Recorder:
    """Records demonstrations in a worker process, away from the tensorflow that writes them."""

    def __init__(self, environment: Mapping[str, Any], collect: CollectConfig) -> None:
        """Prepare; the simulator starts with the first episode."""
        self._collect_episode = simulator(kind_of(environment)).load("collect_episode")
        self._noise, self._split = collect.noise, collect.split
        robot = environment_of(environment, collect.dataset)
        self._pool = EnvPool(functools.partial(make_env, robot), slots=1, workers=1)

    def record(self, shard: DemonstrationShard) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield (episode dict, failed tries before it) for each episode of a shard.

        Raises RuntimeError when the simulator crashes, or when the expert fails with all of an
        episode's seeds.
        """
        for skill, first in shard.episodes:
            for failed in range(TRIES):
                episode = self._one(skill, first + failed)
                if episode["episode_metadata"]["success"]:
                    yield episode, failed
                    break
            else:
                raise RuntimeError(
                    f"the expert for {skill!r} failed with seeds {first} to {first + TRIES - 1}, "
                    f"noise {self._noise}; lower collect.noise or mend the expert"
                )

    def _one(self, skill: str, seed: int) -> dict[str, Any]:
        call = CallCommand(self._collect_episode, (seed, self._split, [skill], self._noise))
        episode = self._pool.run({0: call})[0]
        if isinstance(episode, EnvCrash):
            raise RuntimeError(f"the simulator crashed at {skill!r}, seed {seed}:\n{episode.text}")
        return episode


class RecorderPool:
    """Several recorders at work on shards, one each; `record` may be called from any thread."""

    def __init__(
        self, environment: Mapping[str, Any], collect: CollectConfig, workers: int
    ) -> None:
        """Prepare so many; their simulators start with their first episodes."""
        self._free: queue.SimpleQueue[Recorder] = queue.SimpleQueue()
        for _ in range(workers):
            self._free.put(Recorder(environment, collect))

    def record(self, shard: DemonstrationShard) -> list[tuple[dict[str, Any], int]]:
        """Return what `Recorder.record` yields, by the next one that is free."""
        recorder = self._free.get()
        try:
            return list(recorder.record(shard))
        finally:
            self._free.put(recorder)


def tabletop_episode(
    env: Any, seed: int, split: str, skills: list[str], noise: float
) -> dict[str, Any]:
    """Record one demonstration on the table; noise 0.5 is the simulator's default, 0 none."""
    from octolike.envs.tabletop import ExpertNoise, collect_episode

    return collect_episode(env, seed, split, skills, ExpertNoise(share=noise, kicks=noise / 10))


def tabletop_goal(env: Any, seed: int, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the cameras' pictures, uint8 [h, w, 3], at the end of the expert's own episode.

    The environment is left at that end: reset it before the policy's turn.
    """
    from octolike.envs.tabletop.tabletop_expert import NO_NOISE, collect_episode

    episode = collect_episode(env.unwrapped, seed, options["split"], options["skills"], NO_NOISE)
    return environment.last_pictures(episode)


def _validation(episodes: int, share: float) -> int:
    return max(1, round(episodes * share)) if share else 0
