"""Image resizing in numpy, identical to the data pipeline's in tensorflow."""

from __future__ import annotations

import functools

import numpy as np


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a uint8 image [h, w, 3] to [height, width, 3]: bilinear, antialiased when shrinking.

    Bit-identical to tf.image.resize(antialias=True) of the data pipeline: float32 throughout, rows
    before columns, taps in order; a test checks this. An image of the right size is returned
    unchanged.
    """
    if image.shape[:2] == (height, width):
        return image
    transposed = _resize_rows(image.astype(np.float32), height).transpose(1, 0, 2)
    out = _resize_rows(transposed, width).transpose(1, 0, 2)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def _resize_rows(x: np.ndarray, new: int) -> np.ndarray:
    """Return float32 [h, ...] with its first axis resized: [new, ...]."""
    first, weights = _weights(len(x), new)
    out = np.zeros((new, *x.shape[1:]), np.float32)
    for tap, weight in enumerate(weights):
        out += weight[:, None, None] * x[np.minimum(first + tap, len(x) - 1)]
    return out


@functools.lru_cache(maxsize=32)
def _weights(size: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first input row of each output row, int [new], and float32 weights [taps, new].

    Unused taps have weight 0. The filter is a triangle of the width of an output pixel, but at
    least of an input pixel.
    """
    step = np.float32(1) / (np.float32(new) / np.float32(size))
    reach = max(step, np.float32(1))
    centers = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * step
    first = np.clip(np.ceil(centers - reach - np.float32(0.5)), 0, size - 1).astype(int)
    last = np.clip(np.floor(centers + reach - np.float32(0.5)), 0, size - 1).astype(int)
    weights, total = [], np.zeros(new, np.float32)
    for tap in range(int((last - first).max()) + 1):
        position = (first + tap).astype(np.float32) + np.float32(0.5) - centers
        weight = np.maximum(0, 1 - np.abs(position * (np.float32(1) / reach)))
        weights.append(np.where(first + tap <= last, weight, 0).astype(np.float32))
        total += weights[-1]
    return first, np.stack(weights) * (np.float32(1) / total)
