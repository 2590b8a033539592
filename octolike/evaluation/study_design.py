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
    if not config.environment:
        return f"design: {len(variants)} variants, {seeds} seeds, no simulator"
    skills = tuple(config.collect.skills)
    plan = suites.suite_from_config(config.environment, config.evaluate, skills).plan()
    layouts = sum(e.split == plan[0].split for e in plan)
    pairs = max(1, len(variants) * (len(variants) - 1) // 2)
    smallest = statistics.detectable_difference(seeds, layouts, pairs)
    text = (
        f"design: {len(variants)} variants, {seeds} seeds, {layouts} layouts in split "
        f"{plan[0].split!r}; "
    )
    if seeds < 2:
        return text + "one seed compares policies, not recipes"
    return text + (
        f"with {statistics.POWER:.0%} probability the table shows differences of at least "
        f"{100 * smallest:.0f} points between variants near 50 % (adjusted for {pairs} "
        f"{'pair' if pairs == 1 else 'pairs'}; assumes that the seed explains "
        f"{statistics.SEED_SHARE:.0%} of the variance of an outcome)"
    )


def decided(directory: Path, variants: Sequence[str]) -> tuple[set[str], str]:
    """Return (the variants that certainly differ from the first, the evidence as text).

    5 % for all of them together (Bonferroni), whenever it is called.
    """
    level = statistics.LEVEL / max(1, len(variants) - 1)
    summaries = [v for v in comparison.read(directory) if v.variant in variants]
    evidence = comparison.evidence(summaries, first=variants[0])
    certain = {name for name, process in evidence.items() if process.p <= level}
    lines = [
        f"{name} against {variants[0]} after {process.seeds} seeds: p = {process.p:.2g}, valid at "
        f"any time ({level:.2g} decides): {'decided' if name in certain else 'open'}"
        for name, process in evidence.items()
    ]
    return certain, "\n".join(lines)
