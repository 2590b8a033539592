"""The tokenizer over the states of a pretrained text encoder, and the frozen encoder itself.

    ids, mask [B, L] ─ T5, CLIP, BERT ─ states [B, L, E] ┬ TextEncoder (a tokenizer) ─ tokens
                       or given vectors                  └ InstructionVector ─ vector for FiLM

A trained encoder is part of the network and runs in every step. A frozen encoder stays outside: it
runs once per distinct instruction (`FrozenEncoder`), and the network reads `task.language.states`,
which training, validation and the policy add to the batch (`extend_spec`: to its spec).
`language_weights.py` reads the weights and their config.json.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octolike.config import Component, ConfigError, build_component, option, unknown
from octolike.model import language_weights
from octolike.model.language_weights import read as read_params
from octolike.model.precision import products_of
from octolike.model.text_encoders import ENCODERS
from octolike.types import Batch, BatchSpec, TokenGroup

STATES = "task.language.states"
READERS = ("text_encoder", "instruction_vector")  # kinds of tokenizers with a text encoder
PREPARED_AT_ONCE = 1024  # instructions stacked at once
STATE_DTYPES = ("float32", "bfloat16", "float16")


class TextEncoder(nn.Module):
    """The instruction's states of a pretrained encoder, one token per id, or one in all.

    A trained encoder is part of the network and starts from the weights of its path; the states of
    a frozen one are part of the batch.
    """

    encoder: nn.Module = option(
        meaning="the text encoder", table="octolike.model.text_encoders:ENCODERS"
    )
    trained: bool = option(False, "train the encoder in the network; False: frozen")
    padding_visible: bool = option(
        True, "attend to the tokens of padding too, as Octo does; False: mask them"
    )
    pooled: bool = option(
        False, "one token: the mean over the instruction's states, as for sentence encoders"
    )
    states: str = option(
        "float32", "dtype of a frozen encoder's cached states", choices=STATE_DTYPES
    )
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")
    place: ClassVar[str] = "task"

    def reads(self) -> tuple[str, ...]:
        source = "task.language.ids" if self.trained else STATES
        return source, "task.language.mask", "task.present.language"

    def __call__(self, observation: Mapping[str, Any], task: Mapping[str, Any]) -> TokenGroup:
        words, present = task["language"], task["present"]["language"][:, None]
        x = self.encoder(words["ids"], words["mask"]) if self.trained else words["states"]
        if self.pooled:
            weight = words["mask"].astype(jnp.float32)[..., None]
            mean = (x.astype(jnp.float32) * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
            return TokenGroup(mean[:, None].astype(self.dtype), present)
        mask = present if self.padding_visible else words["mask"] & present
        return TokenGroup(x.astype(self.dtype), jnp.broadcast_to(mask, x.shape[:-1]))


class InstructionVector(nn.Module):
    """The instruction's states of a frozen text encoder as one vector, which conditions FiLM.

    It makes no tokens, and conditions instead of the pooled task tokens. As in Octo, the states
    [L, E] are one vector of L · E values, and an absent instruction has those of the empty text.
    """

    encoder: nn.Module = option(
        meaning="the text encoder", table="octolike.model.text_encoders:ENCODERS"
    )
    states: str = option("float32", "dtype of the encoder's cached states", choices=STATE_DTYPES)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")
    place: ClassVar[str] = "condition"

    def reads(self) -> tuple[str, ...]:
        return (STATES,)

    def __call__(self, observation: Mapping[str, Any], task: Mapping[str, Any]) -> jax.Array:
        """Return the vectors [B, L · E]."""
        states = task["language"]["states"]
        return states.reshape(len(states), -1).astype(self.dtype)


def build_encoder(component: Mapping[str, Any], path: str, dtype: Any) -> nn.Module:
    """Return the text encoder of a config's component; with a `path`, config.json gives the sizes.

    Raises ConfigError, naming `path`, for an unknown kind or field, a size that is set although
    config.json gives it, or a path without a config.json of that kind.
    """
    component = dict(component)
    kind = component.get("kind")
    if kind in ENCODERS and component.get("path"):
        sizes = language_weights.read_sizes(component["path"], kind, path)
        for name in component.keys() - {"kind", "path"}:
            if name in sizes:
                raise ConfigError(f"{path}.{name} is read from config.json of path; remove it here")
        component |= sizes
    return build_component(ENCODERS, component, path, dtype=dtype)


def extend_spec(model: Mapping[str, Any], spec: BatchSpec) -> BatchSpec:
    """Return the spec of the network's batches: the data's, and the states of a frozen encoder.

    Args:
        model: `dataclasses.asdict(config.model)`.
        spec: the spec of the data's batches.

    Raises:
        ConfigError: if instructions may exceed the encoder's maximum length, or if several frozen
            encoders differ.
    """
    for name, tokenizer in _text_encoders(model).items():
        encoder = _encoder(name, tokenizer)
        if "task.language.ids" not in spec:
            continue  # building the tokenizer raises the error
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
    """Raise ConfigError if a text encoder's vocabulary is smaller than the text tokenizer's."""
    for name, tokenizer in _text_encoders(model).items():
        encoder = _encoder(name, tokenizer)
        if vocabulary > encoder.vocabulary:
            raise ConfigError(
                f"data.text has {vocabulary} ids, but the encoder of model.tokenizers.{name} has "
                f"only {encoder.vocabulary}; data.text must be the tokenizer that the encoder was "
                'trained with: {"kind": "huggingface", "path": ...}'
            )


class FrozenEncoder:
    """A frozen text encoder with a cache of states, so that it runs once per instruction.

    Instructions are encoded in padded batches of `ROWS`, so that it compiles once. Every call waits
    for the device, behind the steps that were dispatched: training therefore encodes all
    instructions of the data at the start (`prepare`).
    """

    ROWS: ClassVar[int] = 16

    def __init__(
        self, encoder: nn.Module, params: Any, dtype: str = "float32", cache_bytes: int = 2**31
    ) -> None:
        """Prepare; dtype: of the states; cache_bytes: size of the cache, least recent evicted."""
        self._params = jax.device_put(params)

        def encode(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
            # A policy on another device must see the states of training.
            with products_of(getattr(encoder, "dtype", None) or jnp.float32):
                states = cast(jax.Array, encoder.apply({"params": params}, ids, mask))
            return states.astype(dtype)

        self._encode = jax.jit(encode)
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._cache_bytes, self._used = cache_bytes, 0

    def states(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the encoder's states [B, L, E] of ids int32 [B, L] and their mask [B, L]."""
        keys = [i.tobytes() + m.tobytes() for i, m in zip(ids, mask, strict=True)]
        # A dict for this batch: its states may exceed the cache.
        states = {key: self._cache[key] for key in keys if key in self._cache}
        row_of = {key: row for row, key in enumerate(keys) if key not in states}
        rows = np.array(list(row_of.values()), np.int64)
        for start in range(0, len(rows), self.ROWS):
            chunk = rows[start : start + self.ROWS]
            padded = np.resize(chunk, self.ROWS)
            out = np.asarray(self._encode(self._params, ids[padded], mask[padded]))
            states |= {keys[row]: out[i].copy() for i, row in enumerate(chunk)}
        for key in dict.fromkeys(keys):
            if key not in self._cache:
                self._cache[key] = states[key]
                self._used += states[key].nbytes
            self._cache.move_to_end(key)
        self._evict()
        return np.stack([states[key] for key in keys])

    def prepare(self, ids: np.ndarray, mask: np.ndarray) -> str:
        """Encode instructions ahead; return a sentence on the table of their states."""
        started = time.perf_counter()
        for start in range(0, len(ids), PREPARED_AT_ONCE):
            rows = slice(start, start + PREPARED_AT_ONCE)
            self.states(ids[rows], mask[rows])
        text = f"encoded {len(self._cache):,} of {len(ids):,} instructions"
        text += f", {self._used / 2**20:,.0f} MiB"
        text += f", in {time.perf_counter() - started:.1f} s"
        if len(self._cache) < len(ids):
            text += (
                f"; the table is limited to {self._cache_bytes / 2**20:,.0f} MiB, so others are "
                "encoded during training: states='bfloat16' of the text_encoder halves them"
            )
        return text

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch (octolike.types) with the states of its instructions, [B, L, E]."""
        words = batch["task"]["language"]
        words = {**words, "states": self.states(words["ids"], words["mask"])}
        return {**batch, "task": {**batch["task"], "language": words}}

    def _evict(self) -> None:
        while self._used > self._cache_bytes and self._cache:
            self._used -= self._cache.popitem(last=False)[1].nbytes


def frozen_encoder(model: Mapping[str, Any]) -> FrozenEncoder | None:
    """Return the frozen encoder of the model's config, with its weights, or None."""
    frozen = _frozen(model)
    if frozen is None:
        return None
    name, tokenizer = frozen
    encoder, path = _encoder(name, tokenizer), f"model.tokenizers.{name}.encoder"
    params = read_params(encoder.path, tokenizer["encoder"]["kind"], shapes(encoder), path)
    return FrozenEncoder(encoder, params, tokenizer.get("states", "float32"))


