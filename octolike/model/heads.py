"""Readout tokens to action errors (training) and action chunks (acting).

A head predicts a chunk for each timestep of the window in training, for the last when acting:

    head(group, action, context)       group: the readout's TokenGroup, tokens [B, W, N, D]
                                       action: float32 [B, W, H, A], zero where masked
                                       → errors float32 [B, W, H, A]: their masked mean is the loss
    head.sample(group, dims, context)  dims: bool [B, A], False: the embodiment lacks this; or None
                                       → float32 [B, H, A], normalised actions

`context` (`Context`) says whose chunk it is, for heads that differ between robots or tasks:
`groups.PerGroup` and `hypernet.Hypernet` wrap any other head.

What a masked action is does not matter: its error is left out, and no head mixes the errors of
different values. The model puts 0 in its place beforehand, because heads that noise actions show
the whole chunk to their network; when acting, they keep the dimensions that `dims` denies at the
noise that goes with 0.

Random streams: "noise", and, in training only, "dropout".

A chunk is flattened to F = H · A values, action dimensions innermost. Errors of continuous heads
are scaled by A, so that the loss is a sum over the action dimensions, as in Octo, and learning
rates carry over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import freeze

from octolike.config import ConfigError, build_component, unknown
from octolike.model import bins, denoisers, diffusion
from octolike.model.groups import PerGroup, membership
from octolike.model.hypernet import Hypernet
from octolike.model.pooling import AttentionPooling
from octolike.types import BatchSpec, Context, Names, TokenGroup

LIMIT = 5.0  # normalised actions beyond ±5 are faults of the data


class Head(nn.Module):
    """What every head has: the size of its chunks and how it reads its readout.

    pooling: "mean" of the group's tokens, or "attention": a learned probe over the visible ones
    (`pooling_heads` must divide the token width).
    """

    horizon: int
    action_dim: int
    readout: str = "readout_action"
    pooling: str = "mean"
    pooling_heads: int = 8
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _choice("pooling", self.pooling, ("mean", "attention"))
        super().__post_init__()

    def setup(self) -> None:
        if self.pooling == "attention":
            self.pool = AttentionPooling(self.tokens, self.pooling_heads, dtype=self.dtype)

    @property
    def tokens(self) -> int:
        """How many tokens attention pooling makes."""
        return 1

    def reads(self) -> tuple[str, ...]:
        """Return the batch paths that the head needs besides its readout, as tokenizers do."""
        return ()

    def embed(self, group: TokenGroup) -> jax.Array:
        """Return [B, W, D], one embedding per timestep."""
        if self.pooling == "mean":
            return pooled(group)
        return self.pool(*group)[..., 0, :]

    def check(self, action: jax.Array) -> None:
        """Raise ConfigError for actions of another size than this head's."""
        if action.shape[-2:] != (self.horizon, self.action_dim):
            raise ConfigError(
                f"the head's chunks are {self.horizon} actions of {self.action_dim} dimensions; "
                f"the given ones are {action.shape[-2:]}. A head is made for its batch spec: make "
                "another for these"
            )

    def valid(self, dims: jax.Array | None) -> jax.Array | None:
        """Return bool [B, F] for the embodiments' dims [B, A]."""
        if dims is None:
            return None
        if dims.shape[-1] != self.action_dim:
            raise ConfigError(
                f"dims name {dims.shape[-1]} action dimensions; the head has {self.action_dim}"
            )
        return jnp.tile(dims, (1, self.horizon))


