"""Bridge V2: real episodes agree with Octo's, except for Octo's own faults.

The golden arrays are Octo's batches of the same 25 episodes (window 2, horizon 4). Where they
differ from octolike's, a test names the fault of Octo that explains the difference exactly.
"""

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from data_fakes import config, write_numbered

from octolike import types
from octolike.config import Component
from octolike.data import open_data
from octolike.data.pipeline import windows
from octolike.embodiment import STATISTICS, Embodiment, Statistics

W, H = 2, 4
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # Octo sums in float32: values of several σ differ by more


@pytest.fixture(scope="module")
def root(shared, tmp_path_factory):
    """A copy of the episodes in a writable folder."""
    if not (shared / "data" / "bridge_dataset").exists():
        pytest.skip(f"no Bridge episodes in {shared / 'data'}")
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(shared / "data" / "bridge_dataset", root / "bridge_dataset")
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root


def bridge(root, **data):
    text = Component(kind="hash", length=16, vocabulary=512)
    settings = {"cameras": {"primary": 64}, "window": W, "horizon": H, "pool": 25, "text": text}
    return config(root, **({"mix": "bridge_dataset"} | settings | data))


@pytest.fixture(scope="module")
def data(root):
    return open_data(bridge(root))


@pytest.fixture(scope="module")
def source(data):
    return data._sources[0]


@pytest.fixture(scope="module")
def raw(source):
    """The standard episodes in robot units."""
    i = source.index
    return [source.reader.read_episode(*map(int, at)) for at in zip(i.shard, i.offset, i.length)]


def twice(source, raw, part):
    """Return the statistics over train and val, as Octo takes them: here val is a copy of train."""
    x = np.concatenate([getattr(episode, part) for episode in raw * 2])
    p01, p99 = np.quantile(x, (0.01, 0.99), axis=0)
    arrays = (x.mean(0, np.float64), x.std(0, np.float64), x.min(0), x.max(0), p01, p99)
    arrays = dict(zip(STATISTICS, (np.asarray(a, np.float32) for a in arrays), strict=True))
    return Statistics(**arrays, steps=len(x), episodes=2 * len(raw))


@pytest.mark.parametrize("part", ["action", "proprio"])
def test_statistics_are_octos(shared, source, raw, part):
    octos = json.loads((shared / "golden" / "octo_bridge_statistics.json").read_text())
    ours = getattr(source.embodiment, f"{part}_statistics")
    # Octo's fault: statistics over train and val together. Ours are of the training steps ...
    assert (octos["num_trajectories"], octos["num_transitions"]) == (50, 450)
    assert (ours.episodes, ours.steps) == (25, 225)
    # ... and since val is a copy of train here, only the interpolated quantiles can differ.
    both = twice(source, raw, part)
    for name in STATISTICS:
        np.testing.assert_allclose(getattr(both, name), octos[part][name], atol=1e-5, err_msg=name)
        if name not in ("p01", "p99"):
            np.testing.assert_allclose(getattr(ours, name), octos[part][name], atol=1e-5)


def golden_of(arrays, kind, episode):
    """Return Octo's leaves of an episode, found by its proprio (Octo's order is another one)."""
    error = {}
    for j in range(25):
        proprio = arrays[f"{kind}/{j:02d}/observation/proprio"][:, -1]
        error[j] = np.abs(proprio - episode).max() if proprio.shape == episode.shape else np.inf
    j = min(error, key=error.get)
    prefix = f"{kind}/{j:02d}/"
    return j, {k.removeprefix(prefix): arrays[k] for k in arrays if k.startswith(prefix)}


