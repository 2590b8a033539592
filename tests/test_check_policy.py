"""Policy and training agree bit for bit; a wrong resize or normalisation is detected."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import data_fakes
import jax
import numpy as np
import pytest
from policy_fakes import save_run

from octolike import images
from octolike.config import Component, Config, ConfigError
from octolike.data import open_data
from octolike.data.pipeline import recorded_frames
from octolike.data.rlds.synthetic import fake_episodes, write_fake_dataset
from octolike.data.rlds.writer import Writer
from octolike.envs.replays import Replay
from octolike.errors import DataError
from octolike.evaluation import frame_check, policy_check, replay_check
from octolike.model.network import build_network
from octolike.policy import Policy
from octolike.train.checkpoint import Run
from octolike.train.state import init_params

ROOT = Path(__file__).parents[1]
NETWORK = {"kind": "mlp", "hidden": 16, "blocks": 1}


INVERSE = """
import dataclasses

from octolike.data.specs.catalog import find_spec

SPEC = dataclasses.replace(
    find_spec("fake"),
    name="inverse",
    standardize=None,
    action_from=("action[0:6]", "1 - action[6:7]"),
    proprio_from=("observation.state",),
)
DATASETS = [SPEC]
"""


def config_for(directory: Path, mix: str) -> Config:
    """Return the config of a run with every input, and images smaller than the stored ones."""
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
    """Return an untrained run: the checks do not depend on its quality."""
    settings = dataclasses.asdict(config.model)
    network = build_network(settings, data.spec, data.names)
    tree = jax.eval_shape(lambda: init_params(network, data.spec, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), tree)
    return Run(config, list(data.embodiments), data.spec, data.names, params, 5)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Return (run, data, frames of the data, policy)."""
    directory = tmp_path_factory.mktemp("check")
    write_fake_dataset(directory / "data", side=40)
    config = config_for(directory, "fake")
    data = open_data(config)
    run = run_for(config, data)
    frames = list(recorded_frames.sample_frames(data, config.data, "fake", 32))
    return run, data, frames, Policy(run, batch_size=recorded_frames.BATCH)


@pytest.fixture(scope="module")
def compared(opened):
    """Return the comparison of a correct policy."""
    run, _, frames, policy = opened
    return frame_check.compare_frames(policy, "fake", frames, run)


def faults(compared) -> list[str]:
    return policy_check.CheckReport(compared=[compared]).faults


def differences(policy, frames) -> dict[str, frame_check.InputDifference]:
    """Return the differences of the network's inputs, without sampling actions."""
    out = frame_check.FrameComparison("fake")
    observations = [{k: o[k] for k in policy.observation_keys} for o in frames.observations]
    tasks = [frame_check.create_task(policy, x) for x in frames.conditionings]
    frame_check.compare_inputs(out, policy, observations, tasks, frames)
    return out.different


def test_frames_of_an_exclusive_run_condition_a_policy_as_their_batch(tmp_path):
    write_fake_dataset(tmp_path / "data", side=40)
    config = config_for(tmp_path, "fake")
    config.data.exclusive = True
    data = open_data(config)
    frames = next(recorded_frames.sample_frames(data, config.data, "fake", 8))
    kinds = [bool(x.instruction) for x in frames.conditionings]
    assert kinds == frames.batch["task"]["present"]["language"].tolist()
    assert [not x.goal for x in frames.conditionings] == kinds
    assert 0 < sum(kinds) < len(kinds)


def test_policy_training_and_validation_agree(compared):
    assert faults(compared) == []
    assert compared.frames == 32
    for key in (
        "observation.image_primary",
        "observation.image_wrist",
        "observation.proprio",
        "observation.timestep_mask",
        "task.image_primary",
        "task.language.ids",
    ):
        assert compared.keys[key] > 0
    assert "task.task_id" in compared.unread  # no tokenizer reads it
    assert compared.allowed < compared.error / 4  # the comparison of errors is meaningful
    assert compared.clipped == 0
    assert {len(compared.error_per("dimension")), len(compared.error_per("step"))} == {7, 3}


