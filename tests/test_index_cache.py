"""The cache of the index and the statistics: read again unless files, spec or code changed."""

import os
from dataclasses import replace

import numpy as np
import pytest
from data_fakes import numbered, opened, write, write_numbered

from octolike.data.rlds import statistics
from octolike.data.rlds.index import index_digest
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
        known = tmp_path / "fake" / "1.0.0" / path.name
        assert known.stat().st_size == path.stat().st_size
        path.replace(known)
        os.utime(known, (1e9, 1e9))
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
