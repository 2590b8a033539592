"""Which records of a dataset's files belong to a split, a slice of it, or its held-out part.

If a dataset has the validation split of the config, nothing else is held out. A slice of the
training split ("train[95%:]") is left out of training. Without such a split, a share of the
training episodes is held out by a hash of their records: it depends neither on the number of
episodes or processes nor on the order, and copies of an episode are on the same side.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from octolike.errors import DataError

TRAINING, HELD_OUT = "training", "held out"
_BUCKETS = 1_000_000  # of the hash


class MissingSplitError(DataError):
    """The dataset does not have the split."""


@dataclass(frozen=True)
class HeldOut:
    """The part of a training split that is held out.

    Attributes:
        split: a split or slice of the dataset; "" for none.
        share: share of the training episodes, if the dataset lacks the split; 0 for none.
    """

    split: str = ""
    share: float = 0.0


@dataclass(frozen=True, eq=False)
class SplitRecords:
    """The files of a split and its records.

    Attributes:
        files: paths.
        counts: number of all records in each file.
        selected: bool [count] per file: the records that belong to the split.
    """

    files: list[str]
    counts: list[int]
    selected: list[np.ndarray]

    def without(self, records: SplitRecords) -> SplitRecords:
        """Return these records without others."""
        excluded = dict(zip(records.files, records.selected, strict=True))
        masks = [
            mask & ~excluded[file] if file in excluded else mask
            for file, mask in zip(self.files, self.selected, strict=True)
        ]
        return SplitRecords(self.files, self.counts, masks)


def find_records(splits: Any, split: str, title: str) -> SplitRecords:
    """Return the records of a split or slice; MissingSplitError if the dataset lacks it.

    splits: splits of a tfds.core.DatasetInfo; title: the dataset, for messages.
    """
    if not has_split(splits, split):
        raise MissingSplitError(
            f"{title.format(split)} (splits: {', '.join(sorted(splits)) or 'none'})"
        )
    if split in splits:
        files = [str(path) for path in splits[split].filepaths]
        counts = list(splits[split].shard_lengths)
        return SplitRecords(files, counts, [np.ones(n, bool) for n in counts])
    try:
        instructions = splits[split].file_instructions
    except (ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{title.format(split)}: {reason}") from None
    selected: dict[str, np.ndarray] = {}
    for part in instructions:
        mask = selected.setdefault(str(part.filename), np.zeros(part.examples_in_shard, bool))
        mask[part.skip : len(mask) if part.take < 0 else part.skip + part.take] = True
    if not selected:
        raise DataError(f"{title.format(split)}: the slice contains no episode; choose another one")
    return SplitRecords(list(selected), [len(m) for m in selected.values()], [*selected.values()])


def has_split(splits: Any, split: str) -> bool:
    """Return whether a dataset has all splits that a split or slice is made of."""
    names = re.findall(r"(?:^|\+)\s*([^\[+\s]+)", split)
    return bool(names) and all(name in splits for name in names)


def is_held_out(content: np.ndarray, share: float) -> np.ndarray:
    """Return bool [episodes]: which ones are held out, from the fingerprints of their records."""
    return content % _BUCKETS < round(share * _BUCKETS)
