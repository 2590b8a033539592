"""Order, shuffling, resume and caching: a batch is a pure function of config and position."""

import gc
import json
import os
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_fakes import numbered, opened, shown, write, write_numbered

from octolike import types
from octolike.config import ConfigError
from octolike.data.pipeline.order import EpisodeTable, Order, PoolKey
from octolike.data.rlds import statistics
from octolike.data.rlds.index import index_digest
from octolike.data.rlds.reader import Reader
from octolike.data.specs import standardize
from octolike.data.specs.catalog import find_spec
from octolike.data.specs.mixes import Mixture
from octolike.errors import DataError

LENGTHS = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5]  # of "fake"
BOTH = {"mix": "fake=1,bridge_dataset=1", "cameras": {"primary": 8, "wrist": 4}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two datasets; Bridge's has no wrist camera."""
    path = tmp_path_factory.mktemp("data")
    write_numbered(path, "fake", LENGTHS)
    write_numbered(path, "bridge_dataset", [4, 6, 8])
    return path


def assert_equal(a, b):
    for (path, x), (other, y) in zip(types.flatten(a), types.flatten(b), strict=True):
        assert path == other
        np.testing.assert_array_equal(x, y, err_msg=path)


def differ(a, b) -> bool:
    return any(
        not np.array_equal(x, y)
        for (_, x), (_, y) in zip(types.flatten(a), types.flatten(b), strict=True)
    )


def take(stream, count):
    """Return `count` batches and the state after each, as in a checkpoint."""
    return [(next(stream), json.loads(json.dumps(stream.state()))) for _ in range(count)]


def an_order(steps, *, shares=(1.0,), groups=None, seed=0, start=0, pool=3, budget=10**9, **more):
    """Return an order of episodes of 10 bytes per step."""
    steps = np.array(steps)
    groups = np.zeros(len(steps), int) if groups is None else np.array(groups)
    stock = EpisodeTable(steps=steps, sizes=10 * steps, groups=groups)
    settings = {"seed": seed, "start": start, "pool": pool, "budget": budget}
    return Order(stock, np.array(shares), **settings, **more)


@pytest.mark.parametrize(("pool", "budget"), [(1, 10**9), (3, 10**9), (100, 10**9), (100, 90)])
def test_every_epoch_has_every_frame_once(pool, budget):
    steps = [3, 1, 4, 1, 5, 9, 2]
    order = an_order(steps, pool=pool, budget=budget)
    everything = [(e, t) for e, n in enumerate(steps) for t in range(n)]
    epochs = []
    for epoch in range(3):
        pools, actual = order.take(epoch * len(everything), len(everything))
        frames = [tuple(f) for f in actual.tolist()]
        assert sorted(frames) == everything
        epochs.append(frames)
        # pools are consecutive, with disjoint episodes
        assert pools == [PoolKey(0, epoch, i) for i in range(len(pools))]
        assert [order.following(p) for p in pools] == [*pools[1:], PoolKey(0, epoch + 1, 0)]
        members = [order.episodes(p).tolist() for p in pools]
        assert sorted(e for some in members for e in some) == list(range(len(steps)))
        assert list(dict.fromkeys(e for e, _ in frames)) == [e for some in members for e in some]
        for some in members:
            assert len(some) <= pool
            assert sum(10 * steps[e] for e in some) <= budget
        if budget > 90:
            assert len(pools) == -(-len(steps) // pool)
    assert epochs[0] != epochs[1] != epochs[2]
    # the same from any position, in pieces of any size
    _, all_of_them = order.take(0, 75)
    for at, count in ((0, 1), (24, 2), (13, 60)):
        np.testing.assert_array_equal(order.take(at, count)[1], all_of_them[at : at + count])
    pool, done = order.progress(25)
    assert (pool, done) == (PoolKey(0, 1, 0), 0)


def test_the_order_depends_on_seed_and_start():
    settings = ({}, {"seed": 1}, {"start": 7}, {})
    a, b, c, d = (an_order([5] * 6, **s).take(0, 30)[1].tolist() for s in settings)
    assert a == d
    assert a not in (b, c)


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.98, 0.01, 0.01), (0.9, 0.1, 0.0)])
def test_repetitions_realise_the_shares_evenly(shares):
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], [5, 300, 40])
    steps = rng.integers(1, 20, len(groups))
    order = an_order(steps, shares=shares, groups=groups, pool=32)
    _, frames = order.take(0, 20_000)
    actual = np.bincount(groups[frames[:, 0]], minlength=3) / len(frames)
    np.testing.assert_allclose(actual, shares, atol=0.02)
    for g in range(3):  # repetitions within a group differ by at most one
        own = frames[groups[frames[:, 0]] == g]
        times = np.zeros((len(steps), 20), int)
        np.add.at(times, tuple(own.T), 1)
        firsts = times[groups == g, 0]
        if shares[g]:
            pools = 32 * shares[g] * len(steps) / (groups == g).sum()  # some are in progress
            assert firsts.max() - firsts.min() <= 2 + pools