class Denoising(Head):
    """What diffusion and flow share: a network of `denoisers`, and draws of noise.

    samples_per_example: independent (time, noise) draws per readout in training; a cheap way to a
    calmer gradient. clip: actions are kept within ±clip.
    """

    network: Mapping[str, Any] = freeze({"kind": "mlp"})
    samples_per_example: int = 1
    clip: float = LIMIT

    def setup(self) -> None:
        super().setup()
        self.score = denoisers.build(
            self.network, "network", horizon=self.horizon, dtype=self.dtype
        )

    def network_of(self, group: TokenGroup) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Return the network over (x [B, F], time scalar) for the last timestep."""
        embedding = self.embed(_last(group))[:, 0]
        score, variables = self.score.unbind()  # a scan must not touch a bound module
        return lambda x, t: score.apply(
            variables, embedding, x, jnp.broadcast_to(t, (*x.shape[:-1], 1))
        )


class Diffusion(Denoising):
    """Denoising diffusion (Ho et al. 2020).

    prediction: what the network outputs, "noise" or "sample" (the clean actions).
    sampler: "ddpm" (all steps) or "ddim" (`inference_steps` of them; 0: all).
    """

    steps: int = 20
    prediction: str = "noise"
    sampler: str = "ddpm"
    inference_steps: int = 0

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
        super().setup()
        self.betas = diffusion.cosine_betas(self.steps)

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
        self.check(action)
        x0 = jnp.clip(_flat(action), -self.clip, self.clip)
        bar = jnp.asarray(diffusion.alpha_bars(self.betas))[time]
        x = jnp.sqrt(bar) * x0 + jnp.sqrt(1 - bar) * noise
        embedding = _repeat(self.embed(group), len(time))
        out = self.score(embedding, x, time, train=self.has_rng("dropout"))
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
        self,
        group: TokenGroup,
        x: jax.Array,
        z: jax.Array,
        dims: jax.Array | None = None,
        *,
        path: bool = False,
    ) -> jax.Array:
        """Return actions [B, H, A] for given noise: x [B, F] and, for ddpm, z [steps, B, F].

        path: all that the sampler passes through, [1 + steps, B, H, A].
        """
        network = self.network_of(group)
        bars = jnp.asarray(diffusion.alpha_bars(self.betas))

        def noise_at(x: jax.Array, t: jax.Array) -> jax.Array:
            out = network(x, t)
            if self.prediction == "noise":
                return out
            x0 = jnp.clip(out, -self.clip, self.clip)
            return (x - jnp.sqrt(bars[t]) * x0) / jnp.sqrt(1 - bars[t])

        valid = self.valid(dims)
        options = {"clip": self.clip, "valid": valid, "path": path}
        if self.sampler == "ddpm":
            x = diffusion.ddpm(noise_at, self.betas, x, z, **options)
        else:
            steps = self.inference_steps or self.steps
            x = diffusion.ddim(noise_at, self.betas, x, steps, **options)
        return _chunk(x, self.action_dim)


class Flow(Denoising):
    """Flow matching (Lipman et al. 2023) along straight paths x_t = (1 − t) · noise + t · action.

    steps: Euler steps when acting.
    """

    steps: int = 10

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
        self.check(action)
        x1 = jnp.clip(_flat(action), -self.clip, self.clip)
        x = (1 - time) * noise + time * x1
        embedding = _repeat(self.embed(group), len(time))
        out = self.score(embedding, x, time * _FLOW_TIME, train=self.has_rng("dropout"))
        return ((out - (x1 - noise)) ** 2).mean(axis=0).reshape(action.shape) * self.action_dim

    def sample(
        self,
        group: TokenGroup,
        dims: jax.Array | None = None,
        context: Context | None = None,
    ) -> jax.Array:
        shape = (group.tokens.shape[0], self.horizon * self.action_dim)
        return self.denoise(group, jax.random.normal(self.make_rng("noise"), shape), dims)

    def denoise(
        self,
        group: TokenGroup,
        x: jax.Array,
        dims: jax.Array | None = None,
        *,
        path: bool = False,
    ) -> jax.Array:
        """Return actions [B, H, A] for the given noise x [B, F]; path: as in `Diffusion`."""
        network = self.network_of(group)

        def velocity_at(x: jax.Array, t: jax.Array) -> jax.Array:
            return network(x, t * _FLOW_TIME)

        x = diffusion.euler(velocity_at, x, self.steps, valid=self.valid(dims), path=path)
        return _chunk(jnp.clip(x, -self.clip, self.clip), self.action_dim)


class Regression(Head):
    """A linear map to the chunk, kept within ±limit by limit · tanh(x / limit): see MSE and L1."""

    limit: float = LIMIT

    def setup(self) -> None:
        super().setup()
        self.out = nn.Dense(self.horizon * self.action_dim, dtype=self.dtype)

    def __call__(
        self, group: TokenGroup, action: jax.Array, context: Context | None = None
    ) -> jax.Array:
        self.check(action)
        return self.error(self.predict(self.embed(group)) - action) * self.action_dim

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
        self.valid(dims)
        return self.predict(self.embed(_last(group)))[:, 0]

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
    """Every value is one of `bins` bins, chosen by its own softmax; errors are cross-entropies.

    layout: what one token decides: a single "value" (H · A tokens), a "step" of the chunk (H), or
    the whole "chunk" (1). With pooling "mean" the readout must have that many tokens, but for
    "chunk", which takes their mean; attention pooling makes them from any readout.

    bin_kind: "normal", equally likely under the standard normal distribution, or "uniform" in
    [low, high]. Bins cover normalised actions, so the data's normalisation completes the choice:

        data.normalization "bounds", "uniform" in [-1, 1]   between the 1st and 99th percentile of
                                                            each dimension, as RT-2 and OpenVLA do
        data.normalization "normal", "normal"               quantiles of a normal distribution

    outside: where values beyond the outermost edges go, as in `bins`. temperature: of sampling; 0:
    the likeliest bin.
    """

    layout: str = "chunk"
    bins: int = 256
    bin_kind: str = "normal"
    low: float = -1.0
    high: float = 1.0
    outside: str = "nearest"
    temperature: float = 0.0

    def __post_init__(self) -> None:
        _choice("layout", self.layout, ("value", "step", "chunk"))
        bins.edges(self.bin_kind, self.bins, self.low, self.high)  # raises for what is no bin
        bins.check_outside(self.outside)
        if self.temperature < 0:
            raise ConfigError(f"temperature {self.temperature} is negative; 0: the likeliest bin")
        super().__post_init__()

    @property
    def tokens(self) -> int:
        sizes = {"value": self.horizon * self.action_dim, "step": self.horizon, "chunk": 1}
        return sizes[self.layout]

    def setup(self) -> None:
        super().setup()
        self.edges = bins.edges(self.bin_kind, self.bins, self.low, self.high)
        width = self.horizon * self.action_dim * self.bins // self.tokens
        self.out = nn.Dense(width, dtype=self.dtype)

    def __call__(
        self, group: TokenGroup, action: jax.Array, context: Context | None = None
    ) -> jax.Array:
        self.check(action)
        logits = nn.log_softmax(self.logits(group))
        index = bins.encode(action, self.edges, self.outside)
        return -jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]

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
                f"{self.tokens} tokens, but {self.readout} has {x.shape[-2]}; set its number in "
                "model.readouts, or the head's pooling to 'attention'"
            )
        x = self.out(x).astype(jnp.float32)
        return x.reshape(*x.shape[:2], self.horizon, self.action_dim, self.bins)

    def sample(
        self,
        group: TokenGroup,
        dims: jax.Array | None = None,
        context: Context | None = None,
    ) -> jax.Array:
        self.valid(dims)
        logits = self.logits(_last(group))[:, 0]
        if self.temperature:
            key = self.make_rng("noise")
            index = jax.random.categorical(key, logits / self.temperature)
        else:
            index = logits.argmax(axis=-1)
        return bins.decode(index, self.edges)


def build(
    component: Mapping[str, Any], path: str, spec: BatchSpec, *, names: Names, dtype: Any
) -> nn.Module:
    """Return the head of a config's component, for the chunks of the batch spec.

    Two kinds wrap another head, {"head": {...}}:

        {"kind": "per_group", "by": "embodiment" or "task", "groups": {"arms": ("bridge*",)}}
            parameters of its own for each group of names; {}: for each name (`groups`)
        {"kind": "hypernet", "target": "head" or "adapter", ...}
            weights made from the task (`hypernet`)

    Raises ConfigError for an unknown kind or field, and for groups that do not fit the names.
    """
    kind = component.get("kind")
    context: dict[str, Any] = {"dtype": dtype}
    if kind in WRAPPERS:
        fields = dict(component)
        if "head" not in fields:
            raise ConfigError(f"{path} ({kind!r}) lacks 'head': the head that it wraps")
        inner = build(fields.pop("head"), f"{path}.head", spec, names=names, dtype=dtype)
        context["head"] = inner
        if kind == "per_group":
            by, patterns = fields.setdefault("by", "embodiment"), fields.pop("groups", {})
            context["groups"], context["member"] = membership(by, patterns, names, path)
        else:
            context["where"] = path
        return build_component(HEADS, fields, path, **context)
    _, context["horizon"], context["action_dim"] = spec["action"][0]
    if "network" in component:  # so that an error says where the config has it
        where = f"{path}.network"
        denoisers.build(component["network"], where, horizon=context["horizon"], dtype=dtype)
    return build_component(HEADS, component, path, **context)


WRAPPERS = {"per_group": PerGroup, "hypernet": Hypernet}
HEADS = {"diffusion": Diffusion, "flow": Flow, "mse": MSE, "l1": L1, "bins": Bins, **WRAPPERS}


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


def _last(group: TokenGroup) -> TokenGroup:
    """Return the group of the window's last timestep: W = 1."""
    return jax.tree.map(lambda x: x[:, -1:], group)


def _repeat(embedding: jax.Array, samples: int) -> jax.Array:
    return jnp.broadcast_to(embedding[None], (samples, *embedding.shape))


def _flat(action: jax.Array) -> jax.Array:
    return action.reshape(*action.shape[:-2], -1)


def _chunk(x: jax.Array, action_dim: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, action_dim)


def _choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(unknown(field, value, choices))
