"""Survey an RLDS dataset without a spec: its fields, lengths and values.

    survey = survey_dataset("data/my_robot")
    spec = infer_spec.infer(survey)
    print(describe_survey(survey)); problems.find_problems(survey, spec)

Reads the fields of features.json, in at most `episodes` episodes spread over the shards, and the
encoded images of five steps of four of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.data.rlds import decode, known_features, record_fields, record_files
from octolike.data.rlds.fields import DISCOUNT, IS_FIRST, IS_LAST, IS_TERMINAL, OBSERVATION, STEPS
from octolike.data.rlds.reader import to_numpy
from octolike.data.rlds.record_fields import ParsedEpisode
from octolike.data.rlds.record_files import PARSE_ERRORS, error_summary, one_line
from octolike.data.rlds.texts import is_text_list
from octolike.data.rlds.writer import SETTINGS
from octolike.errors import DataError
from octolike.tables import text_table

BOOKKEEPING = {IS_FIRST, IS_LAST, IS_TERMINAL, DISCOUNT, "reward"}
SAMPLE_EPISODES, SAMPLE_FRAMES = 4, 5  # images kept: episodes, frames of each
DARK, CONTRAST = 16, 8  # of 255: a darker frame, or one with less contrast, shows nothing
MOST_TEXTS = 16  # of a list of texts
# Words in the names of times, which differ at each start of the robot, and of calibrations.
NOT_STATE = re.compile(
    r"(^|[._])(time|timestamps?|stamps?|clock|intrinsics?|extrinsics?|cam2world|cam(era)?_k)([._]|$)"
)
WIDEST = 256  # fields with more dimensions are embeddings, not measurements


@dataclass(frozen=True)
class Survey:
    """Fields and values of one split.

    Attributes:
        directory, name, version, split: identify the data.
        total: {split: number of episodes}.
        count: number E of episodes read.
        features: {field under steps: description of its type}.
        lengths: int64 [E].
        numbers: {field: one float64 [T, dims] per episode}.
        texts: {field: one set of texts per episode}; fields of the episode: "episode.<path>"; of a
            list of texts, "<path>.0", "<path>.1", … up to `MOST_TEXTS`.
        longest: {field with lists of texts: length of the longest list}.
        depth: {field: type of its pixels}.
        images: {camera field: SAMPLE_EPISODES lists of SAMPLE_FRAMES encoded images}.
        frozen: {camera field: number of episodes with identical first and last images}.
        black: {camera field: number of black or empty frames in each episode}.
        undecodable: {camera field: number of episodes with a frame that cannot be decoded}.
        repeated: {camera field: share of the steps with a motion of the robot whose image equals
            the image before}.
        restarts: number of episodes with is_first or is_last at a step inside.
        dark, uniform: {camera field: number of episodes with a nearly black middle frame, or with
            one of nearly one colour}; black ones are not counted again.
        control_hz: 0 if unknown; of the first episode.
        rates: the different rates of the episodes.
        about: metadata of the converter.
    """

    directory: Path
    name: str
    version: str
    split: str
    total: Mapping[str, int]
    count: int
    features: Mapping[str, str]
    lengths: np.ndarray
    numbers: Mapping[str, list[np.ndarray]]
    texts: Mapping[str, list[set[str]]]
    longest: Mapping[str, int]
    depth: Mapping[str, str]
    images: Mapping[str, list[list[bytes]]]
    frozen: Mapping[str, int]
    black: Mapping[str, list[int]]
    undecodable: Mapping[str, int]
    dark: Mapping[str, int]
    uniform: Mapping[str, int]
    repeated: Mapping[str, float]
    restarts: int
    control_hz: float
    rates: tuple[float, ...]
    about: Mapping[str, Any]


def survey_dataset(directory: str | Path, episodes: int = 200, split: str = "") -> Survey:
    """Survey the dataset in <root>/<name>/<version> or <root>/<name> (its newest version).

    split: by default train, or the first split. Raises DataError for a directory that is not a
    dataset and for a record that cannot be read.
    """
    path = find_version(Path(directory))
    try:
        info = known_features.open_builder(str(path)).info
    except DataError:
        raise
    except Exception as error:  # tfds raises the errors of its parsers
        reason = one_line(error)
        raise DataError(f"{path} cannot be opened: {reason}; copy the dataset again") from error
    record_files.check_format(info, path.parent.name, str(path))
    splits = {k: v for k, v in info.splits.items() if v.num_examples}
    if not splits:
        raise DataError(f"{path} has no episodes")
    split = split or ("train" if "train" in splits else next(iter(splits)))
    if split not in splits:
        raise DataError(f"{path} has no split {split!r}; it has {', '.join(splits)}")
    if STEPS not in info.features or OBSERVATION not in info.features[STEPS].feature:
        raise DataError(f"{path} is not an RLDS dataset: it lacks steps.observation")
    fields = record_fields.field_tree(info.features)
    leaves = _leaves({k: v for k, v in fields.items() if k != record_fields.EPISODE})
    leaves = _with_strings(info, split, leaves)
    episode_leaves = _leaves({record_fields.EPISODE: fields[record_fields.EPISODE]})
    collector = SurveyCollector(leaves, episode_leaves)
    parsed = _episodes(info, split, episodes, collector.cameras)
    metadata = [collector.add(episode) for episode in parsed]
    if not sum(collector.lengths):
        raise DataError(f"{path}: none of the {len(collector.lengths)} episodes read has steps")
    rates = [_rate(m["control_hz"]) for m in metadata if "control_hz" in m]
    return Survey(
        directory=path,
        name=path.parent.name,
        version=path.name,
        split=split,
        total={k: v.num_examples for k, v in splits.items()},
        count=len(collector.lengths),
        features={k: _type_name(f) for k, f in leaves.items()},
        lengths=np.array(collector.lengths, np.int64),
        numbers=collector.numbers,
        texts=collector.texts,
        longest=collector.longest,
        depth={k: np.dtype(f.np_dtype).name for k, f in leaves.items() if _is_depth(k, f)},
        images=collector.images,
        frozen=collector.frozen,
        black=collector.black,
        undecodable=collector.undecodable,
        dark=collector.dark,
        uniform=collector.uniform,
        repeated={k: a / b if b else 0.0 for k, (a, b) in collector.repeated.items()},
        restarts=collector.restarts,
        control_hz=rates[0] if rates else 0.0,
        rates=tuple(dict.fromkeys(filter(None, rates))),
        about=_about(path / SETTINGS),
    )


def is_state(field: str) -> bool:
    """Return whether a name is not that of a time or of a camera's calibration."""
    return not NOT_STATE.search(field.lower())


