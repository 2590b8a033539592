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
embedding alone. With `repeat_task_tokens`, every timestep shows the embedded task tokens again, as
obs_task_<tokenizer>. "obs" is all observation groups together. A readout that is one of `registers`
stands among the observations in the drawing: they and the readouts look at it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, unknown
from octolike.model import experts, heads, tokenizers, tokens
from octolike.model.groups import membership
from octolike.model.heads import masked_losses
from octolike.model.transformer import Transformer
from octolike.types import BatchSpec, Context, Names, TokenGroup


class EncodedTokens(NamedTuple):
    """What the transformer leaves.

    groups: every TokenGroup by name; readouts are never masked. task: [B, E], the mean token of
    each task tokenizer side by side, or None without one. metrics: of the transformer, its
    "balance_loss" among them where it has experts.
    """

    groups: dict[str, TokenGroup]
    task: jax.Array | None
    metrics: dict[str, jax.Array]


class PolicyNetwork(nn.Module):
    """The policy network; `build_network` makes one from a config.

    Random streams: "params" at init, "noise", and "dropout" in training. Parameters of a tokenizer
    or head are under tokenizers_<name> and heads_<name>. window: timesteps with an embedding.
    """

    tokenizers: dict[str, nn.Module]
    readouts: dict[str, int]
    transformer: nn.Module
    heads: dict[str, nn.Module]
    width: int
    window: int
    repeat_task_tokens: bool = False
    registers: tuple[str, ...] = ()
    dtype: Any = jnp.float32

    def __call__(
        self, batch: Mapping[str, Any], *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return (loss, metrics) of a training batch; images may be uint8, or float in 0 to 255.

        Metrics: loss_per_example [B], and <head>_loss of each head; the loss is their sum, and the
        transformer's balance_loss where it has experts.
        """
        encoded = self._encode(batch["observation"], batch["task"], train=train)
        context = _context(encoded, batch["embodiment"], batch["task"]["task_id"])
        mask = batch["action_mask"] & batch["observation"]["timestep_mask"][..., None, None]
        # A head that noises actions would otherwise let masked ones reach its network.
        action = jnp.where(mask, batch["action"], 0)
        metrics = encoded.metrics | {"loss_per_example": 0.0}
        loss = metrics.get("balance_loss", 0.0)
        for name, head in self.heads.items():
            errors = head(encoded.groups[head.readout], action, context)
            head_loss, per_example = masked_losses(errors, mask)
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
        embodiment: jax.Array | None = None,
    ) -> jax.Array:
        """Return normalised action chunks, float32 [B, H, A], for the last frame of the window.

        dims: bool [B, A], False for action dimensions that an embodiment lacks; None: it has all.
        embodiment: int [B], which robot; None: the first.
        """
        if head not in self.heads:
            raise ValueError(unknown("head", head, self.heads))
        encoded = self._encode(observation, task, train=False)
        first = jnp.zeros(observation["timestep_mask"].shape[0], jnp.int32)
        robot = first if embodiment is None else embodiment
        context = _context(encoded, robot, task["task_id"])
        return self.heads[head].sample(encoded.groups[self.heads[head].readout], dims, context)

    def encode(
        self, observation: Mapping[str, Any], task: Mapping[str, Any], *, train: bool
    ) -> dict[str, TokenGroup]:
        """Return every group as the transformer leaves it, by name; readouts are never masked."""
        return self._encode(observation, task, train=train).groups

    @nn.compact
    def _encode(
        self, observation: Mapping[str, Any], task: Mapping[str, Any], *, train: bool
    ) -> EncodedTokens:
        steps = observation["timestep_mask"]
        if steps.shape[1] > self.window:
            raise ValueError(f"{steps.shape[1]} frames; the model's window is {self.window}")
        groups = tokens.TokenSequence({}, {}, {})
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
        if self.repeat_task_tokens:
            window = steps.shape[1]
            repeat = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], window, *x.shape[1:]))
            for name, group in groups.task.items():
                groups.observation[f"obs_{name}"] = TokenGroup(*map(repeat, group))
        for name, n in self.readouts.items():
            kind = groups.observation if name in self.registers else groups.readout
            kind[f"readout_{name}"] = self._readout(f"readout_{name}", n, steps)
        mask = tokens.attention_mask(groups)
        x, metrics = self.transformer(
            tokens.join(groups), mask, condition, ends=tokens.ends(groups), train=train
        )
        done = tokens.split(x, groups)
        sensed = [g for name, g in done.observation.items() if name.startswith("obs_")]
        seen = [jnp.concatenate(x, axis=axis) for x, axis in zip(zip(*sensed), (-2, -1))]
        all_groups = done.task | done.observation | done.readout | {"obs": TokenGroup(*seen)}
        return EncodedTokens(all_groups, condition, metrics)

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


def build_network(model: Mapping[str, Any], spec: BatchSpec, names: Names) -> PolicyNetwork:
    """Return the network of `dataclasses.asdict(config.model)` for batches of the given spec.

    names: what the batches' integers count. Raises ConfigError for an unknown kind, field, camera
    or readout, with the choices.
    """
    dtype = jnp.dtype(model["dtype"])
    for part in ("tokenizers", "readouts", "heads"):
        if not model[part]:
            raise ConfigError(f"model.{part} is empty; the policy needs at least one")
    made = {
        name: tokenizers.build(c, f"model.tokenizers.{name}", spec, names=names, dtype=dtype)
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
    readouts = _readouts(model, made)
    for name in model["registers"]:
        if name not in model["readouts"]:
            raise ConfigError(unknown("readout in model.registers", name, model["readouts"]))
    finished = {}
    for name, c in model["heads"].items():
        path = f"model.heads.{name}"
        head = finished[name] = heads.build(c, path, spec, names=names, dtype=dtype)
        if head.readout not in readouts:
            raise ConfigError(unknown(f"readout of {path}", head.readout, readouts))
    return PolicyNetwork(
        tokenizers=made,
        readouts=dict(model["readouts"]),
        transformer=Transformer(
            layers=model["layers"],
            attention_heads=model["attention_heads"],
            mlp_width=model["mlp_width"],
            dropout=model["dropout"],
            experts=experts.build(model["experts"]),
            remat=model["remat"],
            dtype=dtype,
        ),
        heads=finished,
        width=model["width"],
        window=max(model["max_window"], spec["action"][0][0]),
        repeat_task_tokens=model["repeat_task_tokens"],
        registers=tuple(model["registers"]),
        dtype=dtype,
    )


class NamedRows(NamedTuple):
    """Whose rows a parameter has on its first axis; a row counts for `gain` times its numbers."""

    names: tuple[str, ...]
    gain: float = 1.0


def named_rows(model: Mapping[str, Any], names: Names) -> dict[str, NamedRows]:
    """Return {pattern of parameter paths: whose rows they have}: robots', tasks' or groups'.

    model: `dataclasses.asdict(config.model)`; names: the run's. A row is to be found by its name,
    for its number changes with what else is in the mix.
    """
    found = {}
    for name, component in model["tokenizers"].items():
        if component.get("kind") == "task_id":
            found[f"tokenizers_{name}/token/kernel"] = NamedRows(
                names.tasks, len(names.tasks) ** 0.5
            )
    for name, component in model["heads"].items():
        if component.get("kind") == "per_group":
            by, patterns = component.get("by", "embodiment"), component.get("groups", {})
            groups, _ = membership(by, patterns, names, f"model.heads.{name}")
            found[f"heads_{name}/stacked/*"] = NamedRows(groups)
    return found


def _context(encoded: EncodedTokens, embodiment: Any, task_id: Any) -> Context:
    # arrays that can index others while a step is traced, wherever they come from
    return Context(encoded.task, jnp.asarray(embodiment), jnp.asarray(task_id))


def _readouts(model: Mapping[str, Any], made: Mapping[str, nn.Module]) -> list[str]:
    """Return the groups that a head may read: those that belong to timesteps."""
    seen = [f"obs_{name}" for name, t in made.items() if t.place == "observation"]
    return [*(f"readout_{name}" for name in model["readouts"]), *seen, "obs"]
