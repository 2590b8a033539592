"""Rematerialisation by name: which values the backward pass reads, and which it computes again.

none   every intermediate value is stored
dots   the results of matrix products, convolutions and attention kernels are stored; norms,
       activations and softmaxes are computed again: no matrix product runs twice
full   only the inputs of each transformer block and tokenizer are stored
auto   dots on an accelerator, because memory is scarce; none on a CPU
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax

from octolike.model.target import COUNT, target

F = TypeVar("F", bound=Callable[..., Any])
PRODUCTS = ("conv_general_dilated", "dot_product_attention_fwd", "pallas_call")


def checkpoint(function: F, policy: str, static_argnums: tuple[int, ...] = ()) -> F:
    """Return a module class, or a function of a module, under a policy."""
    policy = resolve(policy)
    if policy == "none":
        return function
    keep = keep_products if policy == "dots" else None
    return nn.remat(function, policy=keep, static_argnums=static_argnums)


def resolve(policy: str) -> str:
    """Return the policy that "auto" stands for on the device that is traced for."""
    if target().platform == COUNT:
        return "none"
    if policy != "auto":
        return policy
    return "dots" if target().is_accelerator else "none"


def keep_products(primitive: Any, *_: Any, **params: Any) -> Any:
    """Return whether the results of a primitive are stored under "dots"."""
    if primitive.name.removesuffix("_wrapper") in PRODUCTS:
        return True
    # A product with batch axes is an attention without a kernel: its result is quadratic.
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *_, **params)
