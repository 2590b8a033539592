"""Demonstrations by scripted experts: the plan of episodes, and recording them shard by shard.

A shard is one worker's unit of work. Its content depends on the plan alone, so the dataset is the
same for any number and order of workers. Seeds: training starts at 0, validation at 500,000,
evaluation at 1,000,000 (octolike.evaluation.suites); `collect.draw` starts 50,000 seeds later per
draw, 100,000 with more than 6,250 episodes, and so on. An episode owns `TRIES` seeds: if the expert
fails with one, the next is tried; if it fails with all of them, the episode is left out. So a skill
gets the requested number of demonstrations, or fewer. A seed at which the simulator crashes twice
is skipped and counted; if it would not crash again, another collection has another demonstration in
its place.
"""

from __future__ import annotations

import collections
import functools
import math
import queue
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from octolike.config import CollectConfig, ConfigError
from octolike.envs.pool import EPISODE_LIMIT, CallCommand, EnvCrash, EnvPool, default_workers
from octolike.envs.registry import choose_names, environment_of, kind_of, make_env, simulator
from octolike.progress import progress
from octolike.tables import text_table

TRIES = 8
ATTEMPTS = 2  # at a seed whose simulator crashes
MAX_CRASHED = 3  # seeds of one episode: more suggest that the simulator does not work here at all
FIRST_SEEDS = {"train": 0, "val": 500_000}
LAST_SEED = 1_000_000
SEEDS_PER_DRAW = 50_000


@dataclass(frozen=True)
class DemonstrationShard:
    """The episodes of one file: (skill, first seed) each; file `index` of `total` in `split`."""

    split: str
    index: int
    total: int
    episodes: tuple[tuple[str, int], ...]


class Recorded(NamedTuple):
    """A planned episode.

    Attributes:
        skill: the skill.
        episode: the demonstration; None if the expert failed with all seeds.
        failed: number of failed tries.
        crashed: number of seeds skipped because the simulator crashed.
    """

    skill: str
    episode: dict[str, Any] | None
    failed: int
    crashed: int = 0


class ShardStore(Protocol):
    """Where shards are written; octolike.data has one of RLDS files and one of arrays."""

    def shard_note(self, split: str, index: int) -> Mapping[str, Any] | None:
        """Return what `write` stored with a shard; None for a shard that is not written."""

    def write(
        self,
        split: str,
        index: int,
        episodes: Iterable[Mapping[str, Any]],
        *,
        may_be_empty: bool = False,
        **notes: Any,
    ) -> int:
        """Write the episodes of a shard, perhaps none, and plain values as its note."""


class Yield(NamedTuple):
    """Numbers of planned and recorded demonstrations, failed tries, and seeds with crashes."""

    planned: int
    recorded: int
    failed: int
    crashed: int = 0


def plan(environment: Mapping[str, Any], collect: CollectConfig) -> list[DemonstrationShard]:
    """Return the shards of a dataset, with the skills shuffled.

    Raises:
        ConfigError: a skill or split is unknown, or the split has no task of a skill.
    """
    if not collect.skills or min(collect.skills.values()) < 1:
        raise ConfigError(
            f"collect.skills is {collect.skills}; expected skill: at least one episode"
        )
    parts = simulator(kind_of(environment))
    choose_names("skill", tuple(collect.skills), parts.load("skills"))
    choose_names("split", (collect.split,), parts.load("splits"))
    for skill in collect.skills:
        if not parts.load("tasks_of")(collect.split, (skill,)):
            raise ConfigError(f"collect.split {collect.split!r} has no task of skill {skill!r}")
    counts = {
        "train": collect.skills,
        "val": {
            skill: _validation_episodes(count, collect.validation_share)
            for skill, count in collect.skills.items()
        },
    }
    shards = []
    for split, skills in counts.items():
        names = np.repeat(list(skills), list(skills.values()))
        names = np.random.default_rng(len(names)).permutation(names)
        start = _first_seed(collect, split, len(names))
        episodes = [(str(s), start + TRIES * i) for i, s in enumerate(names)]
        groups = [
            tuple(episodes[i : i + collect.episodes_per_shard])
            for i in range(0, len(episodes), collect.episodes_per_shard)
        ]
        shards += [DemonstrationShard(split, i, len(groups), g) for i, g in enumerate(groups)]
    return shards


