"""LoRA: a frozen kernel W [..., in, out] is used as W + scale · A B, of which A and B are trained.

A [in, rank] and B [rank, out] of the kernel 'x/y/kernel' are the parameters 'lora/x/y/kernel/a' and
'…/b'; a convolution's kernel is taken as [height · width · in, out], that of an attention's query
as [in, heads · features]; experts, and heads per group, have an A and a B each. B starts at 0, so
the first step computes what the frozen network computes. The sum is made where the model is
applied, so the model knows nothing of it, and a policy is loaded with the sum in place of parts.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from octolike.config import ConfigError
from octolike.train import optimizer

Params = dict[str, Any]

NAME = "lora"
# Layers whose kernel has one axis of inputs and all others of outputs: [in, heads, features].
SPREADING = ("query", "key", "value")


def kernels(params: Params, patterns: Sequence[str]) -> dict[str, list[str]]:
    """Return {pattern: the kernels that it decides on}; `params` may be abstract.

    They get a low-rank change, those of a pattern that begins with '!' none. Raises
    ConfigError for a pattern that matches nothing that has rows and columns.
    """
    flat = optimizer.flatten(params)
    paths = [k for k, x in flat.items() if x.ndim >= 2 and optimizer.is_kernel(k)]
    return optimizer.decide(paths, patterns, "optim.lora", "kernel")


def init(params: Params, paths: Sequence[str], rank: int, key: jax.Array) -> Params:
    """Return {"lora": …} for the kernels at `paths`; traceable.

    Raises ConfigError where the rank is not smaller than what it is to replace.
    """
    flat, result = optimizer.flatten(params), {}
    for i, path in enumerate(sorted(paths)):
        count, rows, columns = _matrices(path, flat[path].shape)
        if not 1 <= rank < min(rows, columns):
            raise ConfigError(
                f"optim.lora_rank is {rank}; expected 1 to {min(rows, columns) - 1}, as {path} is "
                f"{rows} × {columns}; or leave that one out of optim.lora"
            )
        a = jax.random.normal(jax.random.fold_in(key, i), (*count, rows, rank), jnp.float32)
        result[f"{NAME}/{path}/a"] = a / math.sqrt(rows)
        result[f"{NAME}/{path}/b"] = jnp.zeros((*count, rank, columns), jnp.float32)
    return optimizer.unflatten(result)


def merged(params: Mapping[str, Any], scale: float) -> Params:
    """Return the parameters that the model takes; numpy arrays stay numpy arrays."""
    if NAME not in params:
        return dict(params)
    flat = optimizer.flatten({k: v for k, v in params.items() if k != NAME})
    changes = optimizer.flatten(params[NAME])
    for path in {name.rpartition("/")[0] for name in changes}:
        change = scale * changes[f"{path}/a"] @ changes[f"{path}/b"]
        flat[path] = flat[path] + change.reshape(flat[path].shape).astype(flat[path].dtype)
    return optimizer.unflatten(flat)


def _matrices(path: str, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
    """Return what a kernel is made of: (how many matrices, () for one), rows and columns."""
    *layers, name = path.split("/")
    # experts (in_kernel, out_kernel) and the heads of groups are stacked on a first axis
    several = name != "kernel" or "stacked" in layers
    count, shape = (tuple(shape[:1]), shape[1:]) if several else ((), shape)
    inputs = 1 if layers[-1:] and layers[-1] in SPREADING else len(shape) - 1
    return count, math.prod(shape[:inputs]), math.prod(shape[inputs:])
