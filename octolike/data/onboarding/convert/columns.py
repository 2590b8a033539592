"""Sorts the columns of a recorded episode into cameras, depth and numbers.

    columns = Columns(options, "episode_0.hdf5")
    columns.add("front", array)          # [T, ...]: numpy, or a dataset of h5py
    recording.episode(steps, columns, instruction, {})

Every column is either used or listed in `left_out` with the reason; `changed` lists the columns
that are not stored in the form in which they were recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octolike.data.onboarding.convert.frame_encoding import (
    JPEG,
    PNG,
    ConvertOptions,
    describe_form,
    encode,
    encode_depth,
    is_depth_image,
)
from octolike.data.rlds.writer import EncodedImage
from octolike.errors import DataError

BLOCK, BLOCK_BYTES = 64, 1 << 28  # frames, and bytes, per read of an array on disk
LARGEST_NUMBERS = 4 << 30  # bytes of an array of numbers, which is read at once
SMALLEST = 4  # pixels: shorter sides are those of matrices, not of images
SIDE = 16  # pixels: planes of uint8 with shorter sides may be matrices
CHANNELS = (1, 3, 4)
FLOATS = "floats in 0 to"
OVERSHOOT = 0.01  # of the range of float images: resampling leaves it by a little
DARKEST = 3.0  # of 255: the largest value of float images that are not empty
LABELS = ("seg", "mask", "label")  # images of class numbers: interpolation would mix the classes


@dataclass
class Columns:
    """The columns of the observation of one episode.

    Attributes:
        options: for encoding frames.
        source: name of the episode in errors.
        numbers: {name: array [T, ...]}.
        cameras: {name: frames}, depth included.
        left_out: {column: reason}.
        changed: {column: how it is stored}.
    """

    options: ConvertOptions
    source: str
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    cameras: dict[str, EncodedImage] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, x: Any) -> None:
        """Add an array [T, ...] of images or numbers, in memory or on disk."""
        shape, kind = tuple(x.shape), np.dtype(x.dtype).kind
        if is_encoded(x):
            self.add_frames(name, encoded_frames(x))
        elif kind in "OSU":
            self.left_out[name] = (
                f"a text: use it as the instruction with --field language_instruction={name}"
            )
        elif kind not in "fiub" or not shape:
            self.left_out[name] = f"{x.dtype} {list(shape)} is neither numbers nor images"
        elif 0 in shape[1:]:
            self.left_out[name] = f"{x.dtype} {list(shape[1:])} has no values"
        elif len(shape) == 4 and _is_channels_first(shape):
            self._add_pictures(name, x, channels_first=True)
        elif _is_pictures(name, x):
            self._add_pictures(name, x)
        elif len(shape) == 5 and shape[-1] in CHANNELS and min(shape[2:4]) > SMALLEST:
            self.left_out[name] = f"{shape[1]} images per step; store each camera on its own"
        else:
            self._set(self.numbers, name, read_numbers(x, f"{self.source}, {name}"))
            if len(shape) in (3, 4) and min(shape[1:3]) >= SIDE:
                self.change(
                    name,
                    f"{x.dtype} {list(shape[1:])} kept as numbers: a camera has 1, 3 or 4 channels "
                    "of 8 bits, and the name of depth contains depth",
                )

    def add_frames(self, name: str, frames: Iterable[np.ndarray | bytes]) -> None:
        """Add the frames of a camera: uint8 [h, w, 3, 1 or 4], or encoded; encoded depth too."""
        place = f"{self.source}, camera {name}"
        frames = iter(frames)
        first = next(frames, None)
        if first is None:
            raise DataError(f"{place} has no frames")
        if isinstance(first, bytes) and is_depth_image(first, place):
            self.add_depth(name, _chain(first, frames))
        elif is_depth_name(name):
            self.left_out[name] = (
                "depth as an image of 8 bits: its scale is not recorded; rename it to use it as a "
                "camera"
            )
        else:
            if form := describe_form(first, place):
                self.change(name, form)
            self._set(self.cameras, name, encode(_chain(first, frames), self.options, place))

    def add_depth(self, name: str, frames: Iterable[np.ndarray | bytes]) -> None:
        """Add depth frames: integers or floats [h, w] or [h, w, 1], or encoded."""
        depth, replaced = encode_depth(frames, f"{self.source}, depth {name}")
        self._set(self.cameras, name, depth)
        self.change(name, f"depth, stored as {depth.pixels}")
        if replaced:
            self.change(name, "values that are not finite became 0")

    def _add_pictures(self, name: str, x: Any, channels_first: bool = False) -> None:
        """Add an array [T, h, w], [T, h, w, c] or [T, c, h, w] as depth, a camera or labels."""
        shape, kind = tuple(x.shape), np.dtype(x.dtype).kind
        channels = 1 if len(shape) == 3 else shape[1 if channels_first else -1]
        frames: Iterator[np.ndarray] = blocks(x)
        if kind == "b" or any(word in name.lower() for word in LABELS):
            self._set(self.numbers, name, read_numbers(x, f"{self.source}, {name}"))
            self.change(name, "labels of pixels, not a camera: kept as numbers")
            return
        if channels_first:
            frames = (np.moveaxis(f, 0, -1) for f in frames)
            self.change(name, "channels first: moved behind height and width")
        if channels == 1 and (is_depth_name(name) or x.dtype != np.uint8):
            self.add_depth(name, frames)
        elif is_depth_name(name):
            self.left_out[name] = "depth in colours: its scale is not recorded"
        elif x.dtype == np.uint8:
            self.add_frames(name, frames)
        elif kind == "f":
            self._add_float_pictures(name, x, frames)
        else:
            self.left_out[name] = f"images of {x.dtype}; expected uint8, or floats in 0 to 1"

    def _add_float_pictures(self, name: str, x: Any, frames: Iterator[np.ndarray]) -> None:
        low, high = np.inf, -np.inf
        for row in blocks(x):
            low, high = min(low, float(row.min())), max(high, float(row.max()))
        scale = 255 if high <= 1 + OVERSHOOT else 1
        largest = 255 / scale
        is_black = scale == 1 and high < DARKEST  # rather floats in 0 to 1 that overshoot
        if not (low >= -OVERSHOOT * largest and high <= (1 + OVERSHOOT) * largest) or is_black:
            self.left_out[name] = (  # also NaN
                f"{x.dtype} {list(x.shape[1:])} with values from {low:.3g} to {high:.3g}; expected "
                "images in 0 to 1 or 0 to 255"
            )
            return
        self.add_frames(
            name, (np.clip(np.round(f * scale), 0, 255).astype(np.uint8) for f in frames)
        )
        span = f"{FLOATS} {255 // scale}" if high > 0 else "floats, all of them 0"
        self.change(name, f"{span}: rounded to 8 bits")

    def change(self, name: str, text: str) -> None:
        """Add a remark on how a column is stored."""
        self.changed[name] = f"{self.changed[name]}; {text}" if name in self.changed else text

    def _set(self, columns: dict[str, Any], name: str, x: Any) -> None:
        if name in self.numbers or name in self.cameras:
            raise DataError(f"{self.source} has two columns {name!r}; rename one of them")
        columns[name] = x


def read_numbers(x: Any, place: str) -> np.ndarray:
    """Return an array, in memory or on disk; DataError for one of more than LARGEST_NUMBERS."""
    if x.nbytes > LARGEST_NUMBERS:
        raise DataError(
            f"{place}: {x.dtype} {list(x.shape)} has {x.nbytes:,} bytes; expected at most "
            f"{LARGEST_NUMBERS:,} of an array of numbers"
        )
    return np.asarray(x[()])


def short_names(paths: Iterable[str], separator: str) -> dict[str, str]:
    """Return {path: name}: without the groups "images" and "obs", joined by underscores.

    Two paths that would get one name keep all their groups.
    """
    paths = list(paths)
    full = {p: p.split(separator) for p in paths}
    short = {p: "_".join(_without_prefixes(parts)) for p, parts in full.items()}
    names = list(short.values())
    return {p: n if names.count(n) == 1 else "_".join(full[p]) for p, n in short.items()}


def is_encoded(x: Any) -> bool:
    """Return whether an array is T encoded images: rows of bytes, padded or of varying length."""
    if x.ndim not in (1, 2) or not len(x) or not (x.dtype == np.uint8 or x.dtype.kind in "OSV"):
        return False
    return next(encoded_frames(x[:1])).startswith((JPEG, PNG))


def encoded_frames(x: Any) -> Iterator[bytes]:
    """Yield encoded images without their padding."""
    for row in blocks(x):
        data = np.asarray(row)
        raw = data.item() if data.dtype == object and data.ndim == 0 else data
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw
        # JPEG and PNG never end in a zero byte.
        yield (raw if isinstance(raw, bytes) else np.asarray(raw).tobytes()).rstrip(b"\0")


def blocks(array: Any) -> Iterator[np.ndarray]:
    """Yield the rows of an array on disk, reading at most `BLOCK` of them at a time."""
    row = max(1, array.nbytes // max(1, len(array)))
    size = max(1, min(BLOCK, BLOCK_BYTES // row))
    for start in range(0, len(array), size):
        yield from array[start : start + size]


def is_depth_name(name: str) -> bool:
    """Return whether a name is that of a depth image."""
    return "depth" in name.lower()


def _is_channels_first(shape: tuple[int, ...]) -> bool:
    last_is_channel = shape[-1] in CHANNELS and min(shape[1:3]) > SMALLEST
    return shape[1] in CHANNELS and min(shape[2:]) > SMALLEST and not last_is_channel


def _is_pictures(name: str, x: Any) -> bool:
    """Return whether an array is images [T, h, w, c], or one channel of them [T, h, w]."""
    shape = tuple(x.shape)
    if len(shape) == 4:
        return shape[-1] in CHANNELS and min(shape[1:3]) > SMALLEST
    if len(shape) != 3 or min(shape[1:]) <= SMALLEST:
        return False
    return is_depth_name(name) or (x.dtype == np.uint8 and min(shape[1:]) >= SIDE)


def _without_prefixes(parts: list[str]) -> list[str]:
    start = 0
    while start < len(parts) - 1 and parts[start] in ("observation", "observations", "obs"):
        start += 1
    while start < len(parts) - 1 and parts[start] in ("images", "image", "rgb"):
        start += 1
    return parts[start:]


def _chain(first: Any, remaining: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from remaining
