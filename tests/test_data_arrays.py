"""Batches from arrays equal those of the RLDS pipeline, and resume exactly."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from octolike import types
from octolike.config import Component, Config, ConfigError
from octolike.data.array_shards import ArrayShards
from octolike.data.arrays import ArrayFrames, ArraySource
from octolike.embodiment import Embodiment, Layout

LENGTHS = (3, 9, 5)
LAYOUT = Layout(
    names=("dx", "dy", "dz", "gripper"),
    units=("cm", "cm", "cm", ""),
    absolute=(False, False, False, True),
    normalized=(True, True, True, False),
)
ROBOT = Embodiment(
    name="metaworld", robot="arm", control_hz=80, gripper="effort", action=LAYOUT, proprio=LAYOUT,
    datasets=("metaworld",),
)  # fmt: skip


def episodes(lengths=LENGTHS, seed=0):
    """Yield episodes in the simulators' format; pixel values encode the episode and the step."""
    rng = np.random.default_rng(seed)
    for e, length in enumerate(lengths):
        # not black: the pipeline treats a black image as a missing camera
        shade = (60 + 10 * e + np.arange(length, dtype=np.uint8))[:, None, None, None]
        yield {
            "steps": {
                "observation": {
                    "image_primary": np.broadcast_to(shade, (length, 16, 16, 3)).copy(),
                    "state": rng.uniform(-1, 1, (length, 4)).astype(np.float32),
                },
                "action": rng.uniform(-1, 1, (length, 4)).astype(np.float32),
                "language_instruction": f"do thing {e % 2}",
            },
            "episode_metadata": {"success": True, "task": f"task-{e}"},
        }


def config(**data):
    c = Config(workdir="unused")
    c.data.mix, c.data.tasks, c.data.goal = "metaworld", "label", "none"
    c.data.cameras, c.data.window, c.data.horizon = {"primary": 16}, 2, 4
    c.data.batch_size, c.data.text = 6, Component(kind="hash", length=4, vocabulary=64)
    for name, value in data.items():
        setattr(c.data, name, value)
    c.check()
    return c


def opened(held_out=None, **data):
    return ArraySource(config(**data), ArrayFrames.from_episodes(episodes()), held_out, ROBOT)


def leaves(batch):
    return dict(types.flatten(batch))


