"""The notebooks run from top to bottom, end in pictures, and are kept without outputs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIMULATE = ("3_rollouts.ipynb",)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTE = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_kept_without_outputs(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_runs_and_ends_in_a_picture(path, tmp_path):
    pytest.importorskip("nbclient", reason="notebooks need the extra 'dev'")
    if path.name in SIMULATE and importlib.util.find_spec("mujoco") is None:  # not imported here
        pytest.skip("rollouts need pip install 'octolike[sim]'")
    done = tmp_path / path.name
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OCTOLIKE_TINY": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    result = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(path), str(done)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    last = [c for c in json.loads(done.read_text())["cells"] if c["cell_type"] == "code"][-1]
    assert any("image/png" in output.get("data", {}) for output in last["outputs"])
