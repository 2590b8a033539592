"""The names of the fields of RLDS episodes and steps, from the rlds package.

Importing `rlds` imports its transformations and with them dm-reverb, which has no build for current
versions of TensorFlow. Its module `rlds_types` has no dependencies, so it is loaded on its own.
"""

import importlib.util
from pathlib import Path


def _load_rlds_types():
    package = importlib.util.find_spec("rlds")
    path = Path(package.submodule_search_locations[0]) / "rlds_types.py"
    spec = importlib.util.spec_from_file_location("rlds_types", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_TYPES = _load_rlds_types()
STEPS = _TYPES.STEPS
OBSERVATION = _TYPES.OBSERVATION
ACTION = _TYPES.ACTION
REWARD = _TYPES.REWARD
DISCOUNT = _TYPES.DISCOUNT
IS_FIRST = _TYPES.IS_FIRST
IS_LAST = _TYPES.IS_LAST
IS_TERMINAL = _TYPES.IS_TERMINAL
