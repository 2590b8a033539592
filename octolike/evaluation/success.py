"""Success rates with confidence intervals, gaps to held-out tasks, and verdicts as sentences.

Memorising or learning? A policy that has learned performs on held-out tasks as it does on seen
ones, and in a familiar scene it follows the instruction instead of repeating the training task.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from octolike.evaluation.statistics import (
    LEVEL,
    Difference,
    OutcomeGrid,
    SuccessRate,
    holm,
    is_equivalent,
    left_out_note,
    paired_difference,
    rate_difference,
    wilson_interval,
)

SEEN = "train"
EQUAL = 0.1  # seen and held-out rates count as equal within this margin: two one-sided tests
HELD_OUT_TASKS = "held_out_task"  # the only split with other skills than the seen split
SPLIT_MEANINGS = {
    "train": "tasks as in the demonstrations, in new arrangements",
    "held_out_combination": "pairs of colour and shape that no training instruction named",
    "held_out_phrasing": "known tasks in wordings that training did not contain",
    "held_out_family": "a known skill on a kind of object that training never paired with it",
    "held_out_object": "known tasks with objects of other shapes, sizes or colours",
    "held_out_position": "known tasks whose objects have exchanged their places",
    "held_out_task": "tasks without any demonstration",
    "counterfactual": "scenes as in training, but the instruction asks for another task there",
    "distractors": "tasks as in training, with more objects on the table than in training",
}
# Interpretation of a success rate below half the rate on seen tasks.
SIGNALS = {
    "counterfactual": "This suggests that the scene, not the instruction, decides the behaviour",
    "distractors": "This suggests that the policy recognises whole scenes, not the objects in them",
}

ResultRow = Mapping[str, Any]


def split_name(split: str) -> str:
    """Return a readable split name: 'seen', 'held-out combination'; a "robot: " prefix is kept."""
    robot, colon, split = split.rpartition(": ")
    words = split.replace("held_out_", "held-out ").replace("_", " ")
    return robot + colon + ("seen" if split == SEEN else words)


def success_rate(rows: Iterable[ResultRow], **fields: str) -> SuccessRate:
    """Return the success rate of the rows with the given field values."""
    selected = [r for r in rows if all(r[k] == v for k, v in fields.items())]
    finished = [r for r in selected if r["success"] is not None]
    successes = sum(bool(r["success"]) for r in finished)
    return SuccessRate(successes, len(finished), len(selected) - len(finished))


def rate_table(rows: Sequence[ResultRow]) -> dict[str, dict[str, dict[str, SuccessRate]]]:
    """Return {policy: {split: {skill: rate}}} in order of appearance; 'all' pools the skills."""
    table: dict[str, dict[str, dict[str, SuccessRate]]] = {}
    for policy in _distinct(rows, "policy"):
        policy_rows = [r for r in rows if r["policy"] == policy]
        table[policy] = {}
        for split in _distinct(policy_rows, "split"):
            split_rows = [r for r in policy_rows if r["split"] == split]
            skills = _distinct(split_rows, "skill")
            rates = {skill: success_rate(split_rows, skill=skill) for skill in skills}
            table[policy][split] = rates | {"all": success_rate(split_rows)}
    return table


def failure_counts(rows: Sequence[ResultRow], **fields: str) -> dict[str, int]:
    """Return {failure reason: count} of the rows with the given field values, largest first."""
    reasons = [
        r["failure"]
        for r in rows
        if r["success"] is False and all(r[k] == v for k, v in fields.items())
    ]
    counts = ((reason, reasons.count(reason)) for reason in set(reasons))
    return dict(sorted(counts, key=lambda x: (-x[1], x[0])))


def steps_to_success(rows: Iterable[ResultRow], **fields: str) -> float | None:
    """Return the median number of steps of the successful episodes; None without any."""
    steps = [r["steps"] for r in rows if r["success"] and all(r[k] == v for k, v in fields.items())]
    return float(np.median(steps)) if steps else None


def mean_rates(rates: Mapping[str, SuccessRate], groups: Mapping[str, str]) -> dict[str, float]:
    """Return means of success rates, all skills weighted equally; {} without finished episodes.

    Args:
        rates: {skill: rate} of one split, as in `rate_table`.
        groups: {skill: group}; may be empty.

    Returns:
        "tasks": the mean over skills; per group, the mean over its skills; "groups": the mean over
        groups. Skills without a finished episode are excluded.
    """
    means = {}
    for name, weights in _weights(rates, groups).items():
        means[name] = float(sum(weight * rates[k].rate for k, weight in weights.items()))
    return means


def mean_intervals(
    rates: Mapping[str, SuccessRate], groups: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """Return the 95 % intervals of `mean_rates`.

    Wilson's, of that mean in 1 / Σ w²/n episodes (w: weight of a skill, n: its episodes), which are
    all episodes if the skills have equally many. They cover episodes; the tasks are fixed.
    """
    intervals = {}
    for name, mean in mean_rates(rates, groups).items():
        weights = _weights(rates, groups)[name]
        episodes = 1 / sum(weight**2 / rates[k].episodes for k, weight in weights.items())
        intervals[name] = wilson_interval(min(mean, 1) * episodes, episodes)
    return intervals


def _weights(
    rates: Mapping[str, SuccessRate], groups: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Return the weights of the skills in each mean of `mean_rates`."""
    skills = [k for k, r in rates.items() if k != "all" and r.episodes]
    if not skills:
        return {}
    members: dict[str, list[str]] = {}
    for group in dict.fromkeys(groups.values()):
        of_group = [skill for skill in skills if groups.get(skill) == group]
        members |= {group: of_group} if of_group else {}
    weights = {"tasks": dict.fromkeys(skills, 1 / len(skills))}
    weights |= {group: dict.fromkeys(names, 1 / len(names)) for group, names in members.items()}
    if members:
        weights["groups"] = {
            k: weight / len(members) for group in members for k, weight in weights[group].items()
        }
    return weights


