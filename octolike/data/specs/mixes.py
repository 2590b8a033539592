"""Named mixtures of datasets. The weights of a mixture are either multipliers or shares.

Multipliers scale the number of steps of a dataset; shares are fractions of the examples,
independent of the sizes of the datasets. A mixture never combines both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from octolike.config import ConfigError, unknown
from octolike.data.specs import oxe_mixes
from octolike.data.specs.catalog import DATASETS


@dataclass(frozen=True)
class Mixture:
    """weights: {dataset: number > 0}; kind: "multipliers" of steps or "shares" of examples."""

    weights: Mapping[str, float]
    kind: str

    def shares(self, steps: Mapping[str, int]) -> np.ndarray:
        """Return each dataset's share of the examples: float64 [datasets], summing to 1."""
        weight = np.array([self.weights[d] for d in self.weights], np.float64)
        if self.kind == "multipliers":
            weight = weight * np.array([steps[d] for d in self.weights], np.float64)
        return weight / weight.sum()


MIXES = (
    {"bridge_and_tabletop": Mixture({"bridge_dataset": 1.0, "tabletop": 1.0}, "shares")}
    | {name: Mixture(weights, "multipliers") for name, weights in oxe_mixes.MULTIPLIERS.items()}
    | {name: Mixture(weights, "shares") for name, weights in oxe_mixes.SHARES.items()}
)


def parse(text: str, kind: str, specs: Collection[str] = DATASETS) -> Mixture:
    """Return the mixture that data.mix names or lists as 'dataset=weight,dataset'.

    A named mixture may also appear in the list if its weights are of the same kind; its weight then
    multiplies them. Raises ConfigError for an unknown name and for a weight that is not a positive
    number.

    Args:
        text: data.mix.
        kind: kind of the weights in a list; a named mixture has its own.
        specs: names of the available datasets.
    """
    if text in MIXES:
        return MIXES[text]
    weights: dict[str, float] = {}
    for item in filter(None, text.split(",")):
        name, equals, number = (part.strip() for part in item.partition("="))
        members = MIXES[name].weights if name in MIXES else {name: 1.0}
        if name in MIXES and MIXES[name].kind != kind:
            raise ConfigError(
                f"data.mix: the weights of {name!r} are {MIXES[name].kind}, but data.mix_weights "
                f"is {kind!r}; set it to {MIXES[name].kind!r} to combine that mixture with datasets"
            )
        if name not in specs and name not in MIXES:
            raise ConfigError(
                unknown("mix or dataset in data.mix", name, {*MIXES, *specs})
                + "; describe your own dataset in a file listed in data.specs"
            )
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            raise ConfigError(f"data.mix: weight {number!r} of {name} is not a number") from None
        if not (0 < weight < float("inf")):
            raise ConfigError(
                f"data.mix: weight {number} of {name} must be a positive number; "
                "to exclude a dataset, remove its name"
            )
        for dataset in members.keys() & weights.keys():
            raise ConfigError(f"data.mix names {dataset} twice")
        weights |= {dataset: weight * factor for dataset, factor in members.items()}
    if not weights:
        raise ConfigError(
            "data.mix is empty; name a mix or datasets "
            f"(mixes: {', '.join(sorted(MIXES))}; datasets: {', '.join(sorted(specs))})"
        )
    return Mixture(weights, kind)
