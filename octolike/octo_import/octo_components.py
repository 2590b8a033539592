"""Octo's classes by name, with the settings that each takes and what they are here.

A class is looked up in the tables at the end and never imported. A setting that is not listed, or
that asks for something this project does not compute, is a ConfigError that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from octolike.config import Component, ConfigError, unknown

WORDS = "language_instruction"
REQUIRED = object()  # stands where Octo has no default


class Seen(NamedTuple):
    """What the example batch shows: the arrays of `observation` and `task` by key.

    An instruction of token ids is {"input_ids", "attention_mask"}, an embedded one an array.
    """

    observation: Mapping[str, np.ndarray]
    task: Mapping[str, Any]


# Reading components


def matching(patterns: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return the keys, sorted, of which some pattern matches the start."""
    return [k for k in sorted(keys) if any(re.match(p, k) for p in patterns)]


def component(table: Mapping[str, Callable], spec: Any, path: str, *context: Any) -> Any:
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise ConfigError(f"{path} is {spec!r}; expected a component with module, name and kwargs")
    if spec["name"] not in table:
        raise ConfigError(unknown(f"class at {path}", spec["name"], table))
    return table[spec["name"]](spec, path, *context)


def fields(spec: Mapping[str, Any], path: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a component over Octo's defaults."""
    if spec.get("args"):
        raise ConfigError(f"{path} has positional arguments {spec['args']}; expected keywords only")
    for name in spec["kwargs"]:
        if name not in defaults:
            raise ConfigError(unknown(f"setting of {path}", name, defaults))
    values = {**defaults, **spec["kwargs"]}
    missing = [name for name, value in values.items() if value is REQUIRED]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}")
    return values


def only(path: str, values: Mapping[str, Any], **allowed: Any) -> None:
    """Raise ConfigError where a setting is not the one value that octolike computes."""
    for name, value in allowed.items():
        found = list(values[name]) if isinstance(values[name], (list, tuple)) else values[name]
        if found != value:
            raise ConfigError(f"{path}.{name} is {found!r}; octolike has only {value!r}")


# Tokenizers: (spec, path, seen) -> (component or None where Octo leaves it out, proprio keys)


def _image(spec: Mapping[str, Any], path: str, seen: Seen) -> tuple[Component | None, tuple]:
    given = fields(spec, path, _IMAGE)
    only(path, given, proper_pad_mask=True)
    keys = matching(given["obs_stack_keys"], list(seen.observation))
    if not keys:
        return None, ()
    goals = []
    if given["task_stack_keys"]:
        # Octo fills goals that the task lacks with zeros, for every observation key that matches.
        goals = matching(given["task_stack_keys"], [*{*seen.task, *seen.observation}])
    others = [k for k in [*keys, *goals] if not k.startswith("image_")]
    if others:
        raise ConfigError(f"{path} stacks {others}; octolike stacks images only")
    if goals not in ([], keys):
        raise ConfigError(
            f"{path} stacks {keys} and the goals {goals}; octolike stacks the goals of the same "
            "cameras, or none"
        )
    film = list(given["task_film_keys"])
    if film and (film != [WORDS] or isinstance(seen.task.get(WORDS), Mapping)):
        raise ConfigError(
            f"{path}.task_film_keys is {film}; octolike modulates by the task's tokens, which is "
            f"the same only for an embedded {WORDS} [batch, width]"
        )
    encoder, pixels = component(ENCODERS, given["encoder"], f"{path}.encoder", bool(film))
    made = Component(
        kind="image",
        cameras=tuple(k.removeprefix("image_") for k in keys),
        goal=bool(goals),
        film=bool(film),
        learned_tokens=int(given["num_tokens"]) if given["use_token_learner"] else 0,
        pixels=pixels,
        encoder=encoder,
    )
    return made, ()


