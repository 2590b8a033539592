"""Checkpoints and run directories: round trip, corrupted files, error messages."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_fakes import NAMES, SPEC, config, robot

from octolike.config import ConfigError, OptimConfig
from octolike.errors import RunError
from octolike.train import checkpoint, checkpoint_store, optimizer, retention, sharding, state
from octolike.train import initial_state as starts

PARAMS = {"head": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}


def initializer(frozen=(), ema=0.9):
    tx = optimizer.make_optimizer(OptimConfig(), 10)
    return starts.StateInitializer(tx, list(frozen), OptimConfig(ema=ema), sharding.make_mesh())


def make_state(params=PARAMS, step=0, **how):
    """Return a state on the devices with the given parameters."""
    state = initializer(**how).create(
        lambda key: jax.tree.map(jnp.asarray, params), jax.random.key(0)
    )
    return state.replace(step=jnp.int32(step))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return a run directory with checkpoints 1, 2 and 3; each adds its step to the kernel."""
    directory = tmp_path_factory.mktemp("runs") / "a"
    checkpoint.write_run_files(config(directory), [robot()], SPEC, NAMES)
    checkpoints = checkpoint_store.CheckpointStore(directory, keep=3)
    now = make_state()
    for step in (1, 2, 3):
        params = jax.tree.map(lambda x, s=step: x + s, PARAMS)
        now = now.replace(
            step=jnp.int32(step), params=params, ema=jax.tree.map(lambda x: -x, params)
        )
        checkpoints.save(now, {"index": 10 * step})
    checkpoints.close()
    return directory


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / "a")


def restore(directory):
    checkpoints = checkpoint_store.CheckpointStore(directory, keep=3)
    return checkpoints.restore(initializer().abstract(jax.eval_shape(lambda: PARAMS)))


def test_restoring_returns_the_saved_state_and_position(directory):
    now, position = restore(directory)
    assert int(now.step) == 3
    assert position == {"index": 30}
    np.testing.assert_array_equal(now.params["head"]["kernel"], PARAMS["head"]["kernel"] + 3)
    np.testing.assert_array_equal(now.ema["head"]["kernel"], -PARAMS["head"]["kernel"] - 3)
    assert jax.tree.structure(now.opt_state) == jax.tree.structure(make_state().opt_state)


def test_a_run_loads_by_step_and_prefers_averaged_parameters(directory):
    assert checkpoint.load_run(directory).step == 3
    run = checkpoint.load_run(directory, step=2)
    assert isinstance(run.params["head"]["kernel"], np.ndarray)
    np.testing.assert_array_equal(run.params["head"]["kernel"], -PARAMS["head"]["kernel"] - 2)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 7; it has \[1, 2, 3\]"):
        checkpoint.load_run(directory, step=7)


def break_manifest(step):
    (step / "params" / "manifest.ocdbt").unlink()


def break_metadata(step):
    path = step / "params" / "_METADATA"
    path.write_bytes(path.read_bytes()[:-9])


def break_optimizer(step):
    shutil.rmtree(step / "optimizer" / "d")


def break_data(step):
    (step / "data" / "metadata").write_text("{")


def remove_parameters(step):
    shutil.rmtree(step / "params")


BREAKS = [break_manifest, break_metadata, break_optimizer, break_data, remove_parameters]


@pytest.mark.parametrize("fault", BREAKS, ids=lambda f: f.__name__)
def test_resume_goes_back_to_the_newest_readable_checkpoint(directory, capsys, fault):
    fault(directory / "checkpoints" / "3")
    now, position = restore(directory)
    assert int(now.step) == 2
    assert position == {"index": 20}
    assert "checkpoint 3 cannot be read" in capsys.readouterr().out
    assert (directory / "checkpoints.broken" / "3").is_dir()
    assert not (directory / "checkpoints" / "3").exists()


@pytest.mark.parametrize("read", range(3))  # manifest, shapes, arrays
def test_a_process_goes_back_if_another_cannot_read_a_checkpoint(
    directory, capsys, monkeypatch, read
):
    answers = iter(range(100))
    monkeypatch.setattr(sharding, "agree_on_fault", lambda fault: fault or next(answers) == read)
    now, position = restore(directory)
    assert (int(now.step), position) == (2, {"index": 20})
    assert "checkpoint 3 cannot be read (another process" in capsys.readouterr().out