@dataclass(frozen=True)
class GeneralizationGap:
    """Seen against held-out success, on the same skills or (`HELD_OUT_TASKS`) on all tasks.

    skills: all compared skills, the seen ones first. difference: seen minus held-out. p: its
    p-value, adjusted for the number of gaps (Holm). sentence: the interpretation.
    """

    split: str
    skills: tuple[str, ...]
    seen: SuccessRate
    held_out: SuccessRate
    difference: Difference
    p: float
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        return {
            "split": self.split,
            "skills": list(self.skills),
            "seen": self.seen.to_json(),
            "held_out": self.held_out.to_json(),
            **self.difference.to_json(),
            "p_adjusted": self.p,
            "sentence": self.sentence,
        }


def generalization_gaps(
    rows: Sequence[ResultRow], policy: str = "trained"
) -> list[GeneralizationGap]:
    """Return the gap between the seen split and each held-out split that was evaluated.

    Episodes in equal scenes are paired; splits with other scenes are compared as independent.
    """
    policy_rows = [r for r in rows if r["policy"] == policy]
    skills_of = {
        split: _distinct([r for r in policy_rows if r["split"] == split], "skill")
        for split in _distinct(policy_rows, "split")
    }
    compared = []
    for split in skills_of:
        skills = _skills_to_compare(split, skills_of.get(SEEN, []), skills_of[split])
        if split == SEEN or not skills:
            continue
        skill_rows = [r for r in policy_rows if r["skill"] in skills]
        seen, held_out = success_rate(skill_rows, split=SEEN), success_rate(skill_rows, split=split)
        if seen.episodes and held_out.episodes:
            a, b = ([r for r in skill_rows if r["split"] == x] for x in (SEEN, split))
            difference = _difference(a, b, ("skill", "seed"))
            compared.append((split, skills, seen, held_out, difference))
    gaps = []
    p_values = holm([difference.p for *_, difference in compared])
    for (split, skills, seen, held_out, difference), p in zip(compared, p_values, strict=True):
        seen_rows = [r for r in rows if r["split"] == SEEN and r["skill"] in skills]
        above_untrained = untrained_difference(seen_rows, policy)
        sentence = _gap_sentence(split, seen, held_out, difference, p, above_untrained)
        if split == HELD_OUT_TASKS:
            sentence += " " + _other_tasks_caveat(skills_of[SEEN], skills_of[split])
        gaps.append(GeneralizationGap(split, skills, seen, held_out, difference, p, sentence))
    return gaps


