"""The path of docs/your_robot.md: any recording is converted, inspected and trained on."""

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recordings

from octolike.config import Component, Config
from octolike.data import open_data
from octolike.data.rlds.synthetic import write_fake_dataset
from octolike.train import loop

ROOT = Path(__file__).parents[1]


def load(path: Path):
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def script(monkeypatch, name: str, *arguments) -> None:
    """Run an argparse script as the command line does."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")


def tiny(directory: Path) -> Config:
    """Return the config of a run with two cameras, to finetune from."""
    config = Config(workdir=str(directory / "base"))
    data, model = config.data, config.model
    data.root, data.mix, data.cache = str(directory), "fake", str(directory)
    data.cameras, data.batch_size, data.pool = {"primary": 32, "wrist": 32}, 4, 8
    data.text = Component(kind="hash", length=8, vocabulary=64)
    model.width, model.layers, model.attention_heads, model.mlp_width = 32, 1, 2, 64
    stem = Component(kind="small_stem", features=(8, 16), groups=4, patch=16, width=32)
    model.tokenizers = {
        "language": Component(kind="language", vocabulary=64, width=32),
        "primary": Component(kind="image", cameras=("primary",), encoder=stem),
        "wrist": Component(kind="image", cameras=("wrist",), encoder=stem),
        "proprio": Component(kind="proprio"),
    }
    model.heads["action"] = Component(kind="l1")
    config.train.steps, config.train.log_every, config.train.validate_every = 2, 1, 0
    config.train.checkpoint_every, config.optim.warmup = 2, 1
    return config


def odd_layout(folder):
    load(ROOT / "examples" / "your_robot.py").record(folder, episodes=4, steps=6)


ODD = ("action=command/joints", "state=robot/joints", "front=camera/front")


@pytest.mark.parametrize(
    ("write", "fields"),
    [
        (odd_layout, ODD),
        (lambda path: recordings.lerobot(path, 2), ()),
        (lambda path: recordings.lerobot(path, 3), ()),
        (lambda path: path.mkdir() or recordings.robomimic(path / "demo.hdf5"), ()),
        (recordings.aloha, ()),
    ],
    ids=["own HDF5", "LeRobot 2.1", "LeRobot 3.0", "robomimic", "ALOHA"],
)
def test_any_recording_becomes_a_dataset_that_trains(tmp_path, monkeypatch, capsys, write, fields):
    write(tmp_path / "in")
    options = [x for field in fields for x in ("--field", field)]
    source = ("--source", tmp_path / "in", "--target", tmp_path, "--name", "my_robot")
    script(monkeypatch, "convert", *source, *options, "--workers", 1, "--instruction", "go")
    monkeypatch.chdir(tmp_path)
    script(monkeypatch, "inspect_data", tmp_path / "my_robot")
    output = capsys.readouterr().out
    assert "inferred spec:" in output
    assert all(len(line) < 400 and "\r" not in line for line in output.splitlines())
    config = tiny(tmp_path)
    config.data.specs, config.data.mix = (str(tmp_path / "my_robot.py"),), "my_robot"
    config.data.cameras, config.data.range_check = {"primary": 32}, "warn"
    batch = next(open_data(config).train())
    assert batch["observation"]["present"]["image_primary"].any()
    assert np.isfinite(batch["action"]).all()


def test_the_example_is_finetuned_and_acts(tmp_path, monkeypatch):
    write_fake_dataset(tmp_path)
    base = tiny(tmp_path)
    loop.train(base, open_data(base))
    odd_layout(tmp_path / "in")
    source = ("--source", tmp_path / "in", "--target", tmp_path, "--name", "my_robot")
    options = [x for field in ODD for x in ("--field", field)]
    script(monkeypatch, "convert", *source, *options, "--workers", 1, "--instruction", "go")
    monkeypatch.chdir(tmp_path)
    script(monkeypatch, "inspect_data", tmp_path / "my_robot")
    config = load(ROOT / "configs" / "finetune.py").get_config(
        f"checkpoint={base.workdir},mode=lora,head=fresh,proprio=fresh"
    )
    config.workdir, config.data.root, config.data.mix = (
        str(tmp_path / "mine"),
        str(tmp_path),
        "my_robot",
    )
    config.data.specs, config.data.absent_cameras = (str(tmp_path / "my_robot.py"),), ("wrist",)
    config.data.cache, config.data.batch_size, config.data.pool = str(tmp_path), 4, 8
    config.train.steps, config.train.log_every, config.train.validate_every = 2, 1, 0
    config.optim.warmup = 1
    loop.train(config, open_data(config))
    script_path, allowed = ROOT / "scripts" / "check_policy.py", f"--plugins={config.data.specs[0]}"
    command = [sys.executable, script_path, config.workdir, "--frames=16", allowed]
    checked = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "no differences" in checked.stdout
    commands = load(ROOT / "examples" / "your_robot.py").act(config.workdir, steps=4)
    assert commands.shape == (4, 4)
    assert np.isfinite(commands).all()