@pytest.mark.parametrize("fault", BREAKS, ids=lambda f: f.__name__)
def test_a_process_tells_the_others_that_it_cannot_read_a_checkpoint(directory, monkeypatch, fault):
    """Each process may see other files; the first one alone reads the manifest."""
    told = []
    monkeypatch.setattr(sharding, "agree_on_fault", lambda fault: told.append(fault) or fault)
    monkeypatch.setattr(sharding, "is_first", lambda: False)
    monkeypatch.setattr(checkpoint_store.CheckpointStore, "_move_aside", lambda *_: None)
    fault(directory / "checkpoints" / "3")
    now, _ = restore(directory)
    assert int(now.step) == 2
    assert (told.count(True), told[-3:]) == (1, 3 * [False])


def test_a_second_corrupted_checkpoint_of_a_step_is_moved_next_to_the_first(directory, capsys):
    corrupted = directory / "checkpoints.broken"
    for name in ("3", "3.1"):
        (corrupted / name / "params").mkdir(parents=True)
    break_manifest(directory / "checkpoints" / "3")
    now, _ = restore(directory)
    assert int(now.step) == 2
    assert f"the corrupted one is now {corrupted / '3.2'}\n" in capsys.readouterr().out
    assert (corrupted / "3.2" / "optimizer").is_dir()
    assert not (corrupted / "3" / "optimizer").exists()


def test_if_no_checkpoint_can_be_read_all_are_listed_and_left_in_place(directory):
    for step in "123":
        break_manifest(directory / "checkpoints" / step)
    with pytest.raises(RunError, match=r"no checkpoint can be read[^$]*3: [^$]*2: [^$]*1: "):
        restore(directory)
    assert len(list((directory / "checkpoints").iterdir())) == 3


def test_another_model_is_an_error_and_not_a_corrupted_checkpoint(directory):
    checkpoints = checkpoint_store.CheckpointStore(directory, keep=3)
    other_params = {"head": {"kernel": np.zeros((2, 4), np.float32)}}
    with pytest.raises(ConfigError, match=r"other shape: head/kernel \[2, 3\], expected \[2, 4\]"):
        checkpoints.restore(initializer().abstract(jax.eval_shape(lambda: other_params)))
    assert (directory / "checkpoints" / "3").is_dir()


def test_loading_a_corrupted_checkpoint_names_it_and_lists_the_others(directory):
    break_manifest(directory / "checkpoints" / "3")
    with pytest.raises(RunError, match=r"checkpoint 3 of .* cannot be read .*of \[1, 2\]"):
        checkpoint.load_run(directory)
    assert checkpoint.load_run(directory, step=2).step == 2


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_missing_run_file_is_named_with_its_purpose(directory, name):
    (directory / name).unlink()
    purpose = checkpoint.FILES[name]
    with pytest.raises(FileNotFoundError, match=f"has no {name} .{purpose}") as error:
        checkpoint.load_run(directory)
    assert "a holds " in str(error.value)
    assert "checkpoints" in str(error.value)


