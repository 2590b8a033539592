"""The interface of recordings in any format, and the conversion of one episode.

Camera frames are encoded one at a time, so the pixels of an episode are never in memory together.
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
BLOCK = 64  # frames per read of an array on disk
# Keys of the instruction in recordings.
INSTRUCTIONS = ("language_instruction", "instruction", "natural_language_instruction", "language")


@dataclass(frozen=True)
class EpisodeLocation:
    """The location of an episode in a recording.

    file: relative to the path of the recording, or its own name; key: of the episode in the file;
    split: of the recording, or "".
    """

    file: str
    key: str = ""
    split: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.key}" if self.key else self.file


@dataclass(frozen=True)
class ConvertOptions:
    """Options for reading episodes.

    Attributes:
        instruction: for episodes without one.
        jpeg: quality of frames that are not JPEG yet and have at least `SMALL` pixels per side;
            smaller frames become PNG. 0: always PNG, which is lossless.
        bgr: frames are stored in BGR order (by OpenCV).
        control_hz: steps per second; 0: from the recording.
    """

    instruction: str = ""
    jpeg: int = 95
    bgr: bool = False
    control_hz: float = 0.0


class Recording(Protocol):
    """A file or folder of episodes in one format."""

    @property
    def path(self) -> Path:
        """Return the file or folder."""

    @property
    def options(self) -> ConvertOptions:
        """Return the options for reading episodes."""

    def episodes(self) -> list[EpisodeLocation]:
        """Return the episodes, in a fixed order."""

    def read(self, location: EpisodeLocation) -> dict[str, Any]:
        """Return an episode for octolike.data.rlds.writer; DataError for a bad one."""

    def metadata(self) -> dict[str, Any]:
        """Return the known facts: {"control_hz": …, "names": {field: names of its dimensions}}."""


def encode(
    frames: Iterable[np.ndarray | bytes], options: ConvertOptions, source: str
) -> EncodedImage:
    """Return encoded frames, from uint8 arrays [h, w, 3 or 1 or 4] or encoded images.

    JPEG images of three channels keep their bytes.
    """
    result: list[bytes] = []
    shape: tuple[int, int, int] | None = None
    kind = ""
    for t, frame in enumerate(frames):
        encoded = frame if isinstance(frame, bytes) and not options.bgr else None
        size = None if encoded is None else _rgb_size(encoded, f"{source}, step {t}")
        if size is None:
            pixels = _pixels(frame, options.bgr, f"{source}, step {t}")
            size = pixels.shape
        if shape is None:
            is_jpeg = encoded is not None and encoded.startswith(JPEG)
            lossy = is_jpeg or (options.jpeg and min(size[:2]) >= SMALL)
            shape, kind = size, "jpeg" if lossy else "png"
        if size != shape:
            raise DataError(f"{source}, step {t}: the frame is {size}, the first one is {shape}")
        if encoded is not None:
            if encoded.startswith(JPEG if kind == "jpeg" else PNG):
                result.append(encoded)
                continue
            pixels = _pixels(frame, False, f"{source}, step {t}")
        quality = options.jpeg or 95
        jpeg = kind == "jpeg"
        image = tf.io.encode_jpeg(pixels, quality=quality) if jpeg else tf.io.encode_png(pixels)
        result.append(image.numpy())
    if shape is None:
        raise DataError(f"{source} has no frames")
    height, width, channels = map(int, shape)
    return EncodedImage(tuple(result), (height, width, channels), kind)


def episode(
    steps: Mapping[str, Any],
    cameras: Mapping[str, EncodedImage],
    instruction: Any,
    options: ConvertOptions,
    metadata: Mapping[str, Any],
    source: str,
) -> dict[str, Any]:
    """Return the episode of numbers (steps, with steps["observation"]) and cameras.

    instruction: one string or T of them; options.instruction replaces empty ones. Numbers become
    float32, int64 or bool. Raises DataError if there is no action or no step, if lengths differ,
    or if a number is not finite.
    """
    if "action" not in steps:
        keys = ", ".join(sorted(_flat(steps))) or "nothing"
        raise DataError(f"{source} has no action; found: {keys}")
    lengths = {k: len(v) for k, v in _flat(steps).items()}
    lengths |= {f"observation.{k}": len(v) for k, v in cameras.items()}
    if len(set(lengths.values())) > 1 or not lengths["action"]:
        raise DataError(f"{source}: {_lengths(lengths)}; expected one length above 0")
    for key, x in _flat(steps).items():
        if np.issubdtype(np.asarray(x).dtype, np.floating) and not np.isfinite(x).all():
            t = np.argwhere(~np.isfinite(x))[0][0]
            raise DataError(f"{source}: {key} at step {t} is not finite")
    steps = dict(steps)
    observation = {k: to_storage_type(v) for k, v in steps.pop("observation", {}).items()}
    result: dict[str, Any] = {k: to_storage_type(v) for k, v in steps.items()}
    result["observation"] = observation | dict(cameras)
    result["language_instruction"] = _instructions(instruction, options, lengths["action"])
    hz = {"control_hz": np.float32(options.control_hz)} if options.control_hz else {}
    return {"steps": result, "episode_metadata": {**metadata, **hz, "source": source}}


def to_storage_type(x: Any) -> np.ndarray:
    """Return numbers as bool, uint8, int64 or float32."""
    x = np.asarray(x)
    if x.dtype == bool or x.dtype == np.uint8:
        return x
    return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float32)


def blocks(array: Any) -> Iterator[np.ndarray]:
    """Yield the rows of an array on disk, reading `BLOCK` at a time."""
    for start in range(0, len(array), BLOCK):
        yield from array[start : start + BLOCK]


def is_video(x: Any) -> bool:
    """Return whether an array [T, ...] contains camera frames."""
    return (
        x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] in (1, 3, 4) and min(x.shape[1:3]) > 4
    )


def text(x: Any) -> str:
    """Return a string from a string, bytes, an array of one element, or None."""
    x = x.item() if isinstance(x, np.ndarray | np.generic) and np.size(x) == 1 else x
    return x.decode("utf-8", "replace") if isinstance(x, bytes) else str(x or "")


def signature(episode: Mapping[str, Any]) -> dict[str, str]:
    """Return {field: type and shape of a step}; it must be the same for all episodes."""
    result = {}
    for key, x in _flat(episode["steps"]).items():
        if isinstance(x, EncodedImage):
            result[key] = f"{x.format} image {tuple(x.shape)}"
        elif np.asarray(x).dtype.kind in "USO":
            result[key] = "text"
        else:
            result[key] = f"{np.asarray(x).dtype} {np.shape(x)[1:]}"
    return result | {f"episode_metadata.{k}": "" for k in episode["episode_metadata"]}


def _instructions(instruction: Any, options: ConvertOptions, steps: int) -> Any:
    if isinstance(instruction, list):
        texts = [text(x).strip() or options.instruction for x in instruction]
        if len(texts) != steps:
            raise DataError(f"{len(texts)} instructions for {steps} steps")
        return np.array(texts, dtype=np.str_)
    return np.array([text(instruction).strip() or options.instruction] * steps, dtype=np.str_)


def _lengths(lengths: Mapping[str, int]) -> str:
    return "lengths " + ", ".join(f"{k} {n}" for k, n in sorted(lengths.items()))


def _rgb_size(encoded: bytes, source: str) -> tuple[int, int, int] | None:
    """Return the (h, w, 3) of an encoded RGB image; None if it must be encoded again."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:  # reads only the header
            keep = image.mode == "RGB" and image.format in ("JPEG", "PNG")
            return (image.height, image.width, 3) if keep else None
    except OSError as error:
        raise DataError(f"{source} is not an image: {error}") from None


def _pixels(frame: np.ndarray | bytes, bgr: bool, source: str) -> np.ndarray:
    if isinstance(frame, bytes):
        try:
            x = tf.io.decode_image(frame, channels=3, expand_animations=False).numpy()
        except tf.errors.OpError as error:
            raise DataError(f"{source} cannot be decoded: {error.message}") from None
    else:
        x = frame
    if x.ndim == 2:
        x = x[..., None]
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[-1] not in (1, 3, 4):
        raise DataError(f"{source}: {x.dtype} {x.shape} is not an image of uint8 [h, w, 3]")
    x = np.repeat(x, 3, -1) if x.shape[-1] == 1 else x[..., :3]
    return x[..., ::-1] if bgr else x


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
