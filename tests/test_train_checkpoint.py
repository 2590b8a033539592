"""Checkpoints and run directories: round trip, broken files, words of the errors."""

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
from octolike.train import checkpoint, optimizer, retention, sharding, state
from octolike.train import initial_state as starts

PARAMS = {"head": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}


def start(frozen=(), ema=0.9):
    tx = optimizer.make(OptimConfig(), 10)
    return starts.Start(tx, list(frozen), OptimConfig(ema=ema), sharding.make_mesh())


def fresh(params=PARAMS, step=0, **how):
    """Return a state on the devices with the given parameters."""
    made = start(**how).scratch(lambda key: jax.tree.map(jnp.asarray, params), jax.random.key(0))
    return made.replace(step=jnp.int32(step))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return a run directory with checkpoints 1, 2 and 3; each adds its step to the kernel."""
    directory = tmp_path_factory.mktemp("runs") / "a"
    checkpoint.write_run_files(config(directory), [robot()], SPEC, NAMES)
    checkpoints = checkpoint.Checkpoints(directory, keep=3)
    now = fresh()
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
    checkpoints = checkpoint.Checkpoints(directory, keep=3)
    return checkpoints.restore(start().abstract(jax.eval_shape(lambda: PARAMS)))


def test_restores_what_was_saved(directory):
    now, position = restore(directory)
    assert int(now.step) == 3
    assert position == {"index": 30}
    np.testing.assert_array_equal(now.params["head"]["kernel"], PARAMS["head"]["kernel"] + 3)
    np.testing.assert_array_equal(now.ema["head"]["kernel"], -PARAMS["head"]["kernel"] - 3)
    assert jax.tree.structure(now.opt_state) == jax.tree.structure(fresh().opt_state)


def test_a_run_loads_by_step_and_prefers_the_average(directory):
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


def test_a_step_that_breaks_again_is_put_beside_the_first(directory, capsys):
    aside = directory / "checkpoints.broken"
    for name in ("3", "3.1"):
        (aside / name / "params").mkdir(parents=True)
    break_manifest(directory / "checkpoints" / "3")
    now, _ = restore(directory)
    assert int(now.step) == 2
    assert f"the broken one is now {aside / '3.2'}\n" in capsys.readouterr().out
    assert (aside / "3.2" / "optimizer").is_dir()
    assert not (aside / "3" / "optimizer").exists()


def test_when_none_can_be_read_all_are_named_and_left_in_place(directory):
    for step in "123":
        break_manifest(directory / "checkpoints" / step)
    with pytest.raises(RunError, match=r"no checkpoint can be read[^$]*3: [^$]*2: [^$]*1: "):
        restore(directory)
    assert len(list((directory / "checkpoints").iterdir())) == 3


def test_another_model_is_no_broken_checkpoint(directory):
    checkpoints = checkpoint.Checkpoints(directory, keep=3)
    other = {"head": {"kernel": np.zeros((2, 4), np.float32)}}
    with pytest.raises(ConfigError, match=r"other shape: head/kernel \[2, 3\], expected \[2, 4\]"):
        checkpoints.restore(start().abstract(jax.eval_shape(lambda: other)))
    assert (directory / "checkpoints" / "3").is_dir()


def test_a_policy_is_told_which_checkpoint_is_broken(directory):
    break_manifest(directory / "checkpoints" / "3")
    with pytest.raises(RunError, match=r"checkpoint 3 of .* cannot be read .*of \[1, 2\]"):
        checkpoint.load_run(directory)
    assert checkpoint.load_run(directory, step=2).step == 2


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_missing_file_is_named_with_its_purpose(directory, name):
    (directory / name).unlink()
    purpose = checkpoint.FILES[name]
    with pytest.raises(FileNotFoundError, match=f"has no {name} .{purpose}") as error:
        checkpoint.load_run(directory)
    assert "a holds " in str(error.value)
    assert "checkpoints" in str(error.value)


def test_no_run_directory_and_no_checkpoint_say_what_is_there(directory):
    with pytest.raises(FileNotFoundError, match=r"no run directory .*/b; .* holds a"):
        checkpoint.load_run(directory.parent / "b")
    shutil.rmtree(directory / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint .*holds batch_spec.json"):
        checkpoint.load_run(directory)


def test_a_file_that_is_no_json_is_named(directory):
    (directory / "batch_spec.json").write_text('{"action"')
    with pytest.raises(RunError, match=r"batch_spec.json is no JSON"):
        checkpoint.load_run(directory)


def test_an_unknown_setting_in_the_stored_config_is_named(directory):
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"clip"', '"clipp"'))
    with pytest.raises(ValueError, match="'clipp'; did you mean 'clip'"):
        checkpoint.load_run(directory)


def test_an_interrupted_save_is_cleared_away(directory):
    half = directory / "checkpoints" / "4.orbax-checkpoint-tmp-1"
    shutil.copytree(directory / "checkpoints" / "3", half)
    now, _ = restore(directory)
    assert int(now.step) == 3


def test_frozen_parameters_are_saved_and_come_back(tmp_path):
    params = {"head": {"kernel": np.ones((2, 3), np.float32)}, **{"stem": PARAMS["head"]}}
    how = {"frozen": ["stem/kernel"], "ema": 0.0}
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(fresh(params, 1, **how), {})
    checkpoints.wait()
    now, _ = checkpoints.restore(start(**how).abstract(jax.eval_shape(lambda: params)))
    np.testing.assert_array_equal(now.frozen["stem"]["kernel"], PARAMS["head"]["kernel"])
    assert now.ema == {}
    assert list(state.TrainState.all_params(now)) == ["stem", "head"]


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    big = {"head": {"kernel": np.arange(3 * 2**20, dtype=np.float32)}}
    now = fresh(big, 1)
    change = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(now, {})
        for _ in range(3):  # in place: what is being written must be a copy
            now = change(now)
    saved = checkpoint._read_arrays(tmp_path / "checkpoints" / "1" / "params")
    np.testing.assert_array_equal(saved["head"]["kernel"], big["head"]["kernel"])


def save_steps(checkpoints, steps, scores=None):
    for step in steps:
        checkpoints.save(fresh(step=step), {"index": step}, (scores or {}).get(step))
    checkpoints.wait()


def test_the_newest_every_so_many_and_the_best_are_kept(tmp_path):
    scores = {s: {"action_error": abs(s - 3) + 1.0, "loss": -float(s)} for s in (2, 3, 5)}
    with checkpoint.Checkpoints(tmp_path, 2, 4, "action_error") as checkpoints:
        save_steps(checkpoints, range(1, 8), scores)
        assert checkpoints.complete() == [3, 4, 6, 7]
    # the best one is known to the next process too, and a better one takes its place
    with checkpoint.Checkpoints(tmp_path, 2, 4, "action_error") as checkpoints:
        save_steps(checkpoints, [9], {9: {"action_error": 2.0}})
        assert checkpoints.complete() == [3, 4, 7, 9]
        save_steps(checkpoints, [10, 11], {10: {"action_error": 0.5}, 11: {"action_error": np.nan}})
        assert checkpoints.complete() == [4, 10, 11]


def test_a_broken_file_of_scores_is_named(tmp_path):
    (tmp_path / retention.FILE).write_text('{"3": ')
    with pytest.raises(RunError, match=r"scores.json is broken .*; delete it"):
        checkpoint.Checkpoints(tmp_path, 1)


def test_scores_are_means_over_datasets():
    rows = {"a": {"loss": 1.0, "action_error": 2.0, "gripper_accuracy": 1.0}}
    rows["b"] = {"loss": 3.0, "action_error": 4.0}
    assert retention.mean(rows) == {"action_error": 3.0, "loss": 2.0}
    assert retention.mean({}) == {}


def test_the_best_needs_validations_at_checkpoints():
    made = config("unused", 12, keep_best="loss", checkpoint_every=4, validate_every=2)
    retention.check(made, validated=True)
    with pytest.raises(ConfigError, match="keep_best is 'loss', but this run has no held-out data"):
        retention.check(made, validated=False)
    for every in (0, 5):
        made.train.validate_every = every
        with pytest.raises(ConfigError, match=r"no checkpoint before the last is validated"):
            retention.check(made, validated=True)


FULL_DISK = """
import resource, sys
import numpy as np
from test_train_checkpoint import checkpoint, fresh

