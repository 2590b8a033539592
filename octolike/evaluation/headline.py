"""The main result of an evaluation in one or two sentences: has the policy learned something?"""

from __future__ import annotations

from collections.abc import Sequence

from octolike.evaluation import success
from octolike.evaluation.statistics import LEVEL, Difference, SuccessRate
from octolike.evaluation.success import SEEN, ResultRow


def headline(rows: Sequence[ResultRow]) -> str:
    """Return the main result in one or two sentences."""
    seen, scope = success.success_rate(rows, policy="trained", split=SEEN), headline_scope(rows)
    trained, untrained = (
        success.success_rate(rows, policy=p, **scope) for p in ("trained", "untrained")
    )
    difference = success.untrained_difference(rows, **scope)
    result = f"On seen tasks the policy succeeds in {_rate_text(trained, 'of the episodes')}"
    if not scope:
        crashes = f"All {seen.crashed} episodes on seen tasks crashed. " * bool(seen.crashed)
        if not trained.episodes:
            return f"No episode finished: all {trained.crashed} crashed."
        episodes = "of the other episodes" if crashes else "of the episodes"
        result = f"{crashes}The policy succeeds in {_rate_text(trained, episodes)}"
    if difference is None:
        crashed = untrained.crashed
        reason = f"crashed in all {crashed}" if crashed else "was not evaluated"
        return f"{result}; the untrained network {reason}."
    return f"{result}, the untrained network in {_rate_text(untrained)}. {_verdict(difference)}"


def headline_scope(rows: Sequence[ResultRow]) -> dict[str, str]:
    """Return the fields of the episodes behind the headline.

    Those on seen tasks, or all if the seen split was not evaluated or all its episodes crashed.
    """
    seen = success.success_rate(rows, policy="trained", split=SEEN)
    return {"split": SEEN} if seen.episodes else {}


def _verdict(difference: Difference) -> str:
    """Return whether the policy has learned something, from trained minus untrained success."""
    bounds = success.bounds_text(difference, "trained minus untrained", f"p = {difference.p:.2g}")
    if difference.is_positive:
        return f"It has learned something ({bounds})."
    if difference.p < LEVEL:
        return f"It succeeds less often than without training ({bounds})."
    return f"These episodes do not show that it has learned anything ({bounds})."


def _rate_text(rate: SuccessRate, episodes: str = "") -> str:
    low, high = rate.interval
    counts = f"{rate.successes} of {rate.episodes}"
    share = f"{rate.rate:.0%} {episodes}".strip()
    return f"{share} ({counts}; 95 % interval {low:.0%} to {high:.0%})"
