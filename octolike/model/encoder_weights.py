"""Published weights of image encoders, from a local file to this project's parameters.

Read are .npz in the layout of big_vision and its ancestors (ViT), and .safetensors in timm's (ViT;
ResNet with group norm). `RULES` says what becomes of each leaf. It is strict: a leaf of the file
that no rule knows, a parameter that the file does not fill, or another shape is an error.

Two things are fitted: position embeddings are interpolated to the grid of the images at hand, and
image channels beyond the file's (a stacked goal image or camera, depth) start with zero weights,
so that the network begins as the published one, looking at the first image alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.flax

from octolike.config import ConfigError
from octolike.model import vit
from octolike.types import flatten, unflatten

Leaves = dict[str, np.ndarray]


class Rule(NamedTuple):
    """Leaves whose whole path matches `pattern` become `targets`, as `change` makes them.

    targets: templates of dotted paths; none: the leaf is not needed. change(leaf, n) returns what
    the n targets get.
    """

    pattern: str
    targets: tuple[str, ...]
    change: Callable[[np.ndarray, int], Iterable[np.ndarray]]


def _same(x: np.ndarray, n: int) -> list[np.ndarray]:
    return [x]


def _linear(x: np.ndarray, n: int) -> list[np.ndarray]:
    """PyTorch's [n · out, in] to n kernels [in, out]; biases are split alike."""
    return [part.T for part in np.split(x, n)]


def _convolution(x: np.ndarray, n: int) -> list[np.ndarray]:
    """PyTorch's [out, in, h, w] to [h, w, in, out]."""
    return [x.transpose(2, 3, 1, 0)]


BIG_VISION_VIT = (
    Rule(r"embedding/(\w+)", (r"embedding.\1",), _same),
    Rule(r"(?:Transformer/posembed_input/)?pos_embedding", ("pos_embedding",), _same),
    Rule(r"cls", ("class_token",), _same),
    Rule(
        r"Transformer/encoderblock_(\d+)/LayerNorm_0/(\w+)",
        (r"block_\1.attention_norm.\2",),
        _same,
    ),
    Rule(
        r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_[01]/(\w+)/(\w+)",
        (r"block_\1.attention.\2.\3",),
        _same,
    ),
    Rule(r"Transformer/encoderblock_(\d+)/LayerNorm_[12]/(\w+)", (r"block_\1.mlp_norm.\2",), _same),
    Rule(
        r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_0/(\w+)",
        (r"block_\1.mlp_in.\2",),
        _same,
    ),
    Rule(
        r"Transformer/encoderblock_(\d+)/MlpBlock_[03]/Dense_1/(\w+)",
        (r"block_\1.mlp_out.\2",),
        _same,
    ),
    Rule(r"Transformer/encoder_norm/(\w+)", (r"norm.\1",), _same),
    Rule(r"(?:head|pre_logits|MAPHead_0)/.*", (), _same),  # pooling and classifier
)

