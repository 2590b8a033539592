"""octolike collect and train_arrays on the tabletop, with an expert that fails."""

import runpy
from pathlib import Path

import pytest

from octolike import config as configs
from octolike.envs import demonstrations

pytest.importorskip("mujoco", reason="needs pip install 'octolike[sim]'")

from octolike.envs.tabletop import tabletop_expert

ROOT = Path(__file__).parents[1]


def failing_expert(env, seed, split, skills, noise):
    """Fail to push, and fail with all seeds of every second episode."""
    episode = tabletop_expert.noisy_episode(env, seed, split, skills, noise)
    episode["episode_metadata"]["success"] &= skills != ["push"] and seed % 16 >= 8
    return episode


class InterruptionError(Exception):
    """Stands for a signal."""


@pytest.fixture
def collect(monkeypatch):
    """Return a function that records skills with failing_expert, by collect or train_arrays."""
    prepare = demonstrations.Recorder.__init__

    def use_expert(self, *arguments):
        prepare(self, *arguments)
        self._collect_episode = failing_expert

    monkeypatch.setattr(demonstrations.Recorder, "__init__", use_expert)

    def run(root, workers, skills, script="collect.py"):
        config = configs.Config()
        config.environment = configs.Component(kind="tabletop", primary_size=16, wrist_size=16)
        config.data.root = str(root)
        config.collect.skills, config.collect.validation_share = skills, 0.2
        config.collect.episodes_per_shard, config.collect.workers = 1, workers
        runpy.run_path(str(ROOT / "scripts" / script))["main"](config)

    return run


def test_a_failing_expert_ends_neither_the_other_skills_nor_the_dataset(
    collect, tmp_path, monkeypatch, capsys
):
    import tensorflow_datasets as tfds

    from octolike.data.rlds.writer import Writer

    skills = {"touch": 5, "push": 1}
    with pytest.raises(SystemExit) as end:
        collect(tmp_path / "a", 2, skills)
    assert str(end.value).startswith("error: the expert failed with every seed of 'push' at noise")
    assert "\n" not in str(end.value)
    output = capsys.readouterr()
    with pytest.raises(SystemExit) as again:  # it stays an error, and the table stays
        collect(tmp_path / "a", 2, skills)
    assert str(again.value) == str(end.value)
    exists, *table = capsys.readouterr().out.splitlines()
    assert "exists already; remove it to collect again" in exists
    assert output.out.splitlines()[-len(table) :] == table
    assert "the expert for 'push' failed with seeds" in output.err
    rows = [line.split() for line in output.out.splitlines()]
    (push,), (touch,) = ([r for r in rows if r[:1] == [s]] for s in ("push", "touch"))
    assert push[1:] == ["0", "of", "2", "16", "0.0%"]
    recorded = int(touch[1])
    assert touch[2:4] == ["of", "6"]
    assert 2 <= recorded <= 4

    directory = tmp_path / "a" / "tabletop" / "1.0.0"
    builder = tfds.builder_from_directory(directory)
    lengths = builder.info.splits["train"].shard_lengths
    assert len(lengths) == 6
    assert 0 in lengths
    total = 0
    for split in builder.info.splits:
        read = [*builder.as_dataset(split)]
        assert len(read) == sum(builder.info.splits[split].shard_lengths)
        assert {e["episode_metadata"]["skill"].numpy() for e in read} == {b"touch"}
        total += len(read)
    assert total == recorded

    # An interrupted collection with another number of workers gives the same files.
    write = Writer.write

    def interrupted(self, split, index, *arguments, **options):
        if index == 3:
            raise InterruptionError
        return write(self, split, index, *arguments, **options)

    monkeypatch.setattr(Writer, "write", interrupted)
    with pytest.raises(InterruptionError):
        collect(tmp_path / "b", 1, skills)
    monkeypatch.setattr(Writer, "write", write)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        collect(tmp_path / "b", 1, skills)
    assert capsys.readouterr().out.splitlines()[-len(table) :] == table
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / x / "tabletop" / "1.0.0").iterdir()}
        for x in "ab"
    ]
    assert files[0] == files[1]


def test_by_default_a_worker_per_core_that_the_process_may_use_records(
    collect, tmp_path, monkeypatch
):
    workers = []

    def stop(self, environment, settings, count):
        workers.append(count)
        raise InterruptionError

    monkeypatch.setattr(demonstrations.RecorderPool, "__init__", stop)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    with pytest.raises(InterruptionError):
        collect(tmp_path, 0, {"touch": 3})
    assert workers == [1]


def test_without_any_demonstration_there_is_no_dataset(collect, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: tabletop has no episodes$"):
        collect(tmp_path, 1, {"push": 1})
    assert not (tmp_path / "tabletop" / "1.0.0").exists()


def test_recording_without_tensorflow_continues_and_a_missing_skill_stays_an_error(
    collect, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    tries = demonstrations.count_tries

    def interrupted(recorded):
        if len([*tmp_path.iterdir()]) == 2:
            raise InterruptionError
        return tries(recorded)

    monkeypatch.setattr(demonstrations, "count_tries", interrupted)
    arguments = (tmp_path, 1, {"touch": 3, "push": 1}, "train_arrays.py")
    with pytest.raises(InterruptionError):
        collect(*arguments)
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(kept) == 2
    shards = []

    def count(recorded):
        shards.append(recorded)
        return tries(recorded)

    monkeypatch.setattr(demonstrations, "count_tries", count)
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"^error: the expert failed .* of 'push' at noise"):
            collect(*arguments)
        assert "touch" in capsys.readouterr().out
    files = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(files) == 6
    assert len(shards) == 4, "a shard that exists is not recorded again"
    assert {name: files[name] for name in kept} == kept
