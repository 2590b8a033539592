"""The denoising heads: diffusion and flow matching, and how their chunks continue a prefix.

The samplers are in `diffusion`, the networks in `denoisers`, the interface of heads in `head`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.core import freeze

from octolike.config import ConfigError, option
from octolike.model import denoisers, diffusion
from octolike.model.head import Head, flat, last, to_chunk
from octolike.model.precision import exact_products
from octolike.types import Context, Prefix, TokenGroup

PREDICTIONS = ("noise", "sample")
SAMPLERS = ("ddpm", "ddim")


class Denoising(Head):
    """The base of diffusion and flow: a network of `denoisers`, and draws of noise."""

    network: Mapping[str, Any] = option(
        freeze({"kind": "mlp"}),
        "the network that denoises",
        table="octolike.model.denoisers:NETWORKS",
    )
    samples_per_example: int = option(
        1, "(time, noise) draws per readout in training: a cheap way to a calmer gradient", low=1
    )
    clip: float = option(5.0, "normalised actions are clipped to ±clip", low=0)
    guidance: float = option(
        5.0, "largest factor of the guidance of real-time chunking (β of Black et al. 2025)", low=0
    )
    prefix: int = option(
        0,
        "real-time chunking learned in training: the largest delay, in actions at the front of a "
        "chunk that are given clean and have no loss; it must be below the horizon. 0: guidance",
        low=0,
    )
    no_prefix: float = option(
        0.5,
        "share of the draws that have no prefix in any case: a prefix withholds the first actions, "
        "which a robot executes first, from the loss",
        low=0,
        high=1,
    )

    def __post_init__(self) -> None:
        if self.prefix and self.prefix >= self.horizon:
            raise ConfigError(
                f"prefix is {self.prefix}; it must be below the chunk's {self.horizon} actions "
                "(data.horizon)"
            )
        super().__post_init__()

    def setup(self) -> None:
        super().setup()
        # float32 for any compute type: noise levels are finer than bfloat16's steps,
        # and it is small.
        self.score = denoisers.build(
            self.network, "network", horizon=self.horizon, dtype=jnp.float32
        )

    def reach(self) -> tuple[float, float]:
        return -self.clip, self.clip

    def bind_network(
        self, group: TokenGroup, prefix: Prefix | None = None
    ) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Return the network over (x [B, F], time scalar) for the last timestep.

        A head trained with a `prefix` sees the known actions instead of those of x.
        """
        embedding = self.embed(last(group))[:, 0]
        score, variables = self.score.unbind()  # a scan must not touch a bound module
        known = None
        if self.prefix:
            none = jnp.zeros((len(embedding), self.horizon), bool)
            known = none if prefix is None else prefix.known

        def network(x: jax.Array, t: jax.Array) -> jax.Array:
            x = self.keep_known(x, prefix)
            time = jnp.broadcast_to(t, (*x.shape[:-1], 1))
            with exact_products():
                return cast(jax.Array, score.apply(variables, embedding, x, time, known))

        return network

    def keep_known(self, x: jax.Array, prefix: Prefix | None) -> jax.Array:
        """Return chunks x [..., F] with the known actions, if the head was trained with them."""
        if prefix is None or not self.prefix:
            return x
        known = jnp.repeat(prefix.known, self.action_dim, axis=-1)
        return jnp.where(known, flat(prefix.action), x)

    def guidance_of(
        self, prefix: Prefix | None, valid: jax.Array | None
    ) -> tuple[jax.Array, jax.Array] | None:
        """Return (target, weight), [B, F], of the guidance; None for none."""
        if prefix is None or prefix.weight is None:
            return None
        weight = jnp.repeat(prefix.weight, self.action_dim, axis=-1)
        weight = weight if valid is None else weight * valid
        return jnp.clip(flat(prefix.action), -self.clip, self.clip), weight

    def draw_prefix(self, shape: tuple[int, ...]) -> jax.Array | None:
        """Return `known`, bool [*shape, H]; None for no prefix.

        The delay is 0 in a share of `no_prefix`, and else a draw of 0 to `prefix`.
        """
        if not self.prefix:
            return None
        key = jax.random.fold_in(self.make_rng("noise"), 1)
        delay = jax.random.randint(key, (*shape, 1), 0, self.prefix + 1)
        has_prefix = jax.random.uniform(jax.random.fold_in(key, 1), (*shape, 1)) >= self.no_prefix
        return has_prefix & (jnp.arange(self.horizon) < delay)

    def training_errors(
        self,
        embedding: jax.Array,
        x: jax.Array,
        clean: jax.Array,
        target: jax.Array,
        time: jax.Array,
        known: jax.Array | None,
    ) -> jax.Array:
        """Return squared errors [B, W, H, A], the mean over K draws, of the network's output.

        x, target: [K, B, W, F]; clean: [B, W, F]; known: bool [K, B, W, H], actions that are given
        clean and have no error; the errors of the others are scaled up, to a mean over H actions.
        """
        if known is not None:
            x = jnp.where(jnp.repeat(known, self.action_dim, axis=-1), clean, x)
        embedding = _repeat(embedding, len(time))
        with exact_products():
            out = self.score(embedding, x, time, known, train=self.has_rng("dropout"))
        errors = to_chunk((out - target) ** 2, self.action_dim)
        if known is not None:
            count = self.horizon - known.sum(axis=-1, keepdims=True)
            errors = errors * (~known * self.horizon / count)[..., None]
        return errors.mean(axis=0) * self.action_dim


