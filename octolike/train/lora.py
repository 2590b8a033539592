"""LoRA: a frozen kernel W [..., in, out] becomes W + scale · A B; only A and B are trained.

A [in, rank] and B [rank, out] of the kernel 'x/y/kernel' are the parameters 'lora/x/y/kernel/a' and
'…/b'. A convolution kernel is reshaped to [height · width · in, out], an attention query to
[in, heads · features]; each expert, and each head per group, has its own A and B. B starts at 0, so
the first step computes the same as the frozen network. The sum is computed outside the model, and
a policy is loaded with the sum.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from octolike.config import ConfigError
from octolike.model.precision import exact_products
from octolike.train import optimizer

Params = dict[str, Any]

NAME = "lora"
# Layers with kernels [in, heads, features]: one input axis, all other axes are outputs.
MULTI_HEAD = ("query", "key", "value")


def match_kernels(params: Params, patterns: Sequence[str]) -> dict[str, list[str]]:
    """Return {pattern: its kernels} (`optimizer.assign_paths`); `params` may be abstract.

    Kernels get LoRA, except those of patterns that begin with '!'.

    Raises:
        ConfigError: a pattern that matches no kernel with rows and columns.
    """
    flat = optimizer.flatten(params)
    paths = [k for k, x in flat.items() if x.ndim >= 2 and optimizer.is_kernel(k)]
    return optimizer.assign_paths(paths, patterns, "optim.lora", "kernel")


def init(params: Params, paths: Sequence[str], rank: int, key: jax.Array) -> Params:
    """Return {"lora": …} for the kernels at `paths`; traceable.

    Raises:
        ConfigError: a rank that is not below the number of rows and of columns of a kernel.
    """
    flat, result = optimizer.flatten(params), {}
    for i, path in enumerate(sorted(paths)):
        stack, rows, columns = _matrices(path, flat[path].shape)
        if not 1 <= rank < min(rows, columns):
            raise ConfigError(
                f"optim.lora_rank is {rank}; expected 1 to {min(rows, columns) - 1}, as {path} is "
                f"{rows} × {columns}; or exclude that kernel from optim.lora"
            )
        a = jax.random.normal(jax.random.fold_in(key, i), (*stack, rows, rank), jnp.float32)
        result[f"{NAME}/{path}/a"] = a / math.sqrt(rows)
        result[f"{NAME}/{path}/b"] = jnp.zeros((*stack, rank, columns), jnp.float32)
    return optimizer.unflatten(result)


def merge(params: Mapping[str, Any], scale: float) -> Params:
    """Return the model's parameters, with A B added; numpy arrays stay numpy arrays."""
    if NAME not in params:
        return dict(params)
    flat = optimizer.flatten({k: v for k, v in params.items() if k != NAME})
    changes = optimizer.flatten(params[NAME])
    for path in {name.rpartition("/")[0] for name in changes}:
        with exact_products():  # as a loaded run merges, in numpy
            change = scale * changes[f"{path}/a"] @ changes[f"{path}/b"]
        flat[path] = flat[path] + change.reshape(flat[path].shape).astype(flat[path].dtype)
    return optimizer.unflatten(flat)


def _matrices(path: str, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
    """Return (stack, rows, columns) of a kernel; stack: (number of matrices,), or () for one."""
    *layers, name = path.split("/")
    # experts (in_kernel, out_kernel) and the heads of groups are stacked on a first axis
    stacked = name != "kernel" or "stacked" in layers
    stack, shape = (tuple(shape[:1]), shape[1:]) if stacked else ((), shape)
    inputs = 1 if layers[-1:] and layers[-1] in MULTI_HEAD else len(shape) - 1
    return stack, math.prod(shape[:inputs]), math.prod(shape[inputs:])
