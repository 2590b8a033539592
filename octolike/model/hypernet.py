"""A head with task-dependent weights: a hypernetwork over the pooled task tokens.

    task [B, E] ─ norm ─ dense ─ swish ─ z ─┬─ per kernel: u(z) · v(z), of low rank
                                            └─ per bias and small kernel: the full change

target "head": the weights of an example are the shared weights + that change. target "adapter": the
head is shared, and the task generates a bottleneck in front of it: token + swish(token · u(z)) ·
v(z). v and the changes are initialised to zero, so training starts with a shared head.

In training each example has its own weights, B times the parameters of the head: "head" is for
small heads. In inference they are generated once per chunk, not once per denoising step.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, option
from octolike.model.groups import inner_draw, inner_init
from octolike.model.head import WrappedHead
from octolike.types import Context, TokenGroup

TARGETS = ("head", "adapter")


class Hypernet(WrappedHead):
    """The inner head with weights, or an adapter in front of it, generated from the task."""

    target: str = option("head", "generate weights, or an adapter", choices=TARGETS)
    rank: int = option(
        4, "rank of a kernel's change (0: full rank), or width of the adapter", low=0
    )
    hidden: int = option(64, "width of the task code z", low=1)
    where: str = option("model.heads", "the head's place in the config, for errors")
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")

    def __post_init__(self) -> None:
        if self.target == "adapter" and self.rank < 1:
            raise ConfigError(
                f"{self.where}.rank is {self.rank}; an adapter needs a rank of at least 1"
            )
        super().__post_init__()

    def draw(self, batch: int) -> dict[str, jax.Array]:
        return self.head.draw(batch) if self.target == "adapter" else inner_draw(self, batch)

    @nn.compact
    def _run(
        self,
        method: str,
        group: TokenGroup,
        values: jax.Array | None,
        context: Context,
        **options: Any,
    ) -> jax.Array:
        z = self._code(context)
        if self.target == "adapter":
            return getattr(self.head, method)(self._adapt(group, z), values, context, **options)
        head = self.head.clone(parent=None, name=None)  # a function of parameters, owning none
        base = self.param("base", inner_init, head, group, context)
        names = [name for name in ("noise", "dropout") if self.has_rng(name)]
        keys = {name: jax.random.split(self.make_rng(name), len(z)) for name in names}
        changes = flax.traverse_util.flatten_dict(base, sep="_")
        changes = {name: self._change(name, z, leaf.shape) for name, leaf in changes.items()}
        paths = flax.traverse_util.flatten_dict(base)
        changes = dict(zip(paths, changes.values(), strict=True))
        params = jax.tree.map(jnp.add, base, flax.traverse_util.unflatten_dict(changes))

        def run(params: Any, inputs: Any, rngs: dict[str, jax.Array]) -> jax.Array:
            *inputs, head_options = jax.tree.map(lambda x: x[None], inputs)
            return head.apply(
                {"params": params}, *inputs, **head_options, rngs=rngs, method=method
            )[0]

        return jax.vmap(run)(params, (group, values, context, options), keys)

    def _code(self, context: Context) -> jax.Array:
        if context is None or context.task is None:
            raise ConfigError(
                f"{self.where} generates weights from the task, but the model has no tokenizer of "
                "the task; add one, e.g. 'language'"
            )
        z = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="task_norm")(context.task)
        return nn.swish(nn.Dense(self.hidden, dtype=self.dtype, name="task_in")(z))

    def _adapt(self, group: TokenGroup, z: jax.Array) -> TokenGroup:
        width = group.tokens.shape[-1]
        down = self._generate("adapter_u", z, (width, self.rank))
        up = self._generate("adapter_v", z, (self.rank, width), zero=True)
        h = nn.swish(jnp.einsum("bwnd,bdr->bwnr", group.tokens.astype(jnp.float32), down))
        change = jnp.einsum("bwnr,brd->bwnd", h, up)
        return TokenGroup(group.tokens + change.astype(group.tokens.dtype), group.mask)

    def _change(self, name: str, z: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Return a parameter's change [B, *shape], of low rank if that needs fewer numbers."""
        m, n = shape[0], math.prod(shape[1:])
        if not 0 < self.rank * (m + n) < m * n:
            return self._generate(f"{name}_change", z, shape, zero=True)
        u = self._generate(f"{name}_u", z, (m, self.rank))
        v = self._generate(f"{name}_v", z, (self.rank, n), zero=True)
        return jnp.einsum("bmr,brn->bmn", u, v).reshape(-1, *shape)

    def _generate(
        self, name: str, z: jax.Array, shape: tuple[int, ...], zero: bool = False
    ) -> jax.Array:
        """Return float32 [B, *shape], linear in z; zero: initialised to zero."""
        # By default the output has the scale of a dense layer's kernel over shape[0] inputs.
        scale = nn.initializers.variance_scaling(1 / shape[0], "fan_in", "normal")
        init = nn.initializers.zeros if zero else scale
        out = nn.Dense(math.prod(shape), dtype=self.dtype, kernel_init=init, name=name)(z)
        return out.astype(jnp.float32).reshape(-1, *shape)
