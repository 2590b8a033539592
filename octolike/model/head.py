"""Action heads: readout tokens to errors in training and to action chunks in inference.

A head predicts a chunk per timestep of the window in training, and for the last one in inference:

    head(group, action, context)       group: the readout's TokenGroup, tokens [B, W, N, D]
                                       action: float32 [B, W, H, A], zero where masked
                                       → errors float32 [B, W, H, A]: their masked mean is the loss
    head.sample(group, dims, context)  dims: bool [B, A], False: the embodiment lacks it; or None
                                       → float32 [B, H, A], normalised actions
    head.draw(batch)                   → the noise that `sample` takes as `noise`, [B, ...] per leaf

`context` (`Context`) identifies the robot and the task, for heads that differ between them:
`groups.PerGroup` and `hypernet.Hypernet` wrap any other head.

Masked actions have no influence: their errors are left out of the loss, and no head mixes the
errors of different values. The network zeros them first, because denoising heads feed the noised
chunk to their network; in inference these heads keep the dimensions absent in `dims` at the noise
level of a zero action.

Real-time chunking: the robot executes the first actions of the next chunk (`types.Prefix`) while
that chunk is computed. Denoising heads make the new chunk continue them: by guidance (`diffusion`),
or, if they were trained with a `prefix`, with these actions as a clean input, which they return
unchanged. Other heads refuse a prefix.

Random streams: "noise", and "dropout" in training only.

A chunk is flattened to F = H · A values, action dimensions innermost. Errors of continuous heads
are scaled by A: the loss is a sum over the action dimensions, as in Octo, so that Octo's learning
rates carry over.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, option
from octolike.model.pooling import AttentionPooling
from octolike.types import Context, Prefix, TokenGroup

POOLINGS = ("mean", "attention")


class Head(nn.Module):
    """The base of all heads: the size of the chunks and the pooling of the readout."""

    horizon: int = option(meaning="H: actions per chunk, from the data", low=1)
    action_dim: int = option(meaning="A: action dimensions, from the data", low=1)
    readout: str = option("readout_action", "token group that the head reads")
    pooling: str = option(
        "mean", "'mean' of the tokens, or 'attention': learned probes", choices=POOLINGS
    )
    pooling_heads: int = option(8, "attention heads of the pooling; divide the width", low=1)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")

    def setup(self) -> None:
        if self.pooling == "attention":
            self.pool = AttentionPooling(self.tokens, self.pooling_heads, dtype=self.dtype)

    @property
    def tokens(self) -> int:
        """The number of tokens that attention pooling returns."""
        return 1

    def reach(self) -> tuple[float, float]:
        """Return the least and the greatest normalised action that the head can output."""
        return -math.inf, math.inf

    def reads(self) -> tuple[str, ...]:
        """Return the batch paths that the head needs in addition to its readout."""
        return ()

    def embed(self, group: TokenGroup) -> jax.Array:
        """Return [B, W, D], one embedding per timestep."""
        if self.pooling == "mean":
            return pooled(group)
        return self.pool(*group)[..., 0, :]

    def draw(self, batch: int) -> dict[str, jax.Array]:
        """Return the noise of `batch` chunks from the stream "noise"; {} if sampling needs none.

        It depends on no parameter.
        """
        return {}

    def refuse_prefix(self, prefix: Prefix | None) -> None:
        """Raise ConfigError if there is a prefix."""
        if prefix is not None:
            raise ConfigError(
                f"real-time chunking needs a diffusion or flow head; the head {type(self).__name__}"
                " predicts a chunk in one pass and cannot continue a prefix: execute its chunks "
                "without real_time, or smooth them with an ensemble"
            )

    def check(self, action: jax.Array) -> None:
        """Raise ConfigError for actions of another size than this head's."""
        if action.shape[-2:] != (self.horizon, self.action_dim):
            raise ConfigError(
                f"the head's chunks are {self.horizon} actions of {self.action_dim} dimensions; "
                f"the given ones are {action.shape[-2:]}. A head fits one batch spec only: build "
                "another for these"
            )

    def valid(self, dims: jax.Array | None) -> jax.Array | None:
        """Return the mask of a flat chunk, bool [B, F], for the embodiments' dims [B, A]."""
        if dims is None:
            return None
        if dims.shape[-1] != self.action_dim:
            raise ConfigError(
                f"dims name {dims.shape[-1]} action dimensions; the head has {self.action_dim}"
            )
        return jnp.tile(dims, (1, self.horizon))


class WrappedHead(nn.Module):
    """The base of heads around another head, to their callers a head like any other.

    A subclass calls a method of the inner head in `_run`.
    """

    head: nn.Module = option(meaning="the head to wrap", table="octolike.model.heads:HEADS")

    @property
    def readout(self) -> str:
        return self.head.readout

    @property
    def horizon(self) -> int:
        return self.head.horizon

    @property
    def action_dim(self) -> int:
        return self.head.action_dim

    def reads(self) -> tuple[str, ...]:
        """Return the batch paths that the head needs in addition to its readout."""
        return self.head.reads()

    def __call__(self, group: TokenGroup, action: jax.Array, context: Context) -> jax.Array:
        return self._run("__call__", group, action, context)

    def sample(
        self,
        group: TokenGroup,
        dims: jax.Array | None,
        context: Context,
        *,
        noise: dict[str, jax.Array] | None = None,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        return self._run("sample", group, dims, context, noise=noise, prefix=prefix)

    def _run(
        self,
        method: str,
        group: TokenGroup,
        values: jax.Array | None,
        context: Context,
        **options: Any,
    ) -> jax.Array:
        """Call the inner head's `method` for a batch."""
        raise NotImplementedError


def pooled(group: TokenGroup) -> jax.Array:
    """Return the mean of a group's tokens: [B, W, N, D] to [B, W, D]."""
    return group.tokens.mean(axis=-2)


def last(group: TokenGroup) -> TokenGroup:
    """Return the group at the window's last timestep, with W = 1."""
    return jax.tree.map(lambda x: x[:, -1:], group)


def flat(action: jax.Array) -> jax.Array:
    """Return chunks [..., H, A] as [..., F]."""
    return action.reshape(*action.shape[:-2], -1)


def to_chunk(x: jax.Array, action_dim: int) -> jax.Array:
    """Return flat chunks [..., F] as [..., H, A]."""
    return x.reshape(*x.shape[:-1], -1, action_dim)