class Diffusion(Denoising):
    """Denoising diffusion (Ho et al. 2020) with the cosine schedule of `diffusion`."""

    steps: int = option(20, "diffusion steps", low=1)
    schedule_offset: float = option(0.008, "s of the cosine schedule", low=0)
    max_beta: float = option(0.999, "largest β of the schedule", low=0, high=1)
    prediction: str = option(
        "noise", "output of the network: the noise, or the clean 'sample'", choices=PREDICTIONS
    )
    sampler: str = option(
        "ddpm", "'ddpm' takes all steps, 'ddim' takes inference_steps", choices=SAMPLERS
    )
    inference_steps: int = option(0, "steps of ddim; 0: all", low=0)

    def __post_init__(self) -> None:
        if not 0 <= self.inference_steps <= self.steps:
            raise ConfigError(
                f"inference_steps is {self.inference_steps}; it must be 0 to steps ({self.steps})"
            )
        if self.sampler == "ddpm" and self.inference_steps not in (0, self.steps):
            raise ConfigError(
                f"sampler 'ddpm' takes all {self.steps} steps, not inference_steps "
                f"{self.inference_steps}; choose 'ddim' for fewer"
            )
        super().__post_init__()

    def setup(self) -> None:
        super().setup()
        self.betas = diffusion.cosine_betas(self.steps, self.schedule_offset, self.max_beta)

    def __call__(
        self, group: TokenGroup, action: jax.Array, context: Context | None = None
    ) -> jax.Array:
        shape = (self.samples_per_example, *action.shape[:2])
        key_time, key_noise = jax.random.split(self.make_rng("noise"))
        time = jax.random.randint(key_time, (*shape, 1), 0, self.steps)
        noise = jax.random.normal(key_noise, (*shape, self.horizon * self.action_dim))
        return self.errors(group, action, time, noise, self.draw_prefix(shape))

    def errors(
        self,
        group: TokenGroup,
        action: jax.Array,
        time: jax.Array,
        noise: jax.Array,
        known: jax.Array | None = None,
    ) -> jax.Array:
        """Return errors for given draws: integer time [K, B, W, 1] and noise [K, B, W, F].

        known: bool [K, B, W, H], the prefix of each chunk that is given clean.
        """
        self.check(action)
        x0 = jnp.clip(flat(action), -self.clip, self.clip)
        bar = jnp.asarray(diffusion.alpha_bars(self.betas))[time]
        x = jnp.sqrt(bar) * x0 + jnp.sqrt(1 - bar) * noise
        target = noise if self.prediction == "noise" else jnp.broadcast_to(x0, noise.shape)
        return self.training_errors(self.embed(group), x, x0, target, time, known)

    def sample(
        self,
        group: TokenGroup,
        dims: jax.Array | None = None,
        context: Context | None = None,
        *,
        noise: dict[str, jax.Array] | None = None,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        noise = noise or self.draw(len(group.tokens))
        z = jnp.moveaxis(noise["z"], 1, 0)
        return self.denoise(group, noise["x"], z, dims, prefix)

    def draw(self, batch: int) -> dict[str, jax.Array]:
        shape = (batch, self.horizon * self.action_dim)
        key_x, key_z = jax.random.split(self.make_rng("noise"))
        steps = self.steps if self.sampler == "ddpm" else 0
        z = jax.random.normal(key_z, (steps, *shape))
        return {"x": jax.random.normal(key_x, shape), "z": jnp.moveaxis(z, 0, 1)}

    def denoise(
        self,
        group: TokenGroup,
        x: jax.Array,
        z: jax.Array,
        dims: jax.Array | None = None,
        prefix: Prefix | None = None,
        *,
        path: bool = False,
    ) -> jax.Array:
        """Return actions [B, H, A] for given noise: x [B, F] and, for ddpm, z [steps, B, F].

        path: return all iterates of the sampler, [1 + steps, B, H, A].
        """
        network = self.bind_network(group, prefix)
        bars = jnp.asarray(diffusion.alpha_bars(self.betas))

        def noise_at(x: jax.Array, t: jax.Array) -> jax.Array:
            out = network(x, t)
            if self.prediction == "noise":
                return out
            x0 = jnp.clip(out, -self.clip, self.clip)
            return (x - jnp.sqrt(bars[t]) * x0) / jnp.sqrt(1 - bars[t])

        valid = self.valid(dims)
        guidance = self.guidance_of(prefix, valid)
        estimate: Callable[[jax.Array, jax.Array], jax.Array] = noise_at
        if guidance:
            estimate = diffusion.guided_noise(
                noise_at, self.betas, *guidance, self.guidance, self.clip
            )
        options: dict[str, Any] = {"clip": self.clip, "valid": valid, "path": path}
        if self.sampler == "ddpm":
            x = diffusion.ddpm(estimate, self.betas, x, z, **options)
        else:
            steps = self.inference_steps or self.steps
            x = diffusion.ddim(estimate, self.betas, x, steps, **options)
        return to_chunk(self.keep_known(x, prefix), self.action_dim)


class Flow(Denoising):
    """Flow matching (Lipman et al. 2023) on straight paths x_t = (1 − t) · noise + t · action."""

    steps: int = option(10, "Euler steps in inference", low=1)
    # The Fourier features are initialised for the integer times of diffusion.
    time_scale: float = option(10.0, "factor of the times in [0, 1] that the network receives")

    def __call__(
        self, group: TokenGroup, action: jax.Array, context: Context | None = None
    ) -> jax.Array:
        shape = (self.samples_per_example, *action.shape[:2])
        key_time, key_noise = jax.random.split(self.make_rng("noise"))
        time = jax.random.uniform(key_time, (*shape, 1))
        noise = jax.random.normal(key_noise, (*shape, self.horizon * self.action_dim))
        return self.errors(group, action, time, noise, self.draw_prefix(shape))

    def errors(
        self,
        group: TokenGroup,
        action: jax.Array,
        time: jax.Array,
        noise: jax.Array,
        known: jax.Array | None = None,
    ) -> jax.Array:
        """Return errors for given draws: time in [0, 1], [K, B, W, 1], and noise [K, B, W, F].

        known: as in `Diffusion`.
        """
        self.check(action)
        x1 = jnp.clip(flat(action), -self.clip, self.clip)
        x = (1 - time) * noise + time * x1
        scaled = time * self.time_scale
        return self.training_errors(self.embed(group), x, x1, x1 - noise, scaled, known)

    def sample(
        self,
        group: TokenGroup,
        dims: jax.Array | None = None,
        context: Context | None = None,
        *,
        noise: dict[str, jax.Array] | None = None,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        noise = noise or self.draw(len(group.tokens))
        return self.denoise(group, noise["x"], dims, prefix)

    def draw(self, batch: int) -> dict[str, jax.Array]:
        shape = (batch, self.horizon * self.action_dim)
        return {"x": jax.random.normal(self.make_rng("noise"), shape)}

    def denoise(
        self,
        group: TokenGroup,
        x: jax.Array,
        dims: jax.Array | None = None,
        prefix: Prefix | None = None,
        *,
        path: bool = False,
    ) -> jax.Array:
        """Return actions [B, H, A] for the given noise x [B, F]; path: as in `Diffusion`."""
        network, valid = self.bind_network(group, prefix), self.valid(dims)

        def velocity_at(x: jax.Array, t: jax.Array) -> jax.Array:
            return network(x, t * self.time_scale)

        guidance = self.guidance_of(prefix, valid)
        estimate: Callable[[jax.Array, jax.Array], jax.Array] = velocity_at
        if guidance:
            estimate = diffusion.guided_velocity(velocity_at, *guidance, self.guidance)
        x = diffusion.euler(estimate, x, self.steps, valid=valid, path=path)
        x = self.keep_known(jnp.clip(x, -self.clip, self.clip), prefix)
        return to_chunk(x, self.action_dim)


def _repeat(embedding: jax.Array, samples: int) -> jax.Array:
    return jnp.broadcast_to(embedding[None], (samples, *embedding.shape))
