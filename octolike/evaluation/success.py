"""Rows of results → success rates with intervals, gaps to held-out tasks, and both in words.

Memorising or learning? A policy that has learned does on held-out tasks what it does on seen ones,
and on a seen table what it is told, not what was done there in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SEEN = "train"
OTHER_TASKS = "held_out_task"  # the one split whose skills are not those of the seen one
Z = 1.959964  # two-sided 95 %
MEANING = {
    "train": "tasks like those of the demonstrations, in new arrangements",
    "held_out_combination": "colour and shape pairs that were never asked for in training",
    "held_out_phrasing": "known tasks in wordings that were never used in training",
    "held_out_family": "a skill on a kind of object that it was never shown with",
    "held_out_task": "tasks that were never demonstrated",
    "counterfactual": "tables as in training, but another task there is asked for",
    "distractors": "tasks as in training, with more things on the table than there ever were",
}
# What a success rate less than half of that on seen tasks signals.
SIGNAL = {
    "counterfactual": "This signals that the table decides what is done, and not the words",
    "distractors": "This signals that it has learned how tables look, not what to look for",
}

ResultRow = Mapping[str, Any]


@dataclass(frozen=True)
class SuccessRate:
    """`successes` of `episodes`, as a share with its Wilson 95 % interval.

    `crashed` episodes have no outcome and are not among `episodes`.
    """

    successes: int
    episodes: int
    crashed: int = 0

    @property
    def rate(self) -> float:
        """The share of successes; NaN without episodes."""
        return self.successes / self.episodes if self.episodes else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson 95 % confidence interval."""
        return wilson(self.successes, self.episodes)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        low, high = self.interval
        return {
            "successes": self.successes,
            "episodes": self.episodes,
            "crashed": self.crashed,
            "rate": self.rate if self.episodes else None,
            "low": low,
            "high": high,
        }


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """Return the Wilson score interval, 95 %, of a share; (0, 1) without episodes.

    Wilson (1927); unlike the normal approximation it is right at 0 and 1 and for few episodes.
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes")
    if not episodes:
        return 0.0, 1.0
    p, n = successes / episodes, episodes
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    # At 0 and 1 the ends are exact; rounding must not leave them outside.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == episodes else min(1.0, middle + half)
    return low, high


def difference(a: SuccessRate, b: SuccessRate) -> tuple[float, float, float]:
    """Return (a - b, low, high): a difference of shares with Newcombe's 95 % interval (1998)."""
    (la, ua), (lb, ub) = a.interval, b.interval
    d = a.rate - b.rate
    low = d - math.hypot(a.rate - la, ub - b.rate)
    high = d + math.hypot(ua - a.rate, b.rate - lb)
    return d, low, high


def count(rows: Iterable[ResultRow], **where: str) -> SuccessRate:
    """Return the rate of the rows whose fields equal `where`."""
    chosen = [r for r in rows if all(r[k] == v for k, v in where.items())]
    done = [r for r in chosen if r["success"] is not None]
    return SuccessRate(sum(bool(r["success"]) for r in done), len(done), len(chosen) - len(done))


def table(rows: Sequence[ResultRow]) -> dict[str, dict[str, dict[str, SuccessRate]]]:
    """Return {policy: {split: {skill: rate}}} in order of appearance; 'all' pools the skills."""
    out: dict[str, dict[str, dict[str, SuccessRate]]] = {}
    for policy in _distinct(rows, "policy"):
        mine = [r for r in rows if r["policy"] == policy]
        out[policy] = {}
        for split in _distinct(mine, "split"):
            here = [r for r in mine if r["split"] == split]
            cells = {skill: count(here, skill=skill) for skill in _distinct(here, "skill")}
            out[policy][split] = cells | {"all": count(here)}
    return out


def failures(rows: Sequence[ResultRow], **where: str) -> dict[str, int]:
    """Return {why an episode failed: how often}, the most frequent first."""
    words = [
        r["failure"]
        for r in rows
        if r["success"] is False and all(r[k] == v for k, v in where.items())
    ]
    return dict(sorted(((w, words.count(w)) for w in set(words)), key=lambda x: (-x[1], x[0])))


def steps_to_success(rows: Iterable[ResultRow], **where: str) -> float | None:
    """Return the median number of steps of the successful episodes; None where there are none."""
    steps = [r["steps"] for r in rows if r["success"] and all(r[k] == v for k, v in where.items())]
    return float(np.median(steps)) if steps else None


def means(cells: Mapping[str, SuccessRate], groups: Mapping[str, str]) -> dict[str, float]:
    """Return means of the skills' success rates, in which each skill counts alike.

    cells: of one split, as in `table`; groups: {skill: its group}, {} for none. Keys: "tasks", the
    mean over skills; a group's name, the mean over its skills; and "groups", the mean over groups.
    Skills without a finished episode are left out; {} where that leaves none.
    """
    rates = {k: r.rate for k, r in cells.items() if k != "all" and r.episodes}
    if not rates:
        return {}
    found: dict[str, list[float]] = {}
    for name in dict.fromkeys(groups.values()):
        members = [rate for skill, rate in rates.items() if groups.get(skill) == name]
        found |= {name: members} if members else {}
    out = {"tasks": float(np.mean(list(rates.values())))}
    out |= {name: float(np.mean(members)) for name, members in found.items()}
    if found:
        out["groups"] = float(np.mean([np.mean(m) for m in found.values()]))
    return out


@dataclass(frozen=True)
class GeneralizationGap:
    """Seen against held-out success over the same skills, or of all tasks of `OTHER_TASKS`.

    skills: all that were compared, the seen ones first.
    """

    split: str
    skills: tuple[str, ...]
    seen: SuccessRate
    held_out: SuccessRate
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        d, low, high = difference(self.seen, self.held_out)
        return {
            "split": self.split,
            "skills": list(self.skills),
            "seen": self.seen.to_json(),
            "held_out": self.held_out.to_json(),
            "difference": d,
            "low": low,
            "high": high,
            "sentence": self.sentence,
        }


