"""Readout tokens to action errors (training) and action chunks (acting).

A head predicts a chunk for each timestep of the window in training, for the last when acting:

    head(group, action, context)       group: the readout's TokenGroup, tokens [B, W, N, D]
                                       action: float32 [B, W, H, A], zero where masked
                                       → errors float32 [B, W, H, A]: their masked mean is the loss
    head.sample(group, dims, context)  dims: bool [B, A], False: the embodiment lacks this; or None
                                       → float32 [B, H, A], normalised actions

`context` (`Context`) says whose chunk it is, for heads that differ between robots or tasks.

A chunk is flattened to F = H · A values, action dimensions innermost. Errors are scaled by A, so
that the loss is a sum over the action dimensions, as in Octo, and learning rates carry over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, build_component, unknown
from octolike.model import diffusion
from octolike.types import BatchSpec, Names, TokenGroup

LIMIT = 5.0  # normalised actions beyond ±5 are faults of the data


class Context(NamedTuple):
    """Whose chunk it is.

    task: [B, E], the pooled task tokens, or None; embodiment, task_id: int32 [B].
    """

    task: jax.Array | None
    embodiment: jax.Array
    task_id: jax.Array


class Diffusion(nn.Module):
    """Denoising diffusion with a residual MLP as its score network.

    samples_per_example: independent (time, noise) draws per readout in training; a cheap way to a
    calmer gradient. prediction: what the network outputs, "noise" or "sample" (the clean actions).
    sampler: "ddpm" (all steps) or "ddim" (`inference_steps` of them; 0: all).
    """

    horizon: int
    action_dim: int
    readout: str = "readout_action"
    steps: int = 20
    hidden: int = 256
    blocks: int = 3
    expansion: int = 4
    samples_per_example: int = 1
    prediction: str = "noise"
    sampler: str = "ddpm"
    inference_steps: int = 0
    clip: float = LIMIT
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _choice("prediction", self.prediction, ("noise", "sample"))
        _choice("sampler", self.sampler, ("ddpm", "ddim"))
        if not 0 <= self.inference_steps <= self.steps:
            raise ConfigError(
                f"inference_steps {self.inference_steps} is not in 0 to steps {self.steps}"
            )
        if self.sampler == "ddpm" and self.inference_steps not in (0, self.steps):
            raise ConfigError(
                f"sampler 'ddpm' takes all {self.steps} steps, not inference_steps "
                f"{self.inference_steps}; choose 'ddim' for fewer"
            )
        super().__post_init__()

    def setup(self) -> None:
        self.betas = diffusion.cosine_betas(self.steps)
        self.score = _score_network(self)

    def __call__(
        self, group: TokenGroup, action: jax.Array, context: Context | None = None
    ) -> jax.Array:
        shape = (self.samples_per_example, *action.shape[:2])
        key_time, key_noise = jax.random.split(self.make_rng("noise"))
        time = jax.random.randint(key_time, (*shape, 1), 0, self.steps)
        noise = jax.random.normal(key_noise, (*shape, self.horizon * self.action_dim))
        return self.errors(group, action, time, noise)

    def errors(
        self, group: TokenGroup, action: jax.Array, time: jax.Array, noise: jax.Array
    ) -> jax.Array:
        """Return errors for given draws: integer time [K, B, W, 1] and noise [K, B, W, F]."""
        x0 = jnp.clip(_flat(action), -self.clip, self.clip)
        bar = jnp.asarray(diffusion.alpha_bars(self.betas))[time]
        x = jnp.sqrt(bar) * x0 + jnp.sqrt(1 - bar) * noise
        out = self.score(_repeat(pooled(group), len(time)), x, time)
        target = noise if self.prediction == "noise" else x0
        return ((out - target) ** 2).mean(axis=0).reshape(action.shape) * self.action_dim

    def sample(
        self,
        group: TokenGroup,
        dims: jax.Array | None = None,
        context: Context | None = None,
    ) -> jax.Array:
        shape = (group.tokens.shape[0], self.horizon * self.action_dim)
        key_x, key_z = jax.random.split(self.make_rng("noise"))
        steps = self.steps if self.sampler == "ddpm" else 0
        x = jax.random.normal(key_x, shape)
        z = jax.random.normal(key_z, (steps, *shape))
        return self.denoise(group, x, z, dims)

    def denoise(
        self, group: TokenGroup, x: jax.Array, z: jax.Array, dims: jax.Array | None = None
    ) -> jax.Array:
        """Return actions [B, H, A] for given noise: x [B, F] and, for ddpm, z [steps, B, F]."""
        embedding = pooled(group)[:, -1]
        score, variables = self.score.unbind()  # a scan must not touch a bound module
        bars = jnp.asarray(diffusion.alpha_bars(self.betas))

        def noise_at(x: jax.Array, t: jax.Array) -> jax.Array:
            out = score.apply(variables, embedding, x, jnp.broadcast_to(t, (*x.shape[:-1], 1)))
            if self.prediction == "noise":
                return out
            x0 = jnp.clip(out, -self.clip, self.clip)
            return (x - jnp.sqrt(bars[t]) * x0) / jnp.sqrt(1 - bars[t])

        valid = _valid(dims, self.horizon)
        if self.sampler == "ddpm":
            x = diffusion.ddpm(noise_at, self.betas, x, z, clip=self.clip, valid=valid)
        else:
            steps = self.inference_steps or self.steps
            x = diffusion.ddim(noise_at, self.betas, x, steps, clip=self.clip, valid=valid)
        return _chunk(x, self.action_dim)


class Flow(nn.Module):
    """Flow matching (Lipman et al. 2023) along straight paths x_t = (1 − t) · noise + t · action.

    steps: Euler steps when acting. samples_per_example: (time, noise) draws per readout.
    """

    horizon: int
    action_dim: int
    readout: str = "readout_action"
    steps: int = 10
    hidden: int = 256
    blocks: int = 3
    expansion: int = 4
    samples_per_example: int = 1
    clip: float = LIMIT
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.score = _score_network(self)

    def __call__(
        self, group: TokenGroup, action: jax.Array, context: Context | None = None
    ) -> jax.Array:
        shape = (self.samples_per_example, *action.shape[:2])
        key_time, key_noise = jax.random.split(self.make_rng("noise"))
        time = jax.random.uniform(key_time, (*shape, 1))
        noise = jax.random.normal(key_noise, (*shape, self.horizon * self.action_dim))
        return self.errors(group, action, time, noise)

    def errors(
        self, group: TokenGroup, action: jax.Array, time: jax.Array, noise: jax.Array
    ) -> jax.Array:
        """Return errors for given draws: time in [0, 1], [K, B, W, 1], and noise [K, B, W, F]."""
        x1 = jnp.clip(_flat(action), -self.clip, self.clip)
        out = self.score(
            _repeat(pooled(group), len(time)), (1 - time) * noise + time * x1, time * _FLOW_TIME
        )
        return ((out - (x1 - noise)) ** 2).mean(axis=0).reshape(action.shape) * self.action_dim

    def sample(
        self,
        group: TokenGroup,
        dims: jax.Array | None = None,
        context: Context | None = None,
    ) -> jax.Array:
        shape = (group.tokens.shape[0], self.horizon * self.action_dim)
        return self.denoise(group, jax.random.normal(self.make_rng("noise"), shape), dims)

    def denoise(self, group: TokenGroup, x: jax.Array, dims: jax.Array | None = None) -> jax.Array:
        """Return actions [B, H, A] for the given noise x [B, F]."""
        embedding = pooled(group)[:, -1]
        score, variables = self.score.unbind()

        def velocity_at(x: jax.Array, t: jax.Array) -> jax.Array:
            time = jnp.broadcast_to(t * _FLOW_TIME, (*x.shape[:-1], 1))
            return score.apply(variables, embedding, x, time)

        x = diffusion.euler(velocity_at, x, self.steps, valid=_valid(dims, self.horizon))
        return _chunk(jnp.clip(x, -self.clip, self.clip), self.action_dim)


class Regression(nn.Module):
    """A linear map to the chunk, kept within ±limit by limit · tanh(x / limit): see MSE and L1."""

    horizon: int
    action_dim: int
    readout: str = "readout_action"
    limit: float = LIMIT
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.out = nn.Dense(self.horizon * self.action_dim, dtype=self.dtype)

    def __call__(
        self, group: TokenGroup, action: jax.Array, context: Context | None = None
    ) -> jax.Array:
        return self.error(self.predict(pooled(group)) - action) * self.action_dim

    def predict(self, embedding: jax.Array) -> jax.Array:
        """Return chunks [..., H, A] for embeddings [..., D]."""
        x = self.out(embedding).astype(jnp.float32)
        return _chunk(self.limit * jnp.tanh(x / self.limit), self.action_dim)

    def sample(
        self,
        group: TokenGroup,
        dims: jax.Array | None = None,
        context: Context | None = None,
    ) -> jax.Array:
        return self.predict(pooled(group)[:, -1])

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


class ScoreNetwork(nn.Module):
    """A residual MLP over (time, embedding, noisy actions), [..., F] to [..., F]."""

    hidden: int
    blocks: int
    expansion: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, embedding: jax.Array, x: jax.Array, time: jax.Array) -> jax.Array:
        """Return [..., F] for embedding [..., D], noisy actions x [..., F] and time [..., 1]."""

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, dtype=self.dtype, name=name)

        waves = self.param("fourier", nn.initializers.normal(0.2), (16, 1), jnp.float32)
        angle = 2 * jnp.pi * time.astype(jnp.float32) @ waves.T
        t = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        t = dense(32, "time_out")(nn.swish(dense(64, "time_in")(t)))
        h = jnp.concatenate([t, embedding.astype(t.dtype), x.astype(t.dtype)], axis=-1)
        h = dense(self.hidden, "in")(h)
        for i in range(self.blocks):
            y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"norm_{i}")(h)
            y = nn.swish(dense(self.expansion * self.hidden, f"up_{i}")(y))
            h = h + dense(self.hidden, f"down_{i}")(y)
        return dense(x.shape[-1], "out")(nn.swish(h)).astype(jnp.float32)


def build(
    component: Mapping[str, Any], path: str, spec: BatchSpec, *, names: Names, dtype: Any
) -> nn.Module:
    """Return the head of a config's component, for the chunks of the batch spec."""
    _, horizon, action_dim = spec["action"][0]
    sizes = {"horizon": horizon, "action_dim": action_dim, "dtype": dtype}
    return build_component(HEADS, component, path, **sizes)


