"""Imports the text encoder (T5) and tokenizer of an Octo checkpoint into a run directory.

    octo_transformer/task_tokenizers_<name>/hf_model/...   → text_encoder/   octolike.model.language
    text_processor, or --text_encoder                      → tokenizer/      octolike.text

Instructions that a text processor embeds (Octo's MuseEmbedding) are looked up in a table of texts
and vectors (`read_table`), which fills both directories. As in any other run, a frozen encoder
stays outside the network, and a finetuned one is part of it.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from octolike import files
from octolike.config import Component, Config, ConfigError
from octolike.model import language, language_weights
from octolike.model.language import READERS
from octolike.text import HuggingFaceTokenizer, write_table
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
    config: Config,
    params: SplitParams,
    words: Any,
    source: Path,
    target: Path,
    text_encoder: str,
) -> dict[str, Params]:
    """Write text_encoder/ and tokenizer/ in `target`; return {tokenizer: finetuned parameters}.

    Sets the paths in `config`.

    Args:
        config: the translated config.
        params: parameters of the checkpoint.
        words: the example batch's instructions.
        source: the checkpoint directory.
        target: the run directory.
        text_encoder: directory or hub id of the tokenizer (and weights), or a table; "": the name
            that the checkpoint states.

    Raises:
        ConfigError: weights are missing, unknown or of another shape, or the tokenizer is missing.
    """
    tokenizers = {n: t for n, t in config.model.tokenizers.items() if t["kind"] in READERS}
    names = [name for name, t in tokenizers.items() if t["kind"] == "text_encoder"]
    for name in params.encoders.keys() - {*names}:
        raise ConfigError(
            f"the checkpoint has parameters of {name}/hf_model, but config.json has no "
            "such tokenizer"
        )
    if len(names) > 1:
        raise ConfigError(
            f"config.json has several text encoders: {', '.join(names)}; octolike supports one"
        )
    if not tokenizers:
        return {}
    folder, path = target / "text_encoder", f"model.tokenizers.{next(iter(tokenizers))}.encoder"
    trained = {}
    if config.data.text["kind"] == "table":
        texts, vectors = read_table(text_encoder, words.shape[1:])
        _write_table(folder, target / "tokenizer", texts, vectors)
        kind = "table"
    else:
        directory = find_directory(text_encoder or config.data.text["path"], source)
        leaves = params.encoders.get(next(iter(names), ""))
        if leaves is None:  # instructions were embedded in advance, with the pretrained weights
            kind = language_weights.kind_of(directory, path)
            encoder = language.build_encoder({"kind": kind, "path": directory}, path, np.float32)
            language_weights.copy(directory, kind, language.shapes(encoder), folder, path)
        else:
            kind, encoder_params = "t5", _save_encoder(leaves, directory, folder, source, path)
            if tokenizers[names[0]]["trained"]:
                trained[names[0]] = encoder_params
        length = config.data.text["length"]
        HuggingFaceTokenizer(length=length, path=directory).save(target / "tokenizer")
    for tokenizer in tokenizers.values():
        tokenizer["encoder"] = Component(kind=kind, path=str(folder))
    config.data.text["path"] = str(target / "tokenizer")
    return trained


def _save_encoder(
    leaves: Mapping[str, np.ndarray], directory: str, folder: Path, source: Path, path: str
) -> Params:
    """Write the checkpoint's T5 to `folder`; return its parameters."""
    sizes = _sizes(directory) or t5_config(leaves)
    tensors = language_weights.from_flax(leaves)
    language_weights.save(folder, sizes, tensors)
    encoder = language.build_encoder({"kind": "t5", "path": str(folder)}, path, np.float32)
    shapes = language.shapes(encoder)
    return language_weights.from_tensors(tensors, "t5", shapes, f"hf_model of {source}")


def ids_of(words: Any) -> dict[str, np.ndarray]:
    """Return task.language of Octo's token ids; for embedded instructions, zeros of its shape."""
    if isinstance(words, Mapping):
        ids, mask = words["input_ids"], words["attention_mask"]
        return {"ids": np.asarray(ids, np.int32), "mask": np.asarray(mask, bool)}
    shape = states_of(words).shape[:2]
    return {"ids": np.zeros(shape, np.int32), "mask": np.ones(shape, bool)}


def states_of(words: np.ndarray) -> np.ndarray:
    """Return embedded instructions [B, E] or [B, L, E] as states [B, L, E]."""
    return np.asarray(words[:, None] if words.ndim == 2 else words, np.float32)


# Tables of embedded instructions


def read_table(path: str, shape: tuple[int, ...]) -> tuple[list[str], np.ndarray]:
    """Return (texts, vectors float32 [N, L, E]) of an .npz file with `texts` and `vectors`.

    texts: [N] distinct instructions, one of them "", which Octo embeds where an instruction is
    absent. vectors: what Octo's text processor returns for them, [N, *shape].

    Raises:
        ConfigError: no file is named, or it does not hold such a table.
    """
    sizes = ", ".join(map(str, ("N", *shape)))
    form = f"an .npz file with texts [N], one of them '', and their vectors [{sizes}]"
    if not path:
        raise ConfigError(
            "the checkpoint reads embedded instructions, whose embedding it lacks; name a table: "
            f"--text_encoder FILE, {form}"
        )
    try:
        with np.load(path) as arrays:
            texts, vectors = arrays["texts"], arrays["vectors"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"--text_encoder {path!r} is not {form} (texts as str, not objects): "
            f"{files.cause(error)}"
        ) from error
    texts = [str(text).strip() for text in texts.ravel()]
    if vectors.shape != (len(texts), *shape) or not np.isfinite(vectors).all():
        raise ConfigError(
            f"--text_encoder {path!r} has {len(texts)} texts, and vectors {list(vectors.shape)}; "
            f"expected {form}, all finite"
        )
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice or "" not in texts:
        found = f"{twice[0]!r} twice" if twice else "no vector for the empty text ''"
        raise ConfigError(f"--text_encoder {path!r} has {found}; expected {form}")
    return texts, np.asarray(vectors, np.float32).reshape(len(texts), -1, shape[-1])


def _write_table(folder: Path, tokenizer: Path, texts: Sequence[str], vectors: np.ndarray) -> None:
    """Write a table's texts, and its vectors, after a row of zeros for padding, as an encoder."""
    rows = np.concatenate([np.zeros_like(vectors[0, :1]), *vectors])
    sizes = {"vocab_size": len(rows), "hidden_size": rows.shape[1]}
    sizes = {"model_type": language_weights.TABLE_TYPE, **sizes}
    language_weights.save(folder, sizes, {"rows.weight": rows})
    write_table(tokenizer, vectors.shape[1], texts)


# Encoders


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