@pytest.mark.parametrize("kind", ["normal", "bounds"])
def test_normalised_chunks_are_octos(shared, source, raw, kind):
    with np.load(shared / "golden" / "octo_bridge_trajectories.npz") as stored:
        arrays = {k: stored[k] for k in stored.files if k.startswith(kind)}
    fields = ("name", "robot", "control_hz", "gripper", "action", "proprio")
    record = Embodiment(
        **{f: getattr(source.embodiment, f) for f in fields},
        normalization=kind,
        action_statistics=twice(source, raw, "action"),
        proprio_statistics=twice(source, raw, "proprio"),
    )
    numbers = set()
    for episode in raw:
        length = len(episode)
        proprio = record.normalize_proprio(episode.proprio)
        action = record.normalize_action(episode.action)
        number, octo = golden_of(arrays, kind, proprio)
        numbers.add(number)
        window = [windows.window_steps(t, W) for t in range(length)]
        chunks = [windows.chunk_steps(t, W, H, length, length) for t in range(length)]
        steps, mask = map(np.stack, zip(*window, strict=True))
        entries, valid = map(np.stack, zip(*chunks, strict=True))

        np.testing.assert_array_equal(mask, octo["observation/timestep_pad_mask"])
        np.testing.assert_allclose(proprio[steps], octo["observation/proprio"], **CLOSE)
        # Before the episode's start Octo repeats the whole chunk of step 0; ours keeps counting.
        # Neither is ever trained on.
        np.testing.assert_allclose(action[entries][mask], octo["action"][mask], **CLOSE)

        # Octo's faults: a chunk is valid one step past the end, and also before the start, and the
        # task is completed two steps after it is: at T + 1, where the last step is T − 1.
        entry = np.arange(length)[:, None, None] - (W - 1) + np.arange(W)[:, None] + np.arange(H)
        np.testing.assert_array_equal(octo["action_pad_mask"].all(-1), entry < length + 1)
        np.testing.assert_array_equal(octo["action_pad_mask"].any(-1), entry < length + 1)
        np.testing.assert_array_equal(valid, (entry < length) & mask[..., None])
        np.testing.assert_array_equal(octo["observation/task_completed"], entry >= length + 1)

        text = octo["task/language_instruction"]
        assert {t.decode() for t in text} == set(episode.instructions)
    assert numbers == set(range(25))


def test_the_last_step_is_dropped_and_flags_are_not_believed(source, raw):
    assert source.index.steps.tolist() == [9] * 25
    # has_image_0 is False in all of them, yet the pictures are there
    assert all(len(e.images["primary"]) == 9 for e in raw)
    features = source.reader.features
    flags = [
        features.deserialize_example(r)["episode_metadata"]["has_image_0"].numpy()
        for r in source.reader.read_records(0)
    ]
    assert not any(flags)


def test_pictures_come_as_they_are_stored(data, raw):
    batch = next(data.train())
    types.check_batch(batch, data.spec)
    images = {tf.io.decode_jpeg(x).numpy().tobytes() for e in raw for x in e.images["primary"]}
    shots = batch["observation"]["image_primary"].reshape(-1, 64, 64, 3)
    assert all(shot.tobytes() in images for shot in shots)
    np.testing.assert_array_equal(batch["task"]["language"]["mask"].any(1), True)


def test_bridge_and_another_robot_share_a_batch(root):
    write_numbered(root, "fake", [4, 5, 6])
    cameras = {"primary": 32, "wrist": 16}
    mix = bridge(root, mix="bridge_dataset=1,fake=1", mix_weights="shares", cameras=cameras)
    mix.data.batch_size, mix.data.goal = 64, "uniform"
    data = open_data(mix)
    batch = next(data.train())
    types.check_batch(batch, data.spec)
    real = batch["dataset"] == 0
    assert 0.25 < real.mean() < 0.75
    np.testing.assert_array_equal(batch["embodiment"], batch["dataset"])
    assert [e.name for e in data.embodiments] == ["bridge_dataset", "fake"]
    for part in (batch["observation"], batch["task"]):
        present = part["present"]
        assert present["image_primary"].all()
        assert not present["image_wrist"][real].any()  # Bridge has no wrist camera
        assert present["image_wrist"][~real].all()
        assert not part["image_wrist"][real].any()
        assert part["image_wrist"][~real].any((-1, -2, -3)).all()


def test_a_read_only_directory_is_left_as_it_is(root, tmp_path):
    copy = tmp_path / "read-only"
    shutil.copytree(root / "bridge_dataset" / "1.0.0", copy / "bridge_dataset" / "1.0.0")
    place = copy / "bridge_dataset" / "1.0.0"
    shutil.rmtree(place / ".octolike", ignore_errors=True)
    place.chmod(0o555)
    try:
        open_data(bridge(copy, cache=str(tmp_path / "mine")))
        assert not (place / ".octolike").exists()
        assert [p.name.split("-")[:2] for p in (tmp_path / "mine").iterdir()] == [
            ["bridge_dataset", "train"]
        ]
    finally:
        place.chmod(0o755)
