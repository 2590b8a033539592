"""A run directory of format 1 (before config.json had a format number) loads, acts and resumes."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from octolike.config import stored_config
from octolike.policy import Policy

FIXTURE = Path(__file__).parent / "fixtures" / "run_format_1"
# The observation of the stored actions lies outside the fixture's few frames.
pytestmark = [
    pytest.mark.filterwarnings("ignore:observation.*far outside the training data"),
    pytest.mark.usefixtures("optimized"),
]


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """Return a copy of the old run, next to its data, as the current directory's `run`."""
    for name in ("run", "data"):
        shutil.copytree(FIXTURE / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def actions(run, step=None):
    """Return the actions for one fixed observation and eight seeds."""
    policy = Policy.load(run, step=step)
    image = (np.arange(16 * 16 * 3) % 251).astype(np.uint8).reshape(16, 16, 3)
    observation = {"image_primary": image, "proprio": np.linspace(-0.2, 0.2, 7, dtype=np.float32)}
    task = policy.create_task(instruction="go to the red square")
    return np.stack([policy.sample_actions(observation, task, seed=s) for s in range(8)])


def test_the_policy_acts_as_it_did():
    with np.load(FIXTURE / "actions.npz") as expected:
        np.testing.assert_allclose(actions(FIXTURE / "run"), expected["step_4"], atol=1e-4)


def test_training_resumes_at_its_position(old_run):
    """The weights, the optimiser and the position are those of then; the order of frames is new."""
    from octolike.data import open_data
    from octolike.train import loop

    config = stored_config("run")
    config.train.steps = 6
    data = open_data(config)
    loop.train(config, data)
    with np.load(FIXTURE / "actions.npz") as expected:
        difference = np.abs(actions(old_run, step=6) - expected["step_4"])
        as_large = np.abs(expected["step_6"] - expected["step_4"]).max()
        assert 0.1 * as_large < difference.max() < 10 * as_large