def test_a_missing_run_directory_or_checkpoint_lists_the_existing_files(directory):
    with pytest.raises(FileNotFoundError, match=r"no run directory .*/b; .* holds a"):
        checkpoint.load_run(directory.parent / "b")
    shutil.rmtree(directory / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint .*holds batch_spec.json"):
        checkpoint.load_run(directory)


def test_a_run_file_that_is_not_json_is_named(directory):
    (directory / "manifest.json").unlink()
    (directory / "batch_spec.json").write_text('{"action"')
    with pytest.raises(RunError, match=r"batch_spec.json is not JSON"):
        checkpoint.load_run(directory)


def test_an_unknown_setting_in_the_stored_config_is_named(directory):
    (directory / "manifest.json").unlink()
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"clip"', '"clipp"'))
    with pytest.raises(ValueError, match="'clipp'; did you mean 'clip'"):
        checkpoint.load_run(directory)


def test_a_partial_checkpoint_is_ignored(directory):
    partial = directory / "checkpoints" / "4.orbax-checkpoint-tmp-1"
    shutil.copytree(directory / "checkpoints" / "3", partial)
    now, _ = restore(directory)
    assert int(now.step) == 3


def test_frozen_parameters_are_saved_and_restored(tmp_path):
    params = {"head": {"kernel": np.ones((2, 3), np.float32)}, **{"stem": PARAMS["head"]}}
    how = {"frozen": ["stem/kernel"], "ema": 0.0}
    checkpoints = checkpoint_store.CheckpointStore(tmp_path, keep=1)
    checkpoints.save(make_state(params, 1, **how), {})
    checkpoints.wait()
    now, _ = checkpoints.restore(initializer(**how).abstract(jax.eval_shape(lambda: params)))
    np.testing.assert_array_equal(now.frozen["stem"]["kernel"], PARAMS["head"]["kernel"])
    assert now.ema == {}
    assert list(state.TrainState.all_params(now)) == ["stem", "head"]


def test_a_state_can_be_donated_during_its_save(tmp_path):
    big = {"head": {"kernel": np.arange(3 * 2**20, dtype=np.float32)}}
    now = make_state(big, 1)
    change = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with checkpoint_store.CheckpointStore(tmp_path, keep=1) as checkpoints:
        checkpoints.save(now, {})
        for _ in range(3):  # in place: the save must work on a copy
            now = change(now)
    saved = checkpoint_store.read_arrays(tmp_path / "checkpoints" / "1", "params")
    np.testing.assert_array_equal(saved["head"]["kernel"], big["head"]["kernel"])


def save_steps(checkpoints, steps, scores=None):
    for step in steps:
        checkpoints.save(make_state(step=step), {"index": step}, (scores or {}).get(step))
    checkpoints.wait()


def test_the_newest_every_kth_and_the_best_checkpoints_are_retained(tmp_path):
    scores = {s: {"action_error": abs(s - 3) + 1.0, "loss": -float(s)} for s in (2, 3, 5)}
    with checkpoint_store.CheckpointStore(tmp_path, 2, 4, "action_error") as checkpoints:
        save_steps(checkpoints, range(1, 8), scores)
        assert checkpoints.complete() == [3, 4, 6, 7]
    # The next process knows the best one too; a better one replaces it.
    with checkpoint_store.CheckpointStore(tmp_path, 2, 4, "action_error") as checkpoints:
        save_steps(checkpoints, [9], {9: {"action_error": 2.0}})
        assert checkpoints.complete() == [3, 4, 7, 9]
        save_steps(checkpoints, [10, 11], {10: {"action_error": 0.5}, 11: {"action_error": np.nan}})
        assert checkpoints.complete() == [4, 10, 11]


def test_a_corrupted_scores_file_is_named(tmp_path):
    (tmp_path / retention.FILE).write_text('{"3": ')
    with pytest.raises(RunError, match=r"scores.json is corrupted .*; delete it"):
        checkpoint_store.CheckpointStore(tmp_path, 1)


def test_scores_are_means_over_datasets():
    rows = {"a": {"loss": 1.0, "action_error": 2.0, "gripper_accuracy": 1.0}}
    rows["b"] = {"loss": 3.0, "action_error": 4.0}
    assert retention.mean_scores(rows) == {"action_error": 3.0, "loss": 2.0}
    assert retention.mean_scores({}) == {}


def test_keep_best_needs_a_validation_at_a_checkpoint():
    run_config = config("unused", 12, keep_best="loss", checkpoint_every=4, validate_every=2)
    retention.check_keep_best(run_config, validated=True)
    with pytest.raises(ConfigError, match="keep_best is 'loss', but this run has no held-out data"):
        retention.check_keep_best(run_config, validated=False)
    for every in (0, 5):
        run_config.train.validate_every = every
        with pytest.raises(ConfigError, match=r"no checkpoint before the last is validated"):
            retention.check_keep_best(run_config, validated=True)


FULL_DISK = """
import resource, sys
import numpy as np
from test_train_checkpoint import checkpoint_store, make_state

big = {"head": {"kernel": np.random.default_rng(0).normal(size=2**18).astype(np.float32)}}
checkpoints = checkpoint_store.CheckpointStore(sys.argv[1], keep=1)
checkpoints.save(make_state(big, 1), {"index": 1})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
checkpoints.save(make_state(big, 2), {"index": 2})
try:
    checkpoints.close()
except checkpoint_store.SaveError as error:
    print("FAILED", error)
"""


def test_a_full_disk_leaves_the_older_checkpoint_and_the_error_names_the_remedy(tmp_path):
    run = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    python_path = os.pathsep.join(str(Path(__file__).parents[i]) for i in (0, 1))
    environment = {**os.environ, "PYTHONPATH": python_path}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    output = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(output) == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    folder = re.escape(str(tmp_path / "checkpoints"))
    pattern = rf"checkpoint 2 could not be written to {folder}: .* up to [\d,]{{9,}} bytes, and "
    pattern += r"[\d,]+ are free .*Checkpoints \[1\] are intact. Remedy: the limit on file sizes"
    assert re.search(pattern, output[0])
    kernel = {"head": {"kernel": np.zeros(2**18, np.float32)}}
    with checkpoint_store.CheckpointStore(tmp_path, keep=1) as checkpoints:
        # It has also removed the partial checkpoint.
        now, position = checkpoints.restore(initializer().abstract(jax.eval_shape(lambda: kernel)))
        assert checkpoints.complete() == [1]
    assert (int(now.step), position) == (1, {"index": 1})

    def remaining():
        return [p.name for p in (tmp_path / "checkpoints").iterdir()]

    until = time.monotonic() + 30
    while remaining() != ["1"] and time.monotonic() < until:  # the removal runs in the background
        time.sleep(0.05)
    assert remaining() == ["1"]


def check_often(checkpoints):
    for _ in range(100):  # like the loop after each step
        checkpoints.check()
        time.sleep(0.05)


def test_checkpoints_without_a_config_are_an_error(directory):

    def same_run():
        return checkpoint.check_same_run(config(directory), [robot()], SPEC, NAMES)

    assert same_run()
    (directory / "config.json").unlink()
    pattern = r"checkpoints holds \[1, 2, 3\], but .*/a has no config.json, .* Put that file back"
    with pytest.raises(ConfigError, match=pattern):
        same_run()
    shutil.rmtree(directory / "checkpoints")
    assert not same_run()


def test_saving_an_earlier_step_is_an_error(directory):
    with checkpoint_store.CheckpointStore(directory, keep=3) as checkpoints:
        checkpoints.save(make_state(step=3), {})  # already saved
        with pytest.raises(checkpoint_store.SaveError, match=r"checkpoint 2 was not .*\[1, 2, 3\]"):
            checkpoints.save(make_state(step=2), {})
        save_steps(checkpoints, [4])
        assert checkpoints.complete() == [2, 3, 4]


def test_a_failed_background_save_stops_the_run(tmp_path, monkeypatch):
    checkpoints = checkpoint_store.CheckpointStore(tmp_path, keep=3)
    checkpoints.save(make_state(step=1), {})
    checkpoints.wait()
    finish = checkpoints._manager._finalize
    monkeypatch.setattr(checkpoints._manager, "_finalize", lambda *a: finish(*a) or 1 / 0)
    checkpoints.save(make_state(step=2), {})
    with pytest.raises(checkpoint_store.SaveError, match=r"checkpoint 2 .*ZeroDivision") as error:
        check_often(checkpoints)
    assert "some space" not in str(error.value)  # the remedy of a full disk alone
    checkpoints.check()  # reported once


def test_a_failed_save_does_not_hide_an_earlier_error(tmp_path, monkeypatch):
    def fail_twice():
        with checkpoint_store.CheckpointStore(tmp_path, keep=3) as checkpoints:
            monkeypatch.setattr(checkpoints._manager, "_finalize", lambda *a: 1 / 0)
            checkpoints.save(make_state(step=1), {})
            raise FloatingPointError("loss is nan")

    with pytest.raises(FloatingPointError) as error:
        fail_twice()
    assert "checkpoint 1 could not be written" in error.value.__notes__[0]