def test_frames_include_the_start_and_the_end_of_an_episode(opened):
    _, _, frames, _ = opened
    for batch in frames:
        assert not batch.batch["observation"]["timestep_mask"][0, 0]
        assert batch.observations[0]["proprio"].shape == (1, 7)  # no earlier frame exists
        assert not batch.batch["action_mask"][1, -1, 1:].any()
        assert batch.observations[2]["image_primary"].shape[1:] == (40, 40, 3)


@pytest.mark.parametrize("kernel", images.KERNELS)
def test_every_kernel_of_the_data_is_that_of_the_policy(tmp_path, kernel):
    write_fake_dataset(tmp_path / "data", side=40)
    config = config_for(tmp_path, "fake")
    config.data.resize = kernel
    data = open_data(config)
    frames = next(iter(recorded_frames.sample_frames(data, config.data, "fake", 16)))
    run = run_for(config, data)
    assert differences(Policy(run, batch_size=recorded_frames.BATCH), frames) == {}
    next_kernel = {"area": "bilinear", "bilinear": "lanczos3", "lanczos3": "area"}[kernel]
    run.config.data.resize = next_kernel
    different = differences(Policy(run, batch_size=recorded_frames.BATCH), frames)
    assert "observation.image_primary" in different


def test_frames_without_an_instruction_are_counted_and_left_out(tmp_path):
    cameras = ["image_primary", "image_wrist"]
    for name, texts in (("fake", ("", "go", "", "up")), ("tabletop", ("", ""))):
        episodes = [data_fakes.numbered(i, 5, cameras, text) for i, text in enumerate(texts)]
        data_fakes.write(tmp_path, name, {"train": episodes})
    config = data_fakes.config(tmp_path, "fake,tabletop", cameras={"primary": 8})
    data = open_data(config)
    table = data.describe()
    assert "no instruction: fake/train: 2 of 4 episodes\n" in table
    assert "no instruction: tabletop/train: 2 of 2 episodes; a policy conditioned on" in table
    sample = functools.partial(recorded_frames.sample_frames, data, config.data)
    (frames,) = sample("fake", 16, {"language"})
    assert {c.instruction for c in frames.conditionings} == {"go", "up"}
    with pytest.raises(DataError, match="no episode of tabletop/train has an instruction"):
        next(sample("tabletop", 16, {"language"}))
    assert len(next(sample("tabletop", 16, {"language", "goal"})).places) == 16


def test_a_wrong_resize_is_detected_with_its_place(opened, monkeypatch):
    run, _, frames, policy = opened

    def nearest(image, height, width, kernel):
        rows = np.arange(height) * len(image) // height
        columns = np.arange(width) * image.shape[1] // width
        return image[rows][:, columns]

    monkeypatch.setattr("octolike.policy.observations.resize", nearest)
    monkeypatch.setattr("octolike.policy.tasks.resize", nearest)
    comparison = frame_check.compare_frames(policy, "fake", frames[:1], run)
    assert {"observation.image_primary", "task.image_primary"} == comparison.different.keys()
    first = faults(comparison)[0]
    assert "fake: observation.image_primary, first at" in first
    assert "byte" in first
    assert "step" in first


def test_a_difference_of_one_in_one_pixel_is_detected(opened, monkeypatch):
    _, _, frames, policy = opened

    def off_by_one(image, height, width, kernel):
        out = images.resize(image, height, width, kernel).copy()
        out[3, 5, 1] ^= 1
        return out

    monkeypatch.setattr("octolike.policy.observations.resize", off_by_one)
    monkeypatch.setattr("octolike.policy.tasks.resize", off_by_one)
    by_key = differences(policy, frames[0])
    assert "image_primary[0, 3, 5, 1]" in by_key["observation.image_primary"].place
    assert by_key["observation.image_primary"].count == 16 * 2


