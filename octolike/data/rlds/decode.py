"""Decoding and resizing of encoded images; `decode_images` is TensorFlow graph code."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

# Bit depth and colour type in the header of a PNG: TFDS stores the 4 bytes of a float as RGBA.
_RGBA = b"\x08\x06"


def decode_images(encoded: tf.Tensor, side: int) -> tf.Tensor:
    """Return uint8 [N, side, side, 3] of N JPEG or PNG images; empty bytes give a black image.

    An image of another size is resized bilinearly with antialiasing, and rounded. The policy does
    the same with camera images.
    """
    return tf.map_fn(
        lambda x: _decode_or_black(x, side),
        encoded,
        fn_output_signature=tf.TensorSpec((side, side, 3), tf.uint8),
        parallel_iterations=8,
    )


def decode_depth(stored: bytes | np.ndarray, side: int) -> np.ndarray:
    """Return float32 [side, side, 1], in the stored unit, of an encoded image or an array [h, w].

    Resized by nearest neighbour: interpolation would invent depths between the sides of an edge.
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
    """Raise tf.errors.OpError for bytes that are not an image; empty bytes are allowed."""
    if encoded:
        tf.io.decode_image(encoded, channels=3, expand_animations=False)


def _decode_or_black(encoded: tf.Tensor, side: int) -> tf.Tensor:
    black = tf.zeros((side, side, 3), tf.uint8)
    return tf.cond(
        tf.strings.length(encoded) == 0, lambda: black, lambda: _decode_resized(encoded, side)
    )


def _decode_resized(encoded: tf.Tensor, side: int) -> tf.Tensor:
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape((None, None, 3))
    fits = tf.reduce_all(tf.shape(image)[:2] == side)
    image = tf.cond(fits, lambda: image, lambda: _resize(image, side))
    return tf.ensure_shape(image, (side, side, 3))


def _resize(image: tf.Tensor, side: int) -> tf.Tensor:
    resized = tf.image.resize(image, (side, side), method="bilinear", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)
