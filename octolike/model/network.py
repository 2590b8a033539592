"""The policy network: tokenize, attend, read out, predict actions.

    instruction ─ tokenizer ─┐
    goal image  ─ tokenizer ─┤   ┌─────────────┐            ┌─ head ─ loss / action chunk
    cameras     ─ tokenizer ─┼───┤ transformer ├─ readouts ─┤
    proprio     ─ tokenizer ─┤   └─────────────┘            └─ head ─ ...
    learned       readouts  ─┘

In training, auxiliary heads (`auxiliary.py`) read readouts as well, to predict labels.

The token sequence and its attention mask: rows are queries, columns keys (`tokens.py` states the
rule):

                          task    t=0: cameras proprio readout    t=1: cameras proprio readout
    task                   ■              ·       ·       ·               ·       ·       ·
    t=0  cameras proprio   ■              ■       ■       ·               ·       ·       ·
         readout           ■              ■       ■       ■               ·       ·       ·
    t=1  cameras proprio   ■              ■       ■       ·               ■       ■       ·
         readout           ■              ■       ■       ■               ■       ■       ■

The groups are named task_<tokenizer>, obs_<tokenizer> and readout_<readout>, in the order of the
config. Each has a projection to the token width and a learned position embedding; a readout is its
position embedding alone. With `repeat_task_tokens`, every timestep also contains the embedded task
tokens, as obs_task_<tokenizer>. "obs" is the concatenation of all observation groups. A readout in
`registers` counts as an observation in the drawing: observations and readouts attend to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, unknown
from octolike.model import auxiliary as auxiliaries
from octolike.model import experts, heads, precision, remat, tokenizers, tokens
from octolike.model.groups import PerGroup, membership
from octolike.model.heads import masked_losses
from octolike.model.transformer import Transformer
from octolike.types import BatchSpec, Context, Names, Prefix, TokenGroup

# Metrics of terms of the loss that belong to the whole batch, not to single examples.
SHARED_LOSSES = ("balance_loss", "subtask_loss", "auxiliary_loss")


class EncodedTokens(NamedTuple):
    """The output of the transformer.

    groups: the requested TokenGroups by name; readouts are never masked. task: [B, E], the
    concatenated mean tokens of all task tokenizers, or the vectors of those at the place
    "condition", or None without either. metrics: those of the transformer, including its
    "balance_loss" if it has experts, and of a subtask tokenizer, including "subtask_loss".
    """

    groups: dict[str, TokenGroup]
    task: jax.Array | None
    metrics: dict[str, jax.Array]


class Readout(NamedTuple):
    """The input of a head for one observation: a TokenGroup [B, 1, N, D] and the Context."""

    group: TokenGroup
    context: Context


class PolicyNetwork(nn.Module):
    """The policy network; `build_network` builds it from a config.

    Random streams: "params" at initialisation, "noise", and "dropout" in training. The parameters
    of tokenizers, heads and auxiliary heads are under tokenizers_<name>, heads_<name> and
    auxiliary_<name>. window: the maximum number of timesteps.
    """

    tokenizers: dict[str, nn.Module]
    readouts: dict[str, int]
    transformer: nn.Module
    heads: dict[str, nn.Module]
    width: int
    window: int
    repeat_task_tokens: bool = False
    registers: tuple[str, ...] = ()
    remat: str = "none"
    auxiliary: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    dtype: Any = jnp.float32

    def __call__(
        self, batch: Mapping[str, Any], *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return (loss, metrics) of a batch; images are uint8, or float in [0, 255].

        Metrics: loss_per_example [B], and <head>_loss of each head. The loss is their sum, plus
        those of SHARED_LOSSES: the transformer's balance_loss if it has experts, the subtask_loss
        of a subtask tokenizer, and auxiliary_loss, the weighted sum of <name>/loss of auxiliary
        heads, which also have their other measures (`auxiliary.masked_means`).
        """
        with precision.products_of(self.dtype):
            return self._loss(batch, train)

    def _loss(
        self, batch: Mapping[str, Any], train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        reads = {head.readout for head in (*self.heads.values(), *self.auxiliary.values())}
        encoded = self._encode(batch["observation"], batch["task"], train=train, reads=reads)
        context = _context(encoded, batch["embodiment"], batch["task"]["task_id"])
        mask = batch["action_mask"] & batch["observation"]["timestep_mask"][..., None, None]
        # Otherwise masked actions would reach the networks of denoising heads.
        action = jnp.where(mask, batch["action"], 0)
        metrics: dict[str, Any] = encoded.metrics | {"loss_per_example": 0.0}
        if self.auxiliary:
            metrics |= self._auxiliary_metrics(encoded, batch, mask.any(axis=(2, 3)))
        loss = sum(metrics.get(name, 0.0) for name in SHARED_LOSSES)
        for name, head in self.heads.items():
            errors = head(encoded.groups[head.readout], action, context)
            head_loss, per_example = masked_losses(errors, mask)
            loss += head_loss
            metrics[f"{name}_loss"] = head_loss
            metrics["loss_per_example"] += per_example
        return loss, metrics

    def _auxiliary_metrics(
        self, encoded: EncodedTokens, batch: Mapping[str, Any], steps: jax.Array
    ) -> dict[str, jax.Array]:
        """Return the metrics of all auxiliary heads; steps: bool [B, W], with a valid action."""
        metrics: dict[str, jax.Array] = {}
        total = jnp.zeros(())
        for name, head in self.auxiliary.items():
            errors, labelled = head(encoded.groups[head.readout], batch)
            metrics |= auxiliaries.masked_means(name, errors, labelled, steps)
            total += head.weight * metrics[f"{name}/loss"]
        return metrics | {"auxiliary_loss": total}

    def sample_actions(
        self,
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        *,
        head: str = "action",
        dims: jax.Array | None = None,
        embodiment: jax.Array | None = None,
    ) -> jax.Array:
        """Return normalised action chunks, float32 [B, H, A], for the last timestep of the window.

        dims: bool [B, A], False for action dimensions that the embodiment lacks; None: all True.
        embodiment: int [B], index into the run's embodiments; None: 0.
        """
        readout = self.read_out(observation, task, head=head, embodiment=embodiment)
        return self.decode(readout, head=head, dims=dims)

    def read_out(
        self,
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        *,
        head: str = "action",
        embodiment: jax.Array | None = None,
    ) -> Readout:
        """Return the input of a head for the last timestep: all that depends on the observation."""
        if head not in self.heads:
            raise ValueError(unknown("head", head, self.heads))
        reads = {self.heads[head].readout}
        with precision.products_of(self.dtype):
            encoded = self._encode(observation, task, train=False, reads=reads)
        if embodiment is None:
            embodiment = jnp.zeros(observation["timestep_mask"].shape[0], jnp.int32)
        group = jax.tree.map(lambda x: x[:, -1:], encoded.groups[self.heads[head].readout])
        return Readout(group, _context(encoded, embodiment, task["task_id"]))

    def decode(
        self,
        readout: Readout,
        *,
        head: str = "action",
        dims: jax.Array | None = None,
        noise: dict[str, jax.Array] | None = None,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        """Return normalised action chunks, float32 [B, H, A], of a head alone.

        noise: noise of `draw`, by default from the stream "noise"; prefix: for real-time chunking.
        """
        options = {"noise": noise, "prefix": prefix}
        options = {name: value for name, value in options.items() if value}
        with precision.products_of(self.dtype):
            return self.heads[head].sample(readout.group, dims, readout.context, **options)

    def draw(self, *, head: str = "action") -> dict[str, jax.Array]:
        """Return a head's noise for one chunk from the stream "noise"; it needs no parameters."""
        draw = getattr(self.heads[head], "draw", None)  # heads of plug-ins may not have it
        return jax.tree.map(lambda x: x[0], draw(1)) if draw else {}

    def encode(
        self, observation: Mapping[str, Any], task: Mapping[str, Any], *, train: bool
    ) -> dict[str, TokenGroup]:
        """Return the transformer's output groups by name; readouts are never masked."""
        with precision.products_of(self.dtype):
            return self._encode(observation, task, train=train).groups

    @nn.compact
    def _encode(
        self,
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        *,
        train: bool,
        reads: Collection[str] | None = None,
    ) -> EncodedTokens:
        """Encode; reads: the groups to return, a saving in the last block; None: all."""
        window = observation["timestep_mask"].shape[1]
        if window > self.window:
            raise ValueError(f"{window} frames; the model's window is {self.window}")
        sequence, condition, reading = self._tokenize(observation, task, train)
        positions = None if reads is None else tokens.positions(sequence, reads)
        x_BxnxD, metrics = self.transformer(
            tokens.join(sequence),
            tokens.attention_mask(sequence),
            condition,
            read=positions,
            train=train,
        )
        metrics |= reading
        if reads is not None and positions is not None:
            groups = tokens.split_read(x_BxnxD, sequence, reads)
            return EncodedTokens(groups, condition, metrics)
        output = tokens.split(x_BxnxD, sequence)
        observed = [g for name, g in output.observation.items() if name.startswith("obs_")]
        obs = TokenGroup(
            jnp.concatenate([g.tokens for g in observed], axis=-2),
            jnp.concatenate([g.mask for g in observed], axis=-1),
        )
        groups = output.task | output.observation | output.readout | {"obs": obs}
        return EncodedTokens(groups, condition, metrics)

    def _tokenize(
        self, observation: Mapping[str, Any], task: Mapping[str, Any], train: bool
    ) -> tuple[tokens.TokenSequence, jax.Array | None, dict[str, jax.Array]]:
        """Return (the embedded groups, the task's condition [B, E] or None, metrics)."""
        steps = observation["timestep_mask"]
        sequence = tokens.TokenSequence({}, {}, {})
        vectors: list[jax.Array] = []
        metrics: dict[str, jax.Array] = {}
        for name, tokenizer in self.tokenizers.items():
            if tokenizer.place == "task":
                sequence.task[f"task_{name}"] = tokenizer(observation, task)
            elif tokenizer.place == "condition":
                vectors.append(tokenizer(observation, task))
            elif tokenizer.place == "subtask":
                (x, mask), metrics = tokenizer(observation, task, train=train)
                sequence.observation[f"obs_{name}"] = TokenGroup(x, mask & steps[..., None])
        vectors = vectors or [tokenizers.masked_mean(*group) for group in sequence.task.values()]
        condition = jnp.concatenate(vectors, axis=-1) if vectors else None
        per_step = _per_step(condition, sequence.observation.values(), steps.shape[1])
        tokenize = remat.checkpoint(_call, self.remat)
        for name, tokenizer in self.tokenizers.items():
            if tokenizer.place == "observation":
                x, mask = tokenize(tokenizer, observation, task, per_step)
                sequence.observation[f"obs_{name}"] = TokenGroup(x, mask & steps[..., None])
        for groups in (sequence.task, sequence.observation):
            groups.update({name: self._embed(name, group) for name, group in groups.items()})
        if self.repeat_task_tokens:
            for name, group in sequence.task.items():
                sequence.observation[f"obs_{name}"] = _repeat(group, steps.shape[1])
        for name, n in self.readouts.items():
            groups = sequence.observation if name in self.registers else sequence.readout
            groups[f"readout_{name}"] = self._readout(f"readout_{name}", n, steps)
        return sequence, condition, metrics

    def _embed(self, name: str, group: TokenGroup) -> TokenGroup:
        x = nn.Dense(self.width, dtype=self.dtype, name=f"{name}_projection")(group.tokens)
        window = None if x.ndim == 3 else x.shape[1]
        return TokenGroup(x + self._positions(name, x.shape[-2], window), group.mask)

    def _readout(self, name: str, n: int, steps: jax.Array) -> TokenGroup:
        x = self._positions(name, n, steps.shape[1])
        x = jnp.broadcast_to(x, (steps.shape[0], *x.shape[1:]))
        return TokenGroup(x, jnp.ones(x.shape[:-1], bool))

    def _positions(self, name: str, n: int, window: int | None) -> jax.Array:
        """Return [1, n, D] for a task group (window None), else [1, W, n, D], the first W steps."""
        shape = (1, n, self.width) if window is None else (1, self.window, n, self.width)
        x = self.param(f"{name}_pos_embedding", nn.initializers.normal(0.02), shape, jnp.float32)
        return (x if window is None else x[:, :window]).astype(self.dtype)


def _per_step(
    task: jax.Array | None, subtask: Iterable[TokenGroup], window: int
) -> jax.Array | None:
    """Return the conditioning of each step [B, W, E]: pooled task and subtask tokens."""
    means = [tokenizers.masked_mean(*group) for group in subtask]
    if task is not None:
        means.insert(0, jnp.repeat(task[:, None], window, axis=1))
    return jnp.concatenate(means, axis=-1) if means else None


def _call(module: nn.Module, *inputs: Any) -> TokenGroup:
    return module(*inputs)


def _repeat(group: TokenGroup, window: int) -> TokenGroup:
    """Return a task group [B, N, ...] repeated for every timestep, [B, W, N, ...]."""
    return TokenGroup(
        *(jnp.broadcast_to(x[:, None], (x.shape[0], window, *x.shape[1:])) for x in group)
    )


def _context(encoded: EncodedTokens, embodiment: Any, task_id: Any) -> Context:
    # jax arrays, so that heads may index them while a step is traced
    return Context(encoded.task, jnp.asarray(embodiment), jnp.asarray(task_id))


def build_network(model: Mapping[str, Any], spec: BatchSpec, names: Names) -> PolicyNetwork:
    """Return the network of `dataclasses.asdict(config.model)` for batches of the given spec.

    names: the run's datasets, embodiments and tasks. Raises ConfigError for an unknown kind, field,
    camera or readout, with the choices.
    """
    dtype = jnp.dtype(model["dtype"])
    for part in ("tokenizers", "heads"):  # heads may read observations instead of a readout
        if not model[part]:
            raise ConfigError(f"model.{part} is empty; the policy needs at least one")
    network_tokenizers = {
        name: tokenizers.build(c, f"model.tokenizers.{name}", spec, names=names, dtype=dtype)
        for name, c in model["tokenizers"].items()
    }
    _check_tokenizers(network_tokenizers)
    for name in model["registers"]:
        if name not in model["readouts"]:
            raise ConfigError(unknown("readout in model.registers", name, model["readouts"]))
    network_heads = {
        name: heads.build(c, f"model.heads.{name}", spec, names=names, dtype=dtype)
        for name, c in model["heads"].items()
    }
    groups = _timestep_groups(model["readouts"], network_tokenizers)
    for name, head in network_heads.items():
        if head.readout not in groups:
            raise ConfigError(unknown(f"readout of model.heads.{name}", head.readout, groups))
    network_auxiliary = {
        name: auxiliaries.build(c, f"model.auxiliary.{name}", spec, dtype=dtype)
        for name, c in model["auxiliary"].items()
    }
    for name, head in network_auxiliary.items():
        if head.readout not in groups:
            raise ConfigError(unknown(f"readout of model.auxiliary.{name}", head.readout, groups))
    return PolicyNetwork(
        tokenizers=network_tokenizers,
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
        heads=network_heads,
        width=model["width"],
        window=max(model["max_window"], spec["action"][0][0]),
        repeat_task_tokens=model["repeat_task_tokens"],
        registers=tuple(model["registers"]),
        remat=model["remat"],
        auxiliary=network_auxiliary,
        dtype=dtype,
    )


def _check_tokenizers(network_tokenizers: Mapping[str, nn.Module]) -> None:
    places = [t.place for t in network_tokenizers.values()]
    if "observation" not in places:
        raise ConfigError("model.tokenizers: none reads the observation; add an 'image' one")
    for name, tokenizer in network_tokenizers.items():
        if getattr(tokenizer, "film", False) and not {*places} - {"observation"}:
            raise ConfigError(
                f"model.tokenizers.{name}.film needs a tokenizer of the task; add a 'language' one"
            )
    if places.count("subtask") > 1:
        raise ConfigError("model.tokenizers: several are of the kind 'subtask'; keep one of them")


def _timestep_groups(
    readouts: Mapping[str, int], network_tokenizers: Mapping[str, nn.Module]
) -> list[str]:
    """Return the names of the groups that a head may read: those with a time axis."""
    places = ("observation", "subtask")
    observed = [f"obs_{n}" for n, t in network_tokenizers.items() if t.place in places]
    return [*(f"readout_{name}" for name in readouts), *observed, "obs"]


class NamedRows(NamedTuple):
    """The names of a parameter's rows (first axis), and the factor `gain` of their values."""

    names: tuple[str, ...]
    gain: float = 1.0


def named_rows(model: Mapping[str, Any], names: Names) -> dict[str, NamedRows]:
    """Return {pattern of parameter paths: NamedRows} for rows per robot, task or group.

    model: `dataclasses.asdict(config.model)`; names: the run's. Finetuning matches such rows by
    name, because their order depends on the datasets of the run.
    """
    rows = {}
    for name, component in model["tokenizers"].items():
        if component.get("kind") == "task_id":
            gain = len(names.tasks) ** 0.5
            rows[f"tokenizers_{name}/token/kernel"] = NamedRows(names.tasks, gain)
    for name, component in model["heads"].items():
        if component.get("kind") == "per_group":
            by = component.get("by", PerGroup.by)
            patterns = component.get("groups", PerGroup.groups)
            groups, _ = membership(by, patterns, names, f"model.heads.{name}")
            rows[f"heads_{name}/stacked/*"] = NamedRows(groups)
    return rows
