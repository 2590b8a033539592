"""Order, lanes, resume and caching: a batch is a pure function of config and position."""

import copy
import gc
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow as tf
from data_fakes import config, numbered, opened, shown, write, write_numbered
from order_fakes import an_order, batches_of, section_of, whole

from octolike import types
from octolike.config import Component, ConfigError
from octolike.data import open_data
from octolike.data.pipeline.graph import NUMBER
from octolike.data.pipeline.order import BLOCKS
from octolike.data.specs.mixes import Mixture
from octolike.errors import DataError

LENGTHS = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5]  # of "fake"
BOTH = {"mix": "fake=1,bridge_dataset=1", "cameras": {"primary": 8, "wrist": 4}}
# Four lanes of two rows, several blocks per epoch, and every kind of draw.
LANES = {"mix": BOTH["mix"], "window": 2, "pool": 8, "batch_size": 8, "lanes": 4, "prefetch": 1}
LANES |= {"goal": "uniform", "keep_language": 0.6, "keep_goal": 0.6}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two datasets; Bridge's has no wrist camera."""
    path = tmp_path_factory.mktemp("data")
    write_numbered(path, "fake", LENGTHS)
    write_numbered(path, "bridge_dataset", [4, 6, 8])
    return path


@pytest.fixture(scope="module")
def single(root):
    """The first dataset with four rows per batch."""
    return opened(root)


@pytest.fixture(scope="module")
def in_lanes(root):
    """Both datasets in four lanes."""
    return opened(root, **LANES)


def assert_equal(a, b):
    for (path, x), (path_of_b, y) in zip(types.flatten(a), types.flatten(b), strict=True):
        assert path == path_of_b
        np.testing.assert_array_equal(x, y, err_msg=path)


def differ(a, b) -> bool:
    return any(
        not np.array_equal(x, y)
        for (_, x), (_, y) in zip(types.flatten(a), types.flatten(b), strict=True)
    )


def take(stream, count):
    """Return `count` batches and the state after each, as in a checkpoint."""
    return [(next(stream), json.loads(json.dumps(stream.state()))) for _ in range(count)]


def assert_resumes_anywhere(data, batches=40, positions=10):
    """Compare streams resumed at some positions with the uninterrupted one."""
    stream = data.train()
    whole = take(stream, batches)
    stream.close()
    for at in np.random.default_rng(0).choice(batches - 4, size=positions, replace=False):
        resumed = data.train(whole[at][1])
        for (a, after), (b, expected) in zip(take(resumed, 3), whole[at + 1 :], strict=False):
            assert_equal(a, b)
            assert after == expected
        resumed.close()


