"""The design of a study: its runs, the difference that it can detect, and when it may stop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from scipy import stats

from octolike.config import Config, ConfigError, load_module, unknown
from octolike.evaluation import comparison, suites
from octolike.evaluation.comparison import VariantSummary
from octolike.evaluation.contrasts import DEFAULT, Question, without_robot
from octolike.evaluation.statistics import LEVEL, OutcomeGrid, holm, paired_difference
from octolike.evaluation.success import SEEN

# Assumptions of a plan without earlier runs: shares of the variance of a single outcome. In the
# studies of RESULTS.md the seeds of one variant had a share of 0.02 to 0.07, and what one variant
# finds hard in a scene and another does not had 0.07 to 0.25.
SEED_SHARE, SCENE_SHARE, INTERACTION_SHARE, POWER = 0.05, 0.2, 0.1, 0.8


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


def question(config: str, against: str = "", split: str = "") -> Question:
    """Return the question of a study: what a command names, else the constants of its config file.

    REFERENCE is the variant with which the others are compared, `default` without it; SPLIT is
    where, by default on seen tasks.

    config: path of the config file, perhaps with arguments; "" for the defaults.
    """
    module = load_module(config.partition(":")[0]) if config else None
    reference = against or getattr(module, "REFERENCE", DEFAULT)
    return Question(reference, split or getattr(module, "SPLIT", ""))


def plan_study(config: str, names: str, seeds: int) -> tuple[list[str], list[StudyRun]]:
    """Return the variants and runs of a config file; names: as in `choose_variants`."""
    path, _, further = config.partition(":")
    module = load_module(path)
    variants = choose_variants(path, module, names)
    return variants, plan_runs(module, variants, further, seeds)


def plan_runs(module: ModuleType, variants: Sequence[str], arg: str, seeds: int) -> list[StudyRun]:
    """Return the runs of a config file, all variants of a seed together.

    arg: further arguments of the file, e.g. "debug".
    """
    runs = []
    for seed, variant in itertools.product(range(seeds), variants):
        run_arg = ",".join(filter(None, (arg, f"variant={variant},seed={seed}")))
        runs.append(StudyRun(variant, seed, module.get_config(run_arg), run_arg))
    return runs


def sentence(
    configs: Mapping[str, Config], seeds: int, question: Question, until_decided: bool = False
) -> str:
    """Return the design as a sentence, with the smallest difference that it can find.

    configs: {variant: config of one of its runs}; until_decided: whether the study may stop early.
    Each variant is compared with the reference on the scenes that both meet, or all pairs if the
    reference is none of them; the sentence is about the pair with the fewest scenes.
    """
    if not all(config.environment for config in configs.values()):
        return f"design: {len(configs)} variants, {seeds} seeds, no simulator"
    scenes = {name: _scenes(config, question.split) for name, config in configs.items()}
    pairs = list(itertools.combinations(scenes, 2))
    pairs = [pair for pair in pairs if question.reference in pair] or pairs
    common = [n for n in (len(scenes[a] & scenes[b]) for a, b in pairs) if n]
    common = common or [min(map(len, scenes.values()))]
    number = f"{len(common)} {'comparison' if len(common) == 1 else 'comparisons'}"
    text = _text(len(configs), seeds, min(common), len(common), number)
    if not until_decided:
        return text
    least = seeds_to_decide(len(configs))
    text += f"; evidence after every seed decides from {least} seeds on, if all have one sign"
    if seeds < least:
        text += f": with --seeds {seeds} nothing is decided early, and all seeds are run"
    return text


def effects_sentence(config: Config, variants: int, seeds: int, effects: int) -> str:
    """Return the design of a transfer study, which estimates effects instead of comparing pairs.

    config: config of a run of a single group.
    """
    if not config.environment:
        return f"design: {variants} variants, {seeds} seeds, no simulator"
    return _text(variants, seeds, len(_scenes(config)), effects, f"{effects} effects")


def _scenes(config: Config, split: str = "") -> frozenset[suites.EpisodePlan]:
    """Return the episodes of a split; "": of that with which a table begins."""
    skills = tuple(config.collect.skills)
    plan = suites.suite_from_config(config.environment, config.evaluate, skills).plan()
    first = SEEN if any(e.split == SEEN for e in plan) else plan[0].split
    return frozenset(episode for episode in plan if episode.split == (split or first))


def _text(variants: int, seeds: int, scenes: int, comparisons: int, number: str) -> str:
    text = f"design: {variants} variants, {seeds} seeds, {scenes} common scenes; "
    if seeds < 2:
        return text + "one seed compares policies, not recipes"
    smallest = detectable_difference(seeds, scenes, comparisons, variants)
    return text + (
        f"with {POWER:.0%} probability the table shows differences of at least "
        f"{100 * smallest:.0f} points between variants near 50 % (adjusted for {number}; assumes "
        f"that the seed explains {SEED_SHARE:.0%} of the variance of an outcome)"
    )


def decided(
    directory: Path,
    variants: Sequence[str],
    question: Question,
    block: str = "",
    episodes: int | None = None,
) -> tuple[set[str], str]:
    """Return (the variants that certainly differ from the reference, the evidence as text).

    5 % for all of them together (Holm), whenever it is called.
    """
    others = [name for name in variants if name != question.reference]
    names = [question.reference, *others]
    processes = evidence(comparison.read(directory, block, names, episodes), question)
    # One without evidence counts in the family: it may have some after the next seed.
    p_values = [processes[name].p if name in processes else 1.0 for name in others]
    adjusted = dict(zip(others, holm(p_values), strict=True))
    certain = {name for name, p in adjusted.items() if p <= LEVEL}
    lines = []
    for name in others:
        if name not in processes:
            lines.append(f"{name} shares no scene and seed with {question.reference}: not decided")
            continue
        lines.append(
            f"{name} against {question.reference} after {processes[name].seeds} seeds: p = "
            f"{adjusted[name]:.2g}, valid at any time, Holm over {len(others)}: "
            f"{'decided' if name in certain else 'open'}"
        )
    return certain, "\n".join(lines)


def seeds_to_decide(variants: int) -> int:
    """Return how many seeds can decide a difference to the reference at all, the first of many.

    Evidence doubles at most with each seed, so a study with fewer seeds never stops early.
    """
    level = LEVEL / max(1, variants - 1)
    return next(n for n in itertools.count(1) if SignFlipProcess.smallest_p(n) <= level)


def evidence(summaries: Sequence[VariantSummary], question: Question) -> dict[str, SignFlipProcess]:
    """Return the evidence that a variant differs from the question's reference, seed by seed.

    On the question's split, of the first robot that both have. Valid after any number of seeds: a
    study may stop as soon as its p is small enough. Variants without a common seed or scene are
    omitted.
    """
    by_name = {v.variant: v for v in summaries}
    if question.reference not in by_name:
        return {}
    reference = by_name[question.reference]
    processes = {}
    for variant, summary in by_name.items():
        common = [s for s in reference.grids if s in summary.grids]
        split = next((s for s in common if question.split in ("", without_robot(s))), None)
        if variant == question.reference or split is None:
            continue
        process = SignFlipProcess()
        for seed in sorted({*summary.seeds[split]} & {*reference.seeds[split]}, key=int):
            a, b = (
                OutcomeGrid.from_seeds([_outcomes_of(v, split, seed)], v.strata(split))
                for v in (summary, reference)
            )
            difference = paired_difference(a, b).value
            if math.isfinite(difference):
                process.update(difference)
        if process.seeds:
            processes[variant] = process
    return processes


def _outcomes_of(summary: VariantSummary, split: str, seed: str) -> Mapping[Any, bool | None]:
    grid = summary.grids[split]
    row = grid.outcomes[summary.seeds[split].index(seed)]
    return {x: bool(y) for x, y in zip(grid.scenes, row, strict=True)}


def detectable_difference(
    seeds: int,
    scenes: int,
    comparisons: int = 1,
    recipes: int = 2,
    rate: float = 0.5,
    seed_share: float = SEED_SHARE,
    scene_share: float = SCENE_SHARE,
    interaction_share: float = INTERACTION_SHARE,
) -> float:
    """Return the smallest difference of two recipes that a study finds with 80 % probability.

    Args:
        seeds: training seeds of each recipe.
        scenes: number of scenes of each seed, the same for all recipes.
        comparisons: number of comparisons of the table, for Holm's first and strictest step.
        recipes: number of recipes, over which the seed's effect is pooled.
        rate: the success rate around which the recipes lie.
        seed_share: the share of an outcome's variance due to the seed.
        scene_share: the share due to the scene; it cancels between recipes.
        interaction_share: the share due to the scene for one recipe; more seeds do not lower it.

    Returns:
        The difference in success rate; 1 if a study of this size finds none (a single seed).
    """
    if seeds < 2:
        return 1.0
    spread = 2 * rate * (1 - rate)  # of two recipes
    rest = spread * (1 - seed_share - scene_share - interaction_share) / scenes / seeds
    by_scene = math.sqrt(spread * (interaction_share / scenes + seed_share / seeds) + rest)
    by_seed = spread * seed_share / seeds + rest
    # The larger of a recipe's own and the pooled estimate is used (`SeedEffect.of`): on average
    # E max(1, chi²(k) / k) times the variance.
    k = seeds - 1
    larger = float(stats.chi2.cdf(k, k) + stats.chi2.sf(k, k + 2))
    limits = [
        float(stats.t.isf(LEVEL / comparisons / 2, freedom)) * deviation
        for freedom, deviation in (
            (math.inf, by_scene),
            (recipes * k, math.sqrt(larger * by_seed)),
        )
    ]
    return min(1.0, max(limits) + float(stats.norm.isf(1 - POWER)) * by_scene)


class SignFlipProcess:
    """Evidence that two recipes differ, valid whenever one looks (an e-process).

    Each seed gives the difference d of two success rates on the same scenes. If the recipes are
    equal on these scenes, d and −d are equally likely, so exp(s d) / cosh(s d) has mean 1 for any
    stake s, and products of it exceed 1 / α with probability at most α, at any time (Ville's
    inequality). The evidence is the mean over several stakes. It is about these scenes: other
    scenes, and demonstrations that all seeds share, are not drawn again.
    """

    _STAKES = np.array([s * sign for s in (3.0, 10.0, 30.0, 100.0) for sign in (-1, 1)])

    def __init__(self) -> None:
        self._logs = np.zeros(len(self._STAKES))
        self.largest = 1.0
        self.seeds = 0

    def update(self, difference: float) -> float:
        """Add a seed's difference of success rates; return the evidence so far."""
        bets = self._STAKES * difference
        self._logs += bets - np.logaddexp(bets, -bets) + math.log(2)
        self.seeds += 1
        evidence = float(np.exp(np.clip(self._logs, -700, 700)).mean())
        self.largest = max(self.largest, evidence)
        return evidence

    @property
    def p(self) -> float:
        """A p-value that may be read after every seed."""
        return min(1.0, 1 / self.largest)

    @staticmethod
    def smallest_p(seeds: int) -> float:
        """Return the limit of p after a number of seeds: all of one sign, however different."""
        return min(1.0, 2.0 ** (1 - seeds))
