"""Checkpoints and run directories: round trip, broken files, words of the errors."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_fakes import NAMES, SPEC, config, robot

from octolike.config import OptimConfig
from octolike.train import checkpoint, loop, optimizer, sharding, state

PARAMS = {"head": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}


def start():
    tx = optimizer.make(OptimConfig(), 10)
    return loop.Start(tx, [], True, sharding.make_mesh())


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return a run directory with checkpoints 1, 2 and 3; each adds its step to the kernel."""
    directory = tmp_path_factory.mktemp("runs") / "a"
    checkpoint.write_run_files(config(directory), [robot()], SPEC, NAMES)
    checkpoints = checkpoint.Checkpoints(directory, keep=3)
    now = start().given(PARAMS)
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
    assert jax.tree.structure(now.opt_state) == jax.tree.structure(start().given(PARAMS).opt_state)


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


def test_when_none_can_be_read_all_are_named_and_left_in_place(directory):
    for step in "123":
        break_manifest(directory / "checkpoints" / step)
    with pytest.raises(ValueError, match=r"no checkpoint can be read[^$]*3: [^$]*2: [^$]*1: "):
        restore(directory)
    assert len(list((directory / "checkpoints").iterdir())) == 3


def test_another_model_is_no_broken_checkpoint(directory):
    checkpoints = checkpoint.Checkpoints(directory, keep=3)
    other = {"head": {"kernel": np.zeros((2, 4), np.float32)}}
    with pytest.raises(ValueError, match=r"other shape: head/kernel \[2, 3\], expected \[2, 4\]"):
        checkpoints.restore(start().abstract(jax.eval_shape(lambda: other)))
    assert (directory / "checkpoints" / "3").is_dir()


def test_a_policy_is_told_which_checkpoint_is_broken(directory):
    break_manifest(directory / "checkpoints" / "3")
    with pytest.raises(ValueError, match=r"checkpoint 3 of .* cannot be read .*of \[1, 2\]"):
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
    with pytest.raises(ValueError, match=r"batch_spec.json is no JSON"):
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
    begin = loop.Start(
        optimizer.make(OptimConfig(), 10), ["stem/kernel"], False, sharding.make_mesh()
    )
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(begin.given(params).replace(step=jnp.int32(1)), {})
    now, _ = checkpoints.restore(begin.abstract(jax.eval_shape(lambda: params)))
    np.testing.assert_array_equal(now.frozen["stem"]["kernel"], PARAMS["head"]["kernel"])
    assert now.ema == {}
    assert list(state.TrainState.all_params(now)) == ["stem", "head"]