def _language(spec: Mapping[str, Any], path: str, seen: Seen) -> tuple[Component | None, tuple]:
    given = fields(spec, path, _LANGUAGE)
    only(path, given, proper_pad_mask=True)
    if WORDS not in seen.task:
        return None, ()
    if isinstance(seen.task[WORDS], Mapping) != (given["encoder"] is not None):
        raise ConfigError(
            f"{path}.encoder is {given['encoder']!r}, which does not fit the example batch's "
            f"{WORDS}: an encoder reads token ids, and without one the instruction is embedded"
        )
    # Padding is seen, as Octo does it; Octo keeps the gradient from an encoder not to be finetuned.
    trained = bool(given["finetune_encoder"]) and given["encoder"] is not None
    return Component(kind="text_encoder", trained=trained, padding_visible=True), ()


def _low_dimensional(
    spec: Mapping[str, Any], path: str, seen: Seen
) -> tuple[Component | None, tuple]:
    given = fields(spec, path, _LOW_DIMENSIONAL)
    keys = [k for p in given["obs_keys"] for k in matching([p], list(seen.observation))]
    if not keys:
        return None, ()
    if not given["discretize"]:
        return Component(kind="proprio", each=True), tuple(keys)
    low, high = float(given["low"]), float(given["high"])
    # Octo clips to [low + 1e-6, high - 1e-6] before it looks for a uniform bin, and nothing before
    # a normal one; what is outside every bin is then in the first, as is what the clip has missed
    # because float32 cannot tell the two numbers apart.
    clipped = given["bin_type"] == "uniform" and np.float32(high - 1e-6) < np.float32(high)
    made = Component(
        kind="proprio",
        bins=int(given["n_bins"]),
        bin_kind=_bin_kind(given["bin_type"], path),
        low=low,
        high=high,
        outside="nearest" if clipped else "first",
    )
    return made, tuple(keys)


def _bin_kind(kind: str, path: str) -> str:
    if kind not in ("uniform", "normal"):
        raise ConfigError(unknown(f"kind of bins at {path}", kind, ["uniform", "normal"]))
    return kind


# Encoders: (spec, path, film) -> (component, how its pixels are scaled)


def _small_stem(patch: int) -> Callable[..., tuple[Component, str]]:
    def stem(spec: Mapping[str, Any], path: str, film: bool) -> tuple[Component, str]:
        given = fields(spec, path, {**_SMALL_STEM, "patch_size": patch})
        only(path, given, use_film=film)
        # Octo's last convolution is patch/16 wide, however much the others shrink the image.
        cell = int(given["patch_size"]) // 16
        made = Component(
            kind="small_stem",
            features=tuple(given["features"]),
            kernels=tuple(given["kernel_sizes"]),
            strides=tuple(given["strides"]),
            padding=tuple(given["padding"]),
            patch=cell * math.prod(given["strides"]),
            width=int(given["num_features"]),
        )
        return made, _pixels(given, path)

    return stem


def _patch_encoder(spec: Mapping[str, Any], path: str, film: bool) -> tuple[Component, str]:
    given = fields(spec, path, _PATCH)
    only(path, given, use_film=film)
    sizes = {"patch": int(given["patch_size"]), "width": int(given["num_features"])}
    return Component(kind="patch", **sizes), _pixels(given, path)


def _pixels(given: Mapping[str, Any], path: str) -> str:
    kinds = {"default": "symmetric", "imagenet": "imagenet"}
    if given["img_norm_type"] not in kinds:
        raise ConfigError(unknown(f"img_norm_type of {path}", given["img_norm_type"], kinds))
    return kinds[given["img_norm_type"]]


# Heads: (spec, path) -> component


def _regression(kind: str, pooled: bool) -> Callable[..., Component]:
    def head(spec: Mapping[str, Any], path: str) -> Component:
        given = fields(spec, path, {**_REGRESSION, "use_map": pooled, "loss_type": kind})
        if given["loss_type"] not in ("mse", "l1"):
            raise ConfigError(unknown(f"loss_type of {path}", given["loss_type"], ["mse", "l1"]))
        limit = float(given["max_action"])
        return Component(kind=given["loss_type"], limit=limit, **_readout(given))

    return head