TIMM_VIT = (
    Rule(r"patch_embed\.proj\.weight", ("embedding.kernel",), _convolution),
    Rule(r"patch_embed\.proj\.bias", ("embedding.bias",), _same),
    Rule(r"pos_embed", ("pos_embedding",), _same),
    Rule(r"cls_token", ("class_token",), _same),
    Rule(r"blocks\.(\d+)\.norm1\.weight", (r"block_\1.attention_norm.scale",), _same),
    Rule(r"blocks\.(\d+)\.norm1\.bias", (r"block_\1.attention_norm.bias",), _same),
    Rule(
        r"blocks\.(\d+)\.attn\.qkv\.weight",
        tuple(rf"block_\1.attention.{x}.kernel" for x in ("query", "key", "value")),
        _linear,
    ),
    Rule(
        r"blocks\.(\d+)\.attn\.qkv\.bias",
        tuple(rf"block_\1.attention.{x}.bias" for x in ("query", "key", "value")),
        _linear,
    ),
    Rule(r"blocks\.(\d+)\.attn\.proj\.weight", (r"block_\1.attention.out.kernel",), _linear),
    Rule(r"blocks\.(\d+)\.attn\.proj\.bias", (r"block_\1.attention.out.bias",), _same),
    Rule(r"blocks\.(\d+)\.norm2\.weight", (r"block_\1.mlp_norm.scale",), _same),
    Rule(r"blocks\.(\d+)\.norm2\.bias", (r"block_\1.mlp_norm.bias",), _same),
    Rule(r"blocks\.(\d+)\.mlp\.fc1\.weight", (r"block_\1.mlp_in.kernel",), _linear),
    Rule(r"blocks\.(\d+)\.mlp\.fc1\.bias", (r"block_\1.mlp_in.bias",), _same),
    Rule(r"blocks\.(\d+)\.mlp\.fc2\.weight", (r"block_\1.mlp_out.kernel",), _linear),
    Rule(r"blocks\.(\d+)\.mlp\.fc2\.bias", (r"block_\1.mlp_out.bias",), _same),
    Rule(r"norm\.weight", ("norm.scale",), _same),
    Rule(r"norm\.bias", ("norm.bias",), _same),
    Rule(r"(?:head|pre_logits|attn_pool)\..*", (), _same),  # pooling and classifier
)

TIMM_RESNET = (
    Rule(r"conv1\.weight", ("conv.kernel",), _convolution),
    Rule(r"bn1\.weight", ("norm.scale",), _same),
    Rule(r"bn1\.bias", ("norm.bias",), _same),
    Rule(
        r"layer(\d+)\.(\d+)\.conv(\d)\.weight",
        (r"stage_\1_block_\2.conv_\3.kernel",),
        _convolution,
    ),
    Rule(r"layer(\d+)\.(\d+)\.bn(\d)\.weight", (r"stage_\1_block_\2.norm_\3.scale",), _same),
    Rule(r"layer(\d+)\.(\d+)\.bn(\d)\.bias", (r"stage_\1_block_\2.norm_\3.bias",), _same),
    Rule(
        r"layer(\d+)\.(\d+)\.downsample\.0\.weight",
        (r"stage_\1_block_\2.conv_skip.kernel",),
        _convolution,
    ),
    Rule(
        r"layer(\d+)\.(\d+)\.downsample\.1\.weight",
        (r"stage_\1_block_\2.norm_skip.scale",),
        _same,
    ),
    Rule(r"layer(\d+)\.(\d+)\.downsample\.1\.bias", (r"stage_\1_block_\2.norm_skip.bias",), _same),
    Rule(r"fc\..*", (), _same),  # classifier
)

RULES = {
    ("vit", ".npz"): BIG_VISION_VIT,
    ("vit", ".safetensors"): TIMM_VIT,
    ("resnet", ".safetensors"): TIMM_RESNET,
}


