"""The command `octolike`, the wheel, and a robot's installation of it."""

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from octolike import commands
from octolike.config import load_module
from octolike.config.python_files import shipped, shipped_config

ROOT = Path(__file__).parents[1]
RUN = ROOT / "tests" / "fixtures" / "run_format_1" / "run"
ACT = f"""
import sys
import numpy as np
from octolike.policy import Policy
policy = Policy.load({str(RUN)!r})
task = policy.create_task(instruction="go to the red square")
image = np.zeros((16, 16, 3), np.uint8)
actions = policy.sample_actions({{"image_primary": image, "proprio": np.zeros(7)}}, task)
print(actions.shape, [m for m in ("tensorflow", "matplotlib") if m in sys.modules])
"""


def run(*command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_the_command_lists_every_script_and_config(capsys):
    commands.main([])
    text = capsys.readouterr().out
    for path in [*(ROOT / "scripts").glob("[a-z]*.py"), *(ROOT / "configs").rglob("*.py")]:
        assert path.stem in text
    assert "Train a policy." in text


def test_an_unknown_command_names_the_nearest():
    with pytest.raises(SystemExit, match="unknown command: 'trian'; did you mean 'train'"):
        commands.main(["trian"])


def test_the_command_runs_a_script_with_a_config_of_that_name(tmp_path):
    code = "from octolike.commands import main; main()"
    arguments = ("train", "--config", "quickstart:debug", "--config.data.batch_size=-1")
    done = run(sys.executable, "-c", code, *arguments, cwd=tmp_path, env=_environment())
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "data.batch_size" in done.stderr
    assert len(done.stderr.splitlines()) == 1


LOST = """
import gc, runpy, signal, sys, time
from octolike import commands

def callback(phase, info):
    gc.callbacks.remove(callback)
    signal.raise_signal(signal.SIGINT)

def command(*_, **__):
    print("a \\x1b[2J \\u202e text")
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(60)

runpy.run_path = command
commands.main(["config"])
"""


def test_a_ctrl_c_during_a_callback_of_the_garbage_collector_ends_the_command():
    """JAX has such a callback, and Python ignores what is raised there.

    Escape sequences of printed texts do not reach the terminal.
    """
    done = run(sys.executable, "-c", LOST, env=_environment(), timeout=30)
    assert done.returncode == 130
    assert done.stdout == "a \\x1b[2J \\u202e text\ninterrupted; what is on disk stays\n"
    assert done.stderr == ""


def test_a_config_is_a_file_or_the_name_of_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_config("quickstart:debug") == f"{shipped('configs')}/quickstart.py:debug"
    assert shipped_config("nothing") == "nothing"
    Path("quickstart").mkdir()  # a file or folder of that name comes first
    assert shipped_config("quickstart") == "quickstart"


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch):
    def run_path(*_, **__):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr("runpy.run_path", run_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match=r"needs tensorflow.*octolike\[train\]"):
        commands.main(["train"])


def extras():
    """Return the extras of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"]


def test_the_installation_page_lists_every_extra():
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = page.partition("| extra | installs |")[2].partition("\n\n")[0].splitlines()
    cells = [row.split("|")[1] for row in rows if row]
    assert {name for cell in cells for name in re.findall("`(.+?)`", cell)} == set(extras())


def test_minilm_is_the_package_that_its_extra_the_docs_and_the_tests_install():
    (requirement,) = (r for r in extras()["minilm"] if not r.startswith("octolike"))
    module = requirement.partition("==")[0].replace("-", "_")
    for config in ("compare:variant=minilm", "pretrain:text=minilm"):
        path, _, arg = shipped_config(config).partition(":")
        assert load_module(path).get_config(arg).data.text["path"] == f"package:{module}/model"
    for name in ("docs/install.md", ".github/workflows/test.yml", "tests/test_model_language.py"):
        assert f"--no-deps {requirement}" in (ROOT / name).read_text(encoding="utf-8"), name


@pytest.mark.slow
def test_a_robot_installs_the_wheel_and_acts_without_tensorflow(tmp_path):
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("uv is not installed next to this Python")
    build = [uv, "build", "--quiet", "--wheel", "--no-build-isolation", "--out-dir", tmp_path, ROOT]
    built = run(*build, "--python", sys.executable)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for name in ("py.typed", "configs/quickstart.py", "scripts/train.py", "scripts/_launch.py"):
        assert f"octolike/{name}" in names
    assert not [n for n in names if n.startswith(("tests/", "configs/", "scripts/"))]

    venv.create(tmp_path / "robot", with_pip=False)
    binaries = tmp_path / "robot" / "bin"
    install = [uv, "pip", "install", "--quiet", "--python", binaries / "python"]
    installed = run(*install, "--constraint", ROOT / "requirements.lock", wheel)
    assert installed.returncode == 0, installed.stderr
    acted = run(binaries / "python", "-c", ACT, cwd=tmp_path, env=_environment(clone=False))
    assert acted.stdout.strip() == "(2, 7) []", acted.stderr
    train = (binaries / "octolike", "train", "--config", "quickstart:debug")
    refused = run(*train, cwd=tmp_path, env=_environment(clone=False))
    assert refused.stderr.startswith("error: octolike train needs tensorflow"), refused.stderr
    size = sum(p.stat().st_size for p in (tmp_path / "robot").rglob("*") if p.is_file())
    assert size < 700e6


def _environment(clone=True):
    """Return this environment with only the clone on PYTHONPATH, or nothing."""
    return os.environ | {"PYTHONPATH": str(ROOT) if clone else ""}
