"""Translates Octo's component specs {module, name, kwargs} to components of octolike.

Octo's classes are looked up by name in the tables at the end and never imported. A setting that is
unknown, or that octolike does not support, is a ConfigError that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from octolike.config import Component, ConfigError, unknown

WORDS = "language_instruction"
REQUIRED = object()  # marks settings for which Octo has no default


class ExampleBatch(NamedTuple):
    """The arrays of `observation` and `task` in example_batch.msgpack, by key.

    A tokenized instruction is {"input_ids", "attention_mask"}, an embedded one an array.
    """

    observation: Mapping[str, np.ndarray]
    task: Mapping[str, Any]


# Reading components


def matching(patterns: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return the sorted keys that a pattern matches from their start, as Octo selects them."""
    return [k for k in sorted(keys) if any(re.match(p, k) for p in patterns)]


def component(table: Mapping[str, Callable], spec: Any, path: str, *context: Any) -> Any:
    """Translate a component spec by the function of its class in a table."""
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise ConfigError(f"{path} is {spec!r}; expected a component with module, name and kwargs")
    if spec["name"] not in table:
        raise ConfigError(unknown(f"class at {path}", spec["name"], table))
    return table[spec["name"]](spec, path, *context)


def fields(spec: Mapping[str, Any], path: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a component spec, completed by Octo's defaults."""
    if spec.get("args"):
        raise ConfigError(
            f"{path} has positional arguments {spec['args']}; expected keyword arguments only"
        )
    for name in spec["kwargs"]:
        if name not in defaults:
            raise ConfigError(unknown(f"setting of {path}", name, defaults))
    values = {**defaults, **spec["kwargs"]}
    missing = [name for name, value in values.items() if value is REQUIRED]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}")
    return values


def require_values(path: str, settings: Mapping[str, Any], **supported: Any) -> None:
    """Raise ConfigError if a setting differs from the only value that octolike supports."""
    for name, expected in supported.items():
        value = settings[name]
        value = list(value) if isinstance(value, (list, tuple)) else value
        if value != expected:
            raise ConfigError(f"{path}.{name} is {value!r}; octolike only supports {expected!r}")


# Tokenizers: (spec, path, example) -> (component or None if Octo skips it, proprio keys)


def _image(
    spec: Mapping[str, Any], path: str, example: ExampleBatch
) -> tuple[Component | None, tuple]:
    settings = fields(spec, path, _IMAGE)
    require_values(path, settings, proper_pad_mask=True)
    keys = matching(settings["obs_stack_keys"], list(example.observation))
    if not keys:
        return None, ()
    goals = []
    if settings["task_stack_keys"]:
        # For every matching observation key, Octo fills a missing goal with zeros.
        goals = matching(settings["task_stack_keys"], [*{*example.task, *example.observation}])
    vectors = [k for k in [*keys, *goals] if not k.startswith("image_")]
    if vectors:
        raise ConfigError(f"{path} stacks {vectors}; octolike only stacks images")
    if goals not in ([], keys):
        raise ConfigError(
            f"{path} stacks {keys} and the goals {goals}; octolike stacks the goals of the same "
            "cameras, or no goals"
        )
    film = list(settings["task_film_keys"])
    words = example.task.get(WORDS)
    if film and (film != [WORDS] or not isinstance(words, np.ndarray)):
        found = "token ids" if words is not None else "nothing"
        found = "an array" if isinstance(words, np.ndarray) else found
        raise ConfigError(
            f"{path}.task_film_keys is {film}, and the example batch has {found} at {WORDS!r}; "
            f"FiLM is imported for [{WORDS!r}] alone, with an embedding [batch, width] there"
        )
    encoder, pixels = component(ENCODERS, settings["encoder"], f"{path}.encoder", bool(film))
    image = Component(
        kind="image",
        cameras=tuple(k.removeprefix("image_") for k in keys),
        goal=bool(goals),
        film=bool(film),
        learned_tokens=int(settings["num_tokens"]) if settings["use_token_learner"] else 0,
        pixels=pixels,
        encoder=encoder,
    )
    return image, ()


def _language(
    spec: Mapping[str, Any], path: str, example: ExampleBatch
) -> tuple[Component | None, tuple]:
    settings = fields(spec, path, _LANGUAGE)
    require_values(path, settings, proper_pad_mask=True)
    if WORDS not in example.task:
        return None, ()
    if isinstance(example.task[WORDS], Mapping) != (settings["encoder"] is not None):
        raise ConfigError(
            f"{path}.encoder is {settings['encoder']!r}, which does not fit the example batch's "
            f"{WORDS}: with an encoder it must be token ids, without one an embedding"
        )
    # As in Octo, padding is attended to, and only a finetuned encoder gets gradients.
    trained = bool(settings["finetune_encoder"]) and settings["encoder"] is not None
    return Component(kind="text_encoder", trained=trained, padding_visible=True), ()


def _low_dimensional(
    spec: Mapping[str, Any], path: str, example: ExampleBatch
) -> tuple[Component | None, tuple]:
    settings = fields(spec, path, _LOW_DIMENSIONAL)
    keys = [k for p in settings["obs_keys"] for k in matching([p], list(example.observation))]
    if not keys:
        return None, ()
    if not settings["discretize"]:
        return Component(kind="proprio", each=True), tuple(keys)
    low, high = float(settings["low"]), float(settings["high"])
    # Octo clips to [low + 1e-6, high - 1e-6] for uniform bins only. Values outside every bin fall
    # into the first one; so do clipped values if high - 1e-6 equals high in float32.
    clipped = settings["bin_type"] == "uniform" and np.float32(high - 1e-6) < np.float32(high)
    proprio = Component(
        kind="proprio",
        bins=int(settings["n_bins"]),
        bin_kind=_bin_kind(settings["bin_type"], path),
        low=low,
        high=high,
        outside="nearest" if clipped else "first",
    )
    return proprio, tuple(keys)


