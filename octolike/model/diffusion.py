"""The noise schedule and the samplers of diffusion and flow heads, as pure functions.

A sampler takes its initial and added noise as arguments: the same noise gives the same actions.

    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε,   α = 1 − β,   ᾱ_t = α_0 · … · α_t

`noise_at(x, t)` is the model's ε for x [..., F] at the integer time t. `valid` (bool, like x; None:
all) is False for dimensions that an embodiment lacks: they had x_0 = 0 in training, so they are
kept at the noise level of a zero action. With `path`, samplers return all iterates,
[1 + steps, ..., F], starting with the noise.

`guided_noise` and `guided_velocity` steer a sampler towards given actions (`types.Prefix`), for
real-time chunking (Black et al. 2025, "Real-time execution of action chunking flow policies"): the
gradient of the weighted error of the estimated clean chunk, through the network, is added with a
clipped factor. A weight of 0 everywhere changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

UNROLL = 20  # steps of a sampler per iteration of its loop; more only lengthen the compilation


def cosine_betas(steps: int, offset: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """Return β float32 [steps], at most max_beta (Nichol & Dhariwal 2021, eq. 17; offset: s)."""
    t = np.arange(steps + 1) / steps
    alpha_bar = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, max_beta).astype(np.float32)


def alpha_bars(betas: np.ndarray) -> np.ndarray:
    """Return ᾱ float32 [steps]."""
    return np.cumprod(1 - betas, dtype=np.float32)


def ddpm(
    noise_at: Callable[[jax.Array, jax.Array], jax.Array],
    betas: np.ndarray,
    x: jax.Array,
    z: jax.Array,
    *,
    clip: float,
    valid: jax.Array | None = None,
    path: bool = False,
) -> jax.Array:
    """Return x_0 by ancestral sampling (Ho et al. 2020) from the noise x [..., F].

    z: [steps, ..., F], noise added at each step, z[0] at the first and noisiest one. Every x is
    clipped to ±clip.
    """
    step = _ddpm_step(noise_at, clip, valid, path)
    return _end_or_path(x, *_steps(step, x, (*_ddpm_schedule(betas), jnp.asarray(z))))


def ddpm_steps(
    noise_at: Callable[[jax.Array, jax.Array], jax.Array],
    betas: np.ndarray,
    x: jax.Array,
    z: jax.Array,
    *,
    clip: float,
) -> jax.Array:
    """Return the result of each step of `ddpm` alone, [steps, ..., F], from x [steps, ..., F]."""
    step = _ddpm_step(noise_at, clip, None, False)
    return jax.lax.map(lambda inputs: step(*inputs)[0], (x, (*_ddpm_schedule(betas), z)))


def _ddpm_schedule(betas: np.ndarray) -> tuple[jax.Array, ...]:
    """Return the times in the order of sampling, and the factors of `_ddpm_step` at each."""
    alphas, bars = 1 - betas, alpha_bars(betas)
    times = np.arange(len(betas))[::-1]
    scale = 1 / np.sqrt(alphas[times])
    noise_scale = betas[times] / np.sqrt(1 - bars[times])
    sigma = np.sqrt(betas[times]) * (times > 0)
    level = np.sqrt(1 - bars[times])  # noise of a dimension with x_0 = 0
    return tuple(jnp.asarray(a) for a in (times, scale, noise_scale, sigma, level))


def _ddpm_step(
    noise_at: Callable[[jax.Array, jax.Array], jax.Array],
    clip: float,
    valid: jax.Array | None,
    path: bool,
) -> Callable[[jax.Array, tuple[jax.Array, ...]], tuple[jax.Array, jax.Array | None]]:
    def step(x: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array | None]:
        t, scale, noise_scale, sigma, level, z = inputs
        y = scale * (x - noise_scale * noise_at(x, t)) + sigma * z
        y = jnp.clip(y, -clip, clip)
        y = y if valid is None else jnp.where(valid, y, level * z)
        return y, y if path else None

    return step


def ddim(
    noise_at: Callable[[jax.Array, jax.Array], jax.Array],
    betas: np.ndarray,
    x: jax.Array,
    steps: int,
    *,
    clip: float,
    valid: jax.Array | None = None,
    path: bool = False,
) -> jax.Array:
    """Return x_0 by deterministic sampling (Song et al. 2021, η = 0) from the noise x [..., F].

    steps: number of evenly spaced times. Every estimate of x_0 is clipped to ±clip.
    """
    times = np.linspace(len(betas) - 1, 0, steps).round().astype(np.int32)
    bars = alpha_bars(betas)[times]
    next_bars = np.append(bars[1:], np.float32(1))
    start = x

    def step(x: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array | None]:
        t, bar, next_bar = inputs
        x0 = (x - jnp.sqrt(1 - bar) * noise_at(x, t)) / jnp.sqrt(bar)
        x0 = jnp.clip(x0, -clip, clip)
        noise = (x - jnp.sqrt(bar) * x0) / jnp.sqrt(1 - bar)
        y = jnp.sqrt(next_bar) * x0 + jnp.sqrt(1 - next_bar) * noise
        y = y if valid is None else jnp.where(valid, y, jnp.sqrt(1 - next_bar) * start)
        return y, y if path else None

    inputs = jax.tree.map(jnp.asarray, (times, bars, next_bars))
    return _end_or_path(x, *_steps(step, x, inputs))


def euler(
    velocity_at: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    steps: int,
    *,
    valid: jax.Array | None = None,
    path: bool = False,
) -> jax.Array:
    """Return x at time 1 by Euler steps along dx/dt = velocity_at(x, t), from the noise x at 0."""
    start = x

    def step(x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        y = x + velocity_at(x, i / steps) / steps
        y = y if valid is None else jnp.where(valid, y, (1 - (i + 1) / steps) * start)
        return y, y if path else None

    return _end_or_path(x, *_steps(step, x, jnp.arange(steps)))


def _steps(step: Callable[..., Any], x: jax.Array, inputs: Any) -> Any:
    """Scan over the steps of a sampler, unrolled: a loop costs an accelerator a launch per step."""
    return jax.lax.scan(step, x, inputs, unroll=UNROLL)


def guided_velocity(
    velocity_at: Callable[[jax.Array, jax.Array], jax.Array],
    target: jax.Array,
    weight: jax.Array,
    limit: float,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return velocity_at, guided to the target [..., F]; weight: like it; limit: the paper's β."""

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        def clean_at(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            velocity = velocity_at(x, t)
            return x + (1 - t) * velocity, velocity

        clean, pull_back, velocity = jax.vjp(clean_at, x, has_aux=True)
        (gradient,) = pull_back(weight * (target - clean))
        # (1 − t) / (t · r²) with r² = (1 − t)² / (t² + (1 − t)²)
        ideal = (t**2 + (1 - t) ** 2) / jnp.maximum(t * (1 - t), 1e-6)
        return velocity + jnp.minimum(limit, ideal) * gradient

    return guided


def guided_noise(
    noise_at: Callable[[jax.Array, jax.Array], jax.Array],
    betas: np.ndarray,
    target: jax.Array,
    weight: jax.Array,
    limit: float,
    clip: float,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return noise_at, guided to the target [..., F] with weights like it.

    With x = x_t / (√ᾱ + √(1 − ᾱ)) at the time √ᾱ / (√ᾱ + √(1 − ᾱ)), a diffusion is a flow; the
    factors of `guided_velocity` become min(limit · √ᾱ, 1 / √(1 − ᾱ)) for the noise.
    """
    bars = jnp.asarray(alpha_bars(betas))

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        signal, level = jnp.sqrt(bars[t]), jnp.sqrt(1 - bars[t])

        def clean_at(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            noise = noise_at(x, t)
            return (x - level * noise) / signal, noise

        clean, pull_back, noise = jax.vjp(clean_at, x, has_aux=True)
        (gradient,) = pull_back(weight * (target - jnp.clip(clean, -clip, clip)))
        return noise - jnp.minimum(limit * signal, 1 / level) * gradient

    return guided


def _end_or_path(start: jax.Array, end: jax.Array, iterates: jax.Array | None) -> jax.Array:
    return end if iterates is None else jnp.concatenate([start[None], iterates])
