"""The optimiser: a learning-rate schedule, clipping, AdamW, and which parameters it trains.

Parameters are named by their path, 'transformer/block_0/mlp/kernel'. Frozen parameters are split
off before gradients are computed: they have neither gradients nor optimiser state.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import optax
from flax import traverse_util

from octolike.config import ConfigError, OptimConfig, unknown

Params = dict[str, Any]

RSQRT_TIMESCALE = 10_000  # steps after the warm-up until 1/√2 of the peak, as in Octo


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Return step -> learning rate: linear warm-up from 0, then the config's schedule.

    Cosine reaches 0 at `steps`. The first update is step 0: with a warm-up, its rate is 0.
    """
    peak, warmup = config.learning_rate, config.warmup
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    elif config.schedule == "rsqrt":

        def after(step: Any) -> Any:
            return peak * (1 + step / RSQRT_TIMESCALE) ** -0.5

    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        choices = ("cosine", "rsqrt", "constant")
        raise ConfigError(unknown("value of optim.schedule", config.schedule, choices))
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Return clipping by the global norm, then AdamW with weight decay on kernels only."""
    adamw = optax.adamw(
        schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if not config.clip:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def decay_mask(params: Params) -> Params:
    """Return a tree of bools: True for kernels, to which weight decay applies."""
    mask = traverse_util.path_aware_map(lambda path, _: is_kernel(str(path[-1])), params)
    return cast(Params, mask)


def is_kernel(path: str) -> bool:
    """Return whether a path names a kernel: 'x/kernel', or an expert's 'x/in_kernel'."""
    name = path.rpartition("/")[2]
    return name == "kernel" or name.endswith("_kernel")


def frozen_paths(
    params: Params, patterns: Sequence[str], *, may_all: bool = False
) -> dict[str, list[str]]:
    """Return {pattern: the parameter paths assigned to it}; '*' also matches '/'.

    A pattern that begins with '!' unfreezes. If several patterns match a path, the last one counts:
    ("*", "!heads_*") trains the heads alone. may_all: whether all parameters may be frozen, since
    LoRA is trained.

    Raises:
        ConfigError: a pattern that matches nothing (names the nearest path), or all parameters
            frozen without `may_all`.
    """
    paths = list(flatten(params))
    matches = assign_paths(paths, patterns, "optim.frozen", "parameter")
    if not may_all and len(selected_paths(matches)) == len(paths):
        raise ConfigError(f"optim.frozen {list(patterns)} freezes every parameter; none is trained")
    return matches


def assign_paths(
    paths: Sequence[str], patterns: Sequence[str], option: str, noun: str
) -> dict[str, list[str]]:
    """Return {pattern: paths}; a path belongs to the last pattern that matches it."""
    matches = match_patterns(paths, patterns, option, noun)
    last = {path: pattern for pattern, matched in matches.items() for path in matched}
    return {p: [k for k in matched if last[k] == p] for p, matched in matches.items()}


def selected_paths(matches: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the paths of the patterns without '!'; matches: a result of `assign_paths`."""
    return sorted(k for p, paths in matches.items() if not p.startswith("!") for k in paths)


def match_patterns(
    paths: Sequence[str], patterns: Sequence[str], option: str, noun: str
) -> dict[str, list[str]]:
    """Return {pattern: the paths that it matches}, ignoring a leading '!'.

    option and noun, of the paths, are for the message.

    Raises:
        ConfigError: a pattern that matches nothing; names the option and the nearest path.
    """
    matches = {p: fnmatch.filter(paths, p.removeprefix("!")) for p in patterns}
    for pattern, matched in matches.items():
        if not matched:
            # Also suggest first components: 'tokenizer/*' is near 'tokenizers_primary/*'.
            heads = {path.rpartition("/")[0].partition("/")[0] + "/*" for path in paths}
            raise ConfigError(
                f"{option} matches no {noun}: "
                + unknown("pattern", pattern, heads | _nearest_paths(pattern, paths))
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
    """Return the nested dict of {'a/b/c': parameter}."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def _nearest_paths(pattern: str, paths: Sequence[str]) -> set[str]:
    import difflib

    return set(difflib.get_close_matches(pattern, paths, n=3, cutoff=0.5))
