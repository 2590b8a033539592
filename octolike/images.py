"""Image resizing in numpy, bit-identical to the data pipeline's in tensorflow (`rlds/decode.py`).

Float32 throughout, and the taps of a pixel are added in order: a test compares both for all kernels
and many sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np


def resize(image: np.ndarray, height: int, width: int, kernel: str) -> np.ndarray:
    """Resize a uint8 image [h, w, 3] to [height, width, 3] with one of `KERNELS`.

    An image of the right size is returned unchanged.
    """
    if image.shape[:2] == (height, width):
        return image
    return np.rint(KERNELS[kernel](image.astype(np.float32), height, width)).astype(np.uint8)


def resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize with a triangle, as wide as two pixels of the input or of the output."""
    rows, columns = (_kernel_taps(*x, _triangle, 1) for x in _sizes(image, height, width))
    return _resize_columns(_resize_rows(image, *rows), *columns)


def resize_lanczos3(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize with a windowed sinc of three lobes: sharp; overshoot at edges is clipped."""
    rows, columns = (_kernel_taps(*x, _lanczos3, 3) for x in _sizes(image, height, width))
    return np.clip(_resize_columns(_resize_rows(image, *rows), *columns), 0, 255)


def resize_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shrink to the mean over each pixel's area; bilinear if a side grows."""
    if height > image.shape[0] or width > image.shape[1]:
        return resize_bilinear(image, height, width)
    rows, columns = (_area_taps(*x) for x in _sizes(image, height, width))
    out = _resize_rows(_resize_columns(image, *columns), *rows)
    steps = [np.float32(size) / np.float32(new) for size, new in _sizes(image, height, width)]
    return out * np.float32(1 / np.float64(steps[0] * steps[1]))


# The values of data.resize: functions of an image float32 [h, w, 3], in [0, 255] and not rounded.
KERNELS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "area": resize_area,
    "bilinear": resize_bilinear,
    "lanczos3": resize_lanczos3,
}


def _sizes(image: np.ndarray, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (image.shape[0], height), (image.shape[1], width)


def _resize_columns(x: np.ndarray, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _resize_rows(x.transpose(1, 0, 2), first, weights).transpose(1, 0, 2)


def _resize_rows(x: np.ndarray, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return float32 [h, ...] with its first axis resized: [new, ...].

    first: int [new], the first input row of each output row. weights: float32 [taps, new].
    """
    out = np.zeros((len(first), *x.shape[1:]), np.float32)
    for tap, weight in enumerate(weights):
        out += weight[:, None, None] * x[np.minimum(first + tap, len(x) - 1)]
    return out


@functools.lru_cache(maxsize=32)
def _kernel_taps(
    size: int, new: int, kernel: Callable[[np.ndarray], np.ndarray], radius: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row and the weights of a kernel of positions ≥ 0; unused taps have weight 0.

    The unit of positions is a pixel of the output, but at least one of the input: shrinking
    averages over more input pixels.
    """
    step = np.float32(1) / (np.float32(new) / np.float32(size))
    unit = max(step, np.float32(1))
    centers = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * step
    reach = np.float32(radius) * unit
    first = np.clip(np.ceil(centers - reach - np.float32(0.5)), 0, size - 1).astype(int)
    last = np.clip(np.floor(centers + reach - np.float32(0.5)), 0, size - 1).astype(int)
    weights, total = [], np.zeros(new, np.float32)
    for tap in range(int((last - first).max()) + 1):
        position = (first + tap).astype(np.float32) + np.float32(0.5) - centers
        weight = kernel(np.abs(position * (np.float32(1) / unit)))
        weights.append(np.where(first + tap <= last, weight, 0).astype(np.float32))
        total += weights[-1]
    return first, np.stack(weights) * (np.float32(1) / total)


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - x)


def _lanczos3(x: np.ndarray) -> np.ndarray:
    pi, radius = np.float32(np.pi), np.float32(3)
    is_center = x <= np.float32(1e-3)
    x = np.where(is_center, np.float32(1), x)
    value = radius * _sin(pi * x) * _sin(pi * x / radius) / (pi * pi * x * x)
    return np.where(is_center, 1, np.where(x > radius, 0, value)).astype(np.float32)


def _sin(x: np.ndarray) -> np.ndarray:
    """Return the float32 sine of the C library, which TensorFlow uses.

    For real float32, numpy has a sine of its own, with other roundings; for complex numbers it
    calls the C library.
    """
    return np.sin(x.astype(np.complex64)).real


@functools.lru_cache(maxsize=32)
def _area_taps(size: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row and the overlaps of input rows with each output row, for new ≤ size."""
    step = np.float32(size) / np.float32(new)
    edges = np.arange(new + 1, dtype=np.float32) * step
    low, high = edges[:-1], edges[1:]
    first = np.floor(low).astype(int)
    weights = []
    for tap in range(int((np.ceil(high) - first).max())):
        start = (first + tap).astype(np.float32)
        end = start + 1
        from_low = np.where(end > high, step, end - low)
        weight = np.where(start < low, from_low, np.where(end > high, high - start, 1))
        weights.append(np.where(start < np.ceil(high), weight, 0).astype(np.float32))
    return first, np.stack(weights)
