"""Plug-ins: kinds in files of your own train, finetune, act and evaluate in fresh processes."""

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
# A simulator: numpy alone, so that its worker processes start quickly.
ENVIRONMENT = """
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from octolike.config import option
from octolike.envs.simulators import Simulator, SimulatorSettings

ROBOTS, SKILLS, SPLITS = {"fake": {}}, ("walk",), ("train",)

def tasks_of(split, skills):
    return skills

def goal(env, seed, options):
    return {}

class Line:
    def __init__(self, settings):
        self.settings = settings
        self.action_space = _Space((7,))
        spaces = {"image_primary": _Space((16, 16, 3)), "proprio": _Space((7,))}
        self.observation_space = _Spaces(spaces)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.observe(), self.info()

    def step(self, action):
        self.steps += 1
        done = self.steps == self.settings.length
        return self.observe(), float(done), done, False, self.info()

    def observe(self):
        image = np.full((16, 16, 3), self.steps, np.uint8)
        return {"image_primary": image, "proprio": np.zeros(7, np.float32)}

    def info(self):
        success = self.steps == self.settings.length
        return {"instruction": "walk", "task": "walk", "success": success, "failure": ""}

    def render(self):
        return self.observe()["image_primary"]

    def close(self):
        pass

@dataclass
class _Space:
    shape: tuple

@dataclass
class _Spaces:
    spaces: dict

@dataclass(frozen=True)
class LineSettings(SimulatorSettings):
    simulator: ClassVar[Simulator] = Simulator(
        env=f"{__name__}:Line",
        skills=f"{__name__}:SKILLS",
        splits=f"{__name__}:SPLITS",
        tasks_of=f"{__name__}:tasks_of",
        collect_episode="octolike.envs.adapters:no_demonstrations",
        goal=f"{__name__}:goal",
        robots=f"{__name__}:ROBOTS",
    )
    length: int = option(5, "steps to the end", low=1)

PLUGINS = {"environments": {"line": LineSettings}}
"""
# name: the file, the option to change, and its component
KINDS = {
    "head": (HEAD, "model.heads", {"action": {"kind": "halved"}}),
    "tokenizer": (TOKENIZER, "model.tokenizers.proprio", {"kind": "gripper"}),
    "encoder": (ENCODER, "model.tokenizers.primary.encoder", {"kind": "mean"}),
    "sampler": (SAMPLER, "data.sampling", {"kind": "first"}),
    "environment": (ENVIRONMENT, "environment", {"kind": "line", "length": 3}),
}
CONFIG = """
from octolike.config import Config, stored_config

def get_config(arg=""):
    config = stored_config({run!r})
    config.workdir, config.data.root = {workdir!r}, {data!r}
    config.model.tokenizers["primary"]["film"] = False
    config.train.steps, config.train.validate_every, config.optim.warmup = 2, 0, 0
    config.train.init_from = {init_from!r}
    config.evaluate.splits, config.evaluate.skills = ("train",), ()
    config.evaluate.episodes, config.evaluate.workers, config.evaluate.videos = 1, 1, 0
    config.evaluate.execute, config.evaluate.untrained = 1, False
    return config
"""
ACT = """
import sys
import numpy as np
from octolike.config import ConfigError
from octolike.policy import Policy
run, *names = sys.argv[1:]
try:
    Policy.load(run)
except ConfigError as error:
    print(error)
policy = Policy.load(run, plugins=names)
observation = {"image_primary": np.zeros((16, 16, 3), np.uint8), "proprio": np.zeros(7, np.float32)}
actions = policy.sample_actions(observation, policy.create_task("go to the red square"))
print(np.isfinite(actions).all(), actions.shape)
"""


def run(*command, cwd=ROOT) -> str:
    """Run Python in a fresh process and return its output."""
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plugins")


@pytest.fixture(scope="module")
def train(folder):
    """Return the command that trains a run in which each kind of `KINDS` is a plug-in's."""
    config = write_config(folder, "trained", FIXTURE / "run")
    command = ["scripts/train.py", f"--config={config}"]
    command += [f"--config.{option}={component}" for _, option, component in KINDS.values()]
    return command


@pytest.fixture(scope="module")
def moved(folder, train):
    """Return the run, trained, moved elsewhere, the files of its plug-ins deleted."""
    files = [folder / f"my_{name}.py" for name in KINDS]
    for file, (text, _, _) in zip(files, KINDS.values()):
        file.write_text(text)
    output = run(*train, *(f"--config.plugins={file}" for file in files))
    assert "trained 2 steps" in output, output
    moved = folder / "elsewhere" / "run"
    shutil.copytree(folder / "trained", moved)
    for file in files:
        file.unlink()
    return moved


def copies(moved, flag="--plugins"):
    return [f"{flag}={moved / 'plugins' / f'my_{name}.py'}" for name in sorted(KINDS)]


@pytest.mark.parametrize("name", KINDS)
def test_a_run_is_trained_with_a_plug_in_of_each_open_set(name, moved):
    _, option, component = KINDS[name]
    node = json.loads((moved / "config.json").read_text())
    assert f"my_{name}.py" in node["plugins"]
    for part in option.split("."):
        node = node[part]
    kind = component if "kind" in component else component["action"]
    node = node if "kind" in component else node["action"]
    assert kind.items() <= node.items()


def test_a_policy_with_plug_ins_acts_in_a_fresh_process(moved):
    names = [f"my_{name}.py" for name in KINDS]
    lines = run("-c", ACT, moved, *names, cwd=moved.parent).splitlines()
    assert lines[0].startswith(f"{moved} was trained with plug-ins, and their code is not executed")
    assert " ".join(copies(moved)) in lines[0]
    assert lines[1] == "True (2, 7)", lines


def test_naming_the_copies_of_plug_ins_resumes_the_run(moved, train):
    assert "all 2 steps are done" in run(*train, *copies(moved, "--config.plugins"))


def test_a_run_with_plug_ins_is_evaluated_in_the_simulator_of_a_plug_in(moved):
    command = ["scripts/evaluate.py", f"--run={moved}", "--embodiment=all"]
    output = run(*command, *copies(moved))
    assert "report: " in output, output
    rows = [
        json.loads(x) for x in (moved / "evaluation" / "results.jsonl").read_text().splitlines()
    ]
    assert [(row["skill"], row["steps"], row["success"]) for row in rows[-1:]] == [
        ("walk", 3, True)
    ]


def test_a_run_with_plug_ins_is_checked(moved):
    options = ["--demonstrations=0", "--frames=2"]
    output = run("scripts/check_policy.py", moved, *copies(moved), *options)
    assert "figure: " in output, output


def test_a_run_with_plug_ins_is_finetuned_once_they_are_allowed(moved, folder):
    config = write_config(folder, "tuned", moved, init_from=str(moved))
    command = ["scripts/finetune.py", f"--config={config}"]
    refusal = f"not executed unless you allow it: --config.plugins={moved}/plugins"
    assert refusal in run(*command)
    output = run(*command, *copies(moved, "--config.plugins"))
    assert "trained 2 steps" in output, output


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Return a plug-in that adds an entry to a table of this test, and forget it afterwards."""
    table = {"l1": object}
    monkeypatch.setattr(plugins.OpenSet, "load", lambda self: table)
    monkeypatch.setattr(plugins, "_loaded", {})
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
