"""The question of a study, and the pairwise comparisons of variants that answer it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from octolike.evaluation.statistics import (
    LEVEL,
    Difference,
    OutcomeGrid,
    SeedEffect,
    compact_letters,
    holm,
    is_equivalent,
    paired_difference,
)
from octolike.evaluation.success import EQUAL, split_name

DEFAULT = "default"  # the variant with which the others are compared, unless a study names another


@dataclass(frozen=True)
class Question:
    """What a study asks: each variant less `reference`, on `split`, for every robot that has it.

    split: without the robot; "" is the first one, seen tasks if there are any.
    """

    reference: str = DEFAULT
    split: str = ""


def asked(splits: Sequence[str], question: Question) -> list[str]:
    """Return the splits of the question, one per robot; ValueError if there is none."""
    wanted = question.split or without_robot(splits[0])
    asked = [split for split in splits if without_robot(split) == wanted]
    if not asked:
        names = dict.fromkeys(map(without_robot, splits))
        raise ValueError(
            f"no run was evaluated on the split {wanted!r}, where the variants are compared; "
            f"these were: {', '.join(names)}"
        )
    return asked


def without_robot(split: str) -> str:
    """Return the split of a key "robot: split"."""
    return split.rpartition(": ")[2]


class Contrasts:
    """The pairwise comparisons of a table: adjusted p-values, letters, notes.

    Two families, each with 5 % for any false alarm, over the robots together: the differences to
    the reference, which the study is about, and all pairs, which the letters show.
    """

    def __init__(
        self,
        grids: Mapping[str, Mapping[str, OutcomeGrid]],
        effects: Mapping[str, SeedEffect],
        reference: str,
    ) -> None:
        """Compare.

        Args:
            grids: {split: {variant: outcomes}}, the question's split of each robot.
            effects: {split: the seed's effect, pooled over the variants}.
            reference: the variant with which the others are compared.
        """
        splits = list(grids)
        self._reference = reference
        self._of_pair: dict[tuple[str, str, str], Difference] = {}
        by_rate: dict[str, list[str]] = {}
        for split, of_split in grids.items():
            rates = {name: grid.rate for name, grid in of_split.items()}
            by_rate[split] = sorted(rates, key=rates.__getitem__, reverse=True)
            for a, b in itertools.permutations(of_split, 2):
                difference = paired_difference(of_split[a], of_split[b], effects[split])
                self._of_pair[split, a, b] = difference
        to_reference = [x for x in self._of_pair if x[2] == reference]
        pairs = [x for x in self._of_pair if (x[0], x[2], x[1]) > x]
        self._p, every = self._adjusted(to_reference), self._adjusted(pairs)
        different = [x for x in pairs if every[x] < LEVEL]
        self._letters = {
            split: compact_letters(names, [x[1:] for x in different if x[0] == split])
            for split, names in by_rate.items()
        }
        compared = [split for split in splits if any(x[0] == split for x in pairs)]
        self._columns = [(split, "letters") for split in compared]
        self._columns += [
            (split, reference) for split in compared if any(x[0] == split for x in to_reference)
        ]
        self.headers = [
            (kind if kind == "letters" else f"minus {reference}") + _of_robot(split, compared)
            for split, kind in self._columns
        ]
        self.notes = self._notes(splits, len(pairs), to_reference) if pairs else []

    def cells(self, variant: str) -> list[str]:
        """Return the cells of a variant under `headers`."""
        return [
            self._letters[split].get(variant, "–")
            if kind == "letters"
            else self._difference_cell((split, variant, self._reference))
            for split, kind in self._columns
        ]

    def _difference_cell(self, pair: tuple[str, str, str]) -> str:
        difference = self._of_pair.get(pair)
        if difference is None or not np.isfinite(difference.value):
            return "–"
        value, low, high = (100 * x for x in (difference.value, difference.low, difference.high))
        return f"{value:+.0f} [{low:+.0f}, {high:+.0f}], p {self._p[pair]:.2g}"

    def _adjusted(self, pairs: Sequence[tuple[str, str, str]]) -> dict[tuple[str, str, str], float]:
        p_values = holm([self._of_pair[x].p for x in pairs])
        return dict(zip(pairs, p_values, strict=True))

    def _notes(
        self, splits: Sequence[str], pairs: int, to_reference: Sequence[tuple[str, str, str]]
    ) -> list[str]:
        where = split_name(without_robot(splits[0]))
        notes = [
            f"Letters ({where}): variants without a common letter differ (5 % for the whole "
            f"table, Holm over {pairs} pairs, scene by scene). A common letter is not equality."
        ]
        if not to_reference:
            missing = f"No column of differences, as no variant is named {self._reference!r}"
            return [*notes, f"{missing}; --against names another."]
        equal = [
            f"{variant}{_of_robot(split, splits)}"
            for split, variant, _ in to_reference
            if is_equivalent(self._of_pair[split, variant, self._reference], EQUAL)
        ]
        text = f"Differences to {self._reference} ({where}): Holm over {len(to_reference)}. "
        text += f"Equal to it within {100 * EQUAL:.0f} points (two one-sided tests, 5 % for each): "
        return [*notes, f"{text}{', '.join(equal) or 'none is shown to be'}."]


def _of_robot(split: str, splits: Sequence[str]) -> str:
    """Return the robot of a split for a heading; "" if all splits are of one robot."""
    return f" ({split.rpartition(': ')[0]})" if len(splits) > 1 else ""
