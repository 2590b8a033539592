"""Variants in equal training time: steps measured once, stored, and handed to each run."""

import itertools
import json
import types

import pytest

from octolike.config import Config, ConfigError
from octolike.errors import RunError
from octolike.evaluation import equal_time, study_design
from octolike.train import optimizer, step_seconds

SECONDS = {"default": 0.1, "slow": 0.25, "quick": 0.04}


@pytest.fixture
def module(tmp_path):
    def get_config(arg):
        variant, seed = (pair.partition("=")[2] for pair in arg.split(","))
        config = Config(workdir=f"{tmp_path}/study/{variant}-{seed}")
        config.train.steps = config.train.checkpoint_every = 1000
        config.train.validate_every, config.optim.warmup = 200, 100
        return config

    return types.SimpleNamespace(VARIANTS=dict.fromkeys(SECONDS), get_config=get_config)


def plan(module, variants, measured, seeds=2):
    def measure(configs):
        measured.append(list(configs))
        return {name: SECONDS[name] for name in configs}

    return equal_time.plan(study_design.plan_runs(module, variants, "", seeds), measure)


def test_steps_take_as_long_as_those_of_the_first_variant(module, tmp_path):
    runs, table = plan(module, ["default", "slow", "quick"], measured := [])
    assert measured == [["default", "slow", "quick"]]
    steps = {run.variant: run.config.train.steps for run in runs}
    assert steps == {"default": 1000, "slow": 400, "quick": 2500}
    assert "2500" in table
    slow = next(r for r in runs if r.variant == "slow" and r.seed == 1)
    assert slow.config.workdir == f"{tmp_path}/study-equal-time/slow-1"
    train = slow.config.train
    assert (train.checkpoint_every, train.validate_every, slow.config.optim.warmup) == (400, 80, 40)
    # the flags turn the config of the file into that of the run
    config = module.get_config(slow.arg)
    for flag in slow.overrides:
        name, value = flag.removeprefix("--config.").split("=")
        section, _, option = name.rpartition(".")
        owner = getattr(config, section) if section else config
        setattr(owner, option, type(getattr(owner, option))(value))
    assert config == slow.config


def test_the_learning_rate_is_the_same_relative_to_the_length(module):
    runs, _ = plan(module, ["default", "slow"], [], seeds=1)
    rates = [
        [float(optimizer.schedule(r.config.optim, steps)(int(steps * x))) for x in (0.05, 0.5, 0.9)]
        for r in runs
        for steps in [r.config.train.steps]
    ]
    assert rates[0] == pytest.approx(rates[1])


def test_a_repeated_command_keeps_the_steps_and_measures_new_variants_only(
    module, tmp_path, monkeypatch
):
    plan(module, ["default", "slow"], [])
    monkeypatch.setitem(SECONDS, "default", 0.2)  # the machine is busy now
    monkeypatch.setitem(SECONDS, "quick", 0.08)
    runs, _ = plan(module, ["default", "slow"], measured := [], seeds=3)
    assert not measured
    assert {r.config.train.steps for r in runs if r.variant == "slow"} == {400}
    with pytest.raises(ConfigError, match="relates steps to the variant 'default': add it"):
        plan(module, ["quick"], measured)
    runs, _ = plan(module, ["default", "quick"], measured)
    assert measured == [["default", "quick"]]
    assert {r.variant: r.config.train.steps for r in runs} == {"default": 1000, "quick": 2500}
    path = tmp_path / "study-equal-time" / equal_time.FILE
    stored = json.loads(path.read_text())
    assert stored["variants"]["slow"]["seconds_per_step"] == 0.25
    assert stored["variants"]["default"]["seconds_per_step"] == 0.1
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RunError, match=r"is not a measurement of steps .*; move it away"):
        plan(module, ["default"], [])


def test_steps_are_measured_in_turn_after_a_warm_up(monkeypatch):
    calls, clock = [], itertools.count()
    monkeypatch.setattr(step_seconds, "_stepper", lambda name, *_: lambda: calls.append(name))
    monkeypatch.setattr(step_seconds.time, "perf_counter", lambda: float(next(clock)))
    inputs = {name: step_seconds.StepInputs(name, {}, None) for name in ("a", "b")}
    assert step_seconds.measure(inputs, repeats=3) == {"a": 1.0, "b": 1.0}
    assert calls == ["a", "b"] * (step_seconds.WARM_UP + 3)
