"""Encoding of camera and depth frames, one at a time: the pixels are never in memory together."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from PIL import Image, UnidentifiedImageError

from octolike.data.rlds.decode import MOST_PIXELS
from octolike.data.rlds.writer import EncodedImage
from octolike.errors import DataError

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# Pillow would give a PostScript picture to Ghostscript, which executes it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
SMALL = 128  # pixels: frames with a shorter side are stored as PNG


@dataclass(frozen=True)
class ConvertOptions:
    """Options for reading episodes.

    Attributes:
        instruction: for episodes without one.
        jpeg: quality of frames that are not JPEG yet and have at least `SMALL` pixels per side;
            smaller frames become PNG. 0: always PNG, which is lossless.
        bgr: frames are stored in BGR order (by OpenCV).
        control_hz: steps per second; 0: from the recording.
        fields: {field: path in the recording}, for recordings in a layout of their own.
    """

    instruction: str = ""
    jpeg: int = 95
    bgr: bool = False
    control_hz: float = 0.0
    fields: tuple[tuple[str, str], ...] = ()


def encode(
    frames: Iterable[np.ndarray | bytes], options: ConvertOptions, source: str
) -> EncodedImage:
    """Return encoded RGB frames, from uint8 arrays [h, w, 3 or 1 or 4] or encoded images.

    JPEG and PNG images keep their bytes if they are RGB; all others (grey, with transparency, with
    a palette, in another format) are decoded and encoded again.
    """
    result: list[bytes] = []
    shape: tuple[int, int, int] | None = None
    is_jpeg = False
    for t, frame in enumerate(frames):
        place = f"{source}, step {t}"
        header = _header(frame, place) if isinstance(frame, bytes) else None
        reusable = header is not None and header.is_plain_rgb and not options.bgr
        pixels = None if reusable else _pixels(frame, options.bgr, place)
        if pixels is None:
            assert header is not None
            size = (*header.size, 3)
        else:
            size = (pixels.shape[0], pixels.shape[1], 3)
        if shape is None:
            was_jpeg = header is not None and header.format == "JPEG"
            is_jpeg = was_jpeg or bool(options.jpeg and min(size[:2]) >= SMALL)
            shape = size
        if size != shape:
            raise DataError(f"{place}: the frame is {size}, the first one is {shape}")
        if reusable and header is not None and (header.format == "JPEG") == is_jpeg:
            assert isinstance(frame, bytes)
            result.append(frame)
            continue
        pixels = _pixels(frame, options.bgr, place) if pixels is None else pixels
        quality = options.jpeg or 95
        image = tf.io.encode_jpeg(pixels, quality=quality) if is_jpeg else tf.io.encode_png(pixels)
        result.append(image.numpy())
    if shape is None:
        raise DataError(f"{source} has no frames")
    return EncodedImage(tuple(result), shape, "jpeg" if is_jpeg else "png")


def encode_depth(frames: Iterable[np.ndarray | bytes], source: str) -> tuple[EncodedImage, bool]:
    """Return (depth frames as PNG, whether values that are not finite, no echo, became 0).

    Integers are stored as uint16, floats as float32. frames: [h, w], [h, w, 1], or encoded images
    of one channel. Raises DataError for integers that do not fit.
    """
    result: list[bytes] = []
    shape: tuple[int, int, int] | None = None
    pixels, replaced = "", False
    for t, frame in enumerate(frames):
        place = f"{source}, step {t}"
        x = _depth_array(frame, place)
        kind = "float32" if x.dtype.kind == "f" else "uint16"
        shape, pixels = shape or (x.shape[0], x.shape[1], 1), pixels or kind
        if (x.shape, kind) != (shape, pixels):
            raise DataError(
                f"{place}: the frame is {kind} {x.shape}, the first one is {pixels} {shape}"
            )
        if kind == "uint16":
            if x.min() < 0 or x.max() >= 2**16:
                raise DataError(f"{place}: depth from {x.min()} to {x.max()} does not fit uint16")
            stored = x.astype(np.uint16)
        else:
            replaced |= not np.isfinite(x).all()
            # TFDS stores the four bytes of a float as the four channels of a PNG.
            stored = np.where(np.isfinite(x), x, 0).astype("<f4").view(np.uint8)
        result.append(tf.io.encode_png(stored).numpy())
    if shape is None:
        raise DataError(f"{source} has no frames")
    return EncodedImage(tuple(result), shape, "png", pixels), replaced


def describe_form(frame: np.ndarray | bytes, place: str) -> str:
    """Return how a frame that is not RGB is stored; "" for an RGB frame."""
    if isinstance(frame, bytes):
        mode = _header(frame, place).mode
        return "" if mode == "RGB" else f"{mode} images: stored as RGB, without transparency"
    channels = 1 if frame.ndim == 2 else frame.shape[-1]
    return {
        1: "one channel: repeated three times",
        4: "four channels: the fourth, transparency or depth, is left out",
    }.get(channels, "")


def is_depth_image(encoded: bytes, place: str) -> bool:
    """Return whether an encoded image has one channel of more than 8 bits."""
    return _header(encoded, place).mode in ("I", "F", "I;16", "I;16B", "I;16L")


class _Header:
    """The header of an encoded image: format, mode in PIL's words, (h, w)."""

    def __init__(self, image: Image.Image) -> None:
        self.format, self.mode = image.format, image.mode
        self.size = (image.height, image.width)
        transparent = "transparency" in image.info
        self.is_plain_rgb = (
            image.mode == "RGB" and image.format in ("JPEG", "PNG") and not transparent
        )


def _header(encoded: bytes, place: str) -> _Header:
    try:
        with _open_image(encoded) as image:  # reads only the header
            return _Header(image)
    except UnidentifiedImageError:  # its message is the address of the bytes
        raise DataError(f"{place} is not an image ({', '.join(FORMATS)})") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{place} is not an image: {error}") from None


def _open_image(encoded: bytes) -> Image.Image:
    """Open an encoded image; ValueError for one with more than MOST_PIXELS, nothing decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
        try:
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from None
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels; expected at most {MOST_PIXELS:,}")
    return image


def _pixels(frame: np.ndarray | bytes, bgr: bool, place: str) -> np.ndarray:
    """Return uint8 [h, w, 3], RGB; one channel is repeated, transparency left out."""
    if isinstance(frame, bytes):
        try:
            with _open_image(frame) as image:
                frame = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{place} cannot be decoded: {error}") from None
    x = frame[..., None] if frame.ndim == 2 else frame
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[-1] not in (1, 3, 4):
        raise DataError(f"{place}: {x.dtype} {x.shape} is not an image of uint8 [h, w, 3]")
    x = np.repeat(x, 3, -1) if x.shape[-1] == 1 else x[..., :3]
    return x[..., ::-1] if bgr else x


def _depth_array(frame: np.ndarray | bytes, place: str) -> np.ndarray:
    """Return a depth frame as [h, w, 1]."""
    if isinstance(frame, bytes):
        try:
            with _open_image(frame) as image:
                frame = np.asarray(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{place} cannot be decoded: {error}") from None
    x = frame[..., None] if frame.ndim == 2 else frame
    if x.dtype.kind not in "fiu" or x.ndim != 3 or x.shape[-1] != 1:
        raise DataError(f"{place}: {x.dtype} {x.shape} is not depth [h, w] or [h, w, 1]")
    return x
