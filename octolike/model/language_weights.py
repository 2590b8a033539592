"""Weights of text encoders: Hugging Face's config.json and safetensors, read and written.

A directory, hub id or package (`files.package_path`) holds config.json and model.safetensors, or
several files listed in model.safetensors.index.json. Of a complete T5 or CLIP model only the text
encoder is read.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.config import ConfigError, unknown

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"

# Our module path: Hugging Face's; {i} is the number of the block in both.
_T5 = "encoder.block.{i}.layer"
_CLIP = "text_model.encoder.layers.{i}"
_BERT = "encoder.layer.{i}"
NAMES = {
    "t5": {
        "words": "shared",
        "relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "block_{i}_attention_norm": f"{_T5}.0.layer_norm",
        "block_{i}_query": f"{_T5}.0.SelfAttention.q",
        "block_{i}_key": f"{_T5}.0.SelfAttention.k",
        "block_{i}_value": f"{_T5}.0.SelfAttention.v",
        "block_{i}_out": f"{_T5}.0.SelfAttention.o",
        "block_{i}_mlp_norm": f"{_T5}.1.layer_norm",
        "block_{i}_mlp_in": f"{_T5}.1.DenseReluDense.wi",
        "block_{i}_mlp_out": f"{_T5}.1.DenseReluDense.wo",
        "norm": "encoder.final_layer_norm",
    },
    "clip": {
        "words": "text_model.embeddings.token_embedding",
        "positions": "text_model.embeddings.position_embedding",
        "block_{i}_attention_norm": f"{_CLIP}.layer_norm1",
        "block_{i}_query": f"{_CLIP}.self_attn.q_proj",
        "block_{i}_key": f"{_CLIP}.self_attn.k_proj",
        "block_{i}_value": f"{_CLIP}.self_attn.v_proj",
        "block_{i}_out": f"{_CLIP}.self_attn.out_proj",
        "block_{i}_mlp_norm": f"{_CLIP}.layer_norm2",
        "block_{i}_mlp_in": f"{_CLIP}.mlp.fc1",
        "block_{i}_mlp_out": f"{_CLIP}.mlp.fc2",
        "norm": "text_model.final_layer_norm",
    },
    "bert": {
        "words": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "segments": "embeddings.token_type_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
        "block_{i}_query": f"{_BERT}.attention.self.query",
        "block_{i}_key": f"{_BERT}.attention.self.key",
        "block_{i}_value": f"{_BERT}.attention.self.value",
        "block_{i}_out": f"{_BERT}.attention.output.dense",
        "block_{i}_attention_norm": f"{_BERT}.attention.output.LayerNorm",
        "block_{i}_mlp_in": f"{_BERT}.intermediate.dense",
        "block_{i}_mlp_out": f"{_BERT}.output.dense",
        "block_{i}_mlp_norm": f"{_BERT}.output.LayerNorm",
    },
    "table": {"rows": "rows"},
}
# In a gated T5, "wi" is two layers.
GATED = {
    "block_{i}_mlp_gate": f"{_T5}.1.DenseReluDense.wi_0",
    "block_{i}_mlp_in": f"{_T5}.1.DenseReluDense.wi_1",
}
_NONE = r"(?!)"  # matches nothing
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
# (pattern, replacement) for the names of a separately saved text encoder or tied embeddings.
ALIASES = {
    "t5": (r"^encoder\.embed_tokens\.", "shared."),
    "clip": (r"^(?=embeddings\.|encoder\.layers\.|final_layer_norm\.)", "text_model."),
    "bert": (r"^bert\.", ""),
    "table": (_NONE, ""),
}
# Parameters of complete models that do not belong to the text encoder: ignored.
OTHERS = {
    "t5": r"(decoder|lm_head)\.",
    "clip": r"(vision_model|visual_projection|text_projection|logit_scale|logit_bias)\b"
    r"|text_model\.embeddings\.position_ids$",
    "bert": r"(pooler|cls)\.|embeddings\.position_ids$",
    "table": _NONE,
}

# Our field: (its name in config.json, Hugging Face's default if config.json lacks it).
SIZES: dict[str, dict[str, tuple[str, Any]]] = {
    "t5": {
        "vocabulary": ("vocab_size", 32128),
        "width": ("d_model", 512),
        "layers": ("num_layers", 6),
        "attention_heads": ("num_heads", 8),
        "head_width": ("d_kv", 64),
        "mlp_width": ("d_ff", 2048),
        "buckets": ("relative_attention_num_buckets", 32),
        "max_distance": ("relative_attention_max_distance", 128),
        "epsilon": ("layer_norm_epsilon", 1e-6),
        "activation": ("feed_forward_proj", "relu"),
    },
    "clip": {
        "vocabulary": ("vocab_size", 49408),
        "width": ("hidden_size", 512),
        "layers": ("num_hidden_layers", 12),
        "attention_heads": ("num_attention_heads", 8),
        "mlp_width": ("intermediate_size", 2048),
        "activation": ("hidden_act", "quick_gelu"),
        "max_length": ("max_position_embeddings", 77),
        "epsilon": ("layer_norm_eps", 1e-5),
    },
    "bert": {
        "vocabulary": ("vocab_size", 30522),
        "width": ("hidden_size", 768),
        "layers": ("num_hidden_layers", 12),
        "attention_heads": ("num_attention_heads", 12),
        "mlp_width": ("intermediate_size", 3072),
        "activation": ("hidden_act", "gelu"),
        "max_length": ("max_position_embeddings", 512),
        "segments": ("type_vocab_size", 2),
        "epsilon": ("layer_norm_eps", 1e-12),
    },
    "table": {"vocabulary": ("vocab_size", 1), "width": ("hidden_size", 512)},
}
TABLE_TYPE = "instruction_table"  # the model_type of a table of vectors; it is octolike's own
KINDS = {
    "t5": "t5",
    "mt5": "t5",
    "clip": "clip",
    "clip_text_model": "clip",
    "bert": "bert",
    TABLE_TYPE: "table",
}


def read_sizes(source: str, kind: str, path: str) -> dict[str, Any]:
    """Return the fields of the encoder's component, read from its config.json.

    source: directory or hub id; path: the setting's name in errors. Raises ConfigError for a
    missing config.json, or one of another kind of encoder.
    """
    file, config = _config(source, path)
    model_type: Any = config.get("model_type")
    if KINDS.get(model_type) != kind:
        types = ", ".join(sorted(k for k, v in KINDS.items() if v == kind))
        raise ConfigError(
            f"{path}.path: {file} has model_type {model_type!r}; {kind!r} reads {types}"
        )
    config = config.get("text_config") or config.get("text_config_dict") or config
    sizes: dict[str, Any] = {
        field: default if config.get(name) is None else config[name]
        for field, (name, default) in SIZES[kind].items()
    }
    if kind == "t5":
        # "relu" in v1.0; "gated-gelu" in v1.1, which means the tanh approximation
        sizes["gated"] = gated = sizes["activation"].startswith("gated-")
        activation = sizes["activation"].removeprefix("gated-")
        sizes["activation"] = "gelu_new" if gated and activation == "gelu" else activation
    return sizes


def kind_of(source: str, path: str) -> str:
    """Return the kind of encoder of a directory or hub id; ConfigError, with `path`, if unknown."""
    file, config = _config(source, path)
    if config.get("model_type") not in KINDS:
        raise ConfigError(f"{unknown('model_type', config.get('model_type'), KINDS)} in {file}")
    return KINDS[config["model_type"]]


def _config(source: str, path: str) -> tuple[Path, dict[str, Any]]:
    """Return (config.json, its content) of a directory or hub id."""
    file = find(source, (CONFIG,), path) / CONFIG
    try:
        return file, json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}.path: {file} is not valid JSON: {error}") from error


def read(source: str, kind: str, shapes: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return parameters nested like `shapes`, float32, read from the safetensors at `source`.

    Raises ConfigError if the files are missing, and with all parameters that are missing,
    unknown or of another shape; path: the setting's name in errors.
    """
    patterns = (CONFIG, WEIGHTS, INDEX, "model-*.safetensors")
    folder = find(source, patterns, path)
    return from_tensors(_tensors(folder, path), kind, shapes, f"{path}.path {str(source)!r}")


