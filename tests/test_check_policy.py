"""Policy and training see the same: bit for bit, and a wrong resize or normalisation is found."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from policy_fakes import save_run

from octolike import images
from octolike.config import Component, Config, ConfigError
from octolike.data import open_data
from octolike.data.pipeline import recorded
from octolike.data.rlds.synthetic import write_fake_dataset
from octolike.envs.replays import Replay
from octolike.errors import DataError
from octolike.evaluation import checks
from octolike.model.network import build_network
from octolike.policy import Policy
from octolike.train.checkpoint import Run
from octolike.train.state import init_params

ROOT = Path(__file__).parents[1]
NETWORK = {"kind": "mlp", "hidden": 16, "blocks": 1}


def config_for(directory: Path, mix: str) -> Config:
    """Return a run that sees fake episodes smaller than they are stored, with all there is."""
    config = Config(workdir=str(directory / "run"))
    data, model = config.data, config.model
    data.root, data.mix, data.cache = str(directory / "data"), mix, str(directory / "cache")
    data.cameras, data.window, data.horizon = {"primary": 24, "wrist": 40}, 2, 3
    data.text = Component(kind="hash", length=8, vocabulary=64)
    model.width, model.layers, model.attention_heads, model.mlp_width = 16, 1, 2, 16
    patch = {"kind": "patch", "patch": 8, "width": 8}
    model.tokenizers = {
        "language": Component(kind="language", vocabulary=64, width=8),
        "primary": Component(kind="image", cameras=("primary",), goal=True, encoder=patch),
        "wrist": Component(kind="image", cameras=("wrist",), encoder=patch),
        "proprio": Component(kind="proprio"),
    }
    model.heads = {"action": Component(kind="diffusion", network=NETWORK, steps=3)}
    config.train.validation_batches = 1
    return config


def run_for(config: Config, data) -> Run:
    """Return an untrained run: what is checked does not depend on how good it is."""
    settings = dataclasses.asdict(config.model)
    network = build_network(settings, data.spec, data.names)
    tree = jax.eval_shape(lambda: init_params(network, data.spec, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), tree)
    return Run(config, list(data.embodiments), data.spec, data.names, params, 5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return (run, opened data, its frames, its policy)."""
    directory = tmp_path_factory.mktemp("check")
    write_fake_dataset(directory / "data", side=40)
    config = config_for(directory, "fake")
    data = open_data(config)
    run = run_for(config, data)
    frames = list(recorded.sample_frames(data, config.data, "fake", 32))
    return run, data, frames, Policy(run, batch_size=recorded.BATCH)


@pytest.fixture(scope="module")
def compared(made):
    """Return what both checks of the inputs find where nothing is wrong."""
    run, _, frames, policy = made
    return checks.compare(policy, "fake", frames, run)


def faults(compared) -> list[str]:
    return checks.CheckReport(compared=[compared]).faults


def differences(policy, frames) -> dict[str, checks.InputDifference]:
    """Return where the network's inputs differ, without acting."""
    out = checks.FrameComparison("fake")
    seen = [{k: o[k] for k in policy.observation_keys} for o in frames.observations]
    tasks = [checks._task(policy, told) for told in frames.told]
    checks._compare_inputs(out, policy, seen, tasks, frames)
    return out.different


def test_the_policy_sees_and_does_what_training_and_validation_do(compared):
    found = compared
    assert faults(found) == []
    assert found.frames == 32
    for key in (
        "observation.image_primary",
        "observation.image_wrist",
        "observation.proprio",
        "observation.timestep_mask",
        "task.image_primary",
        "task.language.ids",
    ):
        assert found.keys[key] > 0
    assert "task.task_id" in found.unread  # no tokenizer reads it
    assert found.allowed < found.error / 4  # the comparison of errors is worth something
    assert found.clipped == 0
    assert {len(found.error_per("dimension")), len(found.error_per("step"))} == {7, 3}


def test_frames_have_an_episodes_start_and_its_end(made):
    _, _, frames, _ = made
    for some in frames:
        assert not some.batch["observation"]["timestep_mask"][0, 0]
        assert some.observations[0]["proprio"].shape == (1, 7)  # a robot has no frame before
        assert not some.batch["action_mask"][1, -1, 1:].any()
        assert some.observations[2]["image_primary"].shape[1:] == (40, 40, 3)


def test_a_wrong_resize_is_found_and_its_place_is_named(made, monkeypatch):
    run, _, frames, policy = made

    def nearest(image, height, width):
        rows = np.arange(height) * len(image) // height
        columns = np.arange(width) * image.shape[1] // width
        return image[rows][:, columns]

    monkeypatch.setattr("octolike.policy.policy.resize", nearest)
    found = checks.compare(policy, "fake", frames[:1], run)
    assert {"observation.image_primary", "task.image_primary"} == found.different.keys()
    first = faults(found)[0]
    assert "fake: observation.image_primary, first at" in first
    assert "byte" in first
    assert "step" in first


def test_a_single_pixel_that_differs_by_one_is_found(made, monkeypatch):
    _, _, frames, policy = made

    def almost(image, height, width):
        out = images.resize(image, height, width).copy()
        out[3, 5, 1] ^= 1
        return out

    monkeypatch.setattr("octolike.policy.policy.resize", almost)
    found = differences(policy, frames[0])
    assert "image_primary[0, 3, 5, 1]" in found["observation.image_primary"].place
    assert found["observation.image_primary"].count == 16 * 2


