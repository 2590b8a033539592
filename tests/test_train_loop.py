"""The training loop: exact resume, donation, no retrace, interruption, files and logs."""

import json
import os
import re
import shutil
import signal
import weakref

import chex
import jax
import numpy as np
import pytest
from train_fakes import (
    ACTION,
    HORIZON,
    NAMES,
    SPEC,
    FakeSource,
    Stream,
    Tiny,
    config,
    make_batch,
    robot,
)

from octolike import types
from octolike.config import AugmentConfig, ConfigError, OptimConfig, stored_config
from octolike.train import (
    checkpoint,
    checkpoint_store,
    device_feeder,
    loop,
    metrics,
    optimizer,
    sharding,
    state,
    validation,
)
from octolike.train import initial_state as starts
from octolike.train import step as steps


class Signalled(Stream):
    """A stream that gets a signal while it makes batch `at`."""

    at, signum = 2, signal.SIGTERM

    def __next__(self):
        if self.index == self.at:
            os.kill(os.getpid(), self.signum)
        return super().__next__()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return (directory, last state, indices of its batches) of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    source = FakeSource()
    last = loop.train(run(directory), source, model=Tiny())
    return directory, last, source.streams[0].indices


def run(directory):
    run_config = config(directory, steps=6, checkpoint_every=4, keep=3)
    run_config.optim.ema = 0.9
    return run_config


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    uninterrupted, tmp_path, capsys, signum, code
):
    interrupted = FakeSource(type("Interrupted", (Signalled,), {"signum": signum}))
    with pytest.raises(SystemExit) as stop:
        loop.train(run(tmp_path), interrupted, model=Tiny())
    assert stop.value.code == code
    saved = checkpoint_store.CheckpointStore(tmp_path, keep=3).latest
    assert 0 < saved < 6
    output = capsys.readouterr().out
    assert f"saved at step {saved} of 6; the same command resumes {tmp_path}" in output

    resumed = FakeSource()
    last = loop.train(run(tmp_path), resumed, model=Tiny())
    assert f"resuming {tmp_path} at step {saved}" in capsys.readouterr().out
    _, expected, indices = uninterrupted
    chex.assert_trees_all_equal(last, expected)
    assert int(last.step) == 6
    # Prefetched batches that were not trained on are repeated.
    assert interrupted.streams[0].indices[:saved] + resumed.streams[0].indices == indices
    logged = [row["step"] for row in metrics.read(tmp_path / metrics.FILE)]
    assert logged == sorted(set(logged))


def test_training_a_finished_run_again_does_nothing(uninterrupted, capsys):
    directory, last, _ = uninterrupted
    second = loop.train(run(directory), FakeSource(), model=Tiny())
    chex.assert_trees_all_equal(second, last)
    assert "all 6 steps are done" in capsys.readouterr().out


def test_a_finished_run_takes_other_evaluation_settings(uninterrupted, tmp_path):
    directory, last, _ = uninterrupted
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    changed, source = run(tmp_path), FakeSource()
    changed.evaluate.execute = 3
    chex.assert_trees_all_equal(loop.train(changed, source, model=Tiny()), last)
    assert not source.streams
    assert stored_config(str(tmp_path)).evaluate.execute == 3


def test_a_run_is_completely_on_disk(uninterrupted):
    directory, last, _ = uninterrupted
    names = {p.name for p in directory.iterdir()}
    assert names >= {*checkpoint.FILES, "versions.json", "metrics.jsonl", "parameters.txt"}
    assert list((directory / "tensorboard").glob("events.*"))
    assert {p.name for p in (directory / "checkpoints").iterdir()} == {"4", "6"}
    loaded = checkpoint.load_run(directory)
    assert loaded.step == 6
    assert loaded.spec == SPEC
    assert loaded.names == NAMES
    assert loaded.embodiments[0].action == robot().action
    chex.assert_trees_all_equal(loaded.params, last.ema)  # the policy uses the averaged parameters
    with pytest.raises(AssertionError, match="differ in leaves"):
        chex.assert_trees_all_equal(loaded.params, last.params)


def test_metrics_rows_hold_losses_shares_and_rates(uninterrupted):
    rows = metrics.read(uninterrupted[0] / metrics.FILE)
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["share/one"] == 0.5
        mean = (row["loss/one"] + row["loss/two"]) / 2
        assert row["loss"] == pytest.approx(mean, rel=1e-5)
        assert 0 <= row["data_wait"] <= 1
        assert row["examples_per_second"] > 0
    assert rows[0]["learning_rate"] > rows[-1]["learning_rate"]


def test_run_files_are_written_before_the_first_batch(tmp_path):
    class Fails(Stream):
        def __next__(self):
            assert (tmp_path / "embodiments.json").exists()
            raise OSError("truncated record")

    with pytest.raises(OSError, match="truncated record"):
        loop.train(run(tmp_path), FakeSource(Fails), model=Tiny())
    assert {p.name for p in tmp_path.iterdir()} >= {*checkpoint.FILES, "versions.json"}


