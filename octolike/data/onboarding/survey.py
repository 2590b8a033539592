"""Look at an RLDS dataset that has no row yet: what is in it, what is wrong with it, which keys.

    seen = survey("data/my_robot")
    print(describe(seen)); problems(seen); guess(seen)      # see guess.py for the spec file

Needs no row: fields are taken as features.json has them. Numbers of at most `episodes` episodes are
looked at, spread over the shards, and the encoded images of five steps of four of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.data.rlds.fields import DISCOUNT, IS_FIRST, IS_LAST, IS_TERMINAL, OBSERVATION, STEPS
from octolike.data.rlds.reader import error_summary
from octolike.data.rlds.writer import SETTINGS
from octolike.errors import DataError

BOOKKEEPING = {IS_FIRST, IS_LAST, IS_TERMINAL, DISCOUNT, "reward"}
SHOWN, FRAMES = 4, 5  # episodes and frames of each that are kept as pictures
WIDEST = 256  # numbers of more dimensions are features, not measurements


@dataclass(frozen=True)
class Survey:
    """What was seen of one split.

    Attributes:
        directory, name, version, split: of the dataset.
        total: episodes of each split. looked: those whose steps were read.
        features: field under steps: its type in words.
        lengths: int64 [looked].
        numbers: field: one float64 [T, dims] per episode.
        texts: field: the set of texts of each episode.
        pictures: camera field: SHOWN rows of FRAMES encoded images.
        frozen: camera field: looked-at episodes whose first and last image are the same bytes.
        control_hz: 0 where nobody says. about: what the converter noted.
    """

    directory: Path
    name: str
    version: str
    split: str
    total: Mapping[str, int]
    looked: int
    features: Mapping[str, str]
    lengths: np.ndarray
    numbers: Mapping[str, list[np.ndarray]]
    texts: Mapping[str, list[set[str]]]
    pictures: Mapping[str, list[list[bytes]]]
    frozen: Mapping[str, int]
    control_hz: float
    about: Mapping[str, Any]


def survey(directory: str | Path, episodes: int = 200, split: str = "") -> Survey:
    """Read a dataset's directory, <root>/<name>/<version> or <root>/<name> (its newest version).

    split: default train, else the first. Raises DataError for a directory that is no dataset, and
    for a record that cannot be read.
    """
    place = find_version(Path(directory))
    try:
        info = tfds.builder_from_directory(place).info
    except Exception as error:  # tfds raises whatever its parsers raise
        raise DataError(f"{place} cannot be opened: {error}; copy the dataset again") from error
    splits = {k: v for k, v in info.splits.items() if v.num_examples}
    if not splits:
        raise DataError(f"{place} has no episodes")
    split = split or ("train" if "train" in splits else next(iter(splits)))
    if split not in splits:
        raise DataError(f"{place} has no split {split!r} (there is: {', '.join(splits)})")
    if STEPS not in info.features or OBSERVATION not in info.features[STEPS].feature:
        raise DataError(f"{place} is no RLDS dataset: it lacks steps.observation")
    leaves = _leaves(info.features[STEPS].feature)
    seen = SurveyCollector(leaves)
    metadata = [seen.add(e) for e in _episodes(place, info, split, episodes)]
    rates = [float(m["control_hz"]) for m in metadata if "control_hz" in m]
    noted = place / SETTINGS
    about = json.loads(noted.read_text()).get("about", {}) if noted.is_file() else {}
    return Survey(
        directory=place,
        name=place.parent.name,
        version=place.name,
        split=split,
        total={k: v.num_examples for k, v in splits.items()},
        looked=len(seen.lengths),
        features={k: _words(f) for k, f in leaves.items()},
        lengths=np.array(seen.lengths, np.int64),
        numbers=seen.numbers,
        texts=seen.texts,
        pictures=seen.pictures,
        frozen=seen.frozen,
        control_hz=rates[0] if rates else 0.0,
        about=about,
    )


def find_version(directory: Path) -> Path:
    """Return the version's directory; DataError says what was found instead."""
    if (directory / "features.json").is_file():
        return directory.absolute()
    if directory.is_dir():
        versions = [d for d in directory.iterdir() if (d / "features.json").is_file()]
        if versions:
            return max(versions, key=lambda d: _version(d.name)).absolute()
        started = [d.name for d in directory.iterdir() if d.name.endswith(".incomplete")]
        if started or directory.name.endswith(".incomplete"):
            raise DataError(f"{directory} is not finished; run what was writing it to the end")
        found = ", ".join(sorted(d.name for d in directory.iterdir())[:10]) or "nothing"
        raise DataError(
            f"{directory} is no RLDS dataset: it has {found}, expected features.json or versions "
            "with it; scripts/convert.py makes one from other formats"
        )
    raise DataError(f"{directory} is no directory")


