"""Floating-point operations of a traced function: its matrix products and convolutions.

The compiler's own figure counts the body of a scan once, and kernels of cuDNN and Pallas as zero.
This one is read off the trace, like the formulas of papers: two operations per multiplication, no
element-wise work, and for a training step no rematerialisation ("model FLOPs", on which MFU is
based). Attention counts the pairs of the spans (`tokens.Layout`), hidden keys included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from octolike.model.target import COUNT, compile_for

# Primitives that `total` counts twice, or not at all.
OTHERS = ("remat", "checkpoint", "dot_product_attention", "pallas_call")


def count(function: Callable[..., Any], *args: Any) -> float:
    """Return the operations of a function for arguments that may be abstract."""
    with compile_for(COUNT):
        return total(jax.make_jaxpr(function)(*args))


def total(jaxpr: Any) -> float:
    """Return the operations of a trace as it is, with those that rematerialisation repeats."""
    return float(sum(repeats * operations(eqn) for eqn, repeats in equations(jaxpr)))


def is_plain(jaxpr: Any) -> bool:
    """Return whether a trace has neither rematerialisation nor a kernel that is not counted."""
    names = {eqn.primitive.name for eqn, _ in equations(jaxpr)}
    return not any(name.startswith(OTHERS) for name in names)


def equations(jaxpr: Any, repeats: int = 1) -> Iterator[tuple[Any, int]]:
    """Yield (equation, times that it runs) of a jaxpr and of all inside it.

    Of a conditional, every branch counts; a while loop without a static length counts once.
    """
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn, repeats
        inner = repeats * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else repeats
        if eqn.primitive.name == "pallas_call":  # its tiles are not the caller's shapes
            continue
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    yield from equations(sub, inner)


def operations(eqn: Any) -> float:
    """Return the operations of one equation; 0 for all but matrix products and convolutions."""
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth
    if name == "conv_general_dilated":
        numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
        depth = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        depth /= eqn.params["batch_group_count"]
        # A gradient with respect to the input multiplies with the zeros between its pixels.
        dilation = math.prod(eqn.params["lhs_dilation"])
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth / dilation
    return 0.0
