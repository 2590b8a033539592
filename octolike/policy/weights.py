"""Cast parameters once at load instead of in every call.

Modules keep float32 parameters and cast them to the compute type at each use. A parameter that is
used in one other type only can be stored in that type: half the memory, half the bytes to read in a
call, and the same results bit for bit. These parameters are read off the traced function, which
works for any component.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

# Operations on one array that only move its values: a cast before or after them is the same.
MOVES = {"broadcast_in_dim", "copy", "reshape", "slice", "squeeze", "transpose"}


def cast_once(function: Callable[[Any], Any], params: Any) -> Any:
    """Return params, those that `function` only uses after one cast already cast."""
    leaves, tree = jax.tree.flatten(params)
    jaxpr = jax.make_jaxpr(function)(params).jaxpr
    dtypes = [_only_dtype(jaxpr, variable) for variable in jaxpr.invars]
    cast = [x if dtype is None else x.astype(dtype) for x, dtype in zip(leaves, dtypes)]
    return jax.tree.unflatten(tree, cast)


def _only_dtype(jaxpr: Any, variable: Any) -> Any:
    """Return the one type that a variable is cast to at all its uses, else None."""
    dtypes = _dtypes(jaxpr, variable)
    return dtypes.pop() if len(dtypes) == 1 and None not in dtypes else None


def _dtypes(jaxpr: Any, variable: Any) -> set[Any]:
    """Return the types that a variable is cast to; None among them: it is used as it is."""
    dtypes: set[Any] = {None} if any(x is variable for x in jaxpr.outvars) else set()
    for equation in jaxpr.eqns:
        places = [i for i, x in enumerate(equation.invars) if x is variable]
        if not places:
            continue
        name = equation.primitive.name
        if name == "convert_element_type":
            dtypes.add(equation.params["new_dtype"])
        elif name in MOVES:
            dtypes |= _dtypes(jaxpr, equation.outvars[0])
        else:
            inner = _called(equation)
            constants = equation.params.get("num_consts", 0)  # of a scan; not its carry
            for place in places:
                is_argument = inner and (name != "scan" or place < constants)
                dtypes |= _dtypes(inner, inner.invars[place]) if is_argument else {None}
    return dtypes


def _called(equation: Any) -> Any:
    """Return the jaxpr that an equation calls with its own arguments, or None."""
    for name in ("jaxpr", "call_jaxpr"):
        inner = equation.params.get(name)
        inner = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
        if isinstance(inner, core.Jaxpr) and len(inner.invars) == len(equation.invars):
            return inner
    return None
