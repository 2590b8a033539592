"""The pass over the records: the sketch's bound, merging, the index, interrupted passes."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from data_fakes import numbered

from octolike.data.rlds import statistics
from octolike.data.rlds.index import COLUMNS, index_digest
from octolike.data.rlds.quantile_sketch import RELATIVE_ERROR, QuantileSketch
from octolike.data.rlds.reader import Reader
from octolike.data.rlds.writer import Writer
from octolike.data.specs.catalog import find_spec
from octolike.embodiment import STATISTICS
from octolike.errors import DataError

HARD = {
    "normal": lambda rng, n: rng.normal(size=n),
    "far from zero": lambda rng, n: 1e4 + 1e-2 * rng.normal(size=n),
    "heavy tails": lambda rng, n: rng.standard_cauchy(n),
    "all scales": lambda rng, n: np.sign(rng.normal(size=n)) * 10 ** rng.uniform(-44, 38, n),
    "two points": lambda rng, n: rng.random(n) < 0.02,
    "constant": lambda rng, n: np.full(n, 0.7),
    "mostly zero": lambda rng, n: np.where(rng.random(n) < 0.985, 0, rng.normal(size=n)),
    "negative zero": lambda rng, n: np.where(rng.random(n) < 0.5, -0.0, 0.0),
    "crossing zero": lambda rng, n: rng.uniform(-1, 99, n),
    "sorted": lambda rng, n: np.sort(rng.exponential(size=n)),
}


def hard(steps: int) -> np.ndarray:
    """Return float32 [steps, dims], a hard distribution per dimension."""
    rng = np.random.default_rng(0)
    return np.stack([f(rng, steps) for f in HARD.values()], axis=1).astype(np.float32)


def sketch(x: np.ndarray, *ends: int) -> QuantileSketch:
    """Return the sketch of x cut into episodes."""
    result = QuantileSketch(x.shape[1])
    for episode in np.split(x, ends):
        result.update(episode)
    return result


def assert_close(a, b):
    assert (a.steps, a.episodes) == (b.steps, b.episodes)
    for name in STATISTICS:
        x, y = getattr(a, name), getattr(b, name)
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-30, err_msg=name)


@pytest.mark.parametrize("steps", [1, 2, 57, 20_001])
@pytest.mark.parametrize("q", [0.01, 0.5, 0.99])
def test_quantiles_are_within_the_bound(steps, q):
    x = hard(steps)
    quantiles = sketch(x).quantile(q)
    ranks = np.sort(x, axis=0).astype(np.float64)
    near = np.array([np.floor(q * (steps - 1)), np.ceil(q * (steps - 1))], int)
    bound = RELATIVE_ERROR * np.abs(ranks[near]).max(0) + 1e-38
    error = np.abs(quantiles - np.quantile(ranks, q, axis=0))
    assert (error <= bound * (1 + 1e-9)).all(), dict(zip(HARD, error / bound, strict=True))


def test_moments_are_exact():
    x = hard(5000)[:, [i for i, name in enumerate(HARD) if name != "all scales"]]
    statistics_of_x, wide = sketch(x, 100, 1000).statistics(), x.astype(np.float64)
    np.testing.assert_allclose(statistics_of_x.mean, wide.mean(0), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(statistics_of_x.std, wide.std(0), rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(statistics_of_x.min, x.min(0))
    np.testing.assert_array_equal(statistics_of_x.max, x.max(0))
    assert (statistics_of_x.steps, statistics_of_x.episodes) == (5000, 3)


def test_small_data_constants_and_grippers_have_exact_quantiles():
    x = np.array([[0.7, t % 2, 1.5 * 2**t] for t in range(30)], np.float32)
    statistics_of_x = sketch(x).statistics()
    for name, q in (("p01", 0.01), ("p99", 0.99)):
        np.testing.assert_allclose(
            getattr(statistics_of_x, name), np.quantile(x, q, axis=0), rtol=1e-6
        )
    assert statistics_of_x.p01[0] == statistics_of_x.p99[0] == np.float32(0.7)
    assert statistics_of_x.std[0] < 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_merging_gives_the_same_in_any_order_and_grouping(seed, monkeypatch):
    monkeypatch.setattr("octolike.data.rlds.quantile_sketch._BUFFER", 500)
    x, rng = hard(4000), np.random.default_rng(seed)
    total = sketch(x, *range(100, 4000, 100))
    parts = [sketch(e) for e in np.split(x, 40)]
    while len(parts) > 1:
        a, b = (parts.pop(int(rng.integers(len(parts)))) for _ in range(2))
        a.merge(b)
        parts.append(QuantileSketch.from_arrays(a.to_arrays()))  # as stored on disk
    np.testing.assert_array_equal(total.quantile(0.5) * 0, parts[0].quantile(0.5) * 0)
    np.testing.assert_array_equal(total.keys, parts[0].keys)
    np.testing.assert_array_equal(total.counts, parts[0].counts)
    assert_close(total.statistics(), parts[0].statistics())


def test_the_size_of_a_sketch_depends_on_the_spread_not_on_the_number_of_values():
    rng, sizes = np.random.default_rng(0), []
    summary = QuantileSketch(1)
    for _ in range(20):
        summary.update(rng.normal(size=(20_000, 1)).astype(np.float32))
        summary.flush()
        sizes.append(len(summary.keys))
    assert sizes[-1] < 8000
    assert sizes[-1] < 1.5 * sizes[4]


def test_a_sketch_rejects_other_widths_and_an_empty_set():
    with pytest.raises(ValueError, match=r"expected values \[T, 3\], got \[4, 2\]"):
        QuantileSketch(3).update(np.zeros((4, 2), np.float32))
    with pytest.raises(ValueError, match="of 3 and 2 dimensions"):
        QuantileSketch(3).merge(QuantileSketch(2))
    with pytest.raises(ValueError, match="no steps"):
        QuantileSketch(3).statistics()


TEXTS = ["open", "", "close", "open", " open ", "push"]


def write(root, name="fake", shards=3, texts=TEXTS):
    """Write numbered episodes of 3, 4, 5... steps over several shards; return their lengths."""
    keys = list(find_spec(name).cameras.values())
    episodes = [numbered(i, 3 + i, keys, text) for i, text in enumerate(texts)]
    writer = Writer(str(root), name, "1.0.0", {"train": shards})
    for shard in range(shards):
        writer.write("train", shard, episodes[shard::shards])
    writer.finish()
    return [len(e["steps"]["action"]) for s in range(shards) for e in episodes[s::shards]]


def make_index(root, name="fake", **settings):
    """Return the index of a dataset's training split."""
    settings = {"threads": 2, "cache": str(root / "cache"), "drop_bad": False} | settings
    return statistics.index_episodes(Reader(find_spec(name), str(root), "train"), **settings)


