"""All action heads: the table of their kinds, and those that predict a chunk in one pass.

`head` states the interface of a head, `denoising` has diffusion and flow; `groups` and `hypernet`
wrap any other head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octolike.config import ConfigError, build_component, option
from octolike.model import bins as binning
from octolike.model import denoisers
from octolike.model.denoising import Diffusion, Flow
from octolike.model.groups import PerGroup, membership
from octolike.model.head import Head, last, pooled, to_chunk
from octolike.model.hypernet import Hypernet
from octolike.model.precision import exact_dense
from octolike.types import BatchSpec, Context, Names, Prefix, TokenGroup

LAYOUTS = ("value", "step", "chunk")


class Regression(Head):
    """The base of MSE and L1: a linear map to the chunk, bounded by limit · tanh(x / limit)."""

    limit: float = option(5.0, "normalised actions are bounded to ±limit")

    def reach(self) -> tuple[float, float]:
        return -self.limit, self.limit

    def setup(self) -> None:
        super().setup()
        self.out = exact_dense(self.horizon * self.action_dim)

    def __call__(
        self, group: TokenGroup, action: jax.Array, context: Context | None = None
    ) -> jax.Array:
        self.check(action)
        return self.error(self.predict(self.embed(group)) - action) * self.action_dim

    def predict(self, embedding: jax.Array) -> jax.Array:
        """Return chunks [..., H, A] for embeddings [..., D]."""
        x = self.out(embedding.astype(jnp.float32))
        return to_chunk(self.limit * jnp.tanh(x / self.limit), self.action_dim)

    def sample(
        self,
        group: TokenGroup,
        dims: jax.Array | None = None,
        context: Context | None = None,
        *,
        noise: dict[str, jax.Array] | None = None,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        self.valid(dims)
        self.refuse_prefix(prefix)
        return self.predict(self.embed(last(group)))[:, 0]

    def error(self, difference: jax.Array) -> jax.Array:
        raise NotImplementedError


class MSE(Regression):
    """Regression to the mean action."""

    def error(self, difference: jax.Array) -> jax.Array:
        return difference**2


class L1(Regression):
    """Regression to the median action."""

    def error(self, difference: jax.Array) -> jax.Array:
        return jnp.abs(difference)


class Bins(Head):
    """A softmax over `bins` bins per value; errors are cross-entropies.

    A token predicts a single value (layout "value": H · A tokens), a step of the chunk ("step": H)
    or the whole chunk ("chunk": 1). With pooling "mean" the readout must have that number of
    tokens, except for "chunk", which takes their mean; attention pooling accepts any readout.

    Bins cover normalised actions, so data.normalization completes the choice of bins:

        "bounds" with "uniform" in [-1, 1]   from the 1st to the 99th percentile of each dimension,
                                             as in RT-2 and OpenVLA
        "normal" with "normal"               quantiles of a normal distribution
    """

    layout: str = option("chunk", "part of the chunk that a token predicts", choices=LAYOUTS)
    bins: int = option(256, "number of bins", low=1)
    bin_kind: str = option(
        "normal", "'uniform' in [low, high], or equally likely under N(0, 1)", choices=binning.KINDS
    )
    low: float = option(-1.0, "lower end of uniform bins")
    high: float = option(1.0, "upper end of uniform bins")
    tail: float = option(
        binning.TAIL, "probability left out at each end of normal bins", low=0, high=0.5
    )
    outside: str = option("nearest", "bin of values outside all bins", choices=binning.OUTSIDE)
    temperature: float = option(0.0, "temperature of sampling; 0: the likeliest bin", low=0)

    def __post_init__(self) -> None:
        self._edges()  # raises ConfigError for invalid bins
        super().__post_init__()

    @property
    def tokens(self) -> int:
        sizes = {"value": self.horizon * self.action_dim, "step": self.horizon, "chunk": 1}
        return sizes[self.layout]

    def setup(self) -> None:
        super().setup()
        self.edges = self._edges()
        width = self.horizon * self.action_dim * self.bins // self.tokens
        self.out = exact_dense(width)

    def __call__(
        self, group: TokenGroup, action: jax.Array, context: Context | None = None
    ) -> jax.Array:
        self.check(action)
        logits = nn.log_softmax(self.logits(group))
        index = binning.encode(action, self.edges, self.outside)
        return -jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]

    def reach(self) -> tuple[float, float]:
        edges = self._edges()
        return float(edges[0]), float(edges[-1])

    def _edges(self) -> np.ndarray:
        return binning.edges(self.bin_kind, self.bins, self.low, self.high, self.tail)

    def logits(self, group: TokenGroup) -> jax.Array:
        """Return float32 [B, W, H, A, bins]."""
        if self.pooling == "attention":
            x = self.pool(*group)
        elif self.layout == "chunk":
            x = pooled(group)[..., None, :]
        else:
            x = group.tokens
        if x.shape[-2] != self.tokens:
            raise ConfigError(
                f"layout {self.layout!r} of chunks {self.horizon} × {self.action_dim} takes "
                f"{self.tokens} tokens, but {self.readout} has {x.shape[-2]}; set its number of "
                "tokens in model.readouts, or the head's pooling to 'attention'"
            )
        x = self.out(x.astype(jnp.float32))
        return x.reshape(*x.shape[:2], self.horizon, self.action_dim, self.bins)

    def sample(
        self,
        group: TokenGroup,
        dims: jax.Array | None = None,
        context: Context | None = None,
        *,
        noise: dict[str, jax.Array] | None = None,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        self.valid(dims)
        self.refuse_prefix(prefix)
        logits = self.logits(last(group))[:, 0]
        if self.temperature:
            noise = noise or self.draw(len(logits))
            logits = logits / self.temperature + noise["gumbel"]
        return binning.decode(logits.argmax(axis=-1), self.edges)

    def draw(self, batch: int) -> dict[str, jax.Array]:
        if not self.temperature:
            return {}
        shape = (batch, self.horizon, self.action_dim, self.bins)
        return {"gumbel": jax.random.gumbel(self.make_rng("noise"), shape)}


def build(
    component: Mapping[str, Any], path: str, spec: BatchSpec, *, names: Names, dtype: Any
) -> nn.Module:
    """Return the head of a config's component, for the chunks of the batch spec.

    Two kinds wrap another head, {"head": {...}}:

        {"kind": "per_group", "by": "embodiment" or "task", "groups": {"arms": ("bridge*",)}}
            separate parameters per group of names; without groups, per name (`groups`)
        {"kind": "hypernet", "target": "head" or "adapter", ...}
            weights generated from the task (`hypernet`)

    Raises ConfigError for an unknown kind or field, and for groups that do not fit the names.
    """
    kind = component.get("kind")
    context: dict[str, Any] = {"dtype": dtype}
    if kind in WRAPPERS:
        fields = dict(component)
        if "head" not in fields:
            raise ConfigError(f"{path} ({kind!r}) lacks 'head': the head that it wraps")
        context["head"] = build(fields.pop("head"), f"{path}.head", spec, names=names, dtype=dtype)
        if kind == "per_group":
            by, patterns = fields.get("by", PerGroup.by), fields.get("groups", PerGroup.groups)
            context["group_names"], context["member"] = membership(by, patterns, names, path)
        else:
            context["where"] = path
        return build_component(HEADS, fields, path, **context)
    _, context["horizon"], context["action_dim"] = spec["action"][0]
    if "network" in component:  # built here already, so that an error names its path
        network = component["network"]
        denoisers.build(network, f"{path}.network", horizon=context["horizon"], dtype=dtype)
    return build_component(HEADS, component, path, **context)


def reach(component: Mapping[str, Any], path: str) -> tuple[float, float]:
    """Return the range of normalised actions that the head of a config's component can output."""
    while component.get("kind") in WRAPPERS and "head" in component:
        component, path = component["head"], f"{path}.head"
    # longer than any prefix; no parameters are made
    spec: BatchSpec = {"action": ((1, 1 << 16, 1), "float32")}
    head = build(component, path, spec, names=Names((), ()), dtype=jnp.float32)
    return head.reach() if isinstance(head, Head) else (-math.inf, math.inf)


WRAPPERS = {"per_group": PerGroup, "hypernet": Hypernet}
HEADS = {"diffusion": Diffusion, "flow": Flow, "mse": MSE, "l1": L1, "bins": Bins, **WRAPPERS}


def masked_losses(errors: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean of errors [B, W, H, A] over the true mask: in total, and per example [B].

    The total weighs every valid action equally. An example without a valid action has the loss 0
    and does not influence the total.
    """
    total = jnp.where(mask, errors, 0).sum(axis=(1, 2, 3))
    count = mask.sum(axis=(1, 2, 3))
    return total.sum() / jnp.maximum(count.sum(), 1), total / jnp.maximum(count, 1)
