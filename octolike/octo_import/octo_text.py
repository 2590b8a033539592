"""Imports the text encoder (T5) and tokenizer of an Octo checkpoint into a run directory.

    octo_transformer/task_tokenizers_<name>/hf_model/...   → text_encoder/   octolike.model.language
    text_processor, or --text_encoder                      → tokenizer/      octolike.text

As in any other run, a frozen encoder stays outside the network, and a finetuned one is part of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from octolike.config import Component, Config, ConfigError
from octolike.model import language, language_weights
from octolike.text import HuggingFaceTokenizer
from octolike.train.state import Params

_MODEL = r"octo_transformer/task_tokenizers_(?P<name>[^/]+)/hf_model/(?P<path>.+)"


class SplitParams(NamedTuple):
    """Octo's parameters {slash path: array}; encoders: those of text encoders, by tokenizer."""

    encoders: dict[str, dict[str, np.ndarray]]
    others: dict[str, np.ndarray]


def split_text_encoders(params: Mapping[str, np.ndarray]) -> SplitParams:
    """Split off the parameters of text encoders."""
    parts = SplitParams({}, {})
    for path, leaf in params.items():
        if match := re.fullmatch(_MODEL, path):
            parts.encoders.setdefault(match["name"], {})[match["path"]] = leaf
        else:
            parts.others[path] = leaf
    return parts


def import_text(
    config: Config, params: SplitParams, source: Path, target: Path, text_encoder: str
) -> dict[str, Params]:
    """Write text_encoder/ and tokenizer/ in `target`; return {tokenizer: finetuned parameters}.

    Sets the paths in `config`.

    Args:
        config: the translated config.
        params: parameters of the checkpoint.
        source: the checkpoint directory.
        target: the run directory.
        text_encoder: directory or hub id of the tokenizer (and weights); "": the name that the
            checkpoint states.

    Raises:
        ConfigError: weights are missing, unknown or of another shape, or the tokenizer is missing.
    """
    components = {n: t for n, t in config.model.tokenizers.items() if t["kind"] == "text_encoder"}
    for name in params.encoders.keys() - components.keys():
        raise ConfigError(
            f"the checkpoint has parameters of {name}/hf_model, but config.json has no "
            "such tokenizer"
        )
    if len(components) > 1:
        raise ConfigError(
            f"config.json has several text encoders: {', '.join(components)}; octolike supports one"
        )
    trained = {}
    for name, component in components.items():
        directory = find_directory(text_encoder or config.data.text["path"], source)
        folder, path = target / "text_encoder", f"model.tokenizers.{name}.encoder"
        leaves = params.encoders.get(name)
        if leaves is None:  # instructions were embedded in advance, with the pretrained weights
            encoder = language.build_encoder({"kind": "t5", "path": directory}, path, np.float32)
            language_weights.copy(directory, "t5", language.shapes(encoder), folder, path)
        else:
            sizes = _sizes(directory) or t5_config(leaves)
            tensors = language_weights.from_flax(leaves)
            language_weights.save(folder, sizes, tensors)
            encoder = language.build_encoder({"kind": "t5", "path": str(folder)}, path, np.float32)
            shapes = language.shapes(encoder)
            encoder_params = language_weights.from_tensors(
                tensors, "t5", shapes, f"hf_model of {source}"
            )
            if component["trained"]:
                trained[name] = encoder_params
        component["encoder"] = Component(kind="t5", path=str(folder))
        length = config.data.text["length"]
        HuggingFaceTokenizer(length=length, path=directory).save(target / "tokenizer")
        config.data.text["path"] = str(target / "tokenizer")
    return trained


def find_directory(name: str, source: Path) -> str:
    """Return a local directory, or one next to the checkpoint; else the name, as a hub id."""
    places = [Path(name), *(parent / name for parent in source.absolute().parents[:2])]
    return str(next((p for p in places if p.is_dir()), name))


def t5_config(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return Hugging Face's config of a T5 encoder, from the shapes of its Flax parameters."""
    first = "encoder/block/0/layer"
    paths = {
        "words": "shared/embedding",
        "bias": f"{first}/0/SelfAttention/relative_attention_bias/embedding",
        "query": f"{first}/0/SelfAttention/q/kernel",
        "out": f"{first}/1/DenseReluDense/wo/kernel",
    }
    missing = [path for path in paths.values() if path not in leaves]
    if missing:
        raise ConfigError(f"hf_model is not a T5 encoder: it lacks {', '.join(missing)}")
    shapes = {part: leaves[path].shape for part, path in paths.items()}
    blocks = {m[1] for m in (re.match(r"encoder/block/(\d+)/", path) for path in leaves) if m}
    gated = f"{first}/1/DenseReluDense/wi_0/kernel" in leaves
    buckets, heads = shapes["bias"]
    return {
        "model_type": "t5",
        "architectures": ["T5EncoderModel"],
        "vocab_size": shapes["words"][0],
        "d_model": shapes["words"][1],
        "num_layers": len(blocks),
        "num_heads": heads,
        "d_kv": shapes["query"][1] // heads,
        "d_ff": shapes["out"][0],
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "relative_attention_num_buckets": buckets,
    }


def _sizes(directory: str) -> dict[str, Any] | None:
    """Return the config.json of a local encoder; None without one."""
    file = Path(directory) / language_weights.CONFIG
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
