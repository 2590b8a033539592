"""The notebooks run from top to bottom, end in a figure, and are stored without outputs."""

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
def test_a_notebook_is_stored_without_outputs(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def execute(path, output, cwd, **variables):
    """Run a notebook in a process with the given directory; return its cells with outputs."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OCTOLIKE_TINY": "1"} | variables
    result = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(path), str(output)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [c for c in json.loads(output.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_runs_and_ends_in_a_figure(path, tmp_path):
    pytest.importorskip("nbclient", reason="notebooks need the extra 'dev'")
    if path.name in SIMULATE and importlib.util.find_spec("mujoco") is None:  # not imported here
        pytest.skip("rollouts need pip install 'octolike[sim]'")
    cells = execute(path, tmp_path / path.name, tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert any("image/png" in output.get("data", {}) for output in cells[-1]["outputs"])


@pytest.mark.parametrize("directory", ["", "notebooks"])
def test_a_run_is_found_from_the_repository_and_from_notebooks(directory, tmp_path):
    """RUN=runs/x is relative to the repository in both cases, and need not be to the notebook."""
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    for path in NOTEBOOKS[1:]:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        source = "".join(next(c["source"] for c in cells if c["cell_type"] == "code"))
        start = source.index("def find_run")
        code = source[start : source.index("\n\n\n", start)]
        code = f"from pathlib import Path\nrepository = Path({str(tmp_path)!r})\n{code}\n"
        result = subprocess.run(
            [sys.executable, "-c", code + "print(find_run('runs/x').resolve())"],
            cwd=tmp_path / directory,
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == str((tmp_path / "runs" / "x").resolve())
