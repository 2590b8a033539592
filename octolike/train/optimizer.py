"""The optimiser: a learning-rate schedule, clipping, AdamW, and which parameters it trains.

Parameters are named by their path, 'transformer/block_0/mlp/kernel'. What is frozen is cut out of
the tree before gradients are taken: it has neither gradients nor optimiser state.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optax
from flax import traverse_util

from octolike.config import ConfigError, OptimConfig, unknown

Params = dict[str, Any]

RSQRT_TIMESCALE = 10_000  # steps after the warm-up until 1/√2 of the peak; Octo's choice


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Return step -> learning rate: linear warm-up from 0, then the config's schedule.

    Cosine reaches 0 at `steps`. The first update is step 0: with a warm-up, its rate is 0.
    """
    peak, warmup = config.learning_rate, config.warmup
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    elif config.schedule == "rsqrt":
        after = lambda step: peak * (1 + step / RSQRT_TIMESCALE) ** -0.5
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        choices = ("cosine", "rsqrt", "constant")
        raise ConfigError(unknown("value of optim.schedule", config.schedule, choices))
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Return clipping by the global norm, then AdamW with decay on kernels only."""
    adamw = optax.adamw(
        schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=kernels,
    )
    if not config.clip:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def kernels(params: Params) -> Params:
    """Return a tree of bools: True where weight decay applies, which is on kernels."""
    return traverse_util.path_aware_map(lambda path, _: is_kernel(path[-1]), params)


def is_kernel(path: str) -> bool:
    """Return whether a path is a kernel's: 'x/kernel', or an expert's 'x/in_kernel'."""
    name = path.rpartition("/")[2]
    return name == "kernel" or name.endswith("_kernel")


def frozen_paths(
    params: Params, patterns: Sequence[str], *, may_all: bool = False
) -> dict[str, list[str]]:
    """Return {pattern: the parameter paths that it decides on}; '*' also crosses '/'.

    A pattern that begins with '!' trains what earlier ones froze; of several that match a path, the
    last one counts: ("*", "!heads_*") trains the heads alone. Raises ConfigError for a pattern that
    matches nothing, with the nearest path, and if nothing would be left to train (which may be
    where something else is trained: `may_all`).
    """
    paths = list(flatten(params))
    matches = decide(paths, patterns, "optim.frozen", "parameter")
    if not may_all and len(chosen(matches)) == len(paths):
        raise ConfigError(f"optim.frozen {list(patterns)} freezes every parameter; none is trained")
    return matches


def decide(
    paths: Sequence[str], patterns: Sequence[str], option: str, what: str
) -> dict[str, list[str]]:
    """Return {pattern: the paths that it decides on}: of several that match one, the last."""
    matches = match(paths, patterns, option, what)
    last = {path: pattern for pattern, found in matches.items() for path in found}
    return {p: [k for k in found if last[k] == p] for p, found in matches.items()}


def chosen(matches: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the paths that patterns without '!' decide on, of what `decide` returned."""
    return sorted(k for p, found in matches.items() if not p.startswith("!") for k in found)


def match(
    paths: Sequence[str], patterns: Sequence[str], option: str, what: str
) -> dict[str, list[str]]:
    """Return {pattern: the paths that it matches}, a leading '!' aside.

    Raises ConfigError, naming the option and the nearest path, where a pattern matches nothing.
    """
    matches = {p: fnmatch.filter(paths, p.removeprefix("!")) for p in patterns}
    for pattern, found in matches.items():
        if not found:
            # The heads of paths, too: 'tokenizer/*' is near 'tokenizers_primary/*'.
            heads = {path.rpartition("/")[0].partition("/")[0] + "/*" for path in paths}
            raise ConfigError(
                f"{option} matches no {what}: "
                + unknown("pattern", pattern, heads | _near(pattern, paths))
            )
    return matches


def split(params: Params, frozen: Iterable[str]) -> tuple[Params, Params]:
    """Return (trained, frozen): two nested dicts that together hold every parameter."""
    frozen, flat = set(frozen), flatten(params)
    return (
        unflatten({k: v for k, v in flat.items() if k not in frozen}),
        unflatten({k: v for k, v in flat.items() if k in frozen}),
    )


def merge(*parts: Params) -> Params:
    """Return the union of nested dicts; of a path in several, the last one counts."""
    flat: dict[str, Any] = {}
    for part in parts:
        flat.update(flatten(part))
    return unflatten(flat)


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return {'a/b/c': parameter}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Return the nested dict that `flatten` took apart."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def _near(pattern: str, paths: Sequence[str]) -> set[str]:
    import difflib

    return set(difflib.get_close_matches(pattern, paths, n=3, cutoff=0.5))
