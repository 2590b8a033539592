"""What every format gives the converter: a list of episodes, and each of them when asked.

Camera frames become encoded images one at a time, so that an episode's pixels are never in memory
together.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from PIL import Image

from octolike.data.rlds.writer import EncodedImage
from octolike.errors import DataError

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
SMALL = 128  # pixels: frames with a shorter side are stored as PNG
BLOCK = 64  # frames of an array on disk that are read at once
# Names under which recordings keep the instruction.
INSTRUCTIONS = ("language_instruction", "instruction", "natural_language_instruction", "language")


@dataclass(frozen=True)
class EpisodeLocation:
    """One episode of a source.

    file: relative to the source's path, or the path's own name; key: inside it; split: the source's
    own, or "".
    """

    file: str
    key: str = ""
    split: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.key}" if self.key else self.file


@dataclass(frozen=True)
class ConvertOptions:
    """How episodes are read.

    Attributes:
        instruction: for episodes that carry none.
        jpeg: quality of camera frames that are not JPEG already and have at least `SMALL` pixels a
            side; smaller ones are PNG; 0: always PNG, which is exact.
        bgr: camera frames are stored blue first (written by OpenCV).
        control_hz: steps per second; 0: what the source says.
    """

    instruction: str = ""
    jpeg: int = 95
    bgr: bool = False
    control_hz: float = 0.0


class Recording(Protocol):
    """Recordings in one format."""

    path: Path
    options: ConvertOptions

    def items(self) -> list[EpisodeLocation]:
        """Return the episodes, in a fixed order."""

    def read(self, item: EpisodeLocation) -> dict[str, Any]:
        """Return an episode for octolike.data.rlds.writer; DataError names the fault."""

    def about(self) -> dict[str, Any]:
        """Return what the format says of its numbers: {"control_hz": …, "names": {field: …}}."""


def encode(
    frames: Iterable[np.ndarray | bytes], options: ConvertOptions, where: str
) -> EncodedImage:
    """Return frames, uint8 arrays [h, w, 3 or 1 or 4] or encoded images, as they will be stored.

    Bytes that are JPEG of three channels already are not touched.
    """
    result, shape, kind = [], None, ""
    for t, frame in enumerate(frames):
        ready = isinstance(frame, bytes) and not options.bgr
        size = _size(frame, f"{where}, step {t}") if ready else None
        if size is None:
            pixels = _pixels(frame, options.bgr, f"{where}, step {t}")
            size = pixels.shape
        if shape is None:
            given = ready and frame.startswith(JPEG)
            lossy = given or (options.jpeg and min(size[:2]) >= SMALL)
            shape, kind = size, "jpeg" if lossy else "png"
        if size != shape:
            raise DataError(f"{where}, step {t}: the frame is {size}, the first is {shape}")
        if ready and frame.startswith(JPEG if kind == "jpeg" else PNG):
            result.append(frame)
            continue
        if ready:
            pixels = _pixels(frame, False, f"{where}, step {t}")
        quality = options.jpeg or 95
        jpeg = kind == "jpeg"
        made = tf.io.encode_jpeg(pixels, quality=quality) if jpeg else tf.io.encode_png(pixels)
        result.append(made.numpy())
    if not result:
        raise DataError(f"{where} has no frames")
    return EncodedImage(tuple(result), tuple(map(int, shape)), kind)


def episode(
    steps: Mapping[str, Any],
    cameras: Mapping[str, EncodedImage],
    instruction: Any,
    options: ConvertOptions,
    metadata: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    """Return an episode of numbers (steps, with steps["observation"]) and cameras.

    instruction: one string or T of them; where empty, the options' own. Numbers become float32,
    int64 or bool. Raises DataError for no action, no steps, or lengths that differ.
    """
    if "action" not in steps:
        found = ", ".join(sorted(_flat(steps))) or "nothing"
        raise DataError(f"{where} has no action; found: {found}")
    lengths = {k: len(v) for k, v in _flat(steps).items()}
    lengths |= {f"observation.{k}": len(v) for k, v in cameras.items()}
    if len(set(lengths.values())) > 1 or not lengths["action"]:
        raise DataError(f"{where}: {_lengths(lengths)}; expected one length above 0")
    for key, x in _flat(steps).items():
        if np.issubdtype(np.asarray(x).dtype, np.floating) and not np.isfinite(x).all():
            t = np.argwhere(~np.isfinite(x))[0][0]
            raise DataError(f"{where}: {key} at step {t} is not finite")
    steps = dict(steps)
    observation = {k: plain(v) for k, v in steps.pop("observation", {}).items()}
    result = {k: plain(v) for k, v in steps.items()}
    result["observation"] = observation | dict(cameras)
    result["language_instruction"] = _instructions(instruction, options, lengths["action"])
    hz = {"control_hz": np.float32(options.control_hz)} if options.control_hz else {}
    return {"steps": result, "episode_metadata": {**metadata, **hz, "source": where}}


def plain(x: Any) -> np.ndarray:
    """Return numbers in the few types that datasets keep."""
    x = np.asarray(x)
    if x.dtype == bool or x.dtype == np.uint8:
        return x
    return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float32)


def blocks(array: Any) -> Iterator[np.ndarray]:
    """Yield the rows of an array on disk, read a few at a time."""
    for start in range(0, len(array), BLOCK):
        yield from array[start : start + BLOCK]


def is_video(x: Any) -> bool:
    """Tell whether an array [T, ...] is camera frames."""
    return (
        x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] in (1, 3, 4) and min(x.shape[1:3]) > 4
    )


def text(x: Any) -> str:
    """Return a string that may be bytes, an array of one, or None."""
    x = x.item() if isinstance(x, np.ndarray | np.generic) and np.size(x) == 1 else x
    return x.decode("utf-8", "replace") if isinstance(x, bytes) else str(x or "")


def signature(made: Mapping[str, Any]) -> dict[str, str]:
    """Return {field: type and shape of a step} of an episode: alike for all of a dataset."""
    result = {}
    for key, x in _flat(made["steps"]).items():
        if isinstance(x, EncodedImage):
            result[key] = f"{x.format} image {tuple(x.shape)}"
        elif np.asarray(x).dtype.kind in "USO":
            result[key] = "text"
        else:
            result[key] = f"{np.asarray(x).dtype} {np.shape(x)[1:]}"
    return result | {f"episode_metadata.{k}": "" for k in made["episode_metadata"]}


def _instructions(instruction: Any, options: ConvertOptions, steps: int) -> Any:
    if isinstance(instruction, list):
        texts = [text(x).strip() or options.instruction for x in instruction]
        if len(texts) != steps:
            raise DataError(f"{len(texts)} instructions for {steps} steps")
        return np.array(texts, dtype=np.str_)
    return np.array([text(instruction).strip() or options.instruction] * steps, dtype=np.str_)


def _lengths(lengths: Mapping[str, int]) -> str:
    return "lengths " + ", ".join(f"{k} {n}" for k, n in sorted(lengths.items()))


def _size(encoded: bytes, where: str) -> tuple[int, int, int] | None:
    """Return the (h, w, 3) of an encoded image, None where it must be made anew."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:  # reads the header alone
            good = image.mode == "RGB" and image.format in ("JPEG", "PNG")
            return (image.height, image.width, 3) if good else None
    except OSError as error:
        raise DataError(f"{where} is no image: {error}") from None


def _pixels(frame: np.ndarray | bytes, bgr: bool, where: str) -> np.ndarray:
    if isinstance(frame, bytes):
        try:
            frame = tf.io.decode_image(frame, channels=3, expand_animations=False).numpy()
        except tf.errors.OpError as error:
            raise DataError(f"{where} cannot be decoded: {error.message}") from None
    if frame.ndim == 2:
        frame = frame[..., None]
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] not in (1, 3, 4):
        raise DataError(f"{where}: {frame.dtype} {frame.shape} is no picture of uint8 [h, w, 3]")
    frame = np.repeat(frame, 3, -1) if frame.shape[-1] == 1 else frame[..., :3]
    return frame[..., ::-1] if bgr else frame


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