def test_a_host_needs_only_its_own_episodes():
    whole = an_order([2] * 50, pool=10)
    own = an_order([2] * 50, pool=10, part=(2, 4, 8))
    for batch in range(12):
        pools, frames = whole.take(8 * batch + 2, 2)
        assert set(frames[:, 0]) <= {e for p in pools for e in own.episodes(p).tolist()}
    assert len(own.episodes(PoolKey(0, 0, 0))) <= 6 < len(whole.episodes(PoolKey(0, 0, 0)))


def test_batches_have_every_frame_once_per_epoch(root):
    frames = [(e, t) for e, n in enumerate(LENGTHS) for t in range(n)]
    assert len(frames) == 35
    stream = opened(root, batch_size=5, pool=3).train()
    for _ in range(2):
        seen = [next(stream)["observation"]["image_primary"][:, -1] for _ in range(7)]
        assert sorted(map(tuple, shown(np.concatenate(seen)))) == frames
    stream.close()


def test_the_episode_limit_selects_the_first_episodes(root):
    data = opened(root, episodes=2, batch_size=20)
    assert {e for e, _ in shown(next(data.train())["observation"]["image_primary"][:, 0])} == {0, 1}
    assert data.embodiments[0].action_statistics.episodes == len(LENGTHS)  # of all episodes


def test_resuming_anywhere_equals_no_interruption(root):
    settings = {"mix": BOTH["mix"], "window": 2, "pool": 2, "batch_size": 3}
    settings |= {"goal": "uniform", "keep_language": 0.6, "keep_goal": 0.6}
    whole = take(opened(root, **settings).train(), 40)
    again = opened(root, **settings)
    for at in np.random.default_rng(0).choice(36, size=10, replace=False):
        resumed = again.train(whole[at][1])
        for (a, after), (b, expected) in zip(take(resumed, 3), whole[at + 1 :], strict=False):
            assert_equal(a, b)
            assert after == expected
        resumed.close()


def test_the_seed_determines_the_batches(root):
    data = opened(root)
    a, b = next(data.train()), next(data.train())
    assert_equal(a, b)
    other = opened(root)
    other._seed = 1
    assert differ(a, next(other.train()))


def test_threads_and_prefetching_do_not_change_batches(root):
    a, b = (
        next(opened(root, threads=n, prefetch=n, batch_size=30, **BOTH).train()) for n in (1, 4)
    )
    assert_equal(a, b)


def test_a_state_of_another_mix_is_rejected(root):
    state = opened(root).train().state()
    with pytest.raises(
        DataError, match=r"datasets \['fake'\], this mix has \['bridge_dataset', 'f"
    ):
        opened(root, **BOTH).train(state)


@pytest.mark.parametrize(
    ("kind", "mix", "share"),
    [
        ("shares", "fake=3,bridge_dataset=1", 3 / 4),
        ("shares", "fake,bridge_dataset", 1 / 2),
        ("multipliers", "fake=1,bridge_dataset=1", 35 / 50),
        ("multipliers", "fake=3,bridge_dataset=1", 105 / 120),
    ],
)
def test_realised_shares_match_the_configured_ones(root, kind, mix, share):
    data = opened(root, mix, mix_weights=kind, batch_size=250)
    assert data.shares[0] == pytest.approx(share)
    assert f"{share:.1%}" in data.describe()
    stream = data.train()
    seen = np.concatenate([next(stream)["dataset"] for _ in range(4)])
    assert np.mean(seen == 0) == pytest.approx(share, abs=0.04)
    assert list(stream.realised()) == data.datasets
    np.testing.assert_allclose(list(stream.realised().values()), np.bincount(seen) / len(seen))
    stream.close()


