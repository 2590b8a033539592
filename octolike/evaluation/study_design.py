"""The design of a comparison: the difference that it can detect, and when it may stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from octolike.config import Config
from octolike.evaluation import comparison, statistics, suites


def sentence(config: Config, variants: Sequence[str], seeds: int) -> str:
    """Return the design as a sentence, with the smallest difference that it can find.

    config: config of one run of the study; its first split counts.
    """
    pairs = max(1, len(variants) * (len(variants) - 1) // 2)
    number = f"{pairs} {'pair' if pairs == 1 else 'pairs'}"
    return _text(config, len(variants), seeds, pairs, number)


def effects_sentence(config: Config, variants: int, seeds: int, effects: int) -> str:
    """Return the design of a transfer study, which estimates effects instead of comparing pairs.

    config: config of a run of a single group.
    """
    return _text(config, variants, seeds, effects, f"{effects} effects")


def _text(config: Config, variants: int, seeds: int, comparisons: int, number: str) -> str:
    if not config.environment:
        return f"design: {variants} variants, {seeds} seeds, no simulator"
    skills = tuple(config.collect.skills)
    plan = suites.suite_from_config(config.environment, config.evaluate, skills).plan()
    layouts = sum(e.split == plan[0].split for e in plan)
    smallest = statistics.detectable_difference(seeds, layouts, comparisons)
    text = (
        f"design: {variants} variants, {seeds} seeds, {layouts} layouts in split "
        f"{plan[0].split!r}; "
    )
    if seeds < 2:
        return text + "one seed compares policies, not recipes"
    return text + (
        f"with {statistics.POWER:.0%} probability the table shows differences of at least "
        f"{100 * smallest:.0f} points between variants near 50 % (adjusted for {number}; assumes "
        f"that the seed explains {statistics.SEED_SHARE:.0%} of the variance of an outcome)"
    )


def decided(directory: Path, variants: Sequence[str]) -> tuple[set[str], str]:
    """Return (the variants that certainly differ from the first, the evidence as text).

    5 % for all of them together (Bonferroni), whenever it is called.
    """
    level = statistics.LEVEL / max(1, len(variants) - 1)
    summaries = [v for v in comparison.read(directory) if v.variant in variants]
    evidence = comparison.evidence(summaries, first=variants[0])
    certain = {name for name, process in evidence.items() if process.p <= level}
    lines = []
    for name in variants[1:]:
        process = evidence.get(name)
        if process is None or not process.seeds:
            lines.append(f"{name} shares no layout with {variants[0]}: never decided")
            continue
        lines.append(
            f"{name} against {variants[0]} after {process.seeds} seeds: p = {process.p:.2g}, valid "
            f"at any time ({level:.2g} decides): {'decided' if name in certain else 'open'}"
        )
    return certain, "\n".join(lines)
