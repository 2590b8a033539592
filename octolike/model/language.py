"""Pretrained text encoders, T5 and CLIP, and the tokenizer that reads them.

    ids, mask [B, L] ─ T5 or CLIP ─ states [B, L, E] ─ TextEncoder (the tokenizer) ─ tokens

A trained encoder is part of the network and runs in every step. A frozen one stays outside: it runs
once per distinct instruction (`FrozenEncoder`), and the network reads `task.language.states`, which
the trainer, the validation and the policy put into the batch (`extend_spec` into its spec).
`language_weights.py` reads the weights and their config.json.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octolike.config import Component, ConfigError, build_component, unknown
from octolike.model import language_weights
from octolike.model.language_weights import read as read_params
from octolike.types import Batch, BatchSpec, TokenGroup

STATES = "task.language.states"
ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
}


class RMSNorm(nn.Module):
    """Divides by the root mean square: a layer norm that neither centres nor shifts."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


class T5(nn.Module):
    """The encoder of T5 (Raffel et al. 2019): v1.0 (relu), v1.1 and its kin (gated).

    Positions enter as a bias on the attention logits, learned per bucket of distances and shared by
    all blocks. path: directory or hub id; the sizes are then read from its config.json.
    """

    path: str = ""
    vocabulary: int = 32128
    width: int = 768
    layers: int = 12
    attention_heads: int = 12
    head_width: int = 64
    mlp_width: int = 3072
    activation: str = "relu"
    gated: bool = False
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @property
    def max_length(self) -> int | None:
        """The most tokens, or None for any number."""
        return None

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the last hidden states [B, L, width] of ids int [B, L]; mask: False is padding."""
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="words")(ids)
        buckets = distance_buckets(ids.shape[1], self.buckets, self.max_distance)
        bias = nn.Embed(self.buckets, self.attention_heads, name="relative_bias")(buckets)
        bias_1xNxLxL = bias.transpose(2, 0, 1)[None].astype(jnp.float32)
        for i in range(self.layers):
            norm = RMSNorm(self.epsilon, self.dtype, name=f"block_{i}_attention_norm")
            x = x + self._attend(i, norm(x), bias_1xNxLxL, mask[:, None, None, :])
            norm = RMSNorm(self.epsilon, self.dtype, name=f"block_{i}_mlp_norm")
            x = x + self._mlp(i, norm(x))
        return RMSNorm(self.epsilon, self.dtype, name="norm")(x)

    def _dense(self, width: int, name: str) -> nn.Dense:
        return nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)

    def _attend(self, i: int, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        q, k, v = (
            self._dense(self.attention_heads * self.head_width, f"block_{i}_{name}")(x)
            for name in ("query", "key", "value")
        )
        # No division by √head_width: T5 has it in its initial weights.
        x = attend(q, k, v, self.attention_heads, mask, bias)
        return self._dense(self.width, f"block_{i}_out")(x)

    def _mlp(self, i: int, x: jax.Array) -> jax.Array:
        activate = _activation(self.activation)
        hidden = self._dense(self.mlp_width, f"block_{i}_mlp_in")(x)
        if self.gated:
            hidden = activate(self._dense(self.mlp_width, f"block_{i}_mlp_gate")(x)) * hidden
        else:
            hidden = activate(hidden)
        return self._dense(self.width, f"block_{i}_mlp_out")(hidden)


class ClipText(nn.Module):
    """The text encoder of CLIP (Radford et al. 2021): a causal pre-norm transformer.

    path: directory or hub id; the sizes are then read from its config.json.
    """

    path: str = ""
    vocabulary: int = 49408
    width: int = 512
    layers: int = 12
    attention_heads: int = 8
    mlp_width: int = 2048
    activation: str = "quick_gelu"
    max_length: int = 77
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the last hidden states [B, L, width] of ids int [B, L]; mask: False is padding."""
        length = ids.shape[1]
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="words")(ids)
        places = nn.Embed(self.max_length, self.width, dtype=self.dtype, name="positions")
        x = x + places(jnp.arange(length))
        visible = mask[:, None, None, :] & jnp.tril(jnp.ones((length, length), bool))
        for i in range(self.layers):
            x = x + self._attend(i, self._norm(f"block_{i}_attention_norm")(x), visible)
            hidden = self._norm(f"block_{i}_mlp_norm")(x)
            hidden = self._dense(self.mlp_width, f"block_{i}_mlp_in")(hidden)
            hidden = _activation(self.activation)(hidden)
            x = x + self._dense(self.width, f"block_{i}_mlp_out")(hidden)
        return self._norm("norm")(x)

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)

    def _dense(self, width: int, name: str) -> nn.Dense:
        return nn.Dense(width, dtype=self.dtype, name=name)

    def _attend(self, i: int, x: jax.Array, mask: jax.Array) -> jax.Array:
        q, k, v = (
            self._dense(self.width, f"block_{i}_{name}")(x) for name in ("query", "key", "value")
        )
        q = q / math.sqrt(self.width // self.attention_heads)
        x = attend(q, k, v, self.attention_heads, mask)
        return self._dense(self.width, f"block_{i}_out")(x)


ENCODERS = {"t5": T5, "clip": ClipText}


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    heads: int,
    mask: jax.Array,
    bias: jax.Array | float = 0.0,
) -> jax.Array:
    """Return softmax(q · k + bias) · v per head; q, k, v: [B, L, N · H], mask: [B, 1, L or 1, L].

    The softmax is taken in float32. A row that sees nothing sees everything alike: it stays finite.
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k).astype(jnp.float32) + bias
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    share = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bnqk,bknh->bqnh", share, v)
    return out.reshape(*out.shape[:2], -1)


def distance_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Return T5's bucket, int32 [L, L], of each distance from row (query) to column (key).

    Half of the buckets are for keys ahead. In each half, the first half is for single distances,
    the others grow in size logarithmically up to `max_distance`; the last takes all beyond.
    """
    place = np.arange(length)
    distance = place[None, :] - place[:, None]
    half = buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), 1)
    # float32 like the weights' makers: at powers of two the rounding decides the bucket
    grown = np.log(far.astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    large = np.minimum(exact + (grown * (half - exact)).astype(np.int32), half - 1)
    inner = np.where(np.abs(distance) < exact, np.abs(distance), large)
    return (inner + np.where(distance > 0, half, 0)).astype(np.int32)


class TextEncoder(nn.Module):
    """A pretrained encoder's states of the instruction, one token per id.

    trained: the encoder is part of the network, with the weights of its path to begin with; else
    it is frozen and outside, and the batch brings its states. padding_visible: tokens of padding
    are seen like words, as Octo does it (they carry the sentence too); False: masked. states: dtype
    in which a frozen encoder's results are kept and transferred.
    """

    encoder: nn.Module
    trained: bool = False
    padding_visible: bool = True
    states: str = "float32"
    dtype: Any = jnp.float32
    place: ClassVar[str] = "task"

    def reads(self) -> tuple[str, ...]:
        read = ("task.language.ids",) if self.trained else (STATES,)
        return *read, "task.language.mask", "task.present.language"

    def __call__(self, observation: Mapping[str, Any], task: Mapping[str, Any]) -> TokenGroup:
        words, present = task["language"], task["present"]["language"][:, None]
        x = self.encoder(words["ids"], words["mask"]) if self.trained else words["states"]
        mask = present if self.padding_visible else words["mask"] & present
        return TokenGroup(x.astype(self.dtype), jnp.broadcast_to(mask, x.shape[:-1]))


def build_encoder(component: Mapping[str, Any], path: str, dtype: Any) -> nn.Module:
    """Return the text encoder of a config's component; with a `path`, of the sizes found there.

    Raises ConfigError, naming `path`, for an unknown kind or field, a size that is set although
    config.json has it, or a path without a config.json of that kind.
    """
    component = dict(component)
    kind = component.get("kind")
    if kind in ENCODERS and component.get("path"):
        sizes = language_weights.read_sizes(component["path"], kind, path)
        for name in component.keys() - {"kind", "path"}:
            if name in sizes:
                raise ConfigError(f"{path}.{name} is read from config.json of path; remove it here")
        component |= sizes
    encoder = build_component(ENCODERS, component, path, dtype=dtype)
    _activation(encoder.activation)
    return encoder


def extend_spec(model: Mapping[str, Any], spec: BatchSpec) -> BatchSpec:
    """Return the spec of what the network reads: with a frozen encoder's states, where it has one.

    model: `dataclasses.asdict(config.model)`; spec: of the data's batches. Raises ConfigError where
    instructions may be longer than the encoder takes, or several frozen encoders differ.
    """
    for name, tokenizer in _text_encoders(model).items():
        encoder = _encoder(name, tokenizer)
        if "task.language.ids" not in spec:
            continue  # building the tokenizer says what it lacks
        (length,), _ = spec["task.language.ids"]
        if encoder.max_length is not None and length > encoder.max_length:
            raise ConfigError(
                f"data.text.length is {length}; the encoder of model.tokenizers.{name} takes at "
                f"most {encoder.max_length} tokens"
            )
    frozen = _frozen(model)
    if frozen is None or "task.language.ids" not in spec:
        return dict(spec)
    name, tokenizer = frozen
    (length,), _ = spec["task.language.ids"]
    shape = (length, _encoder(name, tokenizer).width)
    return {**spec, STATES: (shape, tokenizer.get("states", "float32"))}


def check_vocabulary(model: Mapping[str, Any], vocabulary: int) -> None:
    """Raise ConfigError where a text encoder has fewer words than the text tokenizer has ids."""
    for name, tokenizer in _text_encoders(model).items():
        encoder = _encoder(name, tokenizer)
        if vocabulary > encoder.vocabulary:
            raise ConfigError(
                f"data.text makes ids below {vocabulary}, but the encoder of model.tokenizers."
                f"{name} knows {encoder.vocabulary} only; data.text must be the tokenizer that the "
                'encoder was trained with: {"kind": "huggingface", "path": ...}'
            )


class FrozenEncoder:
    """A frozen text encoder that runs once per distinct instruction: the newest results are kept.

    Instructions are encoded `ROWS` at a time, padded, so that there is one compilation.
    """

    ROWS: ClassVar[int] = 16

    def __init__(
        self, encoder: nn.Module, params: Any, dtype: str = "float32", room: int = 2**28
    ) -> None:
        """Prepare; dtype: of the states; room: bytes of states that are kept."""
        self._params = jax.device_put(params)
        self._encode = jax.jit(
            lambda params, ids, mask: encoder.apply({"params": params}, ids, mask).astype(dtype)
        )
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._room = room

    def states(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the encoder's states [B, L, E] of ids int32 [B, L] and their mask [B, L]."""
        keys = [i.tobytes() + m.tobytes() for i, m in zip(ids, mask, strict=True)]
        # What this batch needs stays at hand even if it is more than there is room for.
        found = {key: self._kept[key] for key in keys if key in self._kept}
        new = {key: row for row, key in enumerate(keys) if key not in found}
        rows = np.array(list(new.values()), np.int64)
        for start in range(0, len(rows), self.ROWS):
            part = rows[start : start + self.ROWS]
            padded = np.resize(part, self.ROWS)
            out = np.asarray(self._encode(self._params, ids[padded], mask[padded]))
            found |= {keys[row]: out[i].copy() for i, row in enumerate(part)}
        for key in dict.fromkeys(keys):
            self._kept[key] = found[key]
            self._kept.move_to_end(key)
        self._forget()
        return np.stack([found[key] for key in keys])

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch (octolike.types) with the states of its instructions; axes [B, ...]."""
        words = batch["task"]["language"]
        words = {**words, "states": self.states(words["ids"], words["mask"])}
        return {**batch, "task": {**batch["task"], "language": words}}

    def _forget(self) -> None:
        used = sum(x.nbytes for x in self._kept.values())
        while used > self._room and self._kept:
            used -= self._kept.popitem(last=False)[1].nbytes


def frozen_encoder(model: Mapping[str, Any]) -> FrozenEncoder | None:
    """Return the frozen encoder that the model's config names, its weights read, or None."""
    frozen = _frozen(model)
    if frozen is None:
        return None
    name, tokenizer = frozen
    encoder, path = _encoder(name, tokenizer), f"model.tokenizers.{name}.encoder"
    params = read_params(encoder.path, tokenizer["encoder"]["kind"], shapes(encoder), path)
    return FrozenEncoder(encoder, params, tokenizer.get("states", "float32"))


def shapes(encoder: nn.Module) -> dict[str, Any]:
    """Return the shapes of an encoder's parameters."""
    ids = np.zeros((1, 1), np.int32)
    init = lambda key: encoder.init(key, ids, ids == 0)["params"]
    return jax.eval_shape(init, jax.random.key(0))


def write(model: Mapping[str, Any], target: Path) -> None:
    """Write the text encoder that a model's config names to `target`, if it names one.

    A frozen one with its weights; of a trained one the sizes alone, its weights being among the
    network's parameters.
    """
    found = source(model)
    if found:
        path, kind, frozen = found
        where = "model.tokenizers: encoder"
        encoder = build_encoder({"kind": kind, "path": path}, where, jnp.float32)
        sizes = shapes(encoder) if frozen else None
        language_weights.copy(path, kind, sizes, target, where)


def with_paths(model: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the model's config with every text encoder of a path at another one.

    Tokenizers stay Components, so that a config's own model can be given too.
    """
    moved = {}
    for name, tokenizer in _text_encoders(model).items():
        if tokenizer["encoder"].get("path"):
            encoder = Component(tokenizer["encoder"] | {"path": path})
            moved[name] = Component({**tokenizer, "encoder": encoder})
    return {**model, "tokenizers": {**model["tokenizers"], **moved}}


def source(model: Mapping[str, Any]) -> tuple[str, str, bool] | None:
    """Return (path, kind, frozen) of the pretrained text encoder of a model's config, or None.

    Raises ConfigError where there are several paths: a run keeps one encoder.
    """
    encoders = _text_encoders(model)
    found = {(t["encoder"].get("path", ""), t["encoder"].get("kind")) for t in encoders.values()}
    found -= {x for x in found if not x[0]}
    if len(found) > 1:
        raise ConfigError(
            f"model.tokenizers name several text encoders ({', '.join(sorted(p for p, _ in found))}"
            "); a run keeps one"
        )
    if not found:
        return None
    return *next(iter(found)), any(not t.get("trained", False) for t in encoders.values())


def _text_encoders(model: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the components of the tokenizers that read a pretrained text encoder, by name."""
    found = {n: t for n, t in model["tokenizers"].items() if t.get("kind") == "text_encoder"}
    for name, tokenizer in found.items():
        if not isinstance(tokenizer.get("encoder"), Mapping):
            raise ConfigError(
                f"model.tokenizers.{name} ('text_encoder') lacks 'encoder': "
                '{"kind": "t5" or "clip", "path": directory or hub id}'
            )
    return found


def _frozen(model: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return name and component of the frozen text encoder, or None; all of them must be alike."""
    source(model)
    frozen = {n: t for n, t in _text_encoders(model).items() if not t.get("trained", False)}
    for name, tokenizer in frozen.items():
        if not tokenizer["encoder"].get("path"):
            raise ConfigError(
                f"model.tokenizers.{name}.encoder has no path: a frozen encoder needs weights; name"
                " a directory or hub id, or set trained=True"
            )
    kept = {t.get("states", "float32") for t in frozen.values()}
    if kept - {"float32", "bfloat16", "float16"}:
        choices = ("float32", "bfloat16", "float16")
        raise ConfigError(unknown("states of a text_encoder", min(kept - {*choices}), choices))
    if len(kept) > 1:
        raise ConfigError(f"model.tokenizers keep states as {sorted(kept)}; choose one")
    return next(iter(frozen.items()), None)


def _encoder(name: str, tokenizer: Mapping[str, Any]) -> nn.Module:
    # float32: what runs once per instruction need not be fast
    return build_encoder(tokenizer["encoder"], f"model.tokenizers.{name}.encoder", jnp.float32)


def _activation(name: str) -> Any:
    if name not in ACTIVATIONS:
        raise ConfigError(unknown("activation of a text encoder", name, ACTIVATIONS))
    return ACTIVATIONS[name]