def _bin_kind(kind: str, path: str) -> str:
    if kind not in ("uniform", "normal"):
        raise ConfigError(unknown(f"kind of bins at {path}", kind, ["uniform", "normal"]))
    return kind


# Encoders: (spec, path, film) -> (component, pixel scaling)


def _small_stem(patch: int) -> Callable[..., tuple[Component, str]]:
    def stem(spec: Mapping[str, Any], path: str, film: bool) -> tuple[Component, str]:
        settings = fields(spec, path, {**_SMALL_STEM, "patch_size": patch})
        require_values(path, settings, use_film=film)
        # Octo's last convolution is patch/16 wide, regardless of the strides of the others.
        cell = int(settings["patch_size"]) // 16
        small_stem = Component(
            kind="small_stem",
            features=tuple(settings["features"]),
            kernels=tuple(settings["kernel_sizes"]),
            strides=tuple(settings["strides"]),
            padding=tuple(settings["padding"]),
            patch=cell * math.prod(settings["strides"]),
            width=int(settings["num_features"]),
        )
        return small_stem, _pixels(settings, path)

    return stem


def _patch_encoder(spec: Mapping[str, Any], path: str, film: bool) -> tuple[Component, str]:
    settings = fields(spec, path, _PATCH)
    require_values(path, settings, use_film=film)
    sizes = {"patch": int(settings["patch_size"]), "width": int(settings["num_features"])}
    return Component(kind="patch", **sizes), _pixels(settings, path)


def _hybrid_resnet(use_film: bool, layers: tuple[int, ...]) -> Callable[..., tuple[Component, str]]:
    def resnet(spec: Mapping[str, Any], path: str, film: bool) -> tuple[Component, str]:
        defaults = {**_VIT_RESNET, "use_film": use_film, "num_layers": layers}
        settings = fields(spec, path, defaults)
        require_values(path, settings, use_film=film)
        blocks, width = tuple(settings["num_layers"]), int(64 * settings["width"])
        return Component(kind="hybrid_resnet", blocks=blocks, width=width), _pixels(settings, path)

    return resnet


def _pixels(settings: Mapping[str, Any], path: str) -> str:
    kinds = {"default": "symmetric", "imagenet": "imagenet"}
    if settings["img_norm_type"] not in kinds:
        raise ConfigError(unknown(f"img_norm_type of {path}", settings["img_norm_type"], kinds))
    return kinds[settings["img_norm_type"]]


# Heads: (spec, path) -> component


def _regression(kind: str, pooled: bool) -> Callable[..., Component]:
    def head(spec: Mapping[str, Any], path: str) -> Component:
        settings = fields(spec, path, {**_REGRESSION, "use_map": pooled, "loss_type": kind})
        if settings["loss_type"] not in ("mse", "l1"):
            raise ConfigError(unknown(f"loss_type of {path}", settings["loss_type"], ["mse", "l1"]))
        limit = float(settings["max_action"])
        return Component(kind=settings["loss_type"], limit=limit, **_readout(settings))

    return head


def _diffusion(spec: Mapping[str, Any], path: str) -> Component:
    settings = fields(spec, path, _DIFFUSION)
    require_values(path, settings, loss_type="mse", time_dim=32)
    network = Component(
        kind="mlp",
        hidden=int(settings["hidden_dim"]),
        blocks=int(settings["num_blocks"]),
        layer_norm=bool(settings["use_layer_norm"]),
        dropout=float(settings["dropout_rate"]),
    )
    return Component(
        kind="diffusion",
        steps=int(settings["diffusion_steps"]),
        samples_per_example=int(settings["n_diffusion_samples"]),
        clip=float(settings["max_action"]),
        network=network,
        **_readout(settings),
    )


def _discrete(spec: Mapping[str, Any], path: str) -> Component:
    settings = fields(spec, path, _DISCRETE)
    layouts = {"action_dim_and_action_horizon": "value", "action_horizon": "step", "": "chunk"}
    if settings["token_per"] not in layouts:
        raise ConfigError(unknown(f"token_per of {path}", settings["token_per"], layouts))
    return Component(
        kind="bins",
        layout=layouts[settings["token_per"]],
        bins=int(settings["vocab_size"]),
        bin_kind=_bin_kind(settings["normalization_type"], path),
        # Octo's discrete head uses the default range of its bins, [0, 1].
        low=0.0,
        high=1.0,
        **_readout(settings),
    )


def _readout(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "readout": settings["readout_key"],
        "pooling": "attention" if settings["use_map"] else "mean",
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
_VIT_RESNET = {"use_film": False, "width": 1, "num_layers": (), "img_norm_type": "default"}
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
    "ViTResnet": _hybrid_resnet(False, ()),
    "ResNet26FILM": _hybrid_resnet(True, (2, 2, 2, 2)),
}
HEADS = {
    "ContinuousActionHead": _regression("mse", pooled=False),
    "MSEActionHead": _regression("mse", pooled=True),
    "L1ActionHead": _regression("l1", pooled=True),
    "DiffusionActionHead": _diffusion,
    "DiscreteActionHead": _discrete,
}