def load(file: str, kind: str, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a file, float32, nested as `fresh`; FiLM's are left out.

    fresh: the encoder's own parameters, arrays or shapes. Raises ConfigError naming leaves.
    """
    path = Path(file)
    suffixes = [s for k, s in RULES if k == kind]
    if path.suffix not in suffixes:
        raise ConfigError(
            f"weights {file!r}: a {kind!r} encoder reads {' or '.join(suffixes)} files"
        )
    if not path.is_file():
        raise ConfigError(f"weights {file!r}: there is no such file; download it first")
    wanted = {k: tuple(v.shape) for k, v in flatten(fresh) if not re.search(r"\bfilm", k)}
    found, unknown = renamed(read(path), RULES[kind, path.suffix])
    found = fitted(found, wanted)
    faults = [f"{name}: in the file, but nothing here takes it" for name in unknown]
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            faults.append(f"{name}: not in the file, expected {list(wanted[name])}")
        elif name not in wanted:
            faults.append(f"{name}: in the file, but this encoder has no such parameter")
        elif found[name].shape != wanted[name]:
            faults.append(
                f"{name}: {list(found[name].shape)} in the file, expected {list(wanted[name])}"
            )
    if faults:
        raise ConfigError(_explain(file, kind, faults))
    return unflatten(found)


def read(path: Path) -> Leaves:
    """Return the leaves of an .npz or .safetensors file; of a training state, its parameters."""
    if path.suffix == ".safetensors":
        return {k: np.asarray(v) for k, v in safetensors.flax.load_file(path).items()}
    with np.load(path, allow_pickle=False) as stored:
        leaves = {k: stored[k] for k in stored.files}
    for prefix in ("params/img/", "params/", "opt/target/", "img/"):
        inside = {k[len(prefix) :]: v for k, v in leaves.items() if k.startswith(prefix)}
        if inside:
            leaves = inside
            break
    return dict(_unstacked(leaves))


def renamed(leaves: Leaves, rules: tuple[Rule, ...]) -> tuple[Leaves, list[str]]:
    """Return ({our dotted path: leaf}, the names that no rule knows)."""
    found, unknown = {}, []
    for name, leaf in leaves.items():
        for rule in rules:
            match = re.fullmatch(rule.pattern, name)
            if match:
                paths = [match.expand(t) for t in rule.targets]
                found |= dict(zip(paths, rule.change(leaf, len(paths)), strict=False))
                break
        else:
            unknown.append(name)
    return found, unknown


def fitted(found: Leaves, wanted: Mapping[str, tuple[int, ...]]) -> Leaves:
    """Return leaves as the wanted shapes have them, where that is only a matter of layout."""
    found = {k: np.asarray(v, np.float32) for k, v in found.items()}
    if "pos_embedding" in found and "pos_embedding" in wanted:
        found |= _positions(found, wanted["pos_embedding"])
    for name, shape in wanted.items():
        x = found.get(name)
        if x is None or x.shape == shape:
            continue
        if ".attention." in name and x.size == math.prod(shape) and x.ndim < len(shape):
            found[name] = x.reshape(shape)  # the heads apart
        elif name in ("embedding.kernel", "conv.kernel") and x.ndim == 4:
            extra = shape[2] - x.shape[2]
            if extra > 0:
                found[name] = np.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))
    return found


def _positions(found: Leaves, shape: tuple[int, ...]) -> Leaves:
    """Return the position embeddings as a grid of the wanted size; a class token gets its own."""
    x = found["pos_embedding"]
    x = x.reshape(-1, x.shape[-1])
    side = math.isqrt(len(x))
    first, grid = x[: len(x) - side**2], x[len(x) - side**2 :]
    leaves = {"pos_embedding": grid.reshape(1, side, side, -1)}
    if grid.shape[-1] == shape[-1]:
        leaves["pos_embedding"] = np.asarray(vit.resample(leaves["pos_embedding"], shape[1:3]))
    if len(first) == 1 and "class_token" in found:
        leaves["class_token"] = found["class_token"] + first
    elif len(first):
        leaves["pos_embedding"] = x[None]  # no square: the shapes will tell
    return leaves


def _unstacked(leaves: Leaves) -> Iterable[tuple[str, np.ndarray]]:
    """Yield the leaves with blocks that were stacked for a scan as blocks of their own."""
    for name, leaf in leaves.items():
        if leaf.dtype.kind == "V" and leaf.dtype.itemsize == 2:  # bfloat16, which numpy lacks
            leaf = (leaf.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if "/encoderblock/" in name:
            for i, part in enumerate(leaf):
                yield name.replace("/encoderblock/", f"/encoderblock_{i}/"), part
        else:
            yield name, leaf


def _explain(file: str, kind: str, faults: list[str]) -> str:
    text = f"weights {file!r} do not fit this {kind!r} encoder:"
    if any("running_" in fault for fault in faults):
        text += " they are of batch norm; take weights of group norm (timm: resnet50_gn);"
    if any(f.startswith("class_token") and "no such" in f for f in faults):
        text += " set class_token=True, or take weights without a class token;"
    shown = faults[:8] + ([f"and {len(faults) - 8} more"] if len(faults) > 8 else [])
    return text + "".join(f"\n  {fault}" for fault in shown)
