"""The form of proprio that the network sees: angles without their jump at ±π.

A state representation is a text, config.data.proprio_representation: "as_stored", or one or both of

    sin_cos        the sine and the cosine in place of each angle
    rotation_6d    the first two columns of the rotation matrix in place of roll, pitch and yaw

Angles are the dimensions in radians; those named roll, pitch and yaw, with any prefix, are a
rotation Rz(yaw) Ry(pitch) Rx(roll), which rotation_6d replaces if both words are given. The robot
sends its proprio as stored, and its statistics are those of the stored values: the new columns lie
within ±1 and are not normalised.

`encode` runs on numpy arrays and on TensorFlow's (xp=tf.experimental.numpy).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from octolike.config.schema import PROPRIO_REPRESENTATIONS as WORDS
from octolike.representation import rotation_matrix

ANGLES = ("roll", "pitch", "yaw")


class StateRepresentation:
    """The transform of one robot's normalised proprio.

    Attributes:
        text: as in the config.
        names: names of the columns that the network sees.
    """

    def __init__(
        self, text: str, names: Sequence[str], units: Sequence[str], normalized: Sequence[bool]
    ) -> None:
        """Plan the transform of proprio with these names and units.

        Raises ValueError for another text, and for proprio without such angles.
        """
        words = text.split()
        unknown = [word for word in words if word not in WORDS or words.count(word) > 1]
        if unknown or not words:
            raise ValueError(
                f"proprio representation {text!r} is not 'as_stored', or one or both of "
                f"{', '.join(WORDS)}"
            )
        self.text = text
        is_angle = [u == "rad" and z for u, z in zip(units, normalized, strict=True)]
        self._rotations = _rotations(names, is_angle) if "rotation_6d" in words else []
        turned = {d for dims in self._rotations for d in dims}
        pairs = [d for d in range(len(names)) if is_angle[d] and d not in turned]
        self._pairs = pairs if "sin_cos" in words else []
        for word, angles in (("rotation_6d", self._rotations), ("sin_cos", self._pairs or turned)):
            if word in words and not angles:
                needed = "roll, pitch and yaw" if word == "rotation_6d" else "angles"
                listed = ", ".join(f"{n} ({u or 'no unit'})" for n, u in zip(names, units))
                raise ValueError(
                    f"proprio representation {text!r} needs {needed} in radians; the proprio is "
                    f"{listed}: correct the names and units in the spec, or convert them there"
                )
        self._kept = [d for d in range(len(names)) if d not in turned | set(self._pairs)]
        stems = [names[dims[0]].removesuffix(ANGLES[0]) for dims in self._rotations]
        self.names = (
            *(names[d] for d in self._kept),
            *(f"{part}_{names[d]}" for part in ("sin", "cos") for d in self._pairs),
            *(f"{stem}rotation_{i}" for stem in stems for i in range(6)),
        )

    def encode(self, x: Any, state: Any, xp: Any = np) -> Any:
        """Return the columns that the network sees, [..., P'].

        x: proprio [..., P], normalised; state: the same in robot units.
        """
        parts = [_take(x, self._kept, xp)] if self._kept else []
        if self._pairs:
            angles = _take(state, self._pairs, xp)
            parts += [xp.sin(angles), xp.cos(angles)]
        for dims in self._rotations:
            rotation = rotation_matrix(_take(state, dims, xp), xp)
            parts += [rotation[..., :, 0], rotation[..., :, 1]]
        return xp.concatenate(parts, axis=-1)


def _rotations(names: Sequence[str], is_angle: Sequence[bool]) -> list[tuple[int, ...]]:
    """Return the dimensions roll, pitch, yaw of each rotation."""
    places = {name: d for d, name in enumerate(names) if is_angle[d]}
    stems = [name.removesuffix(ANGLES[0]) for name in places if name.endswith(ANGLES[0])]
    return [
        tuple(places[f"{stem}{angle}"] for angle in ANGLES)
        for stem in stems
        if all(f"{stem}{angle}" in places for angle in ANGLES)
    ]


def _take(x: Any, dims: Sequence[int], xp: Any) -> Any:
    return xp.take(x, np.array(dims, np.int32), axis=-1)
