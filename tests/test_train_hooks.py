"""Hooks: the checkpoint comes before figures, and neither figures nor simulators end a run."""

import types

import pytest
from train_fakes import NAMES, config

from octolike.pictures import PictureAttempts
from octolike.train import chunk_figures, hooks
from octolike.train.validation import ValidationResult


class Recorder:
    """Stands for the validator, the feeder, the checkpoints and the log; records the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, params):
        self.calls.append("validate")
        return ValidationResult(datasets={}, tasks={}, chunks=())

    def feedback(self, result, position):
        self.calls.append(f"feedback {result.success}")
        return {"fed": True}

    def save(self, state, position, scores):
        self.calls.append(f"save {position}")

    def validation(self, step, scores):
        self.calls.append("log")


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()

    def fail(*arguments):
        recorder.calls.append("picture")
        raise ValueError("$_{ $ is not TeX")

    monkeypatch.setattr(chunk_figures, "save_figure", fail)
    return recorder


def call_all(recorder, tmp_path, measure, times=1):
    run_config = config(tmp_path)
    save = hooks.CheckpointHook(recorder, 1, None)
    after = hooks.with_validation(run_config, recorder, NAMES, recorder, measure, save)
    for step in range(1, times + 1):
        state = types.SimpleNamespace(policy_params=lambda: {})
        hooks.call(after, hooks.StepEvent(step, state, {}, recorder))


def test_a_picture_that_fails_comes_after_the_checkpoint_and_is_printed_once(
    recorder, tmp_path, capsys
):
    call_all(recorder, tmp_path, None, times=3)
    expected = ["validate", "log", "feedback {}", "save {'fed': True}", "picture"]
    assert recorder.calls == expected * 3
    assert capsys.readouterr().err.count("$_{ $ is not TeX (printed once)") == 1


def test_a_simulator_that_fails_does_not_end_the_run_and_feeds_nothing(recorder, tmp_path, capsys):
    def fail(params, step):
        raise RuntimeError("the environment cannot be built: no GL library")

    call_all(recorder, tmp_path, fail)
    assert recorder.calls == ["validate", "log", "save {}", "picture"]
    output = capsys.readouterr().err
    assert "success at step 1 was not measured (RuntimeError: the environment cannot" in output
    call_all(recorder, tmp_path, lambda params, step: {"lift": 0.5})
    assert "feedback {'lift': 0.5}" in recorder.calls


def test_failures_are_counted_by_cause():
    attempts = PictureAttempts()
    assert attempts.draw("a", lambda: 3) == 3
    assert attempts.summary() == ""
    for text in ("x", "x", "y"):
        assert attempts.draw("a", lambda text=text: int(text)) is None
    assert attempts.summary().startswith("3 figures were not drawn: 2 × ValueError")