def test_another_config_in_the_directory_is_an_error(uninterrupted):
    changed = run(uninterrupted[0])
    changed.optim.learning_rate, changed.train.augment.hue = 1e-3, 0.1
    changed.evaluate.episodes, changed.train.steps = 3, 99
    with pytest.raises(ConfigError, match=r"holds another run; its config\.json differs") as error:
        loop.train(changed, FakeSource(), model=Tiny())
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[1:3] == ["optim.learning_rate: 0.01 -> 0.001", "train.augment.hue: 0.0 -> 0.1"]
    assert "--config.workdir=" in lines[3]


def test_a_start_that_never_trained_may_be_corrected(tmp_path, capsys):
    class Fails(Stream):
        def __next__(self):
            raise OSError("truncated record")

    with pytest.raises(OSError, match="truncated record"):
        loop.train(run(tmp_path), FakeSource(Fails), model=Tiny())
    corrected = run(tmp_path)
    corrected.optim.learning_rate = 1e-3
    loop.train(corrected, FakeSource(), model=Tiny())
    assert "holds a start that never trained: its files are replaced" in capsys.readouterr().out
    assert checkpoint.load_run(tmp_path).config.optim.learning_rate == 1e-3


def test_other_datasets_or_statistics_in_the_directory_are_an_error(uninterrupted):
    names = NAMES._replace(datasets=("one", "three"))
    with pytest.raises(ConfigError, match=r'names\.json differs[^$]*1: "two" -> "three"'):
        loop.train(run(uninterrupted[0]), FakeSource(names=names), model=Tiny())


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(tmp_path):
    poisoned = run(tmp_path)
    poisoned.train.checkpoint_every = 2
    pattern = r"loss is nan.* at step 4; the loss was [\d.]+ at the step before. Checkpoint 2 is"
    with pytest.raises(FloatingPointError, match=pattern):
        loop.train(poisoned, FakeSource(lambda start: Stream(start, poison=3)), model=Tiny())
    assert np.isfinite(checkpoint.load_run(tmp_path).params["head"]["kernel"]).all()


def test_the_batch_of_a_non_finite_loss_is_saved(tmp_path):
    path = tmp_path / "bad_batch_4.npz"
    pattern = rf"not finite in action; it is in {re.escape(str(path))} .*feeder.load_batch"
    with pytest.raises(FloatingPointError, match=pattern):
        loop.train(run(tmp_path), FakeSource(lambda start: Stream(start, poison=3)), model=Tiny())
    batch, position = device_feeder.load_batch(path)
    expected = make_batch(3)
    expected["action"][0] = np.nan
    assert position == {"index": 4}
    types.check_batch(batch, SPEC)
    for name, x in types.flatten(expected):
        np.testing.assert_array_equal(dict(types.flatten(batch))[name], x)


def test_no_third_batch_stays_on_the_devices(tmp_path, monkeypatch):
    """That of the step that runs and the next one, as the memory plan counts them."""
    images, counts, put = [], [], device_feeder.DeviceFeeder.next

    def next_batch(self, signum=None):
        batch = put(self, signum)
        images.append(weakref.ref(batch.arrays["observation"]["image_primary"]))
        counts.append(sum(image() is not None for image in images))
        return batch

    monkeypatch.setattr(device_feeder.DeviceFeeder, "next", next_batch)
    loop.train(run(tmp_path), FakeSource(), model=Tiny())
    assert counts == [1, 2, 2, 2, 2, 2]


def test_a_batch_that_does_not_match_the_spec_is_an_error(tmp_path):
    class Wide(Stream):
        def __next__(self):
            batch = super().__next__()
            batch["action"] = batch["action"][..., :1]
            return batch

    with pytest.raises(ValueError, match=r"action: found float32 \[batch, 2, 2, 1\], expected"):
        loop.train(run(tmp_path), FakeSource(Wide), model=Tiny())


def test_a_run_can_start_from_the_parameters_of_another_run(uninterrupted, tmp_path):
    run_config = run(tmp_path)
    run_config.train.init_from = str(uninterrupted[0])
    run_config.optim.learning_rate, run_config.optim.frozen = 0.0, ("stem/*",)
    run_config.train.steps = 1
    last = loop.train(run_config, FakeSource(), model=Tiny())
    expected = checkpoint.load_run(uninterrupted[0]).params
    chex.assert_trees_all_equal(last.all_params(), expected)

    run_config = run(tmp_path / "wide")
    run_config.train.init_from = str(uninterrupted[0])
    with pytest.raises(ConfigError, match=r"at step 6 do not fit[^$]*other shape: head/kernel"):
        loop.train(run_config, FakeSource(), model=Tiny(width=9))