@pytest.mark.parametrize(
    ("lanes", "pool", "budget"), [(1, 10**6, 1e12), (2, 6, 1e12), (4, 10**6, 400.0), (8, 8, 1e12)]
)
def test_an_epoch_has_every_frame_once_up_to_one_batch(lanes, pool, budget):
    steps = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]
    order = an_order(steps, lanes=lanes, pool=pool, budget=budget)
    segment, total, epochs = whole(order), sum(steps), []
    for epoch in range(4):
        first, end = (int(order.first_batch(segment, epoch + i)) for i in range(2))
        assert first == -(-epoch * total // 8)
        assert [order.epoch_at(segment, b) for b in (first, end - 1)] == [epoch, epoch]
        frames = batches_of(order, segment, [epoch])
        assert frames.shape == (end - first, 8, 2)
        counts = np.zeros((len(steps), max(steps)), int)
        np.add.at(counts, tuple(frames.reshape(-1, 2).T), 1)
        counts = np.concatenate([c[:n] for c, n in zip(counts, steps, strict=True)])
        missing, again = (counts == 0).sum(), (counts > 1).sum()
        assert counts.sum() == frames[..., 0].size
        assert counts.max() <= 2
        assert missing + again < 8
        assert not (missing and again)
        epochs.append(frames.tolist())
    assert epochs[0] != epochs[1] != epochs[2] != epochs[3]


def test_the_phases_of_a_lane_use_every_frame_of_its_section_once():
    order = an_order(np.random.default_rng(0).integers(1, 30, 200), lanes=4, pool=40)
    segment, sections = whole(order), []
    for lane in range(4):
        section = section_of(order, segment, 1, lane)
        frames = np.concatenate(section.blocks)
        assert len(section.blocks) > BLOCKS
        assert all(len(x) == BLOCKS for x in section.mixed)
        assert sorted(map(tuple, section.rows)) == sorted(map(tuple, frames))
        assert len(np.unique(frames, axis=0)) == len(frames)
        sections.append({tuple(f) for f in frames.tolist()})
    lengths = [len(s) for s in sections]
    assert len(set(lengths)) == 1  # every batch has the same number of rows of each lane
    assert len(set().union(*sections)) == sum(lengths)  # disjoint


@pytest.mark.parametrize(("pool", "budget"), [(80, 1e12), (10**6, 80 * 10 * 15.5)])
def test_the_mixed_blocks_keep_to_the_pool_and_to_the_memory(pool, budget):
    steps = np.random.default_rng(1).integers(1, 30, 800)
    order = an_order(steps, lanes=4, pool=pool, budget=budget)
    episodes, sizes = [], []
    for lane in range(4):
        section = section_of(order, whole(order), 0, lane)
        members = [np.unique(frames[:, 0]) for frames in section.blocks]
        for phase in section.mixed:
            mixed = np.concatenate([members[b] for b in phase])
            episodes.append(len(mixed))
            sizes.append(10 * steps[mixed].sum())
    # at most one episode more than a lane's part, and on average not more than it
    assert max(episodes) <= pool / 4 + 1
    assert max(sizes) <= budget / 4 + 10 * steps.max()
    assert 0.85 < max(np.mean(episodes) / (pool / 4), np.mean(sizes) / (budget / 4)) < 1.02


def test_a_section_that_fits_into_half_the_memory_is_mixed_as_a_whole():
    order = an_order([5] * 40, lanes=2)
    section = section_of(order, whole(order), 0, 0)
    assert len(section.blocks) == 1
    assert section.mixed == [[0]]
    # a little too large: its blocks are mixed in turns
    order = an_order([5] * 40, lanes=2, pool=60)
    assert len(section_of(order, whole(order), 0, 0).blocks) == BLOCKS + 1


def test_an_episode_longer_than_the_memory_of_a_block_is_a_block_of_its_own():
    order = an_order([5] * 20 + [200], lanes=1, pool=10**6, budget=2100.0)
    section = section_of(order, whole(order), 0, 0)
    assert any(set(frames[:, 0]) == {20} for frames in section.blocks)
    assert len(section.rows) == 304


@pytest.mark.parametrize("lanes", [1, 8])
def test_an_epoch_reads_hardly_more_than_its_episodes(lanes):
    order = an_order(np.random.default_rng(2).integers(5, 40, 2000), lanes=lanes, pool=128)
    reads = 0
    for lane in range(lanes):
        blocks = section_of(order, whole(order), 0, lane).blocks
        members = [len(np.unique(frames[:, 0])) for frames in blocks]
        # the older blocks of the first phase are read before it, and again at the end
        reads += sum(members) + sum(members[-(BLOCKS - 1) :])
    assert reads <= 1.1 * 2000 + lanes


def test_the_order_depends_on_the_seed_and_on_the_start_of_the_segment():
    def frames(seed=0, start=0):
        order = an_order([5] * 8, seed=seed)
        return batches_of(order, order.segment(start, np.ones(1)), [0]).tolist()

    assert frames() == frames()
    assert frames() not in (frames(seed=1), frames(start=7))


def test_random_streams_of_different_segments_do_not_coincide():
    order = an_order([5] * 8)
    derive = lambda stream, *numbers: tuple(order._derive(stream, *map(tf.constant, numbers)))
    seeds = {
        tuple(map(int, derive(s, start, e))) for s in range(5) for start in range(9) for e in (0, 1)
    }
    assert len(seeds) == 5 * 9 * 2


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.98, 0.01, 0.01), (0.9, 0.1, 0.0)])
def test_repetitions_realise_the_shares_evenly(shares):
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], [5, 300, 40])
    steps = rng.integers(1, 20, len(groups))
    order = an_order(steps, groups=groups, pool=64, batch_size=32)
    segment = order.segment(0, np.array(shares))
    frames = batches_of(order, segment, range(6)).reshape(-1, 2)
    actual = np.bincount(groups[frames[:, 0]], minlength=3) / len(frames)
    np.testing.assert_allclose(actual, shares, atol=0.02)
    for g in range(3):  # repetitions within a group differ by at most one
        times = np.zeros((len(steps), 20), int)
        np.add.at(times, tuple(frames.T), 1)
        of_group = [times[e, : steps[e]] for e in np.flatnonzero(groups == g)]
        spread = np.concatenate(of_group)
        if not shares[g]:
            assert not spread.any()
            continue
        # of 6 epochs, each may repeat or leave out less than one batch
        most, least = spread.max(), spread.min()
        assert most - least <= 1 + 6


