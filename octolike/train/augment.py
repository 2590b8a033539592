"""Image augmentation inside the training step: uint8 images in, float32 images in 0 to 255 out.

What an image goes through; an operation that is off in the config is not even traced:

    1. geometry   a random box is cut out and resized to the whole image (bilinear)
    2. brightness a shift
    3. contrast   away from or towards each channel's mean
    4. saturation and 5. hue, both in HSV, in one pass
    6. clipping to 0 to 255, which HSV wants of its input too

Depth images are cut out like the colours they belong to, without mixing pixels: 0 is no distance.

Every operation, camera and goal image has its own random number. It is drawn per example: the
frames of a window share geometry and colours.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from octolike.config import AugmentConfig, ConfigError, unknown
from octolike.types import Batch

IMAGE, DEPTH = "image_", "depth_"


class Draws(NamedTuple):
    """Independent uniform numbers in [0, 1), [B] each."""

    area: jax.Array
    ratio: jax.Array
    top: jax.Array
    left: jax.Array
    brightness: jax.Array
    contrast: jax.Array
    saturation: jax.Array
    hue: jax.Array


def augment(batch: Batch, config: AugmentConfig, key: jax.Array) -> Batch:
    """Return the batch with its images augmented; an image that nothing changes stays uint8.

    Raises ConfigError for a camera in `config.cameras` that the batch does not have.
    """
    parts = {name: dict(batch[name]) for name in ("observation", "task")}
    images = [(p, k) for p in parts for k in sorted(parts[p]) if k.startswith(IMAGE)]
    cameras = {name.removeprefix(IMAGE) for _, name in images}
    for camera in config.cameras:
        if camera not in cameras:
            raise ConfigError(unknown("camera in train.augment.cameras", camera, cameras))
    if dataclasses.replace(config, cameras=()) == AugmentConfig():
        return batch
    # One draw for all: each call of a counter-based generator costs a quarter second to compile.
    shape = (len(images), len(Draws._fields), len(batch["action"]))
    draws = jax.random.uniform(key, shape)
    for (part, name), mine in zip(images, draws):
        geometry = not config.cameras or name.removeprefix(IMAGE) in config.cameras
        x = parts[part][name]
        # Goal images have no window axis: one frame.
        windows = x if x.ndim == 5 else x[:, None]
        windows = augment_windows(windows, config, Draws(*mine), geometry=geometry)
        parts[part][name] = windows if x.ndim == 5 else windows[:, 0]
        depth = name.replace(IMAGE, DEPTH, 1)
        if depth in parts[part] and geometry and _crops(config):
            box = boxes(Draws(*mine), config.crop_scale, config.crop_ratio)
            parts[part][depth] = crop(parts[part][depth], box, nearest=True)
    return {**batch, **parts}


def augment_windows(
    images: jax.Array, config: AugmentConfig, draws: Draws, *, geometry: bool = True
) -> jax.Array:
    """Return [B, W, h, w, 3], float32 unless everything is off."""
    x = images
    if geometry and _crops(config):
        x = crop(x, boxes(draws, config.crop_scale, config.crop_ratio))
    if config.brightness:
        x = brightness(x, _around(0.0, config.brightness, draws.brightness))
    if config.contrast:
        x = contrast(x, _around(1.0, config.contrast, draws.contrast))
    factor = _around(1.0, config.saturation, draws.saturation) if config.saturation else None
    turns = _around(0.0, config.hue, draws.hue) if config.hue else None
    if factor is not None or turns is not None:
        x = saturation_and_hue(x, factor, turns)
    return x if x is images else jnp.clip(x, 0.0, 255.0)


def boxes(draws: Draws, scale: tuple[float, float], ratio: tuple[float, float]) -> jax.Array:
    """Return boxes [B, 4]: top, left, height, width as shares of the image.

    The area is uniform in `scale`, the aspect ratio (width over height) log-uniform in `ratio`; a
    side longer than the image is cut to it.
    """
    area = scale[0] + (scale[1] - scale[0]) * draws.area
    low, high = jnp.log(ratio[0]), jnp.log(ratio[1])
    aspect = jnp.exp(low + (high - low) * draws.ratio)
    height = jnp.minimum(jnp.sqrt(area / aspect), 1.0)
    width = jnp.minimum(jnp.sqrt(area * aspect), 1.0)
    return jnp.stack([(1 - height) * draws.top, (1 - width) * draws.left, height, width], axis=-1)


def crop(images: jax.Array, boxes: jax.Array, *, nearest: bool = False) -> jax.Array:
    """Return the boxes [B, 4] of images [B, W, h, w, C], resized to [h, w], bilinearly or not.

    The outermost pixels of the result lie on the box's edges, as in tf.image.crop_and_resize, so
    that the whole image as a box is the identity. Two gathers per axis: on a CPU twelve times as
    fast as the same map as two batched matrix products.
    """

    def positions(start: jax.Array, length: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        x = (start + length * jnp.linspace(0.0, 1.0, size)) * (size - 1)
        low = jnp.clip(jnp.floor(x).astype(jnp.int32), 0, size - 2)
        return low, jnp.round(x - low) if nearest else x - low

    def one(x: jax.Array, box: jax.Array) -> jax.Array:
        row, dy = positions(box[0], box[2], x.shape[1])
        column, dx = positions(box[1], box[3], x.shape[2])
        x = _mix(x[:, row], x[:, row + 1], dy[:, None, None])
        return _mix(x[:, :, column], x[:, :, column + 1], dx[:, None])

    return jax.vmap(one)(images, boxes)


def brightness(images: jax.Array, shift: jax.Array) -> jax.Array:
    """Return images [B, ...] shifted by shift [B], a share of the range 0 to 255."""
    return images + 255.0 * _per_example(shift, images)


def contrast(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Return images [B, W, h, w, 3], each scaled about its channel means by factor [B]."""
    images = images.astype(jnp.float32)
    mean = images.mean(axis=(-3, -2), keepdims=True)
    return mean + (images - mean) * _per_example(factor, images)