def gaps(rows: Sequence[ResultRow], policy: str = "trained") -> list[GeneralizationGap]:
    """Return one gap per held-out split that was evaluated beside the seen one."""
    mine = [r for r in rows if r["policy"] == policy]
    floor_rows = [r for r in rows if r["policy"] == "untrained" and r["split"] == SEEN]
    skills_of = {
        s: _distinct([r for r in mine if r["split"] == s], "skill")
        for s in _distinct(mine, "split")
    }
    out = []
    for split in skills_of:
        compared = _compared(split, skills_of.get(SEEN, []), skills_of[split])
        if split == SEEN or not compared:
            continue
        shared = [r for r in mine if r["skill"] in compared]
        seen, held_out = count(shared, split=SEEN), count(shared, split=split)
        floor = count([r for r in floor_rows if r["skill"] in compared])
        if seen.episodes and held_out.episodes:
            sentence = _judge(split, seen, held_out, floor)
            if split == OTHER_TASKS:
                sentence += " " + _of_other_tasks(skills_of[SEEN], skills_of[split])
            out.append(GeneralizationGap(split, compared, seen, held_out, sentence))
    return out


def _compared(split: str, seen: Sequence[str], held_out: Sequence[str]) -> tuple[str, ...]:
    """Return the skills over which a held-out split is compared with the seen one.

    Those of both; never demonstrated tasks have none in common with the seen ones, and there it is
    all of one against all of the other.
    """
    if split == OTHER_TASKS and seen:
        return tuple(dict.fromkeys([*seen, *held_out]))
    return tuple(k for k in held_out if k in seen)


def _of_other_tasks(seen: Sequence[str], held_out: Sequence[str]) -> str:
    """Say what a gap between different tasks does not tell."""
    one, other = (f"{len(x)} {'task' if len(x) == 1 else 'tasks'}" for x in (seen, held_out))
    return (
        f"Compared are all seen tasks with all held-out ones, {one} against {other}: these may be "
        "harder or easier in themselves, and the interval is over episodes, not over tasks."
    )


def _judge(split: str, seen: SuccessRate, held_out: SuccessRate, floor: SuccessRate) -> str:
    """Say in words what a gap signals."""
    _, low, high = difference(seen, held_out)
    name = split.replace("_", "-", 1).replace("_", " ")
    start = f"{seen.rate:.0%} on seen tasks, {held_out.rate:.0%} on {name}"
    bound = f"95 % interval of the gap: {100 * low:+.0f} to {100 * high:+.0f} points"
    if floor.episodes and seen.interval[0] <= floor.interval[1]:
        return (
            f"{start}: seen tasks do not stand out from the untrained policy; the gap says nothing."
        )
    if low > 0 and held_out.rate < seen.rate / 2:
        signal = SIGNAL.get(split, "This signals memorising, not learning")
        return f"{start}: less than half. {signal} ({bound})."
    if low > 0:
        return f"{start}: a real loss, part of what it learned is tied to seen tasks ({bound})."
    if high < 0:
        return f"{start}: the held-out tasks went better; they may be the easier ones ({bound})."
    return (
        f"{start}: no gap beyond chance; one of up to {100 * high:.0f} points could hide ({bound})."
    )


@dataclass(frozen=True)
class InstructionFollowing:
    """What is done on tables laid for one task when another is asked for (`counterfactual`).

    asked: how often what was asked for; instead: how often what the table was laid for.
    """

    asked: SuccessRate
    instead: SuccessRate

    @property
    def share(self) -> SuccessRate:
        """Of the episodes in which either was done, those in which it was what was asked for."""
        done = self.asked.successes + self.instead.successes
        return SuccessRate(self.asked.successes, done)

    @property
    def sentence(self) -> str:
        """What this says of the policy."""
        low, high = self.share.interval
        start = (
            f"On known tables with another instruction it does what is asked for in "
            f"{self.asked.rate:.0%}, and what the table was laid for in {self.instead.rate:.0%} of "
            f"{self.asked.episodes} episodes"
        )
        bound = f"of the two, what was asked for: 95 % interval {low:.0%} to {high:.0%}"
        if low > 0.5:
            return f"{start}: behaviour follows the instruction ({bound})."
        if high < 0.5:
            return f"{start}: it does what it has memorised for such a table ({bound})."
        return f"{start}: this does not show that the instruction decides ({bound})."

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        asked, instead = self.asked.to_json(), self.instead.to_json()
        return {"asked": asked, "instead": instead, "sentence": self.sentence}


def following(rows: Iterable[ResultRow], policy: str = "trained") -> InstructionFollowing | None:
    """Return what was done under other instructions; None where none were given."""
    mine = [r for r in rows if r["policy"] == policy and "instead" in r]
    done = [r for r in mine if r["success"] is not None]
    if not done:
        return None
    crashed = len(mine) - len(done)
    return InstructionFollowing(
        count(mine), SuccessRate(sum(r["instead"] for r in done), len(done), crashed)
    )


def verdict(rows: Sequence[ResultRow]) -> list[str]:
    """Answer "memorising or learning?" in sentences, of which there is always one."""
    found = [gap.sentence for gap in gaps(rows)]
    follows = following(rows)
    found += [follows.sentence] if follows else []
    return found or [
        "Memorising or learning? Seen and held-out tasks were not both evaluated, so this "
        "evaluation cannot say."
    ]


def _distinct(rows: Iterable[ResultRow], key: str) -> list[str]:
    return list(dict.fromkeys(r[key] for r in rows))