def test_a_batch_has_nearly_as_many_episodes_as_without_a_pool():
    steps = np.random.default_rng(0).integers(20, 60, 5000)
    order = an_order(steps, batch_size=256, lanes=32, pool=1024)
    sections = [section_of(order, whole(order), 0, lane) for lane in range(32)]
    rows = np.concatenate([s.rows[: 8 * 400].reshape(400, 8, 2) for s in sections], axis=1)
    distinct = [len(np.unique(batch[:, 0])) for batch in rows[::7]]
    assert np.mean(distinct) > 0.85 * 250  # of frames drawn from all episodes


def test_batches_are_those_of_the_order(in_lanes):
    order, groups = in_lanes._graphs["training"].order, in_lanes._supply.table.groups
    stream = in_lanes.train()
    segment = order.segment(0, np.array(list(stream.shares().values())))
    expected = batches_of(order, segment, range(2))
    for number, frames in enumerate(expected):
        batch = next(stream)
        images = batch["observation"]["image_primary"][:, -1]
        numbers = frames - np.where(groups[frames[:, :1]] == 1, [[len(LENGTHS), 0]], 0)
        np.testing.assert_array_equal(shown(images), numbers, err_msg=f"batch {number}")
        np.testing.assert_array_equal(batch["dataset"], groups[frames[:, 0]])
    stream.close()


def test_batches_have_every_frame_once_per_epoch(root):
    frames = [(e, t) for e, n in enumerate(LENGTHS) for t in range(n)]
    assert len(frames) == 35
    stream = opened(root, batch_size=5, pool=3).train()
    for _ in range(2):
        images = [next(stream)["observation"]["image_primary"][:, -1] for _ in range(7)]
        assert sorted(map(tuple, shown(np.concatenate(images)))) == frames
    stream.close()


def test_the_episode_limit_selects_the_first_episodes(root):
    data = opened(root, episodes=2, batch_size=20)
    assert {e for e, _ in shown(next(data.train())["observation"]["image_primary"][:, 0])} == {0, 1}
    assert data.embodiments[0].action_statistics.episodes == len(LENGTHS)  # of all episodes


def test_resuming_anywhere_equals_no_interruption(in_lanes):
    assert_resumes_anywhere(in_lanes)


