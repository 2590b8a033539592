"""Pretrained parts of a network, which replace initial parameters when training starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from octolike.model import encoders, language

Params = dict[str, Any]


def read(model: Mapping[str, Any], shapes: Mapping[str, Any]) -> Params:
    """Return the pretrained parameters of a model's config, nested by path; {} for none.

    Args:
        model: `dataclasses.asdict(config.model)`.
        shapes: the network's parameters, as arrays or shapes.

    Returns:
        Only the parameters that the files contain.

    Raises:
        ConfigError: for files that do not fit.
    """
    params = {}
    for name, tokenizer in model["tokenizers"].items():
        encoder, module = tokenizer.get("encoder"), f"tokenizers_{name}"
        if not isinstance(encoder, Mapping) or "encoder" not in shapes.get(module, {}):
            continue
        encoder_shapes, path = shapes[module]["encoder"], f"model.tokenizers.{name}.encoder"
        for field, load in LOADERS.items():
            if encoder.get(field):
                params[module] = {"encoder": load(encoder, encoder_shapes, path)}
    return params


def _load_language(encoder: Mapping[str, Any], shapes: Mapping[str, Any], path: str) -> Params:
    return language.read_params(encoder["path"], encoder["kind"], shapes, path)


# Field of an encoder's component that names its weights: the function that loads them.
LOADERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], str], Params]] = {
    "path": _load_language,
    "weights": encoders.load_weights,
}
