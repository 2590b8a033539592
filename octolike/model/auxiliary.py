"""Auxiliary heads: readout tokens to the prediction of a label, in training and validation only.

    readout ─┬─ action head ─── action chunk
             └─ auxiliary head ─ label            or on a readout of its own

An auxiliary head teaches the network what the actions alone show slowly, such as the place that a
motion leads to. It has no part in acting: the policy calls action heads only, and no token attends
to a readout. Its weighted loss is added to the loss, so it can stand next to any action head.

    head(group, batch)    group: the readout's TokenGroup, tokens [B, W, N, D]
                          batch: with the labels that `reads()` lists
                          → ({"loss": [B, W], other measure: [B, W]}, labelled: bool [B, W])

Steps without a label have no influence, nor have those without a valid action.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, build_component, option
from octolike.model.head import POOLINGS, pooled
from octolike.model.pooling import AttentionPooling
from octolike.model.precision import exact_dense
from octolike.types import BatchSpec, TokenGroup


class ClosingPosition(nn.Module):
    """Predicts the position of the gripper at its next closing, relative to its present one.

    The loss is the absolute error, summed over x, y and z, in units of `scale`; the measure
    "metres" is the distance between the predicted and the true position. Labels: data.closings.
    """

    readout: str = option("readout_action", "token group that the head reads")
    weight: float = option(0.1, "factor of its loss in the sum of losses", low=0)
    hidden: int = option(128, "width of the hidden layer; 0: a linear map", low=0)
    scale: float = option(0.1, "metres that count as 1 in the loss", low=1e-3)
    pooling: str = option(
        "mean", "'mean' of the tokens, or 'attention': a learned probe", choices=POOLINGS
    )
    pooling_heads: int = option(8, "attention heads of the pooling; divide the width", low=1)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")

    def reads(self) -> tuple[str, ...]:
        return ("closing.position", "closing.mask")

    def setup(self) -> None:
        if self.pooling == "attention":
            self.pool = AttentionPooling(1, self.pooling_heads, dtype=self.dtype)
        if self.hidden:
            self.middle = nn.Dense(self.hidden, dtype=self.dtype)
        self.out = exact_dense(3)

    def __call__(
        self, group: TokenGroup, batch: Mapping[str, Any]
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Return ({"loss", "metres"}: [B, W], labelled: bool [B, W])."""
        difference = self.predict(group) - batch["closing"]["position"]
        # The root has no gradient at 0, and nothing minimises it.
        metres = jnp.linalg.norm(jax.lax.stop_gradient(difference), axis=-1)
        loss = jnp.abs(difference).sum(axis=-1) / self.scale
        return {"loss": loss, "metres": metres}, batch["closing"]["mask"]

    def predict(self, group: TokenGroup) -> jax.Array:
        """Return the position in metres, float32 [B, W, 3]."""
        x = self.pool(*group)[..., 0, :] if self.pooling == "attention" else pooled(group)
        if self.hidden:
            x = nn.swish(self.middle(x))
        return self.scale * self.out(x.astype(jnp.float32))


AUXILIARY = {"closing_position": ClosingPosition}


def build(component: Mapping[str, Any], path: str, spec: BatchSpec, *, dtype: Any) -> nn.Module:
    """Return the auxiliary head of a config's component.

    Raises ConfigError for an unknown kind or field, and for a label that the spec lacks.
    """
    head = build_component(AUXILIARY, component, path, dtype=dtype)
    for key in head.reads():
        if key not in spec:
            remedy = "set data.closings, or " if key.startswith("closing.") else ""
            raise ConfigError(
                f"{path} reads the label {key!r}, which the data do not have; {remedy}remove the "
                "head"
            )
    return head


def masked_means(
    name: str, errors: Mapping[str, jax.Array], labelled: jax.Array, steps: jax.Array
) -> dict[str, jax.Array]:
    """Return {"<name>/<measure>": mean over the labelled steps, 0 without any}.

    And <name>/labelled, the share of the steps with a label. errors: {measure: [B, W]}; labelled:
    bool [B, W]; steps: bool [B, W], those with a valid action.
    """
    mask = labelled & steps
    count = mask.sum()
    means = {
        f"{name}/{measure}": jnp.where(mask, x, 0).sum() / jnp.maximum(count, 1)
        for measure, x in errors.items()
    }
    return means | {f"{name}/labelled": count / jnp.maximum(steps.sum(), 1)}