def describe_survey(seen: Survey) -> str:
    """Return the dataset in a few lines: splits, lengths, fields with the range of their values."""
    t = seen.lengths
    splits = ", ".join(f"{k} {n:,}" for k, n in seen.total.items())
    rate = f"{seen.control_hz:g} steps per second" if seen.control_hz else "control rate unknown"
    lines = [
        f"{seen.name} {seen.version}: episodes {splits}; {rate}",
        f"looked at {seen.looked} of {seen.split}: {t.min()} to {t.max()} steps, "
        f"median {np.median(t):g}, {t.sum():,} in all",
    ]
    wide = max(map(len, seen.features))
    for key, words in sorted(seen.features.items()):
        more = ""
        if key in seen.numbers:
            x = np.concatenate(seen.numbers[key])
            more = f"  {np.nanmin(x):.3g} to {np.nanmax(x):.3g}" if np.isfinite(x).any() else ""
        if key in seen.texts:
            some = set().union(*seen.texts[key])
            more = f"  {len(some)} texts, e.g. {sorted(some, key=len)[-1][:60]!r}"
        lines.append(f"  steps.{key:<{wide}}  {words}{more}")
    return "\n".join(lines)


class SurveyCollector:
    """What `survey` collects, an episode at a time."""

    def __init__(self, leaves: Mapping[str, Any]) -> None:
        self.lengths: list[int] = []
        self.images = [k for k, f in leaves.items() if isinstance(f, tfds.features.Image)]
        self.texts = {k: [] for k, f in leaves.items() if isinstance(f, tfds.features.Text)}
        skip = BOOKKEEPING | {*self.images, *self.texts}
        self.numbers = {k: [] for k, f in leaves.items() if k not in skip and _is_number(f)}
        self.pictures: dict[str, list[list[bytes]]] = {k: [] for k in self.images}
        self.frozen = dict.fromkeys(self.images, 0)

    def add(self, episode: Mapping[str, Any]) -> Mapping[str, Any]:
        """Take what is kept of an episode; return its metadata."""
        steps = _leaves(episode[STEPS])
        t = len(next(iter(steps.values())))
        self.lengths.append(t)
        for key, kept in self.numbers.items():
            kept.append(np.asarray(steps[key], np.float64).reshape(t, -1))
        for key, kept in self.texts.items():
            kept.append({x.decode("utf-8", "replace") for x in steps[key]})
        for key in self.images if t else ():
            frames = steps[key]
            self.frozen[key] += t > 1 and frames[0] == frames[-1]
            if len(self.pictures[key]) < SHOWN:
                at = np.linspace(0, t - 1, FRAMES).round().astype(int)
                self.pictures[key].append([frames[i] for i in at])
        return episode.get("episode_metadata", {})


def _episodes(place: Path, info: Any, split: str, most: int) -> Iterator[dict[str, Any]]:
    """Yield parsed episodes, images encoded, from every shard as many as of the others."""
    files = [str(f) for f in info.splits[split].filepaths]
    share = -(-most // len(files)) if most else max(info.splits[split].shard_lengths)
    skip = {STEPS: tfds.decode.SkipDecoding()}
    parse = tf.function(
        lambda raw: info.features.deserialize_example(raw, decoders=skip),
        input_signature=[tf.TensorSpec((), tf.string)],
    )
    left = most or info.splits[split].num_examples
    for path in files:
        if not Path(path).is_file():
            raise DataError(f"{path} is missing; copy the dataset again")
        try:
            for raw in tf.data.TFRecordDataset(path).take(min(share, left)):
                yield tf.nest.map_structure(lambda x: x.numpy(), parse(raw))
                left -= 1
        except tf.errors.OpError as error:
            raise DataError(
                f"{path} cannot be read: {error_summary(error)}; copy it again"
            ) from None
        if left <= 0:
            return


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping | tfds.features.FeaturesDict)
        result |= _leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return result


def _is_number(feature: Any) -> bool:
    shape, dtype = getattr(feature, "shape", None), getattr(feature, "np_dtype", None)
    if shape is None or None in shape or dtype is None:
        return False
    return np.dtype(dtype).kind in "fiub" and len(shape) <= 2 and np.prod(shape) <= WIDEST


def _words(feature: Any) -> str:
    if isinstance(feature, tfds.features.Image):
        return f"image {tuple(feature.shape)}"
    if isinstance(feature, tfds.features.Text):
        return "text"
    if isinstance(feature, tfds.features.Dataset):
        return "nested dataset"
    return f"{np.dtype(feature.np_dtype).name} {tuple(feature.shape)}"


def _version(name: str) -> list[int]:
    return [int(x) if x.isdigit() else -1 for x in name.split(".")]