@pytest.mark.parametrize("part", ["action", "proprio"])
def test_a_wrong_normalisation_is_found(made, part):
    run, _, frames, _ = made
    (robot,) = run.embodiments
    right = getattr(robot, f"{part}_statistics")
    wrong = dataclasses.replace(right, mean=right.mean + 0.5 * right.std)
    run = dataclasses.replace(
        run, embodiments=[dataclasses.replace(robot, **{f"{part}_statistics": wrong})]
    )
    policy = Policy(run, batch_size=recorded.BATCH)
    if part == "proprio":
        assert differences(policy, frames[0]).keys() == {"observation.proprio"}
    else:
        said = "\n".join(faults(checks.compare(policy, "fake", frames[:1], run)))
        assert "un-normalised actions miss the recorded ones by 0.5" in said


def test_a_policy_that_acts_otherwise_than_in_validation_is_found(made):
    run, _, frames, policy = made

    class Sluggish(Policy):
        def sample_normalized(self, *args):
            return 0.5 * super().sample_normalized(*args)

    sluggish = object.__new__(Sluggish)
    sluggish.__dict__.update(policy.__dict__)
    (said,) = faults(checks.compare(sluggish, "fake", frames, run))
    assert "the action error is" in said
    assert "chance explains" in said


def test_what_a_record_clips_is_known(made):
    run, _, frames, _ = made
    bounded = dataclasses.replace(run.embodiments[0], normalization="bounds")
    cut = checks._clipped(bounded, frames[0].actions)
    assert 0 < cut.mean() < 0.5
    assert not cut[..., 6].any()  # the gripper has no bounds
    assert not checks._clipped(run.embodiments[0], frames[0].actions).any()


@pytest.mark.skipif(
    not (ROOT.parent / "shared" / "data" / "bridge_dataset").exists(),
    reason="no Bridge episodes in the shared data",
)
def test_real_frames_of_another_size_are_equal_bit_for_bit(tmp_path):
    config = config_for(tmp_path, "bridge_dataset")
    config.data.root = str(ROOT.parent / "shared" / "data")
    config.data.cameras, config.data.goal = {"primary": 48}, "last"
    config.data.text["length"] = 32
    config.model.tokenizers.pop("wrist")
    data = open_data(config)
    policy = Policy(run_for(config, data), batch_size=recorded.BATCH)
    (frames,) = recorded.sample_frames(data, config.data, "bridge_dataset", 16)
    assert frames.observations[0]["image_primary"].shape[1:] == (64, 64, 3)
    assert differences(policy, frames) == {}


# The report


def replayed(success: bool, proprio, skill="push", seed=1) -> checks.DemonstrationReplays:
    """Return a replay that is exact as recorded and as given after the round trip."""
    good = Replay(True, 3, np.zeros(3), np.zeros(3))
    given = Replay(success, len(proprio), np.array(proprio), np.zeros(len(proprio)))
    return checks.DemonstrationReplays(skill, seed, good, given)


GOOD, PARTED = replayed(True, [0, 0, 1e-8]), replayed(False, [0, 0, 0.2], seed=7)


def test_few_replays_may_part_by_rounding_and_are_told():
    few = checks.CheckReport(replays=[GOOD] * 39 + [PARTED], simulator="tabletop")
    assert few.faults == []
    assert "push, seed 7, actions normalised and un-normalised: parts" in few.remarks[0]
    assert "at step 2, by up to 0.2 of proprio" in few.table()
    many = checks.CheckReport(replays=[GOOD] * 9 + [PARTED], simulator="tabletop")
    assert many.faults == few.remarks


def test_a_replay_that_starts_elsewhere_is_a_fault():
    report = checks.CheckReport(replays=[GOOD] * 99 + [replayed(True, [0.1, 0, 0])])
    assert "parts from the recording at step 0" in report.faults[0]


def test_a_crash_of_the_simulator_is_a_fault():
    broken = checks.DemonstrationReplays(
        "lift", 3, GOOD.recorded, "Traceback:\nArithmeticError: no"
    )
    report = checks.CheckReport(replays=[GOOD, broken])
    assert "lift, seed 3" in report.faults[0]
    assert "ArithmeticError: no" in report.faults[0]
    assert "1/2" in report.table()


def test_the_report_is_a_table_a_picture_and_json(compared, tmp_path):
    report = checks.CheckReport([GOOD, replayed(True, [0, 0], "lift")], [compared], "tabletop")
    assert report.table().endswith("all is the same")
    picture = report.write(tmp_path / "check_policy")
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "check_policy" / "check_policy.json").read_text())
    assert told["faults"] == []
    assert told["inputs"][0]["error_per_dimension"].keys() == set(compared.names)
    assert len(told["replays"]) == 2


# Data


def test_episodes_without_a_seed_cannot_be_replayed(made):
    _, data, _, _ = made
    count, found = recorded.demonstrations(data.source("fake"), 2)
    assert count == 2
    with pytest.raises(DataError, match=r"does not say its seed, split, skill.*collect\.py"):
        next(found)


def test_an_unknown_dataset_is_named(made):
    _, data, _, _ = made
    with pytest.raises(ConfigError, match=r"dataset of this mix: 'fke'; did you mean 'fake'"):
        data.source("fke")


# The script


@pytest.mark.slow
def test_the_script_says_what_differs_and_fails(made, tmp_path):
    run, _, _, _ = made
    robot = run.embodiments[0]
    statistics = dataclasses.replace(
        robot.proprio_statistics, std=robot.proprio_statistics.std * 2 + 1
    )
    wrong = dataclasses.replace(robot, proprio_statistics=statistics)
    save_run(tmp_path, dataclasses.replace(run, embodiments=[wrong]))
    done = subprocess.run(
        [sys.executable, "scripts/check_policy.py", str(tmp_path), "--frames=16"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "no replay: no simulator is known that made fake" in done.stdout
    assert "DIFFERENT: fake: observation.proprio" in done.stdout
    assert (tmp_path / "check_policy" / "check_policy.png").exists()