@pytest.fixture(scope="module")
def step():
    """Return (compiled step, initial state, mesh)."""
    tx = optimizer.make_optimizer(OptimConfig(), 10)
    mesh = sharding.make_mesh()
    initializer = starts.StateInitializer(tx, ["stem/kernel"], OptimConfig(ema=0.9), mesh)
    first = initializer.create(lambda key: state.init_params(Tiny(), SPEC, key), jax.random.key(0))
    step = steps.make_step(Tiny(), tx, run("unused"), jax.random.key(1))
    return steps.compile_step(step, first, SPEC, 4, mesh)[0], first, mesh


def test_the_step_donates_its_state_and_makes_no_implicit_transfer(step):
    compiled, before, mesh = step
    before = jax.tree.map(lambda x: x.copy(), before)
    leaves = jax.tree.leaves(before)
    with jax.transfer_guard("disallow"):
        after, out = compiled(before, sharding.put_batch(make_batch(0), mesh))
        after, _ = compiled(after, sharding.put_batch(make_batch(1), mesh))
    assert all(x.is_deleted() for x in leaves)
    assert out["loss_per_example"].shape == (4,)
    assert int(after.step) == 2


def test_the_step_is_traced_once(tmp_path, monkeypatch):
    traces = []
    original = steps.apply_gradients
    monkeypatch.setattr(steps, "apply_gradients", lambda *a: traces.append(1) or original(*a))
    loop.train(run(tmp_path), FakeSource(), model=Tiny())
    assert traces == [1]


def test_randomness_is_a_function_of_seed_and_step(step):
    compiled, before, mesh = step
    copies = [jax.tree.map(lambda x: x.copy(), before) for _ in range(3)]
    copies[2] = copies[2].replace(step=copies[2].step + 1)
    losses = [compiled(c, sharding.put_batch(make_batch(0), mesh))[1]["loss"] for c in copies]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_batch_size_that_the_devices_do_not_divide_is_an_error():
    mesh = type("Mesh", (), {"size": 8})
    with pytest.raises(ConfigError, match="batch_size 20 does not divide over 8 devices; try 16"):
        sharding.check_batch_size(20, mesh)


def test_validation_equals_its_definition():
    batches = [make_batch(seed) for seed in (7, 8)]
    batches[0]["action_mask"][0] = False
    batches[1]["action_mask"][..., 1:, 2] = False
    batches[1]["task"]["task_id"][:] = [0, 1, 1, 3]  # 3: a task unknown to training
    params = state.init_params(Tiny(), SPEC, jax.random.key(0))
    mesh = sharding.make_mesh()
    validator = validation.Validator(
        Tiny(),
        {"one": lambda: iter(batches)},
        [robot()],
        SPEC,
        ("lift", "push", "never"),
        batches=5,
        mesh=mesh,
        key=jax.random.key(0),
    )
    result = validator(params)
    assert validator(params) == result  # the noise is the same at each call
    error, right, total, grippers, lift = 0.0, 0, 0, 0, []
    for batch in batches:
        sampled = Tiny().apply(
            {"params": params}, batch["observation"], {}, method="sample_actions"
        )
        for i, h, a in np.ndindex(4, HORIZON, ACTION):
            if batch["action_mask"][i, -1, h, a]:
                true, guess = batch["action"][i, -1, h, a], float(sampled[i, h, a])
                error, total = error + abs(true - guess), total + 1
                lift += [abs(true - guess)] if batch["task"]["task_id"][i] == 0 else []
                if a == 2:
                    right, grippers = right + ((true > 0.5) == (guess > 0.5)), grippers + 1
    assert result.datasets["one"]["action_error"] == pytest.approx(error / total, rel=1e-5)
    assert result.datasets["one"]["gripper_accuracy"] == pytest.approx(right / grippers)
    assert list(result.tasks) == ["lift", "push"]
    assert result.tasks["lift"] == pytest.approx(np.mean(lift), rel=1e-5)


def test_an_empty_validation_split_is_an_error():
    validator = validation.Validator(
        Tiny(),
        {"one": lambda: iter([])},
        [robot()],
        SPEC,
        batches=1,
        mesh=sharding.make_mesh(),
        key=jax.random.key(0),
    )
    with pytest.raises(ConfigError, match="validation split of 'one' has no batch"):
        validator({})


def test_validation_is_logged_and_given_to_the_data(tmp_path):
    run_config = run(tmp_path)
    run_config.train.validate_every, run_config.train.augment = 3, AugmentConfig()
    held_out = {"one": lambda: iter([make_batch(9)])}
    source = FakeSource(validation=held_out)
    loop.train(run_config, source, model=Tiny())
    rows = [r for r in metrics.read(tmp_path / metrics.FILE) if "validation/one/loss" in r]
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0]["validation/one/action_error"] > 0
    error = pytest.approx(rows[1]["validation/one/action_error"])
    assert source.streams[0].fed == ({"one": error}, {})
    text = (tmp_path / metrics.FILE).read_text()
    assert all(re.match(r'\{"step": \d+', line) for line in text.splitlines())
    assert json.loads(text.splitlines()[0])["step"] == 2