@pytest.mark.parametrize("part", ["action", "proprio"])
def test_a_wrong_normalisation_is_detected(opened, part):
    run, _, frames, _ = opened
    (robot,) = run.embodiments
    statistics = getattr(robot, f"{part}_statistics")
    wrong = dataclasses.replace(statistics, mean=statistics.mean + 0.5 * statistics.std)
    run = dataclasses.replace(
        run, embodiments=[dataclasses.replace(robot, **{f"{part}_statistics": wrong})]
    )
    policy = Policy(run, batch_size=recorded_frames.BATCH)
    if part == "proprio":
        assert differences(policy, frames[0]).keys() == {"observation.proprio"}
    else:
        text = "\n".join(faults(frame_check.compare_frames(policy, "fake", frames[:1], run)))
        assert "un-normalised actions differ from the recorded ones by 0.5" in text


def test_a_policy_that_acts_differently_than_in_validation_is_detected(opened):
    run, _, frames, policy = opened

    class Sluggish(Policy):
        def sample_normalized(self, *args):
            return 0.5 * super().sample_normalized(*args)

    sluggish = object.__new__(Sluggish)
    sluggish.__dict__.update(policy.__dict__)
    (fault,) = faults(frame_check.compare_frames(sluggish, "fake", frames, run))
    assert "the action error is" in fault
    assert "noise explains" in fault


def test_actions_beyond_the_bounds_are_counted_as_clipped(opened):
    run, _, frames, _ = opened
    bounded = dataclasses.replace(run.embodiments[0], normalization="bounds")
    is_clipped = frame_check.clipped_actions(bounded, frames[0].actions)
    assert 0 < is_clipped.mean() < 0.5
    assert not is_clipped[..., 6].any()  # the gripper has no bounds
    assert not frame_check.clipped_actions(run.embodiments[0], frames[0].actions).any()


@pytest.mark.skipif(
    not (ROOT.parent / "shared" / "data" / "bridge_dataset").exists(),
    reason="no Bridge episodes in the shared data",
)
def test_resized_real_frames_are_equal_bit_for_bit(tmp_path):
    config = config_for(tmp_path, "bridge_dataset")
    config.data.root = str(ROOT.parent / "shared" / "data")
    config.data.cameras, config.data.goal = {"primary": 48}, "last"
    config.data.text["length"] = 32
    config.model.tokenizers.pop("wrist")
    data = open_data(config)
    policy = Policy(run_for(config, data), batch_size=recorded_frames.BATCH)
    (frames,) = recorded_frames.sample_frames(data, config.data, "bridge_dataset", 16)
    assert frames.observations[0]["image_primary"].shape[1:] == (64, 64, 3)
    assert differences(policy, frames) == {}


# The report


def replayed(success: bool, proprio, skill="push", seed=1) -> replay_check.DemonstrationReplays:
    """Return replays: exact as recorded, and the given one after the round trip."""
    exact = Replay(True, 3, np.zeros(3), np.zeros(3))
    round_trip = Replay(success, len(proprio), np.array(proprio), np.zeros(len(proprio)))
    return replay_check.DemonstrationReplays(skill, seed, exact, round_trip)


EXACT, DIVERGING = replayed(True, [0, 0, 1e-8]), replayed(False, [0, 0, 0.2], seed=7)


def test_a_few_diverging_replays_are_remarks_and_many_are_faults():
    few = policy_check.CheckReport(replays=[EXACT] * 39 + [DIVERGING], simulator="tabletop")
    assert few.faults == []
    assert "push, seed 7, actions after the round trip: diverges" in few.remarks[0]
    assert "at step 2, by up to 0.2 in proprio" in few.table()
    many = policy_check.CheckReport(replays=[EXACT] * 9 + [DIVERGING], simulator="tabletop")
    assert many.faults == few.remarks


def test_a_replay_with_another_start_is_a_fault():
    report = policy_check.CheckReport(replays=[EXACT] * 99 + [replayed(True, [0.1, 0, 0])])
    assert "diverges from the recording at step 0" in report.faults[0]


def test_a_crash_of_the_simulator_is_a_fault():
    broken = replay_check.DemonstrationReplays(
        "lift", 3, EXACT.recorded, "Traceback:\nArithmeticError: no"
    )
    report = policy_check.CheckReport(replays=[EXACT, broken])
    assert "lift, seed 3" in report.faults[0]
    assert "ArithmeticError: no" in report.faults[0]
    assert "1/2" in report.table()


