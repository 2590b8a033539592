"""Malicious code and data of any shape, for tests with files of strangers."""

import json
from pathlib import Path

from hypothesis import strategies as st

EVIL = "from pathlib import Path\nPath({path!r}).touch()\nDATASETS = []\n"

NAMES = st.sampled_from(["featuresDict", "features", "tensor", "shape", "dimensions", "type", "x"])
LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6)
TREES = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(NAMES, x, max_size=3), max_leaves=9
)


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def change_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
