"""Named mixes of datasets. A mix says whether its numbers multiply sizes or are shares.

The two kinds are never confused: multipliers scale a dataset's number of steps, shares are of the
examples, whatever the sizes.
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
    """weights: dataset: number > 0; kind: "multipliers" of steps, or "shares" of examples."""

    weights: Mapping[str, float]
    kind: str

    def shares(self, steps: Mapping[str, int]) -> np.ndarray:
        """Return the share of examples of each dataset, float64 [datasets], summing to 1."""
        weight = np.array([self.weights[d] for d in self.weights], np.float64)
        if self.kind == "multipliers":
            weight = weight * np.array([steps[d] for d in self.weights], np.float64)
        return weight / weight.sum()


MIXES = (
    {"bridge_and_tabletop": Mixture({"bridge_dataset": 1.0, "tabletop": 1.0}, "shares")}
    | {name: Mixture(weights, "multipliers") for name, weights in oxe_mixes.MULTIPLIERS.items()}
    | {name: Mixture(weights, "shares") for name, weights in oxe_mixes.SHARES.items()}
)


def parse(text: str, kind: str, rows: Collection[str] = DATASETS) -> Mixture:
    """Return the mix that data.mix names, or spells as 'dataset=weight,dataset'.

    `kind` is of spelled weights; a named mix has its own. A named mix may also stand among datasets
    if its weights are of that kind; a number then multiplies them. rows: the datasets there are.
    Raises ConfigError for an unknown name and for a weight that is not a positive number.
    """
    if text in MIXES:
        return MIXES[text]
    weights: dict[str, float] = {}
    for item in filter(None, text.split(",")):
        name, given, number = (part.strip() for part in item.partition("="))
        parts = MIXES[name].weights if name in MIXES else {name: 1.0}
        if name in MIXES and MIXES[name].kind != kind:
            raise ConfigError(
                f"data.mix: the weights of {name!r} are {MIXES[name].kind}, data.mix_weights is "
                f"{kind!r}; set it to {MIXES[name].kind!r} to put datasets beside that mix"
            )
        if name not in rows and name not in MIXES:
            known = unknown("mix or dataset in data.mix", name, {*MIXES, *rows})
            raise ConfigError(f"{known}; one's own dataset is a row of a file in data.specs")
        try:
            weight = float(number) if given else 1.0
        except ValueError:
            raise ConfigError(f"data.mix: weight {number!r} of {name} is no number") from None
        if not (0 < weight < float("inf")):
            raise ConfigError(
                f"data.mix: weight {number} of {name} must be a positive number; "
                "to leave a dataset out, leave out its name"
            )
        for dataset in parts.keys() & weights.keys():
            raise ConfigError(f"data.mix names {dataset} twice")
        weights |= {dataset: weight * part for dataset, part in parts.items()}
    if not weights:
        raise ConfigError(
            "data.mix is empty; name a mix or datasets "
            f"(mixes: {', '.join(sorted(MIXES))}; datasets: {', '.join(sorted(rows))})"
        )
    return Mixture(weights, kind)
