"""ObservationEncoder: raw sensor values to the `observation` part of a batch, or a clear error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from octolike import ranges, types
from octolike.config import unknown
from octolike.embodiment import Embodiment
from octolike.images import resize

IMAGE = "image_"


class ObservationEncoder:
    """Checks an observation, resizes its images, normalises proprio, and pads short histories.

    Attributes:
        keys: those that an observation must have: image_<camera>, …, proprio.
        image_shapes: {image_<camera>: (height, width, 3)} of the network's input.
        resize: data.resize of the run, a name in images.KERNELS.
        window: W, the longest history.
    """

    def __init__(self, spec: types.BatchSpec, embodiment: Embodiment, resize: str) -> None:
        """spec: of the run's batches."""
        self.resize = resize
        self.window = spec["action"][0][0]
        self.image_shapes = image_shapes(spec, "observation")
        self._embodiment = embodiment
        self._warned: set[int] = set()
        self._spec = {k: v for k, v in spec.items() if k.startswith("observation.")}
        proprio = embodiment.proprio if "observation.proprio" in spec else None
        self._proprio_width = len(proprio.names) if proprio else 0
        self.keys = (*self.image_shapes, *(["proprio"] if self._proprio_width else []))

    def encode(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `observation` part of the batch contract for one example, no batch axis."""
        arrays = self._check(observation)
        frames = _frame_count(arrays, self.window)
        padding = self.window - frames
        inputs = jax.tree.map(lambda x: x[0], types.zeros(self._spec, 1))["observation"]
        for key, value in arrays.items():
            if key == "timestep_mask":
                continue
            if key == "proprio":
                self._warn_outside(value)
                value = np.asarray(self._embodiment.normalize_proprio(value), np.float32)
                value = np.pad(value, ((0, 0), (0, inputs[key].shape[-1] - value.shape[-1])))
            else:
                height, width, _ = self.image_shapes[key]
                value = np.stack([resize(v, height, width, self.resize) for v in value])
            inputs[key] = np.concatenate([np.repeat(value[:1], padding, axis=0), value])
            set_present(inputs, key, np.ones(self.window, bool))
        mask = arrays.get("timestep_mask", np.ones(frames, bool))
        inputs["timestep_mask"] = np.concatenate([np.zeros(padding, bool), mask])
        return inputs

    def _warn_outside(self, proprio: np.ndarray) -> None:
        """Warn, once per dimension, of proprio [frames, P] far outside the recorded range."""
        is_outside = ranges.far_outside(proprio, self._embodiment)
        new = sorted(set(np.flatnonzero(is_outside.any(axis=0)).tolist()) - self._warned)
        if not new:
            return
        self._warned |= set(new)
        layout, s = self._embodiment.proprio, self._embodiment.proprio_statistics
        assert layout is not None  # else nothing is outside
        assert s is not None
        texts = [
            f"{layout.names[d]} is {proprio[is_outside[:, d], d][-1]:.4g} (recorded "
            f"{s.min[d]:.4g} to {s.max[d]:.4g} {layout.units[d]})"
            for d in new
        ]
        warnings.warn(
            f"observation['proprio'] of {self._embodiment.name} is far outside the training data: "
            f"{', '.join(texts)}; give it in the units and the order of the record",
            stacklevel=user_level(),
        )

    def _check(self, observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the arrays with a frame axis in front, without the sensors given as None."""
        if not isinstance(observation, Mapping):
            raise ValueError(
                f"the observation is a {type(observation).__name__}; expected a dict with the keys "
                f"{', '.join(self.keys)}"
            )
        for key in observation:
            if key not in (*self.keys, "timestep_mask"):
                raise ValueError(unknown("key of the observation", key, self.keys))
        missing = [key for key in self.keys if key not in observation]
        if missing:
            raise ValueError(
                f"the observation lacks {', '.join(missing)}: this policy was trained with "
                f"{', '.join(self.keys)}. For a sensor that this robot lacks, pass None"
            )
        arrays = {}
        for key, value in observation.items():
            if value is None:
                continue
            if key == "timestep_mask":
                arrays[key] = _check_mask(value)
            elif key == "proprio":
                arrays[key] = _check_proprio(value, self._proprio_width, self._embodiment)
            else:
                image = check_image(f"observation[{key!r}]", value, (3, 4))
                arrays[key] = image if image.ndim == 4 else image[None]
        return arrays


def user_level() -> int:
    """Return the stacklevel of a warning of the caller that names the code that uses octolike."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("octolike"):
        frame, level = frame.f_back, level + 1
    return level


def image_shapes(spec: types.BatchSpec, part: str) -> dict[str, tuple[int, ...]]:
    """Return {image_<camera>: (height, width, 3)} of "observation" or "task" in a batch spec."""
    prefix = f"{part}.{IMAGE}"
    return {k[len(part) + 1 :]: s[-3:] for k, (s, _) in spec.items() if k.startswith(prefix)}


def set_present(part: dict[str, Any], key: str, value: Any) -> None:
    """Set part["present"][key], if the batch spec has it."""
    if key in part.get("present", {}):
        part["present"][key] = value


def check_image(name: str, value: Any, ranks: tuple[int, ...]) -> np.ndarray:
    """Return a uint8 image [h, w, 3], or images [frames, h, w, 3] if `ranks` has 4."""
    image = np.asarray(value)
    axes = {3: "[h, w, 3]", 4: "[frames, h, w, 3]"}
    expected = f"expected uint8 {' or '.join(axes[rank] for rank in ranks)}"
    actual = f"{name} is {image.dtype} {list(image.shape)}"
    if image.dtype != np.uint8:
        is_float = image.dtype.kind == "f"
        hint = "; give the raw camera image, with values from 0 to 255" if is_float else ""
        raise ValueError(f"{actual}; {expected}{hint}")
    if image.ndim not in ranks or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"{actual}; {expected}")
    return image


def _frame_count(arrays: Mapping[str, np.ndarray], window: int) -> int:
    """Return the number of frames, which all arrays must share."""
    lengths = {key: len(array) for key, array in arrays.items()}
    if not lengths.keys() - {"timestep_mask"}:
        raise ValueError(
            "every sensor of the observation is None; the policy needs at least one of them"
        )
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"the observation's histories differ in length: {lengths}; give as many frames of each"
        )
    frames = next(iter(lengths.values()))
    if not 1 <= frames <= window:
        raise ValueError(
            f"the observation has {frames} frames; this policy was trained on windows of {window}: "
            f"give the newest {window}, or fewer"
        )
    return frames


def _check_proprio(value: Any, width: int, embodiment: Embodiment) -> np.ndarray:
    """Return float32 [frames, P]."""
    assert embodiment.proprio is not None
    proprio = np.asarray(value)
    if proprio.dtype.kind != "f" or proprio.ndim not in (1, 2) or proprio.shape[-1] != width:
        raise ValueError(
            f"observation['proprio'] is {proprio.dtype} {list(proprio.shape)}; expected float32 "
            f"[{width}] or [frames, {width}]: {', '.join(embodiment.proprio.names)} "
            f"({embodiment.name})"
        )
    if not np.isfinite(proprio).all():
        raise ValueError(
            f"observation['proprio'] has values that are not finite: {proprio.tolist()}"
        )
    return proprio.reshape(-1, width).astype(np.float32)


def _check_mask(value: Any) -> np.ndarray:
    """Return bool [frames]."""
    mask = np.asarray(value)
    if mask.dtype != np.bool_ or mask.ndim != 1:
        raise ValueError(
            f"observation['timestep_mask'] is {mask.dtype} {list(mask.shape)}; "
            "expected bool [frames], False for frames before the episode's first step"
        )
    if len(mask) and not mask[-1]:
        raise ValueError(
            "observation['timestep_mask'] hides the newest frame; its last value must be True"
        )
    return mask
