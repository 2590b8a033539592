"""JSON of results that may contain NaN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def finite_json(data: Any) -> Any:
    """Return nested data as plain JSON values; numbers that are not finite become None."""
    if isinstance(data, Mapping):
        return {k: finite_json(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite_json(v) for v in data]
    if isinstance(data, (float, np.floating)):
        return float(data) if np.isfinite(data) else None
    return data.item() if isinstance(data, np.generic) else data
