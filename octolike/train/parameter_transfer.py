"""The strict transfer of parameters from another run: every path fits, or a pattern names it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from octolike.config import ConfigError, unknown
from octolike.tables import text_table
from octolike.train import optimizer
from octolike.train.state import Params


def merge_strictly(params: Params, loaded: Params, source: str) -> Params:
    """Return `loaded` if it has exactly the paths and shapes of `params` (may be abstract).

    Raises:
        ConfigError: names every path that is missing, extra, or of another shape.
    """
    expected, actual = optimizer.flatten(params), optimizer.flatten(loaded)
    faults = []
    for path in sorted(expected.keys() | actual.keys()):
        if path not in actual:
            faults.append(f"missing there: {path} {list(expected[path].shape)}")
        elif path not in expected:
            faults.append(f"only there: {unknown('parameter', path, expected).partition(' (')[0]}")
        elif expected[path].shape != actual[path].shape:
            shapes = f"{list(actual[path].shape)}, expected {list(expected[path].shape)}"
            faults.append(f"other shape: {path} {shapes}")
    if faults:
        raise ConfigError(
            f"the parameters of {source} do not fit this model ({len(faults)} differences):\n  "
            + "\n  ".join(faults)
            + "\nUse the model settings of that run (its config.json)."
        )
    return loaded


class ParameterTransfer(NamedTuple):
    """The transfer of parameters from one run to another, by path.

    Attributes:
        taken: {path: value} of the parameters that are taken over.
        reinitialized: paths of this model that keep their initial values.
        unused: paths of the other run that this model does not have.
    """

    taken: dict[str, Any]
    reinitialized: list[str]
    unused: list[str]


def transfer_params(
    params: Params, source_params: Params, reinit: Sequence[str], source: str
) -> ParameterTransfer:
    """Return the transfer from another run's parameters to a model with `params`.

    All parameters must fit exactly, except those that the patterns `reinit` match.

    Args:
        params: parameters of this model; may be abstract.
        source_params: parameters of the other run.
        reinit: patterns (train.reinit).
        source: name of the other run, for messages.

    Raises:
        ConfigError: a pattern that matches nothing; or every path that is missing, extra or of
            another shape and not matched by a pattern.
    """
    target, loaded = optimizer.flatten(params), optimizer.flatten(source_params)
    paths = sorted(target.keys() | loaded.keys())
    matches = optimizer.match_patterns(paths, reinit, "train.reinit", "parameter")
    matched = {path for paths in matches.values() for path in paths}

    def strict_part(flat: dict[str, Any]) -> Params:
        return optimizer.unflatten({k: v for k, v in flat.items() if k not in matched})

    try:
        taken = merge_strictly(strict_part(target), strict_part(loaded), source)
    except ConfigError as error:
        patterns = (*reinit, *_patterns_of_differences(target, loaded, matched))
        raise ConfigError(
            f"{error} Or reinitialise the parameters that differ:\n"
            f'  --config.train.reinit="{patterns!r}"'
        ) from None
    return ParameterTransfer(
        taken=optimizer.flatten(taken),
        reinitialized=sorted(target.keys() & matched),
        unused=sorted(loaded.keys() - target.keys()),
    )


def _patterns_of_differences(
    target: Mapping[str, Any], loaded: Mapping[str, Any], matched: Iterable[str]
) -> list[str]:
    """Return a pattern per part with parameters that differ; a head is one part with its input."""
    differing = [
        path
        for path in (target.keys() | loaded.keys()) - set(matched)
        if path not in target or path not in loaded or target[path].shape != loaded[path].shape
    ]
    return sorted({f"{path.partition('/')[0]}*" for path in differing})


def describe_transfer(transfer: ParameterTransfer) -> str:
    """Return a table of the model's parts: arrays taken over, reinitialised, and unused."""
    counts: dict[str, list[int]] = {}
    for i, paths in enumerate(transfer):
        for path in paths:
            counts.setdefault(path.partition("/")[0], [0, 0, 0])[i] += 1
    rows = [(name, *(n or "" for n in row)) for name, row in sorted(counts.items())]
    return text_table(rows, ("part", "taken over", "reinitialised", "unused"), align="lr")
