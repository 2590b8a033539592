"""The noise schedule of diffusion policies and its samplers, as pure functions.

A sampler takes its initial and added noise as arguments: the same noise gives the same actions.

    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε,   α = 1 − β,   ᾱ_t = α_0 · … · α_t

`noise_at(x, t)` is the model's ε for x [..., F] at the integer time t. `valid` (bool, like x; None:
all) is False for dimensions that an embodiment lacks: training showed x_0 = 0 there, so they are
kept at the noise that goes with it. With `path`, samplers return all that they pass through,
[1 + steps, ..., F], noise first.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def cosine_betas(steps: int, s: float = 0.008) -> np.ndarray:
    """Return β float32 [steps], at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    t = np.arange(steps + 1) / steps
    alpha_bar = np.cos((t + s) / (1 + s) * np.pi / 2) ** 2
    return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999).astype(np.float32)


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
    alphas, bars = 1 - betas, alpha_bars(betas)
    times = np.arange(len(betas))[::-1]
    gain = 1 / np.sqrt(alphas[times])
    share = betas[times] / np.sqrt(1 - bars[times])
    spread = np.sqrt(betas[times]) * (times > 0)

    def step(x: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, gain, share, spread, idle, z = at
        y = gain * (x - share * noise_at(x, t)) + spread * z
        y = jnp.clip(y, -clip, clip)
        y = y if valid is None else jnp.where(valid, y, idle * z)
        return y, y if path else None

    at = (times, gain, share, spread, np.sqrt(1 - bars[times]), z)
    return _end_or_path(x, *jax.lax.scan(step, x, jax.tree.map(jnp.asarray, at)))


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

    steps: how many times are visited, spread evenly. Every estimate of x_0 is clipped to ±clip.
    """
    times = np.linspace(len(betas) - 1, 0, steps).round().astype(np.int32)
    bars = alpha_bars(betas)[times]
    following = np.append(bars[1:], np.float32(1))
    first = x

    def step(x: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, bar, after = at
        x0 = (x - jnp.sqrt(1 - bar) * noise_at(x, t)) / jnp.sqrt(bar)
        x0 = jnp.clip(x0, -clip, clip)
        noise = (x - jnp.sqrt(bar) * x0) / jnp.sqrt(1 - bar)
        y = jnp.sqrt(after) * x0 + jnp.sqrt(1 - after) * noise
        y = y if valid is None else jnp.where(valid, y, jnp.sqrt(1 - after) * first)
        return y, y if path else None

    at = jax.tree.map(jnp.asarray, (times, bars, following))
    return _end_or_path(x, *jax.lax.scan(step, x, at))


def euler(
    velocity_at: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    steps: int,
    *,
    valid: jax.Array | None = None,
    path: bool = False,
) -> jax.Array:
    """Return x at time 1, from the noise x [..., F] at time 0, along dx/dt = velocity_at(x, t)."""
    first = x

    def step(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        y = x + velocity_at(x, i / steps) / steps
        y = y if valid is None else jnp.where(valid, y, (1 - (i + 1) / steps) * first)
        return y, y if path else None

    return _end_or_path(x, *jax.lax.scan(step, x, jnp.arange(steps)))


def _end_or_path(start: jax.Array, end: jax.Array, passed: jax.Array | None) -> jax.Array:
    return end if passed is None else jnp.concatenate([start[None], passed])