HEADS = {"diffusion": Diffusion, "flow": Flow, "mse": MSE, "l1": L1}


def pooled(group: TokenGroup) -> jax.Array:
    """Return the mean of a group's tokens: [B, W, N, D] to [B, W, D]."""
    return group.tokens.mean(axis=-2)


def masked_losses(errors: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean of errors [B, W, H, A] where the mask is true: over all, and per example [B].

    The first weighs every valid action alike, so an example without any contributes nothing; its
    own loss is 0.
    """
    total = jnp.where(mask, errors, 0).sum(axis=(1, 2, 3))
    count = mask.sum(axis=(1, 2, 3))
    return total.sum() / jnp.maximum(count.sum(), 1), total / jnp.maximum(count, 1)


# The Fourier features start with frequencies for diffusion's integer times; flow's lie in [0, 1].
_FLOW_TIME = 10.0


def _score_network(head: Diffusion | Flow) -> ScoreNetwork:
    return ScoreNetwork(
        hidden=head.hidden, blocks=head.blocks, expansion=head.expansion, dtype=head.dtype
    )


def _repeat(embedding: jax.Array, samples: int) -> jax.Array:
    return jnp.broadcast_to(embedding[None], (samples, *embedding.shape))


def _flat(action: jax.Array) -> jax.Array:
    return action.reshape(*action.shape[:-2], -1)


def _chunk(x: jax.Array, action_dim: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, action_dim)


def _valid(dims: jax.Array | None, horizon: int) -> jax.Array | None:
    return None if dims is None else jnp.tile(dims, (1, horizon))


def _choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(unknown(field, value, choices))
