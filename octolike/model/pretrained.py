"""Pretrained parts of a network: what is laid over fresh parameters when training starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octolike.model import encoders, language

Params = dict[str, Any]


def read(model: Mapping[str, Any], shapes: Mapping[str, Any]) -> Params:
    """Return the pretrained parameters that a model's config names, nested by path; {} for none.

    model: `dataclasses.asdict(config.model)`; shapes: of the network's parameters. What no file has
    is left out. Raises ConfigError for files that do not fit.
    """
    found = {}
    for name, tokenizer in model["tokenizers"].items():
        encoder, part = tokenizer.get("encoder"), f"tokenizers_{name}"
        if not isinstance(encoder, Mapping) or "encoder" not in shapes.get(part, {}):
            continue
        fresh, path = shapes[part]["encoder"], f"model.tokenizers.{name}.encoder"
        for source, load in SOURCES.items():
            if encoder.get(source):
                found[part] = {"encoder": load(encoder, fresh, path)}
    return found


def _language(encoder: Mapping[str, Any], fresh: Mapping[str, Any], path: str) -> Params:
    return language.read_params(encoder["path"], encoder["kind"], fresh, path)


# The field of an encoder's component that names its weights, and who reads them.
SOURCES = {"path": _language, "weights": encoders.load_weights}
