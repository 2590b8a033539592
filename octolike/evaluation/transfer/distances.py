"""Distances between the distributions of two groups: actions and images.

A distance is judged by its floor: the distance between two halves of the episodes of one group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from octolike.evaluation.transfer.group_sample import GroupSample

CONSTANT = 1e-6  # a dimension with a smaller spread is constant
COMPONENTS = 8  # principal components of images
PROJECTIONS = 64
QUANTILES = 200
COLOUR_BINS = 16


def wasserstein(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the Wasserstein-1 distance per column of [n, A] and [m, A], from quantiles."""
    levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
    return np.abs(np.quantile(x, levels, axis=0) - np.quantile(y, levels, axis=0)).mean(axis=0)


def sliced_wasserstein(x: np.ndarray, y: np.ndarray, seed: int = 0) -> float:
    """Return the sliced Wasserstein-1 distance of [n, A] and [m, A] over random directions."""
    directions = np.random.default_rng(seed).normal(size=(x.shape[1], PROJECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    return float(wasserstein(x @ directions, y @ directions).mean())


def principal_components(
    x: np.ndarray, y: np.ndarray, count: int = COMPONENTS
) -> tuple[np.ndarray, ...]:
    """Return the leading principal components of both, [n, K] and [m, K], with total variance 1."""
    both = np.concatenate([x, y])
    mean = both.mean(axis=0)
    _, values, directions = np.linalg.svd(both - mean, full_matrices=False)
    size = np.sqrt((values[:count] ** 2).sum() / len(both))
    return tuple((z - mean) @ directions[:count].T / max(size, CONSTANT) for z in (x, y))


def half_distance(sample: GroupSample, x: np.ndarray, distance: Callable) -> Any:
    """Return the distance between the rows of x [n, ...] of the sample's two halves."""
    return distance(x[~sample.is_second_half], x[sample.is_second_half])


def distance_floor(
    samples: Sequence[GroupSample], arrays: Sequence[np.ndarray], distance: Callable
) -> float:
    """Return the mean over groups of the distance between a group's halves."""
    pairs = zip(samples, arrays, strict=True)
    return float(np.mean([half_distance(sample, x, distance) for sample, x in pairs]))


def flat_images(sample: GroupSample) -> np.ndarray:
    """Return the images, which must exist, as float64 [n, s·s·3]."""
    assert sample.images is not None
    return sample.images.reshape(len(sample), -1).astype(np.float64)


def image_distances(a: GroupSample, b: GroupSample, seed: int) -> dict[str, float]:
    """Return the fields of `GroupComparison` about images; NaN if a group has no images."""
    if a.images is None or b.images is None:
        names = ("colours", "colours_floor", "brightness", "pictures", "pictures_floor")
        return dict.fromkeys(names, np.nan)
    images = flat_images(a), flat_images(b)
    components = list(principal_components(*images))

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return sliced_wasserstein(x, y, seed)

    return {
        "colours": _colour_distance(*images),
        "colours_floor": distance_floor((a, b), images, _colour_distance),
        "brightness": float(abs(images[0].mean() - images[1].mean())),
        "pictures": distance(*components),
        "pictures_floor": distance_floor((a, b), components, distance),
    }


def _colour_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return the total variation (0 to 1) of colour histograms of flat images, channel mean."""
    histograms = []
    for images in (x, y):
        channels = [images[:, c::3] for c in range(3)]
        counts = [np.histogram(v, COLOUR_BINS, (0, 1))[0] / v.size for v in channels]
        histograms.append(np.stack(counts))
    return float(np.abs(histograms[0] - histograms[1]).sum(axis=1).mean() / 2)