def test_multipliers_scale_sizes_and_shares_do_not():
    steps = {"a": 300, "b": 100}
    for kind, expected in (("shares", [1 / 3, 2 / 3]), ("multipliers", [0.6, 0.4])):
        np.testing.assert_allclose(Mixture({"a": 1, "b": 2}, kind).shares(steps), expected)


def test_missing_sensors_of_a_dataset_are_masked(root):
    data = opened(root, **BOTH, goal="uniform", batch_size=40, window=2)
    batch = next(data.train())
    types.check_batch(batch, data.spec)
    ours = batch["dataset"] == 0
    assert 5 < ours.sum() < 35
    for part in (batch["observation"], batch["task"]):
        assert part["present"]["image_primary"].all()
        wrist = part["present"]["image_wrist"].reshape(40, -1)
        np.testing.assert_array_equal(wrist, np.broadcast_to(ours[:, None], wrist.shape))
        assert not part["image_wrist"][~ours].any()
        assert part["image_wrist"][ours].any((-1, -2, -3)).all()


def test_a_missing_camera_of_an_episode_is_masked(tmp_path):
    episodes = [numbered(i, 3, ["image_primary", "image_wrist"]) for i in range(2)]
    episodes[0]["steps"]["observation"]["image_wrist"] = np.zeros((3, 8, 8, 3), np.uint8)
    write(tmp_path, "fake", {"train": episodes})
    batch = next(opened(tmp_path, cameras={"primary": 8, "wrist": 8}, batch_size=6).train())
    episode = np.array(shown(batch["observation"]["image_primary"]))[:, 0, 0]
    assert sorted(episode) == [0, 0, 0, 1, 1, 1]
    present = batch["observation"]["present"]
    np.testing.assert_array_equal(present["image_wrist"][:, 0], episode == 1)
    assert present["image_primary"].all()


def test_all_settings_keep_the_batch_contract(root):
    for goal, proprio, cameras in (
        ("uniform", False, {}),
        ("uniform", True, {"primary": 4, "secondary": 6}),
        ("none", False, {"wrist": 8}),
    ):
        data = opened(root, BOTH["mix"], goal=goal, use_proprio=proprio, cameras=cameras, horizon=3)
        batch = next(data.train())
        types.check_batch(batch, data.spec)
        assert ("proprio" in batch["observation"]) == proprio
        assert batch["action"].shape == (4, 1, 3, 7)
        for camera, side in cameras.items():
            assert batch["observation"][f"image_{camera}"].shape == (4, 1, side, side, 3)
            assert (f"image_{camera}" in batch["task"]) == (goal != "none")


def test_validation_is_the_same_at_every_call(root):
    settings = {"mix": BOTH["mix"], "keep_language": 0.0, "goal": "uniform", "batch_size": 6}
    loaders = opened(root, **settings).validation()
    assert list(loaders) == ["fake", "bridge_dataset"]
    for name, loader in loaders.items():
        first = list(loader())
        assert len(first) == 2
        others = (list(loader()), list(opened(root, **settings).validation()[name]()))
        for batches in others:
            for a, b in zip(first, batches, strict=True):
                assert_equal(a, b)
        for batch in first:
            assert batch["task"]["present"]["language"].all()  # without dropout
            assert set(batch["dataset"]) == {list(loaders).index(name)}
        # concurrent and unfinished iterations are independent
        for a, (b, c) in zip(first, zip(loader(), loader(), strict=True), strict=True):
            assert_equal(a, b)
            assert_equal(a, c)
        next(loader())
        assert_equal(first[0], next(loader()))


def test_a_missing_validation_split_is_an_error_unless_disabled(tmp_path):
    write(tmp_path, "fake", {"train": [numbered(0, 3, ["image_primary", "image_wrist"])]})
    with pytest.raises(DataError, match=r"fake: no split 'val' in .* \(splits: train\)"):
        opened(tmp_path).validation()
    assert opened(tmp_path, validation_split="").validation() == {}


