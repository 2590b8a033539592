"""The language part of an Octo checkpoint: its T5 encoder and tokenizer, put in the run directory.

    octo_transformer/task_tokenizers_<name>/hf_model/...   → text_encoder/   octolike.model.language
    text_processor, or --text_encoder                      → tokenizer/      octolike.text

A frozen encoder stays outside the network, as in any other run; a finetuned one is part of it.
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


class Leaves(NamedTuple):
    """Octo's parameters, {slash path: array}: those of text encoders by tokenizer, and the rest."""

    encoders: dict[str, dict[str, np.ndarray]]
    others: dict[str, np.ndarray]


def separate(params: Mapping[str, np.ndarray]) -> Leaves:
    """Return the leaves of text encoders apart from the others."""
    leaves = Leaves({}, {})
    for path, leaf in params.items():
        if match := re.fullmatch(_MODEL, path):
            leaves.encoders.setdefault(match["name"], {})[match["path"]] = leaf
        else:
            leaves.others[path] = leaf
    return leaves


def place(
    config: Config, leaves: Leaves, source: Path, target: Path, given: str
) -> dict[str, Params]:
    """Write text_encoder/ and tokenizer/ in `target`; return {tokenizer: its trained encoder}.

    given: directory or hub id of tokenizer (and weights), "" for the name that the checkpoint
    gives. Fills in the paths of `config`. Raises ConfigError for weights that are missing, unknown
    or of another shape, and for a tokenizer that is not found.
    """
    ours = {n: t for n, t in config.model.tokenizers.items() if t["kind"] == "text_encoder"}
    for name in leaves.encoders.keys() - ours.keys():
        raise ConfigError(f"the checkpoint has an hf_model of {name!r}, which config.json has not")
    if len(ours) > 1:
        raise ConfigError(f"text encoders of {', '.join(ours)}: a run keeps one")
    trained = {}
    for name, component in ours.items():
        found = locate(given or config.data.text["path"], source)
        folder, path = target / "text_encoder", f"model.tokenizers.{name}.encoder"
        own = leaves.encoders.get(name)
        if own is None:
            # An instruction that was embedded beforehand: by the weights that come with it.
            encoder = language.build_encoder({"kind": "t5", "path": found}, path, np.float32)
            language_weights.copy(found, "t5", language.shapes(encoder), folder, path)
        else:
            sizes = _sizes(found) or t5_config(own)
            tensors = language_weights.from_flax(own)
            language_weights.save(folder, sizes, tensors)
            encoder = language.build_encoder({"kind": "t5", "path": str(folder)}, path, np.float32)
            where = f"hf_model of {source}"
            shapes = language.shapes(encoder)
            params = language_weights.from_tensors(tensors, "t5", shapes, where)
            if component["trained"]:
                trained[name] = params
        component["encoder"] = Component(kind="t5", path=str(folder))
        length = config.data.text["length"]
        HuggingFaceTokenizer(length=length, path=found).save(target / "tokenizer")
        config.data.text["path"] = str(target / "tokenizer")
    return trained


def locate(name: str, source: Path) -> str:
    """Return a directory of that name here, or beside the checkpoint; else the name: a hub id."""
    places = [Path(name), *(parent / name for parent in source.absolute().parents[:2])]
    return str(next((p for p in places if p.is_dir()), name))


def t5_config(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return Hugging Face's config of a T5 encoder by the shapes of its Flax parameters."""
    first = "encoder/block/0/layer"
    needed = {
        "words": "shared/embedding",
        "bias": f"{first}/0/SelfAttention/relative_attention_bias/embedding",
        "query": f"{first}/0/SelfAttention/q/kernel",
        "out": f"{first}/1/DenseReluDense/wo/kernel",
    }
    missing = [path for path in needed.values() if path not in leaves]
    if missing:
        raise ConfigError(f"hf_model is no T5 encoder: it lacks {', '.join(missing)}")
    shapes = {part: leaves[path].shape for part, path in needed.items()}
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


def _sizes(found: str) -> dict[str, Any] | None:
    file = Path(found) / language_weights.CONFIG
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