big = {"head": {"kernel": np.random.default_rng(0).normal(size=2**18).astype(np.float32)}}
checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=1)
checkpoints.save(fresh(big, 1), {"index": 1})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
checkpoints.save(fresh(big, 2), {"index": 2})
try:
    checkpoints.close()
except checkpoint.SaveError as error:
    print("FAILED", error)
"""


def test_a_full_disk_leaves_the_older_checkpoint_and_says_what_to_do(tmp_path):
    run = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    places = os.pathsep.join(str(Path(__file__).parents[i]) for i in (0, 1))
    environment = {**os.environ, "PYTHONPATH": places}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(said) == 1, done.stdout + done.stderr
    folder = re.escape(str(tmp_path / "checkpoints"))
    pattern = rf"checkpoint 2 could not be written to {folder}: .* up to [\d,]{{9,}} bytes, and "
    pattern += r"[\d,]+ are free .*Checkpoints \[1\] are intact. Make room.* same command .*resumes"
    assert re.search(pattern, said[0])
    kernel = {"head": {"kernel": np.zeros(2**18, np.float32)}}
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:  # also clears the remains away
        now, position = checkpoints.restore(start().abstract(jax.eval_shape(lambda: kernel)))
        assert checkpoints.complete() == [1]
    assert (int(now.step), position) == (1, {"index": 1})
    left = lambda: [p.name for p in (tmp_path / "checkpoints").iterdir()]
    until = time.monotonic() + 30
    while left() != ["1"] and time.monotonic() < until:  # it is done in the background
        time.sleep(0.05)
    assert left() == ["1"]


def check_often(checkpoints):
    for _ in range(100):  # as the loop does, after each step
        checkpoints.check()
        time.sleep(0.05)


def test_checkpoints_of_an_unknown_run_are_not_trained_beside(directory):
    known = lambda: checkpoint.check_same_run(config(directory), [robot()], SPEC, NAMES)
    assert known()
    (directory / "config.json").unlink()
    said = r"checkpoints holds \[1, 2, 3\], but .*/a has no config.json .* Put that file back"
    with pytest.raises(ConfigError, match=said):
        known()
    shutil.rmtree(directory / "checkpoints")
    assert not known()


def test_a_step_that_is_not_saved_is_an_error(directory):
    with checkpoint.Checkpoints(directory, keep=3) as checkpoints:
        checkpoints.save(fresh(step=3), {})  # is there
        with pytest.raises(checkpoint.SaveError, match=r"checkpoint 2 was not .*\[1, 2, 3\]"):
            checkpoints.save(fresh(step=2), {})
        save_steps(checkpoints, [4])
        assert checkpoints.complete() == [2, 3, 4]


def test_a_save_that_fails_in_the_background_stops_the_run(tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    checkpoints.save(fresh(step=1), {})
    checkpoints.wait()
    finish = checkpoints._manager._finalize
    monkeypatch.setattr(checkpoints._manager, "_finalize", lambda *a: finish(*a) or 1 / 0)
    checkpoints.save(fresh(step=2), {})
    with pytest.raises(checkpoint.SaveError, match=r"checkpoint 2 .*ZeroDivisionError"):
        check_often(checkpoints)
    checkpoints.check()  # told once


def test_an_error_is_not_hidden_by_a_save_that_fails_as_well(tmp_path, monkeypatch):
    def fail_twice():
        with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
            monkeypatch.setattr(checkpoints._manager, "_finalize", lambda *a: 1 / 0)
            checkpoints.save(fresh(step=1), {})
            raise FloatingPointError("loss is nan")

    with pytest.raises(FloatingPointError) as error:
        fail_twice()
    assert "checkpoint 1 could not be written" in error.value.__notes__[0]


@pytest.mark.slow
def test_a_run_survives_being_killed():
    """Two kills; all fifty: python tests/kill_many.py --times 50."""
    command = [sys.executable, str(Path(__file__).with_name("kill_many.py")), "--times", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"kills": 2' in done.stdout