def test_the_report_has_a_table_a_figure_and_json(compared, tmp_path):
    report = policy_check.CheckReport(
        [EXACT, replayed(True, [0, 0], "lift")], [compared], "tabletop"
    )
    assert report.table().endswith("no differences")
    figure = report.write(tmp_path / "check_policy")
    assert figure.read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "check_policy" / "check_policy.json").read_text())
    assert data["faults"] == []
    assert data["inputs"][0]["error_per_dimension"].keys() == set(compared.names)
    assert len(data["replays"]) == 2


# Data


def test_episodes_without_a_seed_cannot_be_replayed(opened):
    _, data, _, _ = opened
    count, episodes = recorded_frames.sample_episodes(data.source("fake"), 2)
    assert count == 2
    with pytest.raises(
        DataError, match=r"does not record its seed, split, skill.*octolike collect"
    ):
        next(episodes)


def test_a_replay_has_the_idle_steps_that_training_leaves_out(tmp_path):
    episode = next(fake_episodes(0, 1, steps=8, cameras={"primary": 40, "wrist": 40}))
    steps, length = episode["steps"], len(episode["steps"]["action"])
    steps["action"][3, :6] = 0  # idle; the gripper stays as it is
    steps["action"][3, 6] = steps["action"][2, 6]
    steps["executed_action"] = np.arange(7 * length, dtype=np.float32).reshape(length, 7)
    episode["episode_metadata"] |= {"seed": 3, "split": "train", "skill": "touch"}
    writer = Writer(str(tmp_path / "data"), "fake", "1.0.0", {"train": 1})
    writer.write("train", 0, [episode])
    writer.finish()
    config = config_for(tmp_path, "fake")
    config.data.filters, config.data.validation_split = Component(idle=1e-3), ""
    source = open_data(config).source("fake")
    assert source.index.idle_steps > 0
    _, episodes = recorded_frames.sample_episodes(source, 1)
    (replayed,) = episodes
    np.testing.assert_array_equal(replayed.actions, steps["executed_action"])
    np.testing.assert_array_equal(replayed.observation["proprio"], steps["observation"]["state"])


def test_executed_actions_are_converted_as_the_labels_are(tmp_path):
    """With noise they differ from the labels; both are stored in the dataset's convention."""
    episode = next(fake_episodes(0, 1, steps=8, cameras={"primary": 40, "wrist": 40}))
    steps = episode["steps"]
    steps["executed_action"] = executed = steps["action"] + np.float32(0.01)
    episode["episode_metadata"] |= {"seed": 3, "split": "train", "skill": "touch"}
    writer = Writer(str(tmp_path / "data"), "inverse", "1.0.0", {"train": 1})
    writer.write("train", 0, [episode])
    writer.finish()
    config = config_for(tmp_path, "inverse")
    config.data.validation_split = ""
    (tmp_path / "inverse.py").write_text(INVERSE)
    config.data.specs = (str(tmp_path / "inverse.py"),)
    _, episodes = recorded_frames.sample_episodes(open_data(config).source("inverse"), 1)
    (replayed,) = episodes
    np.testing.assert_array_equal(replayed.actions[:, :6], executed[:, :6])
    np.testing.assert_array_equal(replayed.actions[:, 6], 1 - executed[:, 6])


def test_an_unknown_dataset_is_named(opened):
    _, data, _, _ = opened
    with pytest.raises(ConfigError, match=r"dataset of this mix: 'fke'; did you mean 'fake'"):
        data.source("fke")


# The script


@pytest.mark.slow
def test_the_script_prints_differences_and_fails(opened, tmp_path):
    run, _, _, _ = opened
    robot = run.embodiments[0]
    statistics = dataclasses.replace(robot.proprio_statistics, std=robot.proprio_statistics.std / 2)
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
    assert "no replay: no simulator is known for fake" in done.stdout
    assert "DIFFERENT: fake: observation.proprio" in done.stdout
    assert (tmp_path / "check_policy" / "check_policy.png").exists()


