"""A trained run as a policy: raw observation and task in, robot actions out; no tensorflow.

Names are imported at their first use: the executor and the client need numpy only, not jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octolike.policy.policy import Policy
    from octolike.policy.tasks import Task

__all__ = ["Policy", "Task"]

_HOMES = {"Policy": "octolike.policy.policy", "Task": "octolike.policy.tasks"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