def test_resuming_in_any_stage_of_a_curriculum_equals_no_interruption(root):
    stages = ((0, {"fake": 1}), (9, {"fake": 1, "bridge_dataset": 3}), (10, {"*": 1}))
    sampling = Component(kind="curriculum", stages=(*stages, (23, {"bridge_dataset": 1})))
    assert_resumes_anywhere(opened(root, **LANES, sampling=sampling), positions=5)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_make_the_batches_of_one(in_lanes, count):
    parts, single = [in_lanes.train(process=(i, count)) for i in range(count)], in_lanes.train()
    for _ in range(12):
        leaves = [dict(types.flatten(next(part))) for part in parts]
        joined = {k: np.concatenate([x[k] for x in leaves]) for k in leaves[0]}
        assert all(len(x["action"]) == 8 // count for x in leaves)
        assert_equal(types.unflatten(joined), next(single))
    assert single.memory() >= count * parts[0].memory() > 0
    states = {json.dumps(x.state()) for x in (*parts, single)}
    assert len(states) == 1
    resumed = in_lanes.train(json.loads(states.pop()), process=(count - 1, count))
    assert_equal(next(parts[-1]), next(resumed))


def test_the_dataset_has_the_batches_of_the_stream(in_lanes):
    stream = in_lanes.train()
    position = [x[1] for x in take(stream, 5)][-1]
    for number, element in enumerate(in_lanes.dataset(position).take(3), start=5):
        leaves = {k: x.numpy() for k, x in types.flatten(element)}
        batch = dict(types.flatten(next(stream)))
        assert leaves.pop(NUMBER) == number
        assert (leaves.pop("bad") == -1).all()
        texts = [x.decode() for x in leaves.pop("text")]
        assert leaves.pop("paraphrase_draw").shape == (8,)
        ids, mask = in_lanes._wording.text.encode(texts)
        leaves |= {"task.language.ids": ids, "task.language.mask": mask}
        assert leaves.keys() == batch.keys()
        for path, x in leaves.items():
            np.testing.assert_array_equal(x, batch[path], err_msg=path)


def test_a_serialised_dataset_gives_the_same_batches(in_lanes):
    dataset = in_lanes.dataset()
    graph = dataset._as_serialized_graph()
    variant = tf.raw_ops.DatasetFromGraph(graph_def=graph)
    again = tf.data.experimental.from_variant(variant, dataset.element_spec)
    for a, b in zip(dataset.take(3), again.take(3), strict=True):
        for (path, x), (_, y) in zip(types.flatten(a), types.flatten(b), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=path)


def test_the_seed_determines_the_batches(root, single):
    a, b = next(single.train()), next(single.train())
    assert_equal(a, b)
    another = config(root)
    another.seed = 1
    assert differ(a, next(open_data(another).train()))


def test_threads_and_prefetching_do_not_change_batches(root):
    a, b = (
        next(opened(root, threads=n, prefetch=n, batch_size=30, **BOTH).train()) for n in (1, 4)
    )
    assert_equal(a, b)


def test_the_graph_has_threads_of_its_own(single):
    threading = single.dataset().options().threading
    assert threading.private_threadpool_size == single._threads + 2
    assert threading.max_intra_op_parallelism == 1


def test_a_state_of_another_mix_or_version_is_rejected(single, in_lanes):
    state = single.train().state()
    with pytest.raises(
        DataError, match=r"datasets \['fake'\], this mix has \['bridge_dataset', 'f"
    ):
        in_lanes.train(state)
    with pytest.raises(DataError, match=r"has \['batches', 'datasets'\], expected batches, cont"):
        single.train({"batches": 3, "datasets": ["fake"]})


def other_order(episodes: list[dict]) -> list[dict]:
    return episodes[::-1]


def other_image(episodes: list[dict]) -> list[dict]:
    changed = copy.deepcopy(episodes)
    changed[2]["steps"]["observation"]["image_primary"][3] ^= 64
    return changed


@pytest.mark.parametrize("change", [other_order, other_image])
def test_a_state_of_other_episodes_is_rejected(tmp_path, change):
    """Statistics, names and counts are the same, so nothing else notices the change."""
    episodes = [numbered(i, 5, ("image_primary", "image_wrist")) for i in range(4)]
    settings = {"validation_split": "", "tasks": "dataset"}
    for folder, stored in (("a", episodes), ("b", change(episodes))):
        write(tmp_path / folder, "fake", {"train": stored})
    data, changed = (opened(tmp_path / folder, **settings) for folder in "ab")
    state = json.loads(json.dumps(data.train().state()))
    means = [x.embodiments[0].action_statistics.mean for x in (data, changed)]
    np.testing.assert_array_equal(*means)
    assert data.names == changed.names
    message = r"episodes of fake have changed since .* were 4 episodes, 20 steps, .*; restore the"
    with pytest.raises(DataError, match=message):
        changed.train(state)
    data.train(state)
    changed.train({k: x for k, x in state.items() if k != "contents"})  # of an older version


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
    datasets = np.concatenate([next(stream)["dataset"] for _ in range(4)])
    assert np.mean(datasets == 0) == pytest.approx(share, abs=0.04)
    assert list(stream.realised()) == data.datasets
    np.testing.assert_allclose(
        list(stream.realised().values()), np.bincount(datasets) / len(datasets)
    )
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
        streams = (list(loader()), list(opened(root, **settings).validation()[name]()))
        for batches in streams:
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


def test_hosts_share_the_validation(root):
    """Their shares in order are the batch; hosts that no lane is left for divide one's rows."""
    data = opened(root, mix="fake", batch_size=4)
    whole = next(data.validation()["fake"]())
    assert len(whole["action"]) == 4
    for hosts, rows in ((2, 2), (3, 2)):
        shares = [next(data.validation((i, hosts))["fake"]()) for i in range(hosts)]
        assert [len(share["action"]) for share in shares] == [rows] * hosts
        joined = jax.tree.map(lambda *x: np.concatenate(x), *shares)
        used = joined["action_mask"].any(axis=(1, 2, 3))
        assert_equal(whole, jax.tree.map(lambda x, used=used: x[used], joined))


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


def test_streams_and_their_episodes_are_freed(single):
    def threads():
        return len(os.listdir("/proc/self/task"))

    next(single.train())
    gc.collect()
    references, before = [], threads()
    for _ in range(3):
        stream = single.train()
        next(stream)
        references += [weakref.ref(stream), weakref.ref(stream._elements)]
        del stream  # without close()
    closed = single.train()
    next(closed)
    assert closed.memory() > 0
    closed.close()
    with pytest.raises(StopIteration):
        next(closed)
    assert closed.memory() == 0
    for _ in range(50):
        gc.collect()
        if not any(ref() for ref in references) and threads() <= before:
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
