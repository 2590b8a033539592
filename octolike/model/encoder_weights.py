"""Published weights of image encoders: from a local file to the parameters of octolike's encoders.

The formats are .npz in the layout of big_vision and its predecessors (ViT), and .safetensors in
timm's layout (ViT; ResNet with group norm). `RULES` maps the leaves of a file to parameters. The
mapping is strict: an unknown leaf, a parameter missing from the file, or another shape is an error.

Two kinds of parameters are adapted: position embeddings are interpolated to the grid of the run's
images, and additional image channels (a stacked goal image or camera, depth) get zero weights, so
that the network starts as the published one and ignores them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.flax

from octolike.config import ConfigError
from octolike.model import vit
from octolike.types import flatten, unflatten

Leaves = dict[str, np.ndarray]


class Rule(NamedTuple):
    """Maps a leaf that matches `pattern` completely to the parameters `targets`.

    targets: templates of dotted paths; (): the leaf is ignored. change(leaf, n) returns the values
    of the n targets.
    """

    pattern: str
    targets: tuple[str, ...]
    change: Callable[[np.ndarray, int], Iterable[np.ndarray]]


def _same(x: np.ndarray, n: int) -> list[np.ndarray]:
    return [x]


def _linear(x: np.ndarray, n: int) -> list[np.ndarray]:
    """Convert PyTorch's [n · out, in] to n kernels [in, out], or a bias to n biases."""
    return [piece.T for piece in np.split(x, n)]


def _convolution(x: np.ndarray, n: int) -> list[np.ndarray]:
    """Convert PyTorch's [out, in, h, w] to [h, w, in, out]."""
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


def load(file: str, kind: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a file, float32, nested as `shapes`, without FiLM.

    shapes: the encoder's parameters, as arrays or shapes. Raises ConfigError with the leaves that
    do not fit.
    """
    path = Path(file)
    suffixes = [s for k, s in RULES if k == kind]
    if path.suffix not in suffixes:
        raise ConfigError(
            f"weights {file!r}: a {kind!r} encoder reads {' or '.join(suffixes)} files"
        )
    if not path.is_file():
        raise ConfigError(f"weights {file!r}: the file does not exist; download it first")
    expected = {k: tuple(v.shape) for k, v in flatten(shapes) if not re.search(r"\bfilm", k)}
    leaves, unknown = rename_leaves(read(path), RULES[kind, path.suffix])
    leaves = fit_leaves(leaves, expected)
    faults = [f"{name}: in the file, but not used by this encoder" for name in unknown]
    for name in sorted(expected.keys() | leaves.keys()):
        if name not in leaves:
            faults.append(f"{name}: not in the file, expected {list(expected[name])}")
        elif name not in expected:
            faults.append(f"{name}: in the file, but this encoder has no such parameter")
        elif leaves[name].shape != expected[name]:
            faults.append(
                f"{name}: {list(leaves[name].shape)} in the file, expected {list(expected[name])}"
            )
    if faults:
        raise ConfigError(_explain(file, kind, faults))
    return unflatten(leaves)


def read(path: Path) -> Leaves:
    """Return the leaves of an .npz or .safetensors file; of a training state, the parameters."""
    if path.suffix == ".safetensors":
        return {k: np.asarray(v) for k, v in safetensors.flax.load_file(path).items()}
    with np.load(path, allow_pickle=False) as stored:
        leaves = {k: stored[k] for k in stored.files}
    for prefix in ("params/img/", "params/", "opt/target/", "img/"):
        params = {k[len(prefix) :]: v for k, v in leaves.items() if k.startswith(prefix)}
        if params:
            leaves = params
            break
    return dict(_unstack_blocks(leaves))


def rename_leaves(leaves: Leaves, rules: tuple[Rule, ...]) -> tuple[Leaves, list[str]]:
    """Return ({our dotted path: leaf}, the names that match no rule)."""
    renamed: Leaves = {}
    unknown = []
    for name, leaf in leaves.items():
        for rule in rules:
            match = re.fullmatch(rule.pattern, name)
            if match:
                paths = [match.expand(t) for t in rule.targets]
                renamed |= dict(zip(paths, rule.change(leaf, len(paths)), strict=False))
                break
        else:
            unknown.append(name)
    return renamed, unknown


def fit_leaves(leaves: Leaves, shapes: Mapping[str, tuple[int, ...]]) -> Leaves:
    """Return the leaves with positions, attention heads and image channels as in `shapes`."""
    leaves = {k: np.asarray(v, np.float32) for k, v in leaves.items()}
    if "pos_embedding" in leaves and "pos_embedding" in shapes:
        leaves |= _fit_positions(leaves, shapes["pos_embedding"])
    for name, shape in shapes.items():
        x = leaves.get(name)
        if x is None or x.shape == shape:
            continue
        if ".attention." in name and x.size == math.prod(shape) and x.ndim < len(shape):
            leaves[name] = x.reshape(shape)  # split the heads
        elif name in ("embedding.kernel", "conv.kernel") and x.ndim == 4:
            extra = shape[2] - x.shape[2]
            if extra > 0:
                leaves[name] = np.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))
    return leaves


def _fit_positions(leaves: Leaves, shape: tuple[int, ...]) -> Leaves:
    """Return position embeddings for the grid of `shape`; a class token absorbs its own."""
    x = leaves["pos_embedding"]
    x = x.reshape(-1, x.shape[-1])
    side = math.isqrt(len(x))
    extra, grid = x[: len(x) - side**2], x[len(x) - side**2 :]
    positions = grid.reshape(1, side, side, -1)
    if grid.shape[-1] == shape[-1]:
        positions = np.asarray(vit.resample(jnp.asarray(positions), shape[1:3]))
    if len(extra) == 1 and "class_token" in leaves:
        return {"pos_embedding": positions, "class_token": leaves["class_token"] + extra}
    if len(extra):
        return {"pos_embedding": x[None]}  # not a square grid: `load` reports the shapes
    return {"pos_embedding": positions}


def _unstack_blocks(leaves: Leaves) -> Iterable[tuple[str, np.ndarray]]:
    """Yield (name, leaf), with blocks that were stacked for a scan as separate leaves."""
    for name, leaf in leaves.items():
        if leaf.dtype.kind == "V" and leaf.dtype.itemsize == 2:  # bfloat16, which numpy lacks
            leaf = (leaf.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if "/encoderblock/" in name:
            for i, block in enumerate(leaf):
                yield name.replace("/encoderblock/", f"/encoderblock_{i}/"), block
        else:
            yield name, leaf


def _explain(file: str, kind: str, faults: list[str]) -> str:
    text = f"weights {file!r} do not fit this {kind!r} encoder:"
    if any("running_" in fault for fault in faults):
        text += " they have batch norm; use weights with group norm (timm: resnet50_gn);"
    if any(f.startswith("class_token") and "no such" in f for f in faults):
        text += " set class_token=True, or use weights without a class token;"
    lines = faults[:8] + ([f"and {len(faults) - 8} more"] if len(faults) > 8 else [])
    return text + "".join(f"\n  {line}" for line in lines)