def frozen_encoder_bytes(model: Mapping[str, Any]) -> int:
    """Return the bytes of a frozen encoder's weights on a device; 0 without one."""
    frozen = _frozen(model)
    leaves = jax.tree.leaves(shapes(_encoder(*frozen))) if frozen else []
    return sum(x.size * x.dtype.itemsize for x in leaves)


def shapes(encoder: nn.Module) -> dict[str, Any]:
    """Return the shapes of an encoder's parameters."""
    ids = np.zeros((1, 1), np.int32)
    return jax.eval_shape(encoder.init, jax.random.key(0), ids, ids == 0)["params"]


def write(model: Mapping[str, Any], target: Path) -> None:
    """Write the text encoder of a model's config to `target`, if it has a pretrained one.

    A frozen encoder is written with its weights; a trained one as config.json only, because its
    weights are part of the network's parameters.
    """
    encoder_source = source(model)
    if encoder_source:
        path, kind, frozen = encoder_source
        where = "model.tokenizers: encoder"
        encoder = build_encoder({"kind": kind, "path": path}, where, jnp.float32)
        encoder_shapes = shapes(encoder) if frozen else None
        language_weights.copy(path, kind, encoder_shapes, target, where)


def with_paths(model: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the model's config with another path for every pretrained text encoder.

    Tokenizers stay Components, so that `model` may also be the dict of a config's model.
    """
    tokenizers = dict(model["tokenizers"])
    for name, tokenizer in _text_encoders(model).items():
        if tokenizer["encoder"].get("path"):
            encoder = Component(tokenizer["encoder"] | {"path": path})
            tokenizers[name] = Component({**tokenizer, "encoder": encoder})
    return {**model, "tokenizers": tokenizers}


def source(model: Mapping[str, Any]) -> tuple[str, str, bool] | None:
    """Return (path, kind, frozen) of the pretrained text encoder of a model's config, or None.

    Raises ConfigError for several paths: a run stores one encoder.
    """
    tokenizers = _text_encoders(model).values()
    encoders = {(t["encoder"].get("path", ""), t["encoder"].get("kind")) for t in tokenizers}
    encoders = {(path, kind) for path, kind in encoders if path}
    if len(encoders) > 1:
        paths = ", ".join(sorted(path for path, _ in encoders))
        raise ConfigError(
            f"model.tokenizers name several text encoders ({paths}); a run stores only one"
        )
    if not encoders:
        return None
    return *encoders.pop(), any(not t.get("trained", False) for t in tokenizers)


def _text_encoders(model: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the components of the tokenizers with a text encoder by name."""
    components = {n: t for n, t in model["tokenizers"].items() if t.get("kind") in READERS}
    for name, tokenizer in components.items():
        if not isinstance(tokenizer.get("encoder"), Mapping):
            raise ConfigError(
                f"model.tokenizers.{name} ({tokenizer['kind']!r}) lacks 'encoder': "
                '{"kind": "t5", "clip" or "bert", "path": directory or hub id}'
            )
    return components


def _frozen(model: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return (name, component) of the frozen text encoder, or None; several must be equal."""
    source(model)
    frozen = {n: t for n, t in _text_encoders(model).items() if not t.get("trained", False)}
    for name, tokenizer in frozen.items():
        if not tokenizer["encoder"].get("path"):
            raise ConfigError(
                f"model.tokenizers.{name}.encoder has no path: a frozen encoder needs weights; name"
                " a directory or hub id, or set trained=True"
            )
    dtypes = {t.get("states", "float32") for t in frozen.values()}
    for dtype in sorted(dtypes - {*STATE_DTYPES}):
        raise ConfigError(unknown("states of a text_encoder", dtype, STATE_DTYPES))
    if len(dtypes) > 1:
        raise ConfigError(f"model.tokenizers have states of the types {sorted(dtypes)}; choose one")
    return next(iter(frozen.items()), None)


def _encoder(name: str, tokenizer: Mapping[str, Any]) -> nn.Module:
    # float32: an encoder that runs once per instruction need not be fast
    return build_encoder(tokenizer["encoder"], f"model.tokenizers.{name}.encoder", jnp.float32)
