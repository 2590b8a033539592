"""The design of a study: its runs, the difference that it can detect, and when it may stop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from octolike.config import Config, ConfigError, unknown
from octolike.evaluation import comparison, statistics, suites
from octolike.evaluation.comparison import VariantSummary
from octolike.evaluation.statistics import OutcomeGrid, SignFlipProcess
from octolike.evaluation.success import SEEN


@dataclass(frozen=True)
class StudyRun:
    """A run of a study: its variant, seed, config, and the argument of the config file.

    overrides: flags of train.py with which that argument makes this config.
    """

    variant: str
    seed: int
    config: Config
    arg: str
    overrides: tuple[str, ...] = ()


def choose_variants(path: str, module: ModuleType, text: str) -> list[str]:
    """Return the variants of a config file in a comma-separated list; all of them for ""."""
    if not hasattr(module, "VARIANTS"):
        raise ConfigError(f"{path} defines no VARIANTS to compare; see experiments/compare.py")
    variants = text.split(",") if text else list(module.VARIANTS)
    for name in (v for v in variants if v not in module.VARIANTS):
        raise ConfigError(unknown("variant", name, module.VARIANTS))
    return variants


def plan_runs(module: ModuleType, variants: Sequence[str], arg: str, seeds: int) -> list[StudyRun]:
    """Return the runs of a config file, all variants of a seed together.

    arg: further arguments of the file, e.g. "debug".
    """
    runs = []
    for seed, variant in itertools.product(range(seeds), variants):
        run_arg = ",".join(filter(None, (arg, f"variant={variant},seed={seed}")))
        runs.append(StudyRun(variant, seed, module.get_config(run_arg), run_arg))
    return runs


def sentence(configs: Mapping[str, Config], seeds: int) -> str:
    """Return the design as a sentence, with the smallest difference that it can find.

    configs: {variant: config of one of its runs}. Pairs of variants are compared on the scenes
    that both meet; the sentence is about the pair with the fewest.
    """
    if not all(config.environment for config in configs.values()):
        return f"design: {len(configs)} variants, {seeds} seeds, no simulator"
    scenes = [_first_scenes(config) for config in configs.values()]
    common = [len(a & b) for a, b in itertools.combinations(scenes, 2)]
    pairs = [n for n in common if n] or [min(map(len, scenes))]
    number = f"{len(pairs)} {'pair' if len(pairs) == 1 else 'pairs'}"
    return _text(len(configs), seeds, min(pairs), len(pairs), number)


def effects_sentence(config: Config, variants: int, seeds: int, effects: int) -> str:
    """Return the design of a transfer study, which estimates effects instead of comparing pairs.

    config: config of a run of a single group.
    """
    if not config.environment:
        return f"design: {variants} variants, {seeds} seeds, no simulator"
    return _text(variants, seeds, len(_first_scenes(config)), effects, f"{effects} effects")


def _first_scenes(config: Config) -> frozenset[suites.EpisodePlan]:
    """Return the episodes of the split with which a table begins."""
    skills = tuple(config.collect.skills)
    plan = suites.suite_from_config(config.environment, config.evaluate, skills).plan()
    first = SEEN if any(e.split == SEEN for e in plan) else plan[0].split
    return frozenset(episode for episode in plan if episode.split == first)


def _text(variants: int, seeds: int, scenes: int, comparisons: int, number: str) -> str:
    text = f"design: {variants} variants, {seeds} seeds, {scenes} common scenes; "
    if seeds < 2:
        return text + "one seed compares policies, not recipes"
    smallest = statistics.detectable_difference(seeds, scenes, comparisons, variants)
    return text + (
        f"with {statistics.POWER:.0%} probability the table shows differences of at least "
        f"{100 * smallest:.0f} points between variants near 50 % (adjusted for {number}; assumes "
        f"that the seed explains {statistics.SEED_SHARE:.0%} of the variance of an outcome)"
    )


def decided(directory: Path, variants: Sequence[str], block: str = "") -> tuple[set[str], str]:
    """Return (the variants that certainly differ from the first, the evidence as text).

    5 % for all of them together (Bonferroni), whenever it is called.
    """
    level = statistics.LEVEL / max(1, len(variants) - 1)
    summaries = [v for v in comparison.read(directory, block) if v.variant in variants]
    processes = evidence(summaries, first=variants[0])
    certain = {name for name, process in processes.items() if process.p <= level}
    lines = []
    for name in variants[1:]:
        process = processes.get(name)
        if process is None or not process.seeds:
            lines.append(f"{name} shares no scene with {variants[0]}: never decided")
            continue
        lines.append(
            f"{name} against {variants[0]} after {process.seeds} seeds: p = {process.p:.2g}, valid "
            f"at any time ({level:.2g} decides): {'decided' if name in certain else 'open'}"
        )
    return certain, "\n".join(lines)


def evidence(summaries: Sequence[VariantSummary], first: str) -> dict[str, SignFlipProcess]:
    """Return the evidence that a variant differs from `first`, seed by seed.

    On the first split that both have; of two robots, a variant may have the second one alone. Valid
    after any number of seeds: a study may stop as soon as its p is small enough. Variants without a
    common seed or split are omitted.
    """
    by_name = {v.variant: v for v in summaries}
    if first not in by_name:
        return {}
    reference = by_name[first]
    processes = {}
    for variant, summary in by_name.items():
        common = [s for s in summary.seeds if s in reference.seeds]
        split = next((s for s in reference.grids if s in summary.grids), None)
        if variant == first or not common or split is None:
            continue
        process = SignFlipProcess()
        for seed in sorted(common, key=int):
            a, b = (
                OutcomeGrid.from_seeds([_outcomes_of(v, split, seed)], v.strata(split))
                for v in (summary, reference)
            )
            difference = statistics.paired_difference(a, b).value
            if math.isfinite(difference):
                process.update(difference)
        processes[variant] = process
    return processes


def _outcomes_of(summary: VariantSummary, split: str, seed: str) -> Mapping[Any, bool | None]:
    grid = summary.grids[split]
    row = grid.outcomes[summary.seeds.index(seed)]
    return {x: bool(y) for x, y in zip(grid.scenes, row, strict=True)}