def untrained_difference(rows: Sequence[ResultRow], policy: str = "trained") -> Difference | None:
    """Return trained minus untrained success of the rows.

    Returns:
        The difference, paired if the two met the same scenes; None if one finished no episode.
    """
    trained, untrained = ([r for r in rows if r["policy"] == x] for x in (policy, "untrained"))
    if not all(success_rate(x).episodes for x in (trained, untrained)):
        return None
    return _difference(trained, untrained, ("split", "skill", "seed"))


def _difference(
    a_rows: Iterable[ResultRow], b_rows: Iterable[ResultRow], pair: tuple[str, ...]
) -> Difference:
    """Return success(a) − success(b), paired if the two sides share most of their scenes.

    Single pairs may have different scenes: one crashed at its start, or the split `counterfactual`
    drew another scene, as the first allows no other task. Such a pair is valid, too; it only
    narrows nothing.

    Args:
        a_rows: one row per scene.
        b_rows: of the other side.
        pair: the fields that two rows of a pair share. With the split among them, equal seeds start
            equal scenes, also in older results without scenes on record.
    """
    a, b = ({tuple(r[k] for k in pair): r for r in rows} for rows in (a_rows, b_rows))
    scenes = [(a[x].get("scene"), b[x].get("scene")) for x in a.keys() & b]
    seed_decides = "split" in pair
    equal = sum(x == y if x and y else seed_decides for x, y in scenes)
    difference = paired_difference(_grid(a), _grid(b))
    if 2 * equal <= max(len(a), len(b)) or math.isnan(difference.value):  # no pair finished
        return rate_difference(success_rate(a.values()), success_rate(b.values()))
    return difference


def _grid(rows: Mapping[tuple[Any, ...], ResultRow]) -> OutcomeGrid:
    """Return the outcomes of one policy, {scene: row}."""
    outcome = {scene: row["success"] for scene, row in rows.items()}
    return OutcomeGrid.from_seeds([outcome], {x: row["skill"] for x, row in rows.items()})


def bounds_text(difference: Difference, sides: str, p: str) -> str:
    """Return how a difference was measured, in words.

    sides: "trained minus untrained"; p: the name of the p-value to print after the interval.
    """
    low, high = 100 * difference.low, 100 * difference.high
    pairing = "the same scenes" if difference.is_paired else "other scenes, compared unpaired"
    left_out = left_out_note(difference.left_out)
    return (
        f"{pairing}{left_out and f', {left_out}'}; {sides}: 95 % interval {low:+.0f} to "
        f"{high:+.0f} points, {p}"
    )


def _skills_to_compare(split: str, seen: Sequence[str], held_out: Sequence[str]) -> tuple[str, ...]:
    """Return the skills on which a held-out split is compared with the seen split.

    The common ones. Tasks without demonstrations share no skill with the seen tasks, so there all
    tasks of one split are compared with all tasks of the other.
    """
    if split == HELD_OUT_TASKS and seen:
        return tuple(dict.fromkeys([*seen, *held_out]))
    return tuple(k for k in held_out if k in seen)


def _other_tasks_caveat(seen: Sequence[str], held_out: Sequence[str]) -> str:
    """Return the caveat of a gap between different tasks."""
    n_seen, n_held_out = (
        f"{len(x)} {'task' if len(x) == 1 else 'tasks'}" for x in (seen, held_out)
    )
    return (
        f"This compares all seen tasks ({n_seen}) with all held-out ones ({n_held_out}), which may "
        "differ in difficulty; the interval covers episodes, not the choice of tasks."
    )