def test_the_index_finds_every_episode_and_its_task(tmp_path):
    lengths = write(tmp_path)
    index = make_index(tmp_path)
    reader = Reader(find_spec("fake"), str(tmp_path), "train")
    assert index.steps.tolist() == lengths
    for i, steps in enumerate(lengths):
        episode = reader.read_episode(
            *(int(x[i]) for x in (index.shard, index.offset, index.length))
        )
        assert len(episode) == steps
        assert episode.instructions[0].strip() == index.tasks[index.task[i]]
    assert sorted(index.tasks) == ["", "close", "open", "push"]
    assert (index.labels, set(index.label.tolist())) == (("",), {0})
    few = index.first_episodes(2)
    assert (few.steps.tolist(), few.task.tolist()) == (lengths[:2], index.task[:2].tolist())
    assert few.action.episodes == 6


def test_the_cache_returns_the_same_index(tmp_path, monkeypatch):
    write(tmp_path)
    first = make_index(tmp_path)
    monkeypatch.setattr(statistics, "scan_split", None)
    second = make_index(tmp_path)
    assert_same(first, second)
    digest = index_digest(Reader(find_spec("fake"), str(tmp_path), "train"))
    names = [p.name for p in (tmp_path / "fake/1.0.0/.octolike").iterdir()]
    assert names == [f"fake-train-{digest}.npz"]


def assert_same(a, b):
    """Assert that two indices are equal to the last bit."""
    for k in COLUMNS:
        np.testing.assert_array_equal(getattr(a, k), getattr(b, k), err_msg=k)
    assert (a.tasks, a.labels, a.bad) == (b.tasks, b.labels, b.bad)
    for part in ("action", "proprio"):
        for name in STATISTICS:
            x, y = (getattr(getattr(i, part), name) for i in (a, b))
            np.testing.assert_array_equal(x, y, err_msg=f"{part}.{name}")


class Killed(BaseException):
    """An exception that no handler catches, like a kill."""


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_pass_resumes_with_the_remaining_shards(tmp_path, monkeypatch, done):
    write(tmp_path)
    expected = make_index(tmp_path)
    for path in (tmp_path / "fake/1.0.0/.octolike").iterdir():
        path.unlink()
    scan, scanned = statistics._scan_shard, []

    def killed(reader, parser, shard, *rest):
        if len(scanned) == done:
            raise Killed
        scanned.append(shard)
        return scan(reader, parser, shard, *rest)

    monkeypatch.setattr(statistics, "_scan_shard", killed)
    with pytest.raises(Killed):
        make_index(tmp_path, threads=1)
    place = tmp_path / "fake/1.0.0/.octolike"
    assert not list(place.glob("*.npz"))
    again = []
    monkeypatch.setattr(
        statistics, "_scan_shard", lambda r, p, s, *rest: again.append(s) or scan(r, p, s, *rest)
    )
    assert_same(make_index(tmp_path), expected)
    assert sorted(scanned + again) == [0, 1, 2]
    assert len(list(place.iterdir())) == 1


