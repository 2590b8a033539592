"""Decoding and resizing of encoded images; `decode_images` is TensorFlow graph code."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

# A larger encoded image has content: a black one of h · w pixels takes at most this many bytes.
BLACK_BYTES, BLACK_BYTES_PER_PIXEL = 1000, 0.05

MOST_PIXELS = 1 << 26  # of an image: 8192 × 8192
# Markers of a JPEG's frame header (SOF0 to SOF15): C4, C8 and CC are others.
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))  # stuffing, TEM, RST0 to 7, SOI

# Bit depth and colour type in the header of a PNG: TFDS stores the 4 bytes of a float as RGBA.
_RGBA = b"\x08\x06"


def decode_images(encoded: tf.Tensor, side: int, resize: str, depth: bool = False) -> tf.Tensor:
    """Return uint8 [N, side, side, 3] of N JPEG or PNG images; empty bytes give a black image.
    depth: they are depth images, float32 [N, side, side, 1].

    An image of another size is resized with one of `KERNELS` and rounded. The policy does the same
    with camera images, bit for bit (`octolike.images`).
    """
    positions = tf.range(tf.size(encoded))
    return DecodedImages(encoded, positions, side, resize, depth=depth).gather(positions)


class DecodedImages:
    """N images, each decoded once; graph code.

    The loop over the images has as few operations as possible: the executor's time for them is
    several percent of that of decoding.
    """

    def __init__(
        self,
        encoded: tf.Tensor,
        positions: tf.Tensor,
        side: int,
        resize: str,
        *,
        depth: bool = False,
    ) -> None:
        """Decode the images at positions [N] of encoded [M]; empty bytes give zeros.

        resize: the kernel of images; depth is resized by nearest neighbour.
        """

        def decode_one(x: tf.Tensor) -> tf.Tensor:
            return _decode_resized_depth(x, side) if depth else decode_image(x, side, resize)

        def encoded_at(i: tf.Tensor) -> tf.Tensor:  # cheaper than slices
            return tf.gather(encoded, tf.gather(chosen, i))

        shape, dtype = (side, side, 1 if depth else 3), tf.float32 if depth else tf.uint8
        positions = tf.cast(positions, tf.int32)
        has_bytes = tf.gather(tf.strings.length(encoded) > 0, positions)
        # Slot 0 holds the zeros, slot i the i-th image with bytes.
        self._slots = tf.where(has_bytes, tf.cumsum(tf.cast(has_bytes, tf.int32)), 0)
        chosen = tf.concat([[0], tf.boolean_mask(positions, has_bytes)], 0)
        array = tf.TensorArray(dtype, size=tf.size(chosen), element_shape=shape)
        self._array = tf.while_loop(
            lambda i, _: i < tf.size(chosen),
            lambda i, array: (i + 1, array.write(i, decode_one(encoded_at(i)))),
            (1, array.write(0, tf.zeros(shape, dtype))),
            parallel_iterations=1,  # the graph decodes several parts of batches at a time
        )[1]

    def gather(self, index: tf.Tensor) -> tf.Tensor:
        """Return images by their number below N, [n, side, side, 3 or 1]; each is copied once."""
        return self._array.gather(tf.gather(self._slots, index))


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


def size_problem(encoded: bytes) -> str:
    """Return why an encoded image must not be decoded, by its header; "" for nothing.

    Nothing is decoded: a few kilobytes can decompress to gigabytes. BMP is not compressed. The
    frames of a GIF have sizes of their own, and all of them are decompressed.
    """
    if encoded.startswith(b"GIF8"):
        return "the image is a GIF; expected PNG or JPEG"
    width, height = _png_or_jpeg_size(encoded)
    return f"the image has more than {MOST_PIXELS:,} pixels" if width * height > MOST_PIXELS else ""


def _png_or_jpeg_size(encoded: bytes) -> tuple[int, int]:
    """Return (width, height) in the header of a PNG or JPEG; (0, 0) without one."""
    if encoded.startswith(b"\x89PNG") and len(encoded) >= 24:
        return struct.unpack(">II", encoded[16:24])
    if not encoded.startswith(b"\xff\xd8"):
        return 0, 0
    # The segments of a JPEG: marker, length, content; the frame header holds height and width.
    # Bytes between segments are skipped, as libjpeg does.
    at = 2
    while 0 <= (at := encoded.find(b"\xff", at)) <= len(encoded) - 9:
        marker = encoded[at + 1]
        if marker in _FRAME_HEADERS:
            height, width = struct.unpack(">HH", encoded[at + 5 : at + 9])
            return width, height
        if marker == 0xFF:
            at += 1
        elif marker in _WITHOUT_LENGTH:
            at += 2
        else:
            at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return 0, 0


def check_size(encoded: bytes) -> None:
    """Raise tf.errors.InvalidArgumentError for an image with a `size_problem`."""
    if problem := size_problem(encoded):
        raise tf.errors.InvalidArgumentError(None, None, problem)


def check_image(encoded: bytes) -> None:
    """Raise tf.errors.OpError for bytes that are not an image; empty bytes are allowed."""
    if encoded:
        check_size(encoded)
        tf.io.decode_image(encoded, channels=3, expand_animations=False)


def black_frames(frames: tf.Tensor) -> np.ndarray:
    """Return bool [T]: which encoded images (string [T]) are empty, a single pixel or all black.

    Decodes the first image and those that are suspiciously small, equal ones once. (Flags in the
    metadata cannot be used: those of Bridge V2 are False for images that exist.) Raises
    UndecodableFrameError for one of these that cannot be decoded, and for any with a
    `size_problem`: the stream decodes only images that this pass has seen.
    """
    encoded: list[bytes] = frames.numpy().tolist()
    sizes = np.array([len(x) for x in encoded], np.int64)
    black = sizes == 0
    if black.all():
        return black
    for t, image in enumerate(encoded):
        if size_problem(image):
            _decoded_frame(image, t)  # raises
    first = int(np.flatnonzero(~black)[0])
    pixels = _decoded_frame(encoded[first], first)
    limit = BLACK_BYTES + BLACK_BYTES_PER_PIXEL * pixels.shape[0] * pixels.shape[1]
    suspicious = sizes <= max(limit, sizes.max() / 4)
    if (sizes == sizes[first]).all():
        suspicious[:] = True  # not compressed: the size means nothing
    steps = {encoded[t]: t for t in np.flatnonzero(~black & suspicious).tolist()[::-1]}
    steps.pop(encoded[first], None)
    is_black = {encoded[first]: _is_black(pixels), **_find_black(steps)}
    return black | [is_black.get(x, False) for x in encoded]


class UndecodableFrameError(Exception):
    """An encoded image cannot be decoded.

    Attributes:
        step: its number in the episode.
        error: TensorFlow's error.
    """

    def __init__(self, step: int, error: tf.errors.OpError) -> None:
        super().__init__(step, error)
        self.step, self.error = step, error


def _decoded_frame(encoded: bytes, step: int) -> np.ndarray:
    try:
        check_size(encoded)
        return tf.io.decode_image(encoded, expand_animations=False).numpy()
    except tf.errors.OpError as error:
        raise UndecodableFrameError(step, error) from None


def _is_black(image: np.ndarray) -> bool:
    return image.size <= image.shape[-1] or not image.any()


def _find_black(steps: Mapping[bytes, int]) -> dict[bytes, bool]:
    """Return `_is_black` of encoded images, given with their first steps."""
    if not steps:
        return {}
    try:
        return dict(zip(steps, _are_black(list(steps)).numpy().tolist(), strict=True))
    except tf.errors.OpError:  # one at a time finds the step
        return {x: _is_black(_decoded_frame(x, t)) for x, t in steps.items()}


@tf.function(input_signature=[tf.TensorSpec((None,), tf.string)], autograph=False)
def _are_black(encoded: tf.Tensor) -> tf.Tensor:
    """Return bool [N]: `_is_black` of N encoded images, in one graph."""

    def is_black(x: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_image(x, expand_animations=False)
        return (tf.size(image) <= tf.shape(image)[-1]) | ~tf.reduce_any(image > 0)

    return tf.map_fn(is_black, encoded, fn_output_signature=tf.bool, parallel_iterations=1)


def _decode_resized_depth(encoded: tf.Tensor, side: int) -> tf.Tensor:
    """Return float32 [side, side, 1], in the stored unit: the same as `decode_depth`."""
    depth = tf.cond(
        tf.strings.substr(encoded, 24, 2) == _RGBA,
        lambda: tf.bitcast(tf.io.decode_png(encoded, channels=4), tf.float32)[..., None],
        lambda: tf.cast(tf.io.decode_png(encoded, channels=1, dtype=tf.uint16), tf.float32),
    )
    centers = tf.range(side, dtype=tf.float64) + 0.5
    size = tf.cast(tf.shape(depth)[:2], tf.float64)
    rows, columns = (tf.cast(centers * size[i] / side, tf.int64) for i in range(2))
    image = tf.gather(tf.gather(depth, rows), columns, axis=1)
    return tf.ensure_shape(image, (side, side, 1))


def decode_image(encoded: tf.Tensor, side: int, resize: str) -> tf.Tensor:
    """Return uint8 [side, side, 3] of one encoded image."""
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape((None, None, 3))
    fits = tf.reduce_all(tf.shape(image)[:2] == side)
    image = tf.cond(fits, lambda: image, lambda: _traced_resize(side, resize)(image))
    return tf.ensure_shape(image, (side, side, 3))


@functools.cache
def _traced_resize(side: int, kernel: str) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return `_resize` as one operation: inlined, the executor would walk through it if unused."""
    return tf.function(
        lambda image: _resize(image, side, kernel),
        input_signature=[tf.TensorSpec((None, None, 3), tf.uint8)],
        autograph=False,
        experimental_attributes={"_noinline": True},
    )


def _resize(image: tf.Tensor, side: int, kernel: str) -> tf.Tensor:
    return tf.cast(tf.round(KERNELS[kernel](image, side)), tf.uint8)


def _resize_area(image: tf.Tensor, side: int) -> tf.Tensor:
    shrinks = tf.reduce_all(tf.shape(image)[:2] >= side)
    return tf.cond(
        shrinks,
        lambda: tf.image.resize(image, (side, side), "area"),
        lambda: _resize_bilinear(image, side),
    )


def _resize_bilinear(image: tf.Tensor, side: int) -> tf.Tensor:
    return tf.image.resize(image, (side, side), "bilinear", antialias=True)


def _resize_lanczos3(image: tf.Tensor, side: int) -> tf.Tensor:
    resized = tf.image.resize(image, (side, side), "lanczos3", antialias=True)
    return tf.clip_by_value(resized, 0, 255)  # it overshoots at edges; the others are averages


# The values of data.resize: uint8 [h, w, 3] to float32 [side, side, 3], not rounded.
KERNELS = {"area": _resize_area, "bilinear": _resize_bilinear, "lanczos3": _resize_lanczos3}
