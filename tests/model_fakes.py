"""A tiny batch spec, random batches, parameters and a small config, for the model's tests."""

import jax
import numpy as np

from octolike.types import BatchSpec, Names, unflatten

WORDS, VOCABULARY = 5, 32
NAMES = Names(("one", "two"), ("arm", "base"), ("lift", "push", "touch"))


def spec(window: int = 2, horizon: int = 2, action_dim: int = 3, cameras=None) -> BatchSpec:
    """Return the spec of a batch with the given cameras ({name: side}), proprio and language."""
    cameras = cameras or {"primary": 16, "wrist": 8}
    leaves = {
        "observation.proprio": ((window, 4), "float32"),
        "observation.present.proprio": ((window,), "bool"),
        "observation.timestep_mask": ((window,), "bool"),
        "task.language.ids": ((WORDS,), "int32"),
        "task.language.mask": ((WORDS,), "bool"),
        "task.present.language": ((), "bool"),
        "task.task_id": ((), "int32"),
        "task.present.task_id": ((), "bool"),
        "action": ((window, horizon, action_dim), "float32"),
        "action_mask": ((window, horizon, action_dim), "bool"),
        "dataset": ((), "int32"),
        "embodiment": ((), "int32"),
    }
    for camera, side in cameras.items():
        leaves[f"observation.image_{camera}"] = ((window, side, side, 3), "uint8")
        leaves[f"observation.present.image_{camera}"] = ((window,), "bool")
        leaves[f"task.image_{camera}"] = ((side, side, 3), "uint8")
        leaves[f"task.present.image_{camera}"] = ((), "bool")
    return leaves


def batch(spec: BatchSpec, size: int, seed: int = 0) -> dict:
    """Return a random batch with everything present and every mask true."""
    rng = np.random.default_rng(seed)

    def leaf(path: str, shape: tuple, dtype: str) -> np.ndarray:
        if dtype == "bool":
            return np.ones((size, *shape), bool)
        if dtype == "uint8":
            return rng.integers(0, 256, (size, *shape), np.uint8)
        if dtype == "int32":
            words = path == "task.language.ids"
            low, high = (1, VOCABULARY) if words else (0, 2)
            return rng.integers(low, high, (size, *shape)).astype(np.int32)
        return rng.normal(size=(size, *shape)).astype(np.float32)

    return unflatten({path: leaf(path, *s) for path, s in spec.items()})


def parameters(init, *args, **kwargs) -> dict:
    """Return random variables of the shapes that `init` makes, none zero, without compiling it.

    Zeros (FiLM, biases) would hide influences, and compiling a hundred initialisers takes too long.
    """
    rng = np.random.default_rng(0)
    rngs = {name: jax.random.key(0) for name in ("params", "noise")}
    shapes = jax.eval_shape(lambda: init(rngs, *args, **kwargs))

    def leaf(path, x) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.3 * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def model(**changes) -> dict:
    """Return a small model config, as dataclasses.asdict(config.model) gives it."""
    return {
        "width": 16,
        "layers": 2,
        "attention_heads": 2,
        "mlp_width": 32,
        "dropout": 0.0,
        "dtype": "float32",
        "remat": "none",
        "max_window": 0,
        "repeat_task_tokens": False,
        "experts": {},
        "tokenizers": {
            "language": {"kind": "language", "vocabulary": VOCABULARY, "width": 8},
            "primary": {
                "kind": "image",
                "cameras": ("primary",),
                "goal": True,
                "film": True,
                "encoder": {
                    "kind": "small_stem",
                    "features": (4, 8),
                    "patch": 8,
                    "width": 8,
                    "groups": 2,
                },
            },
            "wrist": {
                "kind": "image",
                "cameras": ("wrist",),
                "film": True,
                "encoder": {
                    "kind": "keypoints",
                    "features": (4, 8),
                    "kernels": (5, 3),
                    "strides": (2, 1),
                    "keypoints": 4,
                    "groups": 2,
                    "width": 8,
                },
            },
            "proprio": {"kind": "proprio"},
        },
        "readouts": {"action": 1, "other": 2},
        "registers": (),
        "heads": {
            "action": {
                "kind": "diffusion",
                "network": {"kind": "mlp", "hidden": 16, "blocks": 1},
                "samples_per_example": 2,
            },
            "other": {"kind": "l1", "readout": "readout_other"},
        },
        "auxiliary": {},
        **changes,
    }
