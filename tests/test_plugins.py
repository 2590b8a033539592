"""Plug-ins: kinds in a file of your own train, finetune and act in fresh processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from octolike import config as c
from octolike.config import plugins

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "fixtures" / "run_format_1"

HEAD = """
from octolike.config import option
from octolike.model.heads import L1

class Halved(L1):
    factor: float = option(0.5, "factor of the error", low=0)

    def error(self, difference):
        return self.factor * super().error(difference)

PLUGINS = {"heads": {"halved": Halved}}
"""
TOKENIZER = """
from typing import ClassVar
import flax.linen as nn
from octolike.types import TokenGroup

class Gripper(nn.Module):
    index: int = 6
    dtype: object = "float32"
    place: ClassVar[str] = "observation"

    def reads(self):
        return "observation.proprio", "observation.present.proprio"

    def __call__(self, observation, task, condition=None):
        x = observation["proprio"][..., None, self.index :]
        return TokenGroup(x, observation["present"]["proprio"][..., None])

PLUGINS = {"tokenizers": {"gripper": Gripper}}
"""
ENCODER = """
import flax.linen as nn

class Mean(nn.Module):
    width: int = 8
    dtype: object = "float32"

    @nn.compact
    def __call__(self, x, condition=None):
        return nn.Dense(self.width, name="out")(x.mean(axis=(1, 2)))[:, None]

PLUGINS = {"encoders": {"mean": Mean}}
"""
SAMPLER = """
from dataclasses import dataclass
import numpy as np
from octolike.data.pipeline.sampling import Sampling

@dataclass
class First(Sampling):
    index: int = 0

    def shares(self, groups, batch, memory):
        return np.eye(len(groups.names))[self.index]

PLUGINS = {"samplings": {"first": First}}
"""
# name: the file, the option to change, and its component
KINDS = {
    "head": (HEAD, "model.heads", {"action": {"kind": "halved"}}),
    "tokenizer": (TOKENIZER, "model.tokenizers.proprio", {"kind": "gripper"}),
    "encoder": (ENCODER, "model.tokenizers.primary.encoder", {"kind": "mean"}),
    "sampler": (SAMPLER, "data.sampling", {"kind": "first"}),
}
CONFIG = """
from octolike.config import Config, stored_config

def get_config(arg=""):
    config = stored_config({run!r})
    config.workdir, config.data.root = {workdir!r}, {data!r}
    config.model.tokenizers["primary"]["film"] = False
    config.train.steps, config.train.validate_every, config.optim.warmup = 2, 0, 0
    config.train.init_from = {init_from!r}
    return config
"""
ACT = """
import sys
import numpy as np
from octolike.config import ConfigError
from octolike.policy import Policy
run, name = sys.argv[1:]
try:
    Policy.load(run)
except ConfigError as error:
    print(error)
policy = Policy.load(run, plugins=(name,))
observation = {"image_primary": np.zeros((16, 16, 3), np.uint8), "proprio": np.zeros(7, np.float32)}
actions = policy.sample_actions(observation, policy.create_task("go to the red square"))
print(np.isfinite(actions).all(), actions.shape)
"""


def run(*command, cwd=ROOT) -> str:
    """Run Python in a fresh process and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