def same(a, b):
    a, b = leaves(a), leaves(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("extra", [{}, {"task_ids": True, "normalization": "bounds"}])
def test_every_frame_gives_the_same_example_as_the_rlds_pipeline(tmp_path, extra):
    from octolike.data import open_data
    from octolike.data.pipeline import goals
    from octolike.data.rlds.writer import Writer

    writer = Writer(str(tmp_path), "metaworld", "1.0.0", {"train": 1})
    writer.write("train", 0, episodes())
    writer.finish()
    c = config(root=str(tmp_path), validation_split="", **extra)
    rlds = open_data(c)
    frames = ArrayFrames.from_episodes(episodes())
    arrays = ArraySource(c, frames, None, ROBOT)
    assert arrays.spec == rlds.spec
    assert arrays.names == rlds.names
    record, rlds_record = arrays.embodiments[0], rlds.embodiments[0]
    for part in ("action_statistics", "proprio_statistics"):
        for name in ("mean", "std", "min", "max"):
            value = getattr(getattr(record, part), name)
            expected = getattr(getattr(rlds_record, part), name)
            np.testing.assert_allclose(value, expected, atol=1e-5)
    # RLDS percentiles are estimates, these are exact: normalise both with the same record.
    arrays._builder._robot = rlds_record
    positions = np.array([(e, t) for e, length in enumerate(LENGTHS) for t in range(length)])
    batch = arrays._builder.batch(frames, np.arange(len(positions)), dropout=None)
    draws = np.zeros((len(positions), goals.DRAWS))
    expected = leaves(rlds.examples(rlds.source("metaworld"), positions, draws))
    types.check_batch(batch, rlds.spec)
    batch = leaves(batch)
    for name, value in expected.items():
        atol = 2 if "image_primary" in name and value.dtype == np.uint8 else 1e-5
        difference = np.abs(np.asarray(value, np.float64) - np.asarray(batch[name], np.float64))
        assert difference.max() <= atol, name


def test_chunks_and_masks_match_their_definition():
    data, starts = opened(), np.cumsum([0, *LENGTHS])
    frames, robot = ArrayFrames.from_episodes(episodes()), data.embodiments[0]
    batch = data._builder.batch(frames, np.arange(sum(LENGTHS)), dropout=None)
    for i in range(sum(LENGTHS)):
        e = int(np.searchsorted(starts, i, side="right") - 1)
        for w in range(2):
            step = i - starts[e] - 1 + w
            assert batch["observation"]["timestep_mask"][i, w] == (step >= 0)
            shade = batch["observation"]["image_primary"][i, w]
            assert (shade == 60 + 10 * e + max(step, 0)).all()
            for h in range(4):
                valid = step >= 0 and step + h < LENGTHS[e]
                assert (batch["action_mask"][i, w, h] == valid).all()
                if valid:
                    action = frames.action[starts[e] + step + h]
                    expected = robot.normalize_action(action)
                    np.testing.assert_array_equal(batch["action"][i, w, h], expected)


def test_an_epoch_shows_each_frame_once_and_two_epochs_differ():
    stream = opened(batch_size=17, window=1).train()
    shades = [next(stream)["observation"]["image_primary"][:, 0, 0, 0, 0] for _ in range(2)]
    assert all(len(set(s.tolist())) == sum(LENGTHS) for s in shades)
    assert (shades[0] != shades[1]).any()


def test_resuming_equals_no_interruption():
    data = opened(keep_language=0.5, task_ids=True)
    stream = data.train()
    uninterrupted = [(next(stream), stream.state()) for _ in range(7)]
    position = uninterrupted[3][1]
    resumed = data.train(position)
    assert all(same(next(resumed), batch) for batch, _ in uninterrupted[4:])
    stream.feedback({"metaworld": 1.0}, {})
    assert stream.state_at(position) == position
    assert stream.memory() > 0
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_hosts_share_a_batch():
    data = opened(keep_language=0.5, keep_task_id=0.5, task_ids=True)
    batch, parts = next(data.train()), [next(data.train(None, (i, 2))) for i in range(2)]
    for name, value in leaves(batch).items():
        np.testing.assert_array_equal(value, np.concatenate([leaves(p)[name] for p in parts]))
    with pytest.raises(ConfigError, match="batch_size 6 cannot be divided for process 0 of 4"):
        data.train(None, (0, 4))


def test_validation_is_the_same_at_every_call_and_keeps_instructions():
    # task-3 is not a training task
    held_out = ArrayFrames.from_episodes(episodes((4, 4, 4, 4), seed=1))
    data = opened(held_out, keep_language=0.0, task_ids=True)
    first, again = (list(data.validation()["metaworld"]()) for _ in range(2))
    assert len(first) == 3  # 16 frames in batches of 6; the last one is smaller
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    for batch in first:
        types.check_batch(batch, data.spec)
        assert batch["task"]["present"]["language"].all()
        is_trained = batch["task"]["task_id"] < 3
        np.testing.assert_array_equal(batch["task"]["present"]["task_id"], is_trained)
    shares = [next(data.validation((i, 4))["metaworld"]()) for i in range(4)]
    assert [len(x["action"]) for x in shares] == [2, 2, 2, 2]  # of 6
    assert not shares[3]["action_mask"].any()
    joined = {k: np.concatenate([x[k] for x in shares[:3]]) for k in ("action", "action_mask")}
    assert same(joined, {k: first[0][k] for k in joined})
    assert opened().validation() == {}


def test_dropout_never_removes_all_conditioning():
    data = opened(keep_language=0.0, keep_task_id=0.0, task_ids=True)
    batch = next(data.train())
    assert batch["task"]["present"]["language"].all()


def assert_equal(frames, expected):
    for f in dataclasses.fields(frames):
        a, b = getattr(frames, f.name), getattr(expected, f.name)
        if f.name == "images":
            assert a.keys() == b.keys()
            a, b = a["primary"], b["primary"]
        np.testing.assert_array_equal(a, b)


def test_frames_survive_their_files(tmp_path):
    root, recorded = tmp_path / "data", list(episodes())
    store = ArrayShards(str(root), {"train": 3, "val": 1})
    store.write("train", 2, recorded[2:], tries={"do": [1, 0, 0]})
    store.write("train", 0, recorded[:2])
    assert store.write("train", 1, [], may_be_empty=True, tries={"do": [0, 8, 0]}) == 0
    assert store.write("train", 0, []) == 2, "an existing shard is kept"
    store = ArrayShards(str(root), {"train": 3, "val": 1})
    assert store.shard_note("train", 1)["tries"] == {"do": [0, 8, 0]}
    assert store.shard_note("val", 0) is None
    assert_equal(store.frames("train"), ArrayFrames.from_episodes(recorded))
    store.write("val", 0, [], may_be_empty=True)
    assert store.frames("val") is None
    with pytest.raises(ConfigError, match="no episodes"):
        ArrayShards(str(tmp_path / "empty"), {"train": 1}).write("train", 0, [])
    assert len([*root.iterdir()]) == 4, "nothing but the shards"


def test_a_file_that_is_no_whole_shard_is_named(tmp_path):
    shards = {"train": 1}
    ArrayShards(str(tmp_path), shards).write("train", 0, episodes())
    (shard,) = tmp_path.iterdir()
    data = shard.read_bytes()
    np.savez(tmp_path / "train.npz", action=np.zeros((3, 4)))
    with pytest.raises(ConfigError, match=r"train.npz cannot be read as demonstrations: .*note"):
        ArrayShards(str(tmp_path), shards)
    (tmp_path / "train.npz").unlink()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"00000-of-00001.npz cannot be read .*remove it"):
        ArrayShards(str(tmp_path), shards)


