"""The cache of the index and the statistics: read again unless files, spec or code changed."""

import os
from dataclasses import replace

import numpy as np
import pytest
from data_fakes import numbered, opened, write, write_numbered
from hypothesis import given
from hypothesis import strategies as st

from octolike.data.rlds import statistics
from octolike.data.rlds.index import CAMERA_COLUMNS, COLUMNS, _load_first, index_digest
from octolike.data.rlds.reader import Reader
from octolike.data.specs import standardize
from octolike.data.specs.catalog import find_spec


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
        restored = tmp_path / "fake" / "1.0.0" / path.name
        assert restored.stat().st_size == path.stat().st_size
        path.replace(restored)
        os.utime(restored, (1e9, 1e9))
    assert opened(tmp_path).embodiments[0].action_statistics.max[0] == 3
    assert passes == ["fake", "fake"]


def test_the_digest_follows_the_files_and_the_spec(tmp_path):
    write_numbered(tmp_path, "fake", [3, 4, 2])
    reader = Reader(find_spec("fake"), str(tmp_path), "train")
    before = index_digest(reader)
    assert before == index_digest(Reader(find_spec("fake"), str(tmp_path), "train"))
    assert before != index_digest(Reader(find_spec("fake"), str(tmp_path), "val"))
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


@pytest.fixture(scope="module")
def stored_index(tmp_path_factory):
    """Return (path of a stored index, the index)."""
    root = tmp_path_factory.mktemp("index")
    write_numbered(root, "fake", [3, 4])
    opened(root)
    (path,) = (root / "fake" / "1.0.0" / ".octolike").glob("*.npz")
    return path, _load_first([str(path.parent)], path.name)


def contents(index):
    """Return everything that an index holds, to compare."""
    columns = [getattr(index, k).tolist() for k in (*COLUMNS, *CAMERA_COLUMNS, "kept")]
    texts = index.tasks, index.labels, index.bad, dict(index.filtered_by), index.idle_steps
    sketches = {
        part: {k: x.tobytes() for k, x in sketch.to_arrays().items()}
        for part, sketch in index.sketches.items()
    }
    return columns, texts, sketches


@given(st.data())
def test_a_changed_stored_index_is_the_same_or_computed_again(stored_index, data):
    """Flipped bytes, truncations, insertions and any other bytes: never another number."""
    path, index = stored_index
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "replace"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        for at in {place, *data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3))}:
            content[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
    else:
        content = data.draw(st.binary(max_size=200))
    damaged = path.parent / "changed.npz"
    damaged.write_bytes(content)
    read = _load_first([str(path.parent)], damaged.name)
    assert read is None or contents(read) == contents(index)


ARRAYS = st.sampled_from(
    [np.zeros(0), np.zeros((2, 2)), np.array(["a"]), np.arange(3), np.full(2, -2), np.full(2, 9)]
)


@given(
    st.dictionaries(
        st.sampled_from([*COLUMNS, *CAMERA_COLUMNS, "kept", "texts"]), ARRAYS, min_size=1
    )
)
def test_an_index_of_other_arrays_is_computed_again(stored_index, replaced):
    """Valid archives, of somebody else or of a program that is not finished."""
    path, index = stored_index
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path.parent / "other.npz", **{**arrays, **replaced})
    read = _load_first([str(path.parent)], "other.npz")
    if read is not None:
        columns = [getattr(read, k) for k in (*COLUMNS, *CAMERA_COLUMNS)]
        expected = [getattr(index, k) for k in (*COLUMNS, *CAMERA_COLUMNS)]
        assert [(x.dtype, len(x)) for x in columns] == [(x.dtype, len(x)) for x in expected]
        assert all(read.tasks[i] and read.labels[j] == "" for i, j in zip(read.task, read.label))
        assert [len(read.positions(i)) for i in range(len(read.steps))] == read.steps.tolist()
