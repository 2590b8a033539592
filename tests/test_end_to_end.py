"""Whole paths, on fake data and on real Bridge frames: train, be killed, resume, act; overfit."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest
from train_fakes import FakeSource

from octolike.config import Component, Config
from octolike.data import open_data
from octolike.data.rlds.synthetic import write_fake_dataset
from octolike.policy import Policy
from octolike.train import checkpoint, loop, metrics

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
needs_bridge = pytest.mark.skipif(
    not (DATA / "bridge_dataset").exists(), reason=f"no Bridge episodes in {DATA}"
)


class Constant:
    """One batch, again and again."""

    def __init__(self, batch):
        self.batch = batch

    def __next__(self):
        return self.batch

    def state(self):
        return {}

    def memory(self):
        return 0

    def feedback(self, datasets, tasks):
        pass

    def state_at(self, position):
        return position

    def close(self):
        pass


def small(directory) -> Config:
    """Return the config of a network that learns eight frames by heart in seconds."""
    config = Config(workdir=str(directory / "run"))
    data, model = config.data, config.model
    data.root, data.mix, data.cache = str(DATA), "bridge_dataset", str(directory)
    data.cameras, data.batch_size, data.pool = {"primary": 64}, 8, 25
    data.text = Component(kind="hash", length=16, vocabulary=512)
    model.width, model.layers, model.attention_heads, model.mlp_width = 64, 1, 2, 128
    stem = Component(kind="small_stem", features=(16, 32, 64), groups=4, patch=16, width=64)
    model.tokenizers = {
        "language": Component(kind="language", vocabulary=512, width=32),
        "primary": Component(kind="image", cameras=("primary",), goal=True, encoder=stem),
        "proprio": Component(kind="proprio"),
    }
    model.heads["action"] = Component(
        kind="diffusion",
        prediction="sample",
        sampler="ddim",
        network=Component(kind="mlp", hidden=128, blocks=2),
        samples_per_example=8,
    )
    config.optim.learning_rate, config.optim.warmup, config.optim.weight_decay = 2e-3, 20, 0.0
    config.train.steps, config.train.validate_every, config.train.log_every = 250, 0, 50
    return config


@needs_bridge
@pytest.mark.slow
def test_sampled_actions_of_one_real_batch_are_learnt_by_heart(tmp_path):
    config = small(tmp_path)
    data = open_data(config)
    batch = next(data.train())
    held_out = {"the batch": lambda: iter([batch])}
    source = FakeSource(
        lambda start: Constant(batch), held_out, data.names, data.spec, data.embodiments
    )
    loop.train(config, source)
    last = metrics.read(tmp_path / "run" / metrics.FILE)[-1]
    assert last["step"] == config.train.steps
    assert last["validation/the batch/action_error"] < 0.02  # of normalised units: σ of the data
    assert last["validation/the batch/gripper_accuracy"] == 1.0


# Fewer steps than the config's, and every kind of event twice.
SHORT = {"steps": 24, "log_every": 4, "validate_every": 8, "checkpoint_every": 8}


def bridge_debug(workdir: Path, cache: Path) -> Config:
    """Return the debug form of configs/bridge.py."""
    path = ROOT / "configs" / "bridge.py"
    module_spec = importlib.util.spec_from_file_location("bridge", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    config = module.get_config("debug")
    config.workdir, config.data.root, config.data.cache = str(workdir), str(DATA), str(cache)
    for name, value in SHORT.items():
        setattr(config.train, name, value)
    return config


def train(config: Config):
    data = open_data(config)
    return loop.train(config, data)


def run_script_and_terminate_it(config: Config) -> tuple[int, str]:
    """Start scripts/train.py, send SIGTERM at step 4; return (exit code, output)."""
    command = [sys.executable, "scripts/train.py", "--config", "configs/bridge.py:debug"]
    command += [f"--config.workdir={config.workdir}", f"--config.data.root={config.data.root}"]
    command += [f"--config.data.cache={config.data.cache}"]
    command += [f"--config.train.{k}={getattr(config.train, k)}" for k in SHORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        output = ""
        for line in process.stdout:
            if re.match(r"step +4/", line):  # once: a second signal would end it at once
                process.send_signal(signal.SIGTERM)
            output += line
        return process.wait(), output


@needs_bridge
@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit_and_its_policy_acts(tmp_path):
    cache = tmp_path / "cache"
    config = bridge_debug(tmp_path / "killed", cache)
    code, output = run_script_and_terminate_it(config)
    assert code == 143, output
    assert "the same command resumes" in output
    stopped = checkpoint.load_run(config.workdir).step
    assert 0 < stopped < config.train.steps

    resumed = train(config)
    whole = train(bridge_debug(tmp_path / "whole", cache))
    chex.assert_trees_all_equal(resumed, whole)

    policy = Policy.load(config.workdir)
    observation = {
        "image_primary": np.zeros((64, 64, 3), np.uint8),
        "proprio": np.zeros(len(policy.embodiment.proprio), np.float32),
    }
    actions = policy.sample_actions(observation, policy.create_task("put the cup into the sink"))
    assert actions.shape == (config.data.horizon, 7)
    assert np.isfinite(actions).all()


def test_fake_data_train_stop_resume_and_act(tmp_path):
    write_fake_dataset(tmp_path / "data", side=64)

    def fake(directory: str, steps: int) -> Config:
        config = small(tmp_path)
        config.workdir, config.data.root = str(tmp_path / directory), str(tmp_path / "data")
        config.data.mix, config.data.window = "fake", 2
        config.model.heads["action"] = Component(kind="l1")
        config.optim.schedule, config.optim.warmup, config.optim.ema = "constant", 1, 0.9
        config.train.steps, config.train.validation_batches = steps, 1
        return config

    whole = train(fake("whole", 6))
    train(fake("parts", 3))
    resumed = train(fake("parts", 6))
    chex.assert_trees_all_equal(resumed, whole)

    policy = Policy.load(tmp_path / "parts")
    observation = {
        "image_primary": np.zeros((2, 64, 64, 3), np.uint8),
        "proprio": np.zeros((2, 7), np.float32),
    }
    actions = policy.sample_actions(observation, policy.create_task("go to the red square"))
    assert actions.shape == (4, 7)
