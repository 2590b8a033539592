"""The policy of a config with random parameters: its speed is that of a trained one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octolike.config import Config
from octolike.data.specs.planned import plan_data
from octolike.embodiment import Embodiment, Statistics
from octolike.policy import Policy
from octolike.train import lowering
from octolike.train.checkpoint import Run


def random_policy(config: Config, batch_size: int = 1) -> Policy:
    """Return the policy of a config, for the first robot of its data, which need not be here."""
    planned = plan_data(config)
    state = lowering.workload(config, planned.spec, planned.names).state
    params = filled(jax.eval_shape(lambda state: state.policy_params(), state))
    robot = _with_statistics(planned.embodiments[0])
    run = Run(config, [robot], planned.spec, planned.names, params, 0)
    return Policy(run, robot.name, batch_size)


def filled(tree: Any) -> Any:
    """Return small random arrays for floating-point leaves, zeros for others."""
    rng = np.random.default_rng(0)

    def fill(x: Any) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32), x.dtype)

    return jax.tree.map(fill, tree)


def _with_statistics(robot: Embodiment) -> Embodiment:
    """Return the record of a robot with statistics of a vector that is uniform in [0, 1]."""

    def statistics(width: int) -> Statistics:
        zero, one = np.zeros(width, np.float32), np.ones(width, np.float32)
        ends = dict.fromkeys(("min", "p01", "low"), zero) | dict.fromkeys(
            ("max", "p99", "high"), one
        )
        return Statistics(mean=one / 2, std=one / 2, **ends, steps=1, episodes=1)

    return dataclasses.replace(
        robot,
        action_statistics=statistics(len(robot.learned)),
        proprio_statistics=statistics(len(robot.proprio)) if robot.proprio else None,
    )
