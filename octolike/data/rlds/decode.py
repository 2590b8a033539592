"""Encoded bytes to pixels, in graph code: decoding and resizing."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

# Bit depth and colour type in a PNG's header: TFDS stores the four bytes of a float as colours.
_RGBA = b"\x08\x06"


def decode_images(encoded: tf.Tensor, side: int) -> tf.Tensor:
    """Return uint8 [N, side, side, 3] of N JPEG or PNG images; black where the bytes are empty.

    Resized only where the size differs: bilinear with antialiasing, rounded. The policy does the
    same to what a camera gives.
    """
    return tf.map_fn(
        lambda x: _decode_one(x, side),
        encoded,
        fn_output_signature=tf.TensorSpec((side, side, 3), tf.uint8),
        parallel_iterations=8,
    )


def decode_depth(stored: bytes | np.ndarray, side: int) -> np.ndarray:
    """Return float32 [side, side, 1], in the stored unit, of an encoded image or an array [h, w].

    The nearest pixel where the size differs: between an edge's two sides there is nothing.
    """
    if isinstance(stored, bytes) and stored[24:26] == _RGBA:
        stored = tf.io.decode_png(stored, channels=4).numpy().view(np.float32)
    elif isinstance(stored, bytes):
        stored = tf.io.decode_png(stored, channels=1, dtype=tf.uint16).numpy()
    depth = np.asarray(stored, np.float32)
    depth = depth.reshape(*depth.shape[:2], -1)[..., :1]
    rows, columns = (((np.arange(side) + 0.5) * n / side).astype(np.int64) for n in depth.shape[:2])
    return depth[rows][:, columns]


def check_image(encoded: bytes) -> None:
    """Raise tf.errors.OpError for bytes that are no image; empty ones stand for a black image."""
    if encoded:
        tf.io.decode_image(encoded, channels=3, expand_animations=False)


def _decode_one(encoded: tf.Tensor, side: int) -> tf.Tensor:
    black = tf.zeros((side, side, 3), tf.uint8)
    return tf.cond(tf.strings.length(encoded) == 0, lambda: black, lambda: _read(encoded, side))


def _read(encoded: tf.Tensor, side: int) -> tf.Tensor:
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape((None, None, 3))
    fits = tf.reduce_all(tf.shape(image)[:2] == side)
    image = tf.cond(fits, lambda: image, lambda: _resize(image, side))
    return tf.ensure_shape(image, (side, side, 3))


def _resize(image: tf.Tensor, side: int) -> tf.Tensor:
    resized = tf.image.resize(image, (side, side), method="bilinear", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)
