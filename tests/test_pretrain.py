"""The recipe for pretraining, in its debug form on a small soup; the scripts that launch it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_oxe import write_fake_oxe

from octolike.config import load_module
from octolike.data import open_data
from octolike.train import checkpoint, loop, metrics

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SOUP = ("bridge_dataset", "viola")


def test_the_debug_recipe_trains_on_a_soup(tmp_path, capsys):
    """One of the datasets has a wrist camera."""
    for name in SOUP:
        write_fake_oxe(tmp_path / "data", name, episodes=2, steps=6, side=32)
    config = load_module(ROOT / "configs" / "pretrain.py").get_config("debug")
    data, train = config.data, config.train
    data.root, data.mix, config.workdir = str(tmp_path / "data"), ",".join(SOUP), str(tmp_path)
    data.threads, data.validation_split, data.held_out = 1, "", 0.0
    train.steps, train.log_every, config.optim.warmup = 3, 1, 2
    train.validate_every, train.checkpoint_every = 0, 3
    config.check()
    state = loop.train(config, open_data(config))
    rows = [row for row in metrics.read(tmp_path / metrics.FILE) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in rows)
    run = checkpoint.load_run(tmp_path)
    assert run.step == int(state.step) == 3
    assert [robot.name for robot in run.embodiments] == [*SOUP]


@pytest.mark.parametrize("path", [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"], ids=str)
def test_the_launch_scripts_are_bash(path):
    checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_plan_command_prints_a_plan():
    command = [sys.executable, "scripts/plan.py", "--config", "configs/pretrain.py:debug"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "--chips", "h100:8"], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("8 × h100", "parameters", "operations per step", "20 steps", "days"):
        assert word in done.stdout
