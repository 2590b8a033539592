"""Configs that older versions wrote: one function for each change of the format.

A function takes the object of config.json and returns it as the next change expects it.
"""

from typing import Any

FORMAT = 2  # of the config.json that this version writes
Json = dict[str, Any]


def rename_options(config: Json) -> Json:
    """Rename train.fresh to train.reinit, and evaluate.tell to evaluate.condition_on."""
    config = _rename(config, "train", "fresh", "reinit")
    return _rename(config, "evaluate", "tell", "condition_on")


def _rename(config: Json, section: str, old: str, new: str) -> Json:
    """Return the config with an option of a section renamed, in its place."""
    options = config.get(section, {})
    return {**config, section: {new if k == old else k: v for k, v in options.items()}}
