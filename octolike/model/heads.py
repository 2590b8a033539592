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
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import freeze

from octolike.config import ConfigError, build_component, option
from octolike.model import bins as binning
from octolike.model import denoisers, diffusion
from octolike.model.groups import PerGroup, membership
from octolike.model.hypernet import Hypernet
from octolike.model.pooling import AttentionPooling
from octolike.model.precision import exact_dense, exact_products
from octolike.types import BatchSpec, Context, Names, Prefix, TokenGroup

POOLINGS = ("mean", "attention")
PREDICTIONS = ("noise", "sample")
SAMPLERS = ("ddpm", "ddim")
LAYOUTS = ("value", "step", "chunk")


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

    def __post_init__(self) -> None:
        if self.prefix and self.prefix >= self.horizon:
            raise ConfigError(
                f"prefix is {self.prefix}; it must be below the chunk's {self.horizon} actions "
                "(data.horizon)"
            )
        super().__post_init__()

    def setup(self) -> None:
        super().setup()
        # float32 whatever the compute type: the network sees noise levels below bfloat16's steps,
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
        embedding = self.embed(_last(group))[:, 0]
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
        return jnp.where(known, _flat(prefix.action), x)

    def guidance_of(
        self, prefix: Prefix | None, valid: jax.Array | None
    ) -> tuple[jax.Array, jax.Array] | None:
        """Return (target, weight), [B, F], of the guidance; None for none."""
        if prefix is None or prefix.weight is None:
            return None
        weight = jnp.repeat(prefix.weight, self.action_dim, axis=-1)
        weight = weight if valid is None else weight * valid
        return jnp.clip(_flat(prefix.action), -self.clip, self.clip), weight

    def draw_prefix(self, shape: tuple[int, ...]) -> jax.Array | None:
        """Return known, bool [*shape, H], of simulated delays 0 to `prefix`; None without."""
        if not self.prefix:
            return None
        key = jax.random.fold_in(self.make_rng("noise"), 1)
        delay = jax.random.randint(key, (*shape, 1), 0, self.prefix + 1)
        return jnp.arange(self.horizon) < delay

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

        x, target: [K, B, W, F]; clean: [B, W, F]; known: bool [K, B, W, H], those actions are given
        clean and have no error, and the others count as much more as makes their mean that of H.
        """
        if known is not None:
            x = jnp.where(jnp.repeat(known, self.action_dim, axis=-1), clean, x)
        embedding = _repeat(embedding, len(time))
        with exact_products():
            out = self.score(embedding, x, time, known, train=self.has_rng("dropout"))
        errors = _chunk((out - target) ** 2, self.action_dim)
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
        x0 = jnp.clip(_flat(action), -self.clip, self.clip)
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
        return _chunk(self.keep_known(x, prefix), self.action_dim)


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
        x1 = jnp.clip(_flat(action), -self.clip, self.clip)
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
        return _chunk(x, self.action_dim)


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
        return _chunk(self.limit * jnp.tanh(x / self.limit), self.action_dim)

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
        logits = self.logits(_last(group))[:, 0]
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


def pooled(group: TokenGroup) -> jax.Array:
    """Return the mean of a group's tokens: [B, W, N, D] to [B, W, D]."""
    return group.tokens.mean(axis=-2)


def masked_losses(errors: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean of errors [B, W, H, A] over the true mask: in total, and per example [B].

    The total weighs every valid action equally. An example without a valid action has the loss 0
    and does not influence the total.
    """
    total = jnp.where(mask, errors, 0).sum(axis=(1, 2, 3))
    count = mask.sum(axis=(1, 2, 3))
    return total.sum() / jnp.maximum(count.sum(), 1), total / jnp.maximum(count, 1)


def _last(group: TokenGroup) -> TokenGroup:
    """Return the group at the window's last timestep, with W = 1."""
    return jax.tree.map(lambda x: x[:, -1:], group)


def _repeat(embedding: jax.Array, samples: int) -> jax.Array:
    return jnp.broadcast_to(embedding[None], (samples, *embedding.shape))


def _flat(action: jax.Array) -> jax.Array:
    return action.reshape(*action.shape[:-2], -1)


def _chunk(x: jax.Array, action_dim: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, action_dim)