def _gap_sentence(
    split: str,
    seen: SuccessRate,
    held_out: SuccessRate,
    difference: Difference,
    p: float,
    above_untrained: Difference | None,
) -> str:
    """Return a gap and its interpretation as a sentence; p: adjusted."""
    rates = f"{seen.rate:.0%} on seen tasks, {held_out.rate:.0%} on “{split_name(split)}”"
    bounds = bounds_text(difference, "seen minus held-out", f"adjusted p = {p:.2g}")
    if above_untrained and not above_untrained.is_positive:
        p_untrained = f"p = {above_untrained.p:.2g}"
        chance = bounds_text(above_untrained, "trained minus untrained", p_untrained)
        return (
            f"{rates}: these episodes do not show that seen tasks succeed more often than without "
            f"training ({chance}), so the gap is not informative."
        )
    if p < LEVEL and difference.value > 0 and held_out.rate < seen.rate / 2:
        signal = SIGNALS.get(split, "This suggests memorising, not learning")
        return f"{rates}: less than half. {signal} ({bounds})."
    if p < LEVEL and difference.value > 0:
        return (
            f"{rates}: a significant loss; part of the skill is specific to seen tasks ({bounds})."
        )
    if p < LEVEL:
        return f"{rates}: the held-out tasks succeed more often; they may be easier ({bounds})."
    if is_equivalent(difference, EQUAL):
        return f"{rates}: equal within {100 * EQUAL:.0f} points ({bounds})."
    largest = 100 * max(0.0, difference.high)
    possible = f"one of up to {largest:.0f} points is possible"
    return f"{rates}: no significant gap, but {possible} ({bounds})."


@dataclass(frozen=True)
class InstructionFollowing:
    """Success with another instruction in familiar scenes (split `counterfactual`).

    instructed: success at the instructed task; original: success at the scene's training task.
    """

    instructed: SuccessRate
    original: SuccessRate

    @property
    def share(self) -> SuccessRate:
        """The share of the instructed task among episodes that completed either task."""
        completed = self.instructed.successes + self.original.successes
        return SuccessRate(self.instructed.successes, completed)

    @property
    def sentence(self) -> str:
        """The result and its interpretation as a sentence."""
        low, high = self.share.interval
        rates = (
            "In familiar scenes with another instruction, the policy completes the instructed task "
            f"in {self.instructed.rate:.0%} and the scene's training task in "
            f"{self.original.rate:.0%} of {self.instructed.episodes} episodes"
        )
        bounds = (
            f"share of the instructed task among the two: 95 % interval {low:.0%} to {high:.0%}"
        )
        if low > 0.5:
            return f"{rates}: behaviour follows the instruction ({bounds})."
        if high < 0.5:
            return f"{rates}: it repeats the task memorised for the scene ({bounds})."
        return f"{rates}: this does not show that the instruction decides ({bounds})."

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        return {
            "asked": self.instructed.to_json(),
            "instead": self.original.to_json(),
            "sentence": self.sentence,
        }


def instruction_following(
    rows: Iterable[ResultRow], policy: str = "trained"
) -> InstructionFollowing | None:
    """Return the result of counterfactual instructions; None if there were no such episodes."""
    counterfactual = [r for r in rows if r["policy"] == policy and "instead" in r]
    finished = [r for r in counterfactual if r["success"] is not None]
    if not finished:
        return None
    crashed = len(counterfactual) - len(finished)
    original = SuccessRate(sum(r["instead"] for r in finished), len(finished), crashed)
    return InstructionFollowing(success_rate(counterfactual), original)


def verdicts(rows: Sequence[ResultRow]) -> list[str]:
    """Return answers to "memorising or learning?": at least one sentence."""
    sentences = [gap.sentence for gap in generalization_gaps(rows)]
    following = instruction_following(rows)
    sentences += [following.sentence] if following else []
    return sentences or [
        "Memorising or learning? This evaluation cannot answer: it needs both seen and held-out "
        "tasks."
    ]


def _distinct(rows: Iterable[ResultRow], key: str) -> list[str]:
    return list(dict.fromkeys(r[key] for r in rows))
