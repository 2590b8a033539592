"""The main result of an evaluation in one or two sentences: has the policy learned something?"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from octolike.evaluation import success
from octolike.evaluation.statistics import LEVEL, Difference, SuccessRate
from octolike.evaluation.success import SEEN, ResultRow


def headline(rows: Sequence[ResultRow], undemonstrated: Collection[str] = ()) -> str:
    """Return the main result in one or two sentences.

    undemonstrated: skills without demonstrations: of these, the seen split is counted apart.
    """
    seen, new = _seen_and_new(rows, undemonstrated)
    where = "seen tasks" if seen or not new else "tasks without demonstrations"
    of_split = success.success_rate(seen or new, policy="trained")
    chosen = headline_rows(rows, undemonstrated)
    trained, untrained = (success.success_rate(chosen, policy=p) for p in ("trained", "untrained"))
    if not trained.episodes:
        return f"No episode finished: all {trained.crashed} crashed."
    if of_split.episodes:
        result = f"On {where} the policy succeeds in {_rate_text(trained, 'of the episodes')}"
    else:
        crashes = f"All {of_split.crashed} episodes on {where} crashed. " * bool(of_split.crashed)
        episodes = "of the other episodes" if crashes else "of the episodes"
        result = f"{crashes}The policy succeeds in {_rate_text(trained, episodes)}"
    others = success.success_rate(new if seen else [], policy="trained")
    apart = f" On tasks without demonstrations it succeeds in {_rate_text(others)}."
    apart *= bool(others.episodes)
    difference = success.untrained_difference(chosen)
    if difference is None:
        crashed = untrained.crashed
        reason = f"crashed in all {crashed}" if crashed else "was not evaluated"
        return f"{result}; the untrained network {reason}.{apart}"
    verdict = _verdict(difference)
    return f"{result}, the untrained network in {_rate_text(untrained)}. {verdict}{apart}"


def headline_rows(
    rows: Sequence[ResultRow], undemonstrated: Collection[str] = ()
) -> list[ResultRow]:
    """Return the episodes behind the headline: those on seen tasks, if any of them finished.

    Else those on tasks without demonstrations, or, without the seen split, all.
    """
    seen, new = _seen_and_new(rows, undemonstrated)
    finished = success.success_rate(seen or new, policy="trained").episodes
    return (seen or new) if finished else list(rows)


def _seen_and_new(
    rows: Sequence[ResultRow], undemonstrated: Collection[str]
) -> tuple[list[ResultRow], list[ResultRow]]:
    """Return the rows of the seen split with and without demonstrations."""
    of_split = [row for row in rows if row["split"] == SEEN]
    seen = [row for row in of_split if row["skill"] not in undemonstrated]
    return seen, [row for row in of_split if row["skill"] in undemonstrated]


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