def find_version(directory: Path) -> Path:
    """Return the directory of a version; DataError lists the files found instead."""
    known_features.check_path(str(directory))
    if (directory / "features.json").is_file():
        return directory.absolute()
    if directory.is_dir():
        versions = [d for d in directory.iterdir() if (d / "features.json").is_file()]
        if versions:
            return max(versions, key=lambda d: _version(d.name)).absolute()
        partial = [d.name for d in directory.iterdir() if d.name.endswith(".incomplete")]
        if partial or directory.name.endswith(".incomplete"):
            raise DataError(f"{directory} is not complete; run the command that wrote it again")
        names = ", ".join(sorted(d.name for d in directory.iterdir())[:10]) or "nothing"
        raise DataError(
            f"{directory} is not an RLDS dataset: it has {names}, expected features.json or "
            "versions with it; `octolike convert` reads other formats"
        )
    raise DataError(f"{directory} is not a directory")


def describe_survey(survey: Survey) -> str:
    """Return the splits and lengths, and a table of the fields with the range of their values."""
    t = survey.lengths
    splits = ", ".join(f"{k} {n:,}" for k, n in survey.total.items())
    rate = (
        f"{survey.control_hz:g} steps per second" if survey.control_hz else "control rate unknown"
    )
    rows = []
    episode = {k: "text" for k in survey.texts if k.startswith("episode.")}
    for key, type_name in sorted({**survey.features, **episode}.items()):
        values = ""
        if key in survey.numbers:
            x = np.concatenate(survey.numbers[key])
            values = f"{np.nanmin(x):.3g} to {np.nanmax(x):.3g}" if np.isfinite(x).any() else ""
        if key in survey.texts:
            texts = set().union(*survey.texts[key])
            longest = max(texts, key=len, default="")
            values = f"{len(texts)} texts, e.g. {longest[:60]!r}"
        rows.append((key if key in episode else f"steps.{key}", type_name, values))
    return "\n".join(
        [
            f"{survey.name} {survey.version}: episodes {splits}; {rate}",
            f"{survey.count} episodes of {survey.split} read: {t.min()} to {t.max()} steps, "
            f"median {np.median(t):g}, {t.sum():,} in total",
            text_table(rows, indent=2),
        ]
    )