def from_tensors(
    tensors: Mapping[str, Any], kind: str, shapes: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return parameters nested like `shapes`, float32, from Hugging Face's tensors.

    tensors: arrays, or functions that return them; where: their source, for errors. Raises
    ConfigError with all tensors that do not fit.
    """
    names = _tensor_names(shapes, kind)
    stored = {re.sub(*ALIASES[kind], name): name for name in tensors}
    stored |= {name: name for name in tensors if name in names}
    params: dict[str, dict[str, np.ndarray]] = {}
    faults = []
    for name, (module, leaf) in names.items():
        expected = list(shapes[module][leaf].shape)
        if name not in stored:
            faults.append(f"missing: {name}, for {module}/{leaf} {expected}")
            continue
        value = tensors[stored.pop(name)]
        value = np.asarray(value() if callable(value) else value)
        # PyTorch's linear layers store [out, in]
        value = value.T if leaf == "kernel" else value
        if list(value.shape) != expected:
            faults.append(f"{name} gives {module}/{leaf} as {list(value.shape)}, not {expected}")
            continue
        params.setdefault(module, {})[leaf] = np.ascontiguousarray(value, np.float32)
    faults += [f"unknown: {x}" for x in stored.values() if not re.match(OTHERS[kind], x)]
    if faults:
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ConfigError(
            f"the weights of {where} do not fit its config.json ({len(faults)} differences):\n  "
            + "\n  ".join(faults[:20])
            + more
        )
    return params


def from_flax(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return {PyTorch name: tensor} for Hugging Face's Flax parameters {slash path: array}."""
    tensors = {}
    for path, value in leaves.items():
        *parents, leaf = path.split("/")
        value = value.T if leaf == "kernel" else value
        tensors[".".join([*parents, LEAVES.get(leaf, leaf)])] = np.asarray(value)
    return tensors


def save(
    directory: str | Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write a directory that `read` and `read_sizes` read: all of it or nothing.

    config: Hugging Face's; tensors: by PyTorch's names, {} for a directory of sizes alone.
    """
    from safetensors.numpy import save_file

    with files.replacing(directory) as part:
        part.mkdir()
        (part / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        if tensors:
            arrays = {k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()}
            save_file(arrays, part / WEIGHTS, metadata={"format": "pt"})


def copy(source: str, kind: str, shapes: Mapping[str, Any] | None, target: Path, path: str) -> None:
    """Write to `target` the config.json of `source` and, with `shapes`, the encoder's tensors."""
    config = json.loads((find(source, (CONFIG,), path) / CONFIG).read_text(encoding="utf-8"))
    tensors = {}
    if shapes is not None:
        params = read(source, kind, shapes, path)
        for name, (module, leaf) in _tensor_names(shapes, kind).items():
            value = params[module][leaf]
            tensors[name] = value.T if leaf == "kernel" else value
    save(target, config, tensors)


@functools.lru_cache(maxsize=8)
def find(source: str, patterns: tuple[str, ...], path: str) -> Path:
    """Return the local directory of a directory or hub id; downloads files that match patterns."""
    source = files.package_path(source)
    if Path(source).is_dir():
        if not (Path(source) / CONFIG).is_file():
            contents = ", ".join(sorted(p.name for p in Path(source).iterdir())) or "nothing"
            raise ConfigError(f"{path}.path {source!r} has no {CONFIG}; it contains {contents}")
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's classes, its HTTP client's, or OSError
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ConfigError(
            f"{path}.path {source!r} is neither a directory with {CONFIG} nor a reachable hub id "
            f"({reason})"
        ) from error


def _tensors(folder: Path, path: str) -> dict[str, Any]:
    """Return {name: function that reads the tensor} for a directory's safetensors."""
    from safetensors import safe_open

    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
    else:
        contents = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ConfigError(
            f"{path}.path {str(folder)!r} has no weights: no {WEIGHTS} and no {INDEX}; it contains "
            f"{contents}. To convert weights of another format, load them with transformers and "
            "call save_pretrained"
        )
    tensors: dict[str, Callable[[], Any]] = {}
    for name in files:
        try:
            # "flax", because numpy lacks bfloat16
            file = safe_open(folder / name, framework="flax")
        except Exception as error:
            raise ConfigError(
                f"{path}.path: {folder / name} cannot be read: {type(error).__name__}: {error}"
            ) from error
        tensors |= {key: functools.partial(file.get_tensor, key) for key in list(file.keys())}
    return tensors


def _tensor_names(shapes: Mapping[str, Any], kind: str) -> dict[str, tuple[str, str]]:
    """Return {Hugging Face's name: (our module, leaf)} for every parameter."""
    gated = any(name.endswith("_mlp_gate") for name in shapes)
    table = NAMES[kind] | (GATED if gated else {})
    names: dict[str, tuple[str, str]] = {}
    for module, leaves in shapes.items():
        block = re.match(r"block_(\d+)_", module)
        template = re.sub(r"^block_\d+_", "block_{i}_", module)
        if template not in table:
            raise ConfigError(unknown(f"part of a {kind} encoder", module, table))
        prefix = table[template].format(i=block[1] if block else "")
        names |= {f"{prefix}.{LEAVES[leaf]}": (module, leaf) for leaf in leaves}
    return names
