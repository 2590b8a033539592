"""The precision of float32 matrix products: by default an accelerator rounds their inputs.

    TPU       to bfloat16 (8 bits)
    NVIDIA    to TF32 (11 bits)
    CPU       not at all

A network of compute type float32 asks for float32 everywhere. One in bfloat16 asks for it in the
last layers of heads and in denoising, which take little time and decide the actions.
"""

from __future__ import annotations

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

EXACT = "highest"


def exact_products() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which float32 products are traced as such, gradients included."""
    return jax.default_matmul_precision(EXACT)


def products_of(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a network of this compute type."""
    # Not for bfloat16: Pallas refuses an exact product of it, and its inputs are exact anyway.
    exact = jnp.dtype(dtype) == jnp.float32
    return exact_products() if exact else contextlib.nullcontext()


def exact_dense(width: int) -> nn.Dense:
    """Return a dense layer in float32, for the last layer of a head."""
    return nn.Dense(width, dtype=jnp.float32, precision=EXACT)


def describe() -> str:
    """Return the precision of float32 products in this process, for reports."""
    device = jax.local_devices()[0]
    setting = jax.config.values["jax_default_matmul_precision"] or "default"
    return f"float32 products {EXACT!r} (elsewhere {setting!r}) on {device.device_kind}"