def write_config(folder: Path, workdir: str, stored: Path, init_from: str = "") -> Path:
    path = folder / f"{workdir}_config.py"
    values = {"run": str(stored), "workdir": str(folder / workdir), "init_from": init_from}
    data = folder / "data"  # a copy: statistics are cached next to the data
    if not data.exists():
        shutil.copytree(FIXTURE / "data", data)
    path.write_text(CONFIG.format(**values, data=str(data)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_plug_in_trains_and_acts_in_fresh_processes(name, tmp_path):
    text, option, component = KINDS[name]
    file = tmp_path / f"my_{name}.py"
    file.write_text(text)
    config = write_config(tmp_path, "trained", FIXTURE / "run")
    command = ["scripts/train.py", f"--config={config}", f"--config.{option}={component}"]
    command.append(f"--config.plugins={file}")
    output = run(*command)
    assert "trained 2 steps" in output, output

    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(tmp_path / "trained", moved)
    file.unlink()
    lines = run("-c", ACT, moved, file.name, cwd=tmp_path / "elsewhere").splitlines()
    allowed = f"--plugins={moved / 'plugins' / file.name}"
    assert lines[0].startswith(f"{moved} was trained with plug-ins, and their code is not executed")
    assert allowed in lines[0]
    assert lines[1] == "True (2, 7)", lines

    if name != "head":
        return
    command = command[:2] + [
        f"--config.{option}={component}",
        f"--config.plugins={moved}/plugins/{file.name}",
    ]
    assert "all 2 steps are done" in run(*command)  # naming the plug-in again is consent enough
    checked = run("scripts/check_policy.py", moved, allowed, "--demonstrations=0", "--frames=2")
    assert "figure: " in checked, checked
    config = write_config(tmp_path, "tuned", moved, init_from=str(moved))
    command = ["scripts/finetune.py", f"--config={config}"]
    assert f"not executed unless you allow it: --config.plugins={moved}/plugins" in run(*command)
    output = run(*command, f"--config.plugins={moved / 'plugins' / file.name}")
    assert "trained 2 steps" in output, output


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Return a plug-in that adds an entry to a table of this test, and forget it afterwards."""
    table = {"l1": object}
    monkeypatch.setattr(plugins.OpenSet, "load", lambda self: table)
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.setattr(plugins, "_owners", {})
    path = tmp_path / "mine.py"
    path.write_text("class Mine: pass\nPLUGINS = {'heads': {'mine': Mine}}")
    return path


def test_loading_twice_is_harmless(file, tmp_path):
    plugins.load([str(file)])
    plugins.load([str(file)])
    copy = tmp_path / "copy" / "mine.py"
    copy.parent.mkdir()
    shutil.copy(file, copy)
    plugins.load([str(copy)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PLUGINS = {'heads': {'l1': int}}", "kind 'l1' of heads, which is built in"),
        ("PLUGINS = {'heds': {'x': int}}", "open set in PLUGINS of .*'heds'; did you mean 'heads'"),
        ("PLUGINS = {'heads': [int]}", r"PLUGINS\['heads'\] of .* expected \{kind: class\}"),
        ("x = 3", r"defines no PLUGINS; expected e\.g\. PLUGINS = "),
        ("1 / 0", "cannot be read: ZeroDivisionError"),
    ],
)
def test_a_plug_in_that_cannot_be_used_is_named(file, text, message):
    file.write_text(text)
    with pytest.raises(c.ConfigError, match=message) as caught:
        plugins.load([str(file)])
    assert "\n" not in str(caught.value)


def test_two_plug_ins_with_one_kind_or_one_name_are_refused(file, tmp_path):
    plugins.load([str(file)])
    second = tmp_path / "second.py"
    second.write_text(file.read_text() + "\n# another file")
    with pytest.raises(c.ConfigError, match=r"second\.py and .*mine\.py both define .*'mine'"):
        plugins.load([str(second)])
    with pytest.raises(c.ConfigError, match=r"two plug-ins are named mine\.py"):
        plugins.load([str(file), "other/mine.py"])


@pytest.fixture
def trained(file, tmp_path):
    """Return a run directory that records the plug-in and holds a copy of it."""
    directory = tmp_path / "run"
    (directory / "plugins").mkdir(parents=True)
    shutil.copy(file, directory / "plugins")
    data = {"format": 2, "plugins": plugins.digests([str(file)])}
    (directory / "config.json").write_text(json.dumps(data))
    return directory


def test_the_run_s_copy_is_used_by_name(trained, file, tmp_path, monkeypatch):
    file.unlink()
    monkeypatch.chdir(tmp_path)
    assert plugins.allow(trained, ["mine.py"]) == (str(trained / "plugins" / "mine.py"),)


def test_a_plug_in_that_is_missing_or_has_changed_is_refused(trained, file):
    with pytest.raises(c.ConfigError, match=r"--plugins=.*plugins/mine\.py \(in Python: plugins="):
        plugins.allow(trained, [])
    file.write_text("PLUGINS = {'heads': {'other': int}}")
    with pytest.raises(c.ConfigError, match=r"mine\.py has changed since .* use the file of that"):
        plugins.allow(trained, [str(file)])
    with pytest.raises(c.ConfigError, match="has changed since"):
        plugins.check_unchanged(trained, [str(file)])
    (trained / "plugins" / "mine.py").unlink()
    file.unlink()
    with pytest.raises(
        c.ConfigError, match=r"plug-in mine\.py of .* is missing; put the file back"
    ):
        plugins.allow(trained, [str(file)])
    with pytest.raises(c.ConfigError, match=r"the plug-in .*mine\.py cannot be read"):
        plugins.load([str(file)])