@pytest.mark.parametrize("text", ["relative tool_frame rotation_6d", "absolute"])
def test_policy_and_training_agree_in_another_representation(opened, tmp_path, text):
    config = config_for(tmp_path, "fake")
    config.data.root, config.data.representation = opened[0].config.data.root, text
    data = open_data(config)
    run = run_for(config, data)
    frames = list(recorded_frames.sample_frames(data, config.data, "fake", 16))
    policy = Policy(run, batch_size=recorded_frames.BATCH)
    comparison = frame_check.compare_frames(policy, "fake", frames, run)
    assert faults(comparison) == []
    assert comparison.names == run.embodiments[0].learned.names
    assert list(comparison.meaning.sides) == ["gripper"]
    assert policy.sample_batch(
        [{k: o[k] for k in policy.observation_keys} for o in frames[0].observations[:1]],
        [frame_check.create_task(policy, frames[0].conditionings[0])],
        [0],
    ).shape == (1, 3, 7)


# Sides and ranges


def test_sides_are_reported_next_to_the_more_frequent_side(compared, opened):
    _, _, frames, _ = opened
    (name,) = compared.meaning.sides
    assert name == "gripper"
    right, upper, total = compared.meaning.sides[name]
    mask = np.concatenate([f.batch["action_mask"][:, -1, :, 6] for f in frames])
    gripper = np.concatenate([f.actions[..., 6] for f in frames])
    assert total == mask.sum() * frame_check.SAMPLES
    assert upper == (gripper[mask] > 0.5).sum() * frame_check.SAMPLES
    assert 0 <= right <= total
    assert "always the more frequent side" in frame_check.frame_table(compared)
    assert compared.to_json()["sides"]["gripper"]["right"] == pytest.approx(right / total)


def test_proprio_in_other_units_than_the_record_is_a_fault(opened):
    run, _, frames, policy = opened
    samples = np.stack([f.actions for f in frames[:1]])[0][:, None]
    (robot,) = run.embodiments
    s = robot.proprio_statistics
    degrees = {n: getattr(s, n) / 57.3 for n in ("mean", "std", "min", "max", "p01", "p99")}
    robot = dataclasses.replace(robot, proprio_statistics=dataclasses.replace(s, **degrees))
    check = frame_check.MeaningCheck()
    check.add(robot, frames[0], samples, samples)
    assert any("far outside the record's range" in fault for fault in check.faults)
    sound = frame_check.MeaningCheck()
    sound.add(policy.embodiment, frames[0], samples, samples)
    assert sound.faults == []
    right, _, total = sound.sides["gripper"]
    assert right == total  # the demonstrated actions themselves


def test_commands_outside_the_demonstrated_range_are_counted(opened):
    _, _, frames, policy = opened
    samples = np.stack([frames[0].actions, frames[0].actions], axis=1).copy()
    samples[:, 1, :, 0] += 10
    record = policy.embodiment
    s = record.action_statistics
    check = frame_check.MeaningCheck()
    check.add(record, frames[0], samples, samples)
    expected = "commands outside the demonstrated range: dx 50.0% (by up to "
    assert expected in "\n".join(check.lines())
    farthest = (samples[:, 1, :, 0].max() - s.max[0]) / (s.max[0] - s.min[0])
    assert check.farthest["dx"] == pytest.approx(farthest, rel=1e-4)
    assert check.farthest["dy"] == 0


def test_a_dimension_that_never_moved_has_no_range_to_leave(opened):
    _, _, frames, policy = opened
    s = policy.embodiment.action_statistics
    low, high = s.min.copy(), s.max.copy()
    low[1] = high[1] = s.mean[1]
    record = dataclasses.replace(
        policy.embodiment, action_statistics=dataclasses.replace(s, min=low, max=high)
    )
    samples = frames[0].actions[:, None]
    check = frame_check.MeaningCheck()
    check.add(record, frames[0], samples, samples)
    assert "dy" not in check.commands
    assert "dx" in check.commands