def _diffusion(spec: Mapping[str, Any], path: str) -> Component:
    given = fields(spec, path, _DIFFUSION)
    only(path, given, loss_type="mse", time_dim=32)
    network = Component(
        kind="mlp",
        hidden=int(given["hidden_dim"]),
        blocks=int(given["num_blocks"]),
        layer_norm=bool(given["use_layer_norm"]),
        dropout=float(given["dropout_rate"]),
    )
    return Component(
        kind="diffusion",
        steps=int(given["diffusion_steps"]),
        samples_per_example=int(given["n_diffusion_samples"]),
        clip=float(given["max_action"]),
        network=network,
        **_readout(given),
    )


def _discrete(spec: Mapping[str, Any], path: str) -> Component:
    given = fields(spec, path, _DISCRETE)
    layouts = {"action_dim_and_action_horizon": "value", "action_horizon": "step", "": "chunk"}
    if given["token_per"] not in layouts:
        raise ConfigError(unknown(f"token_per of {path}", given["token_per"], layouts))
    return Component(
        kind="bins",
        layout=layouts[given["token_per"]],
        bins=int(given["vocab_size"]),
        bin_kind=_bin_kind(given["normalization_type"], path),
        # Octo's discrete head leaves the range of its bins at the default, [0, 1].
        low=0.0,
        high=1.0,
        **_readout(given),
    )


def _readout(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "readout": given["readout_key"],
        "pooling": "attention" if given["use_map"] else "mean",
    }


# Octo's settings with their defaults

_IMAGE = {
    "encoder": REQUIRED,
    "use_token_learner": False,
    "num_tokens": 8,
    "conditioning_type": "none",
    "obs_stack_keys": ("image_.*", "depth_.*"),
    "task_stack_keys": (),
    "task_film_keys": (),
    "proper_pad_mask": True,
}
_LANGUAGE = {"encoder": None, "finetune_encoder": False, "proper_pad_mask": True}
_LOW_DIMENSIONAL = {
    "obs_keys": (),
    "discretize": False,
    "n_bins": 256,
    "bin_type": "uniform",
    "low": 0.0,
    "high": 1.0,
    "proper_pad_mask": True,
}
_PATCH = {
    "use_film": False,
    "patch_size": 32,
    "num_features": 512,
    "img_norm_type": "default",
}
_SMALL_STEM = {
    "use_film": False,
    "patch_size": 32,
    "kernel_sizes": (3, 3, 3, 3),
    "strides": (2, 2, 2, 2),
    "features": (32, 96, 192, 384),
    "padding": (1, 1, 1, 1),
    "num_features": 512,
    "img_norm_type": "default",
}
HEAD = {"readout_key": REQUIRED, "action_horizon": 1, "action_dim": 7}
_REGRESSION = {**HEAD, "use_map": False, "max_action": 5.0, "loss_type": "mse"}
_DIFFUSION = {
    **HEAD,
    "use_map": False,
    "max_action": 5.0,
    "loss_type": "mse",
    "time_dim": 32,
    "num_blocks": 3,
    "dropout_rate": 0.0,
    "hidden_dim": 256,
    "use_layer_norm": True,
    "diffusion_steps": 20,
    "n_diffusion_samples": 1,
}
_DISCRETE = {
    **HEAD,
    "use_map": False,
    "token_per": "action_dim_and_action_horizon",
    "vocab_size": 256,
    "normalization_type": "uniform",
}

TOKENIZERS = {
    "ImageTokenizer": _image,
    "LanguageTokenizer": _language,
    "LowdimObsTokenizer": _low_dimensional,
}
ENCODERS = {
    "SmallStem": _small_stem(32),
    "SmallStem16": _small_stem(16),
    "SmallStem32": _small_stem(32),
    "PatchEncoder": _patch_encoder,
}
HEADS = {
    "ContinuousActionHead": _regression("mse", pooled=False),
    "MSEActionHead": _regression("mse", pooled=True),
    "L1ActionHead": _regression("l1", pooled=True),
    "DiffusionActionHead": _diffusion,
    "DiscreteActionHead": _discrete,
}