class SurveyCollector:
    """Collects the values of a `Survey`, one episode at a time."""

    def __init__(self, leaves: Mapping[str, Any], episode: Mapping[str, Any]) -> None:
        self.lengths: list[int] = []
        depth = {k for k, f in leaves.items() if _is_depth(k, f)}
        self.cameras = [k for k, f in leaves.items() if _is_camera(f) and k not in depth]
        self.texts: dict[str, list[set[str]]] = {
            k: [] for k, f in {**leaves, **episode}.items() if isinstance(f, tfds.features.Text)
        }
        self.longest: dict[str, int] = {
            k: 0 for k, f in {**leaves, **episode}.items() if is_text_list(f)
        }
        skip = BOOKKEEPING | depth | {*self.cameras, *self.texts, *self.longest}
        self.numbers: dict[str, list[np.ndarray]] = {
            k: [] for k, f in leaves.items() if k not in skip and _is_number(f)
        }
        self.images: dict[str, list[list[bytes]]] = {k: [] for k in self.cameras}
        self.frozen = dict.fromkeys(self.cameras, 0)
        self.black: dict[str, list[int]] = {k: [] for k in self.cameras}
        self.undecodable = dict.fromkeys(self.cameras, 0)
        self.dark = dict.fromkeys(self.cameras, 0)
        self.uniform = dict.fromkeys(self.cameras, 0)
        # Images that equal the one before, and the steps with a motion.
        self.repeated = dict.fromkeys(self.cameras, (0, 0))
        self.restarts = 0

    def add(self, episode: ParsedEpisode) -> Mapping[str, Any]:
        """Add the values of an episode; return its metadata."""
        parsed = to_numpy(episode.steps)
        of_episode = parsed.pop(record_fields.EPISODE)
        steps, t = _leaves(parsed), len(parsed[IS_FIRST])
        steps |= _leaves({record_fields.EPISODE: of_episode})
        self.lengths.append(t)
        inside = [steps[IS_FIRST][1:], np.ravel(steps.get(IS_LAST, []))[:-1]]
        self.restarts += any(np.any(flags) for flags in inside)
        for key, arrays in self.numbers.items():
            x = np.asarray(steps[key], np.float64)
            arrays.append(x.reshape(t, math.prod(x.shape[1:])))
        for key, texts in self.texts.items():
            if key in steps:
                values = np.reshape(steps[key], -1)
                texts.append({x.decode("utf-8", "replace") for x in values.tolist()})
        for key in self.longest:
            self._add_texts(key, steps[key])
        for key in self.cameras if t else ():
            frames = episode.images[key].numpy()
            try:
                black = decode.black_frames(episode.images[key])
                self.black[key].append(int(black.sum()))
                if not black[t // 2]:
                    self._add_contrast(key, frames[t // 2])
            except (decode.UndecodableFrameError, tf.errors.OpError):
                self.undecodable[key] += 1
                continue
            self.frozen[key] += t > 1 and frames[0] == frames[-1]
            self._add_repeated(key, frames, black)
            if len(self.images[key]) < SAMPLE_EPISODES:
                sampled = np.linspace(0, t - 1, SAMPLE_FRAMES).round().astype(int)
                self.images[key].append([frames[i] for i in sampled])
        return of_episode.get("episode_metadata", {})

    def _add_texts(self, key: str, value: np.ndarray) -> None:
        """Add the lists of texts of an episode: one of the episode, or one of each step."""
        lists = [value] if key.startswith(f"{record_fields.EPISODE}.") else list(value)
        longest = max(map(len, lists), default=0)
        self.longest[key] = max(self.longest[key], longest)
        earlier = len(self.lengths) - 1
        for i in range(min(self.longest[key], MOST_TEXTS)):
            texts = self.texts.setdefault(f"{key}.{i}", [set() for _ in range(earlier)])
            texts.append({x[i].decode("utf-8", "replace") for x in lists if i < len(x)})

    def _add_repeated(self, key: str, frames: np.ndarray, black: np.ndarray) -> None:
        """Count the images that equal the image before, of the steps in which the robot moved."""
        fields = [k for k in self.numbers if k.startswith(f"{OBSERVATION}.") and is_state(k)]
        moved = np.zeros(max(len(frames) - 1, 0), bool)
        for field in fields:
            moved |= (np.diff(self.numbers[field][-1], axis=0) != 0).any(axis=1)
        moved &= ~black[1:]
        same = frames[1:] == frames[:-1]
        repeated, steps = self.repeated[key]
        self.repeated[key] = repeated + int((same & moved).sum()), steps + int(moved.sum())

    def _add_contrast(self, key: str, encoded: bytes) -> None:
        """Count a frame that shows nothing, such as that of a camera with its cap on."""
        pixels = tf.io.decode_image(encoded, channels=3, expand_animations=False).numpy()
        self.dark[key] += int(pixels.max() < DARK)
        self.uniform[key] += int(
            pixels.max() >= DARK and np.ptp(pixels, axis=(0, 1)).max() < CONTRAST
        )


def _episodes(info: Any, split: str, most: int, cameras: Sequence[str]) -> Iterator[ParsedEpisode]:
    """Yield parsed episodes, equally many from each shard; most 0: all."""
    files = [str(f) for f in info.splits[split].filepaths]
    share = -(-most // len(files)) if most else max(info.splits[split].shard_lengths)
    tree = record_fields.field_tree(info.features)
    paths = {k: record_fields.find_path(tree, k) or () for k in cameras}
    parser = record_fields.graph_parser(info.features, record_fields.not_image_array, paths, {}, 1)
    parse = record_fields.traced(parser, str(info.data_dir))
    remaining = most or info.splits[split].num_examples
    for path in files:
        if not Path(path).is_file():
            raise DataError(f"{path} is missing; copy the dataset again")
        record_files.check_lengths(path, Path(path).stat().st_size)
        try:
            for raw in tf.data.TFRecordDataset(path).take(min(share, remaining)):
                yield parse(raw)
                remaining -= 1
        except PARSE_ERRORS as error:
            problem = record_files.container_problem(path)
            reason = f"cannot be read: {error_summary(error)}; copy it again"
            raise DataError(f"{path} {problem or reason}") from None
        if remaining <= 0:
            return


def _with_strings(info: Any, split: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields; plain strings become texts, or encoded images by the first record."""
    strings = {
        k for k, f in leaves.items() if type(f) is tfds.features.Tensor and _is_one_string(f)
    }
    result = dict(leaves)
    episodes = _episodes(info, split, 1, ()) if strings else iter(())
    for episode in episodes:
        values = _leaves(to_numpy(episode.steps))
        for key in strings:
            encoded = next((x for x in np.ravel(values[key]) if x), b"")
            is_image = encoded.startswith((b"\xff\xd8\xff", b"\x89PNG"))
            result[key] = tfds.features.Image() if is_image else tfds.features.Text()
    return result


def _is_one_string(feature: Any) -> bool:
    return feature.shape == () and tf.as_dtype(feature.np_dtype) == tf.string


def _rate(value: Any) -> float:
    """Return a control rate; 0 for one that is not a positive number."""
    x = np.ravel(value)
    is_rate = x.size == 1 and x.dtype.kind in "fiu" and 0 < x[0] < np.inf
    return float(x[0]) if is_rate else 0.0


def _about(settings: Path) -> Mapping[str, Any]:
    """Return the converter's metadata; {} without them."""
    data = known_features.read_json(str(settings)) if settings.is_file() else {}
    about = data.get("about") if isinstance(data, dict) else None
    return about if isinstance(about, dict) else {}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping | tfds.features.FeaturesDict)
        result |= _leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return result


def _is_camera(feature: Any) -> bool:
    return record_fields.is_picture(feature) or record_fields.is_image_array(feature)


def _is_depth(name: str, feature: Any) -> bool:
    """Return whether a feature is one channel of more than 8 bits: [h, w, 1], or depth by name."""
    shape = tuple(getattr(feature, "shape", None) or ())
    if feature is None or len(shape) < 2 or None in shape[-1:]:
        return False
    wide = np.dtype(feature.np_dtype).kind in "fiu" and np.dtype(feature.np_dtype).itemsize > 1
    is_plane = (len(shape) == 3 and shape[-1] == 1) or (len(shape) == 2 and "depth" in name.lower())
    return wide and is_plane and (isinstance(feature, tfds.features.Image) or min(shape[:2]) > 4)


def _is_number(feature: Any) -> bool:
    shape, dtype = getattr(feature, "shape", None), getattr(feature, "np_dtype", None)
    if shape is None or None in shape or dtype is None:
        return False
    if record_fields.parse_problem(feature):
        return False
    return np.dtype(dtype).kind in "fiub" and len(shape) <= 2 and np.prod(shape) <= WIDEST


def _type_name(feature: Any) -> str:
    if isinstance(feature, tfds.features.Image):
        return f"image {tuple(feature.shape)}"
    if record_fields.is_image_array(feature):
        return f"image {tuple(feature.shape)}, stored as an array"
    if record_fields.is_picture(feature):
        return "several images per step: the last one is used"
    if isinstance(feature, tfds.features.Text):
        return "text"
    if is_text_list(feature):
        return "list of texts"
    if isinstance(feature, tfds.features.Dataset):
        return "nested dataset"
    problem = record_fields.parse_problem(feature)
    return f"{np.dtype(feature.np_dtype).name} {tuple(feature.shape)}" + (
        f": not read, {problem}" if problem else ""
    )


def _version(name: str) -> list[int]:
    return [int(x) if x.isdigit() else -1 for x in name.split(".")]