def _first_seed(collect: CollectConfig, split: str, episodes: int) -> int:
    """Return the seed of a split's first episode; ConfigError if its episodes need too many."""
    first = FIRST_SEEDS[split]
    reserved = (FIRST_SEEDS["val"] if split == "train" else LAST_SEED) - first
    per_draw = SEEDS_PER_DRAW * math.ceil(TRIES * episodes / SEEDS_PER_DRAW)
    if per_draw * (collect.draw + 1) > reserved:
        largest = SEEDS_PER_DRAW * (reserved // (collect.draw + 1) // SEEDS_PER_DRAW)
        raise ConfigError(
            f"{episodes} {split} episodes of collect.draw={collect.draw} need more seeds than are "
            f"reserved; expected at most {largest // TRIES}"
        )
    return first + per_draw * collect.draw


def settings(environment: Mapping[str, Any], collect: CollectConfig) -> dict[str, Any]:
    """Return the settings that determine the demonstrations; an interrupted run must match them.

    `scene_version` changes when a version of octolike draws other scenes from the same seeds, and
    `expert_version` when its expert acts otherwise.
    """
    names = ("skills", "validation_share", "noise", "episodes_per_shard")
    # Defaults are not stored, so that datasets from before these options existed still match.
    later = {"split": collect.split if collect.split != "train" else None, "draw": collect.draw}
    parts = simulator(kind_of(environment))
    for version in ("scene_version", "expert_version"):
        if getattr(parts, version):
            later[version] = parts.load(version)(tuple(collect.skills))
    later = {name: value for name, value in later.items() if value}
    robot = {"environment": environment_of(environment, collect.dataset)}
    robot["environment"].pop("bare_goal", None)  # of the evaluation alone
    return robot | {n: getattr(collect, n) for n in names} | later


class Recorder:
    """Records demonstrations in a worker process, separate from the tensorflow that writes them."""

    def __init__(self, environment: Mapping[str, Any], collect: CollectConfig) -> None:
        """Prepare; the simulator starts with the first episode."""
        self._collect_episode = simulator(kind_of(environment)).load("collect_episode")
        self._noise, self._split = collect.noise, collect.split
        robot = environment_of(environment, collect.dataset)
        self._pool = EnvPool(functools.partial(make_env, robot), slots=1, workers=1)

    def record(self, shard: DemonstrationShard) -> Iterator[Recorded]:
        """Yield each planned episode of a shard; those that are left out are printed.

        Raises:
            RuntimeError: the simulator crashes at MAX_CRASHED seeds of an episode, or cannot be
                built.
        """
        for skill, first in shard.episodes:
            yield self._record_planned(skill, first)

    def _record_planned(self, skill: str, first: int) -> Recorded:
        crashed = 0
        for tries in range(TRIES):
            episode = self._record_episode(skill, first + tries)
            if isinstance(episode, str):
                crashed += 1
                if crashed == MAX_CRASHED:
                    raise RuntimeError(f"{episode}; it crashed at {crashed} seeds of an episode")
                print(f"{episode}; this seed is skipped", file=sys.stderr)
            elif episode["episode_metadata"]["success"]:
                return Recorded(skill, episode, tries - crashed, crashed)
        crashes = f" ({crashed} crashed the simulator)" if crashed else ""
        print(
            f"the expert for {skill!r} failed with seeds {first} to {first + TRIES - 1}{crashes}, "
            f"noise {self._noise}; this demonstration is left out",
            file=sys.stderr,
        )
        return Recorded(skill, None, TRIES - crashed, crashed)

    def _record_episode(self, skill: str, seed: int) -> dict[str, Any] | str:
        """Return the episode of a seed; a sentence if the simulator crashes in each attempt."""
        arguments = (seed, self._split, [skill], self._noise)
        call = CallCommand(self._collect_episode, arguments, limit=EPISODE_LIMIT)
        for attempt in range(1, ATTEMPTS + 1):
            episode = self._pool.run({0: call})[0]
            if not isinstance(episode, EnvCrash):
                return episode
            crash = f"the simulator crashed at {skill!r}, seed {seed}: {episode.error_and_place}"
            if attempt < ATTEMPTS:
                print(f"{crash}; recording this episode again", file=sys.stderr)
        return f"{crash}, in {ATTEMPTS} attempts"


class RecorderPool:
    """Several recorders, one shard each at a time; `record` may be called from any thread."""

    def __init__(
        self, environment: Mapping[str, Any], collect: CollectConfig, workers: int
    ) -> None:
        """Prepare the recorders; their simulators start with their first episodes."""
        self._free: queue.SimpleQueue[Recorder] = queue.SimpleQueue()
        for _ in range(workers):
            self._free.put(Recorder(environment, collect))

    def record(self, shard: DemonstrationShard, on_episode: Callable[[], Any]) -> list[Recorded]:
        """Return the episodes of `Recorder.record` from the next free recorder.

        on_episode: called after each episode; a shard of LIBERO takes minutes.
        """
        recorder, recorded = self._free.get(), []
        try:
            for episode in recorder.record(shard):
                recorded.append(episode)
                on_episode()
            return recorded
        finally:
            self._free.put(recorder)


def record_missing(
    environment: Mapping[str, Any],
    collect: CollectConfig,
    shards: Sequence[DemonstrationShard],
    store: ShardStore,
) -> dict[str, Yield]:
    """Record the shards that are not in a store, in parallel, and return the yields of all."""
    missing = [s for s in shards if not store.shard_note(s.split, s.index)]
    planned, left = (sum(len(s.episodes) for s in of) for of in (shards, missing))
    most = default_workers(len(missing))
    workers = min(collect.workers or most, max(len(missing), 1))
    recorders = RecorderPool(environment, collect, workers)

    def record_shard(shard: DemonstrationShard) -> None:
        recorded = recorders.record(shard, bar.update)
        episodes = [r.episode for r in recorded if r.episode is not None]
        tries = count_tries(recorded)
        store.write(shard.split, shard.index, episodes, may_be_empty=True, tries=tries)

    with (
        progress("demonstrations", total=planned, unit="episodes", initial=planned - left) as bar,
        ThreadPoolExecutor(workers) as threads,
    ):
        for _ in threads.map(record_shard, missing):
            pass
    notes = [(s, store.shard_note(s.split, s.index)) for s in shards]
    return yields((s, note["tries"]) for s, note in notes if note and "tries" in note)


def count_tries(recorded: Iterable[Recorded]) -> dict[str, list[int]]:
    """Return {skill: [demonstrations, failed tries, crashed seeds]} of recorded episodes."""
    counts: dict[str, list[int]] = {}
    for skill, episode, failed, crashed in recorded:
        before = counts.get(skill, (0, 0, 0))
        counts[skill] = np.add(before, (episode is not None, failed, crashed)).tolist()
    return counts


def yields(
    shards: Iterable[tuple[DemonstrationShard, Mapping[str, Sequence[int]]]],
) -> dict[str, Yield]:
    """Return the yield of each skill from shards and their results of `count_tries`."""
    total: dict[str, Yield] = {}
    for shard, tries in shards:
        planned = collections.Counter(skill for skill, _ in shard.episodes)
        for skill, count in planned.items():
            # Shards from before crashes were counted have two numbers.
            recorded, failed, crashed = (*tries.get(skill, ()), 0, 0, 0)[:3]
            before = total.get(skill, Yield(0, 0, 0))
            total[skill] = Yield(*np.add(before, (count, recorded, failed, crashed)).tolist())
    return dict(sorted(total.items()))


def yield_table(of_skills: Mapping[str, Yield]) -> str:
    """Return the demonstrations and the share of successful tries of each skill as a text table.

    Seeds that crashed the simulator are no tries; they have a column if there are any.
    """
    headers = ["skill", "demonstrations", "tries", "yield"]
    has_crashes = any(counts.crashed for counts in of_skills.values())
    rows = []
    for skill, counts in of_skills.items():
        tries = counts.recorded + counts.failed
        share = f"{counts.recorded / tries:.1%}" if tries else ""
        row = [skill, f"{counts.recorded} of {counts.planned}", tries, share]
        rows.append(row + [counts.crashed] * has_crashes)
    headers += ["crashed seeds"] * has_crashes
    return text_table(rows, headers, "lrrr" + "r" * has_crashes)


def report_yields(of_skills: Mapping[str, Sequence[int]], noise: float) -> None:
    """Print the table of yields, perhaps read from a file, and check them as `check_yields`."""
    counts = {skill: Yield(*numbers) for skill, numbers in of_skills.items()}
    if counts:
        print(yield_table(counts))
    else:
        print("its yields are not known: the version that collected it stored none")
    check_yields(counts, noise)


def check_yields(of_skills: Mapping[str, Yield], noise: float) -> None:
    """Raise RuntimeError, with the remedy, if a skill has no demonstration."""
    without = [repr(skill) for skill, counts in of_skills.items() if not counts.recorded]
    if without:
        raise RuntimeError(
            f"the expert failed with every seed of {', '.join(without)} at noise {noise}, so there "
            "is no demonstration of it; the others can be used; to collect again, remove the "
            "dataset, and leave the skill out of collect.skills or lower collect.noise"
        )


def _validation_episodes(episodes: int, share: float) -> int:
    return max(1, round(episodes * share)) if share else 0
