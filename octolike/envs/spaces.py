"""Gymnasium's spaces of observations and actions, in the form that all simulators share."""

from __future__ import annotations

from collections.abc import Mapping

import gymnasium
import numpy as np


def observation_space(
    images: Mapping[str, tuple[int, int]], proprio: tuple[int, float] | None = None
) -> gymnasium.spaces.Dict:
    """Return the space of image_<camera> uint8 [height, width, 3] and proprio float32 [P].

    Args:
        images: {camera: (height, width)}.
        proprio: (P, the largest magnitude of its values); None: there is none.
    """
    spaces: dict[str, gymnasium.Space] = {
        f"image_{camera}": gymnasium.spaces.Box(0, 255, (*size, 3), np.uint8)
        for camera, size in images.items()
    }
    if proprio:
        width, limit = proprio
        spaces["proprio"] = gymnasium.spaces.Box(-limit, limit, (width,), np.float32)
    return gymnasium.spaces.Dict(spaces)