def test_held_out_episodes_do_not_enter_the_statistics(tmp_path):
    cameras = ["image_primary", "image_wrist"]
    splits = {"train": [numbered(1, 3, cameras)], "val": [numbered(200, 3, cameras)]}
    write(tmp_path, "fake", splits)
    data = opened(tmp_path, batch_size=3)
    record = data.embodiments[0].action_statistics
    assert (record.steps, record.episodes, record.max[0]) == (3, 1, 1)
    batch = next(data.validation()["fake"]())
    assert set(np.array(shown(batch["observation"]["image_primary"]))[:, 0, 0]) == {200}
    # the training record normalises them
    action = data.embodiments[0].unnormalize_action(batch["action"][:, 0, 0])
    np.testing.assert_allclose(action[:, 0], 200, rtol=1e-5)


@pytest.fixture
def passes(monkeypatch):
    """Return the growing list of passes over the records."""
    names, scan = [], statistics.scan_split
    scan_and_count = lambda *a: names.append(a[0].spec.name) or scan(*a)
    monkeypatch.setattr(statistics, "scan_split", scan_and_count)
    return names


def test_a_second_opening_reads_only_the_cache(tmp_path, passes, monkeypatch):
    write_numbered(tmp_path, "fake", [3, 4])
    first = opened(tmp_path)
    assert passes == ["fake"]
    monkeypatch.setattr(Reader, "read_records", None)
    second = opened(tmp_path)
    assert passes == ["fake"]
    assert (tmp_path / "fake" / "1.0.0" / ".octolike").is_dir()
    for part in ("action_statistics", "proprio_statistics"):
        a, b = (getattr(d.embodiments[0], part) for d in (first, second))
        assert (a.steps, a.episodes) == (b.steps, b.episodes)
        for name in ("mean", "std", "min", "max", "p01", "p99"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_other_files_of_the_same_size_are_read_again(tmp_path, passes):
    write_numbered(tmp_path, "fake", [3, 4])
    assert opened(tmp_path).embodiments[0].action_statistics.max[0] == 1
    cameras = ["image_primary", "image_wrist"]
    later = [numbered(i, n, cameras, f"do {i}") for i, n in ((2, 3), (3, 4))]
    write(tmp_path / "later", "fake", {"train": later})
    for path in (tmp_path / "later" / "fake" / "1.0.0").glob("*train*"):
        known = tmp_path / "fake" / "1.0.0" / path.name
        assert known.stat().st_size == path.stat().st_size
        path.replace(known)
        os.utime(known, (1e9, 1e9))
    assert opened(tmp_path).embodiments[0].action_statistics.max[0] == 3
    assert passes == ["fake", "fake"]


def test_the_digest_follows_the_files_and_the_spec(root):
    reader = Reader(find_spec("fake"), str(root), "train")
    before = index_digest(reader)
    assert before == index_digest(Reader(find_spec("fake"), str(root), "train"))
    assert before != index_digest(Reader(find_spec("fake"), str(root), "val"))
    reader.spec = replace(reader.spec, standardize=lambda steps: standardize.as_stored(steps))
    assert before != index_digest(reader)


def test_a_read_only_directory_uses_the_cache(tmp_path, passes):
    write_numbered(tmp_path, "fake", [3, 4])
    place = tmp_path / "fake" / "1.0.0"
    place.chmod(0o555)
    try:
        opened(tmp_path)
        opened(tmp_path)
        assert passes == ["fake"]
        assert not (place / ".octolike").exists()
        assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npz"]
    finally:
        place.chmod(0o755)


def test_streams_and_their_episodes_are_freed(root):
    data = opened(root)
    seen = []
    for _ in range(3):
        stream = data.train()
        next(stream)
        seen += [weakref.ref(stream), weakref.ref(stream._cache)]
        del stream  # without close()
    closed = data.train()
    next(closed)
    closed.close()
    with pytest.raises(StopIteration):
        next(closed)
    assert closed.memory() == 0
    for _ in range(50):
        gc.collect()
        if not any(ref() for ref in seen):
            return
        time.sleep(0.1)
    pytest.fail("tensorflow keeps streams that nobody holds any more")


def test_a_process_with_a_running_stream_ends_quietly(root):
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from data_fakes import opened
stream = opened(Path({str(root)!r}), batch_size=8).train()
next(stream)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""  # no messages of tensorflow either


def test_unknown_cameras_of_a_mix_are_rejected(root):
    with pytest.raises(
        ConfigError, match=r"'wirst'; did you mean 'wrist'\? \(choices: primary, se"
    ):
        opened(root, BOTH["mix"], cameras={"wirst": 8})