def test_a_corrupted_index_is_recomputed(tmp_path, capsys):
    write(tmp_path)
    expected = make_index(tmp_path)
    (path,) = (tmp_path / "fake/1.0.0/.octolike").glob("*.npz")
    stored = path.read_bytes()
    for corrupted in (b"", stored[: len(stored) // 2], b"x" * 100):
        path.write_bytes(corrupted)
        assert_same(make_index(tmp_path), expected)
        assert "is corrupted" in capsys.readouterr().err
        assert path.stat().st_size == len(stored)


def test_bad_episodes_are_excluded_and_offsets_stay_correct(tmp_path):
    keys = list(find_spec("fake").cameras.values())
    good = [numbered(i, 4, keys) for i in range(3)]
    writer = Writer(str(tmp_path), "fake", "1.0.0", {"train": 1})
    writer.write("train", 0, good)
    writer.finish()
    (shard,) = (tmp_path / "fake/1.0.0").glob("*train.tfrecord*")
    stored = [r.numpy() for r in tf.data.TFRecordDataset(str(shard))]
    with tf.io.TFRecordWriter(str(shard)) as file:
        for record in (stored[0], b"\xff" * 100, stored[2]):
            file.write(record)
    with pytest.raises(DataError, match=r"episode 1 does not match features\.json"):
        make_index(tmp_path)
    index = make_index(tmp_path, drop_bad=True)
    reader = Reader(find_spec("fake"), str(tmp_path), "train")
    at = [(int(s), int(o), int(n)) for s, o, n in zip(index.shard, index.offset, index.length)]
    assert [reader.read_episode(*where).action[0, 0] for where in at] == [0, 2]
    assert len(index.bad) == 1


def test_datasets_of_one_embodiment_pool_their_steps(tmp_path):
    write(tmp_path, "fake")
    write(tmp_path, "tabletop", texts=TEXTS[:2], shards=1)
    both = [make_index(tmp_path, "fake"), make_index(tmp_path, "tabletop")]
    action, proprio = statistics.pool_statistics(both)
    x = np.concatenate([np.full(3 + i, i) for n in (6, 2) for i in range(n)]).astype(np.float64)
    assert (action.steps, action.episodes) == (len(x), 8)
    assert action.mean[0] == pytest.approx(x.mean())
    assert action.std[0] == pytest.approx(x.std())
    assert action.p99[0] == pytest.approx(np.quantile(x, 0.99))
    assert proprio.steps == action.steps
    assert both[0].action.steps == both[1].action.steps + 26  # pooling changes neither


def test_a_change_of_the_spec_recomputes_the_statistics_and_reports_it(tmp_path, capsys):
    write(tmp_path)
    reader = Reader(find_spec("fake"), str(tmp_path), "train")
    settings = {"threads": 1, "cache": str(tmp_path / "cache"), "drop_bad": False}
    first = statistics.index_episodes(reader, **settings)
    assert "recomputing" not in capsys.readouterr().err
    reader = Reader(dataclasses.replace(reader.spec, every=2), str(tmp_path), "train")
    second = statistics.index_episodes(reader, **settings)
    expected = "statistics of fake/train: the spec's computation changed, recomputing\n"
    assert expected in capsys.readouterr().err
    assert second.action.steps < first.action.steps
    statistics.index_episodes(reader, **settings)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("constant", ["FORMAT", "ALGORITHM"])
def test_another_algorithm_or_format_recomputes_the_statistics(
    tmp_path, monkeypatch, capsys, constant
):
    write(tmp_path)
    make_index(tmp_path)
    monkeypatch.setattr(f"octolike.data.rlds.index.{constant}", 99)
    capsys.readouterr()
    make_index(tmp_path)
    assert "the way of computing statistics changed, recomputing" in capsys.readouterr().err


def test_a_cache_of_the_first_format_is_reported_and_recomputed(tmp_path, capsys):
    write(tmp_path)
    folder = tmp_path / "fake/1.0.0/.octolike"
    folder.mkdir()
    (folder / "fake-train-0123456789abcdef.npz").write_bytes(b"")
    (folder / "fake-val-0123456789abcdef.npz").write_bytes(b"")
    make_index(tmp_path)
    assert capsys.readouterr().err.count("recomputing") == 1