def test_frames_made_with_other_settings_are_rejected(tmp_path):
    def opened(settings, train=1):
        return ArrayShards(str(tmp_path), {"train": train}, settings)

    opened({"noise": 0.5, "skills": {"reach": 3}}).write("train", 0, episodes())
    assert opened({"skills": {"reach": 3}, "noise": 0.5}).frames("train")
    with pytest.raises(ConfigError, match=r"recorded with .*'reach': 3.*this config has .*: 9"):
        opened({"noise": 0.5, "skills": {"reach": 9}})
    with pytest.raises(ConfigError, match=r"recorded with train-00000-of-00001.npz.*'train': 2"):
        opened({"noise": 0.5, "skills": {"reach": 3}}, train=2)


def test_errors_name_the_setting_or_frame():
    for match, data in (
        ("data.episodes is 10", {"episodes": 10}),
        ("data.limits is", {"limits": Component(metaworld=3)}),
        ("data.goal is 'uniform'", {"goal": "uniform"}),
        ("data.sampling.kind is 'uniform'", {"sampling": Component(kind="uniform")}),
        ("data.mix is 'a,b'", {"mix": "a,b"}),
        ("data.cameras has 'wrist', the frames have primary", {"cameras": {"wrist": 16}}),
        (r"cameras.primary is 32, but its images are \[16, 16, 3\]", {"cameras": {"primary": 32}}),
    ):
        with pytest.raises(ConfigError, match=match):
            opened(**data)
    with pytest.raises(ConfigError, match=r"the saved data state is .*the data here begin at"):
        opened().train({"batches": 3, "dataset": "metaworld", "frames": 18})
    frames = ArrayFrames.from_episodes(episodes())
    with pytest.raises(ConfigError, match="17 actions, but 16 for proprio"):
        dataclasses.replace(frames, proprio=frames.proprio[1:])
    bad = frames.action.copy()
    bad[4, 1] = np.nan
    with pytest.raises(ConfigError, match="action is not finite in 1 frames, the first is frame 4"):
        dataclasses.replace(frames, action=bad)
    with pytest.raises(ConfigError, match="no episodes"):
        ArrayFrames.from_episodes([])
    with pytest.raises(ConfigError, match="no episode for training"):
        ArraySource(config(), None, frames, ROBOT)


def test_neither_the_module_nor_the_script_needs_tensorflow():
    code = (
        "import sys, octolike.data.array_shards, octolike.data.specs.catalog; "
        "import octolike.envs.demonstrations; "
        "print([m for m in sys.modules if m.startswith(('tensorflow', 'jax'))])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
