"""The model on one screen: tokenize → attend → read out → heads.

    instruction ─ tokenizer ─┐
    goal image  ─ tokenizer ─┤   ┌─────────────┐            ┌─ head ─ loss / action chunk
    cameras     ─ tokenizer ─┼───┤ transformer ├─ readouts ─┤
    proprio     ─ tokenizer ─┤   └─────────────┘            └─ head ─ ...
    learned       readouts  ─┘

The sequence, and who looks at whom (rows at columns; `tokens.py` has the rule):

                          task    t=0: cameras proprio readout    t=1: cameras proprio readout
    task                   ■              ·       ·       ·               ·       ·       ·
    t=0  cameras proprio   ■              ■       ■       ·               ·       ·       ·
         readout           ■              ■       ■       ■               ·       ·       ·
    t=1  cameras proprio   ■              ■       ■       ·               ■       ■       ·
         readout           ■              ■       ■       ■               ■       ■       ■

The groups are named task_<tokenizer>, obs_<tokenizer> and readout_<readout>, in the order of the
config. Each has a projection to the token width and a learned position embedding; a readout is its
embedding alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, build_component, unknown
from octolike.model import tokenizers, tokens
from octolike.model.heads import HEADS, masked_losses
from octolike.model.transformer import Transformer
from octolike.types import BatchSpec, TokenGroup


class Octo(nn.Module):
    """The policy network; `build` makes one from a config.

    Random streams: "params" at init, "noise", and "dropout" in training. Parameters of a tokenizer
    or head are under tokenizers_<name> and heads_<name>.
    """

    tokenizers: dict[str, nn.Module]
    readouts: dict[str, int]
    transformer: nn.Module
    heads: dict[str, nn.Module]
    width: int
    window: int
    dtype: Any = jnp.float32

    def __call__(
        self, batch: Mapping[str, Any], *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return (loss, metrics) of a training batch; images may be uint8, or float in 0 to 255.

        Metrics: loss_per_example [B], and <head>_loss of each head; the loss is their sum.
        """
        groups = self.encode(batch["observation"], batch["task"], train=train)
        mask = batch["action_mask"] & batch["observation"]["timestep_mask"][..., None, None]
        # A head that noises actions would otherwise let masked ones reach its network.
        action = jnp.where(mask, batch["action"], 0)
        loss, metrics = 0.0, {"loss_per_example": 0.0}
        for name, head in self.heads.items():
            head_loss, per_example = masked_losses(head(groups[head.readout], action), mask)
            loss += head_loss
            metrics[f"{name}_loss"] = head_loss
            metrics["loss_per_example"] += per_example
        return loss, metrics

    def sample_actions(
        self,
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        *,
        head: str = "action",
        dims: jax.Array | None = None,
    ) -> jax.Array:
        """Return normalised action chunks, float32 [B, H, A], for the last frame of the window.

        dims: bool [B, A], False for action dimensions that an embodiment lacks; None: it has all.
        """
        if head not in self.heads:
            raise ValueError(unknown("head", head, self.heads))
        groups = self.encode(observation, task, train=False)
        return self.heads[head].sample(groups[self.heads[head].readout], dims)

    @nn.compact
    def encode(
        self, observation: Mapping[str, Any], task: Mapping[str, Any], *, train: bool
    ) -> dict[str, TokenGroup]:
        """Return every group as the transformer leaves it, by name; readouts are never masked."""
        steps = observation["timestep_mask"]
        if steps.shape[1] > self.window:
            raise ValueError(f"{steps.shape[1]} frames; the model's window is {self.window}")
        groups = tokens.Groups({}, {}, {})
        for name, tokenizer in self.tokenizers.items():
            if tokenizer.place == "task":
                groups.task[f"task_{name}"] = tokenizer(observation, task)
        means = [tokenizers.masked_mean(*group) for group in groups.task.values()]
        condition = jnp.concatenate(means, axis=-1) if means else None
        for name, tokenizer in self.tokenizers.items():
            if tokenizer.place == "observation":
                x, mask = tokenizer(observation, task, condition)
                groups.observation[f"obs_{name}"] = TokenGroup(x, mask & steps[..., None])
        for kind in (groups.task, groups.observation):
            kind.update({name: self._embed(name, group) for name, group in kind.items()})
        for name, n in self.readouts.items():
            groups.readout[f"readout_{name}"] = self._readout(f"readout_{name}", n, steps)
        x = self.transformer(tokens.join(groups), tokens.attention_mask(groups), train=train)
        done = tokens.split(x, groups)
        return done.task | done.observation | done.readout

    def _embed(self, name: str, group: TokenGroup) -> TokenGroup:
        x = nn.Dense(self.width, dtype=self.dtype, name=f"{name}_projection")(group.tokens)
        window = None if x.ndim == 3 else x.shape[1]
        return TokenGroup(x + self._positions(name, x.shape[-2], window), group.mask)

    def _readout(self, name: str, n: int, steps: jax.Array) -> TokenGroup:
        x = self._positions(name, n, steps.shape[1])
        x = jnp.broadcast_to(x, (steps.shape[0], *x.shape[1:]))
        return TokenGroup(x, jnp.ones(x.shape[:-1], bool))

    def _positions(self, name: str, n: int, window: int | None) -> jax.Array:
        """Return [1, n, D] for a task group, else [1, W, n, D]: the first W of those trained."""
        shape = (1, n, self.width) if window is None else (1, self.window, n, self.width)
        x = self.param(f"{name}_pos_embedding", nn.initializers.normal(0.02), shape, jnp.float32)
        return (x if window is None else x[:, :window]).astype(self.dtype)


def build(model: Mapping[str, Any], spec: BatchSpec) -> Octo:
    """Return the network of `dataclasses.asdict(config.model)` for batches of the given spec.

    Raises ConfigError for an unknown kind, field, camera or readout, with the choices.
    """
    window, horizon, action_dim = spec["action"][0]
    dtype = jnp.dtype(model["dtype"])
    for part in ("tokenizers", "readouts", "heads"):
        if not model[part]:
            raise ConfigError(f"model.{part} is empty; the policy needs at least one")
    made = {
        name: tokenizers.build(c, f"model.tokenizers.{name}", spec, dtype=dtype)
        for name, c in model["tokenizers"].items()
    }
    places = [t.place for t in made.values()]
    if "observation" not in places:
        raise ConfigError("model.tokenizers: none reads the observation; add an 'image' one")
    for name, tokenizer in made.items():
        if getattr(tokenizer, "film", False) and "task" not in places:
            raise ConfigError(
                f"model.tokenizers.{name}.film needs a tokenizer of the task; add a 'language' one"
            )
    heads = {}
    for name, c in model["heads"].items():
        sizes = {"horizon": horizon, "action_dim": action_dim, "dtype": dtype}
        heads[name] = build_component(HEADS, c, f"model.heads.{name}", **sizes)
        readout, readouts = heads[name].readout, [f"readout_{r}" for r in model["readouts"]]
        if readout not in readouts:
            raise ConfigError(unknown(f"readout of model.heads.{name}", readout, readouts))
    return Octo(
        tokenizers=made,
        readouts=dict(model["readouts"]),
        transformer=Transformer(
            layers=model["layers"],
            attention_heads=model["attention_heads"],
            mlp_width=model["mlp_width"],
            dropout=model["dropout"],
            dtype=dtype,
        ),
        heads=heads,
        width=model["width"],
        window=window,
        dtype=dtype,
    )