def saturation_and_hue(
    images: jax.Array, factor: jax.Array | None, turns: jax.Array | None
) -> jax.Array:
    """Return images [B, ..., 3] with their HSV saturation scaled and their hue turned.

    With v the largest and v − c the smallest of a pixel's channels, the saturation is c / v: it is
    scaled, up to 1, by scaling c. A channel is v − c · clip(min(k, 4 − k), 0, 1) with k = n + 6 ·
    hue modulo 6 and n = 5, 3, 1 for red, green, blue: a turn is added to k. Either may be None:
    untouched.
    """
    x = jnp.clip(images.astype(jnp.float32), 0.0, 255.0)
    # Channels as arrays of their own and floor instead of %: five times as fast on a CPU.
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    ratio = jnp.minimum(_per_example(1.0 if factor is None else factor, value), value / safe)
    if turns is None:
        return x * ratio[..., None] + (value * (1 - ratio))[..., None]
    hue = jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = jnp.where(value == red, (green - blue) / safe, hue) + 6.0 * _per_example(turns, value)

    def channel(n: float) -> jax.Array:
        k = n + hue - 6.0 * jnp.floor((n + hue) / 6.0)
        return value - chroma * ratio * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)

    return jnp.stack([channel(5.0), channel(3.0), channel(1.0)], axis=-1)


def _crops(config: AugmentConfig) -> bool:
    return (config.crop_scale, config.crop_ratio) != ((1.0, 1.0), (1.0, 1.0))


def _around(middle: float, spread: float, draw: jax.Array) -> jax.Array:
    return middle + spread * (2 * draw - 1)


def _mix(a: jax.Array, b: jax.Array, share: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return a + (b - a) * share


def _per_example(x: jax.Array | float, like: jax.Array) -> jax.Array:
    return jnp.reshape(x, (-1, *[1] * (like.ndim - 1)))
