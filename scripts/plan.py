"""Plan a run without a device: memory, operations, step time, data rate, days, and limits.

    octolike plan --config pretrain:size=base --chips h100:32
    octolike plan --config bridge --chips 4090:2 --mfu 0.3 --per-host 2

Nothing is compiled and no data are read: shapes come from the dataset specs. The step time is the
operations over the vendors' peak times --mfu, an assumption; the activations are those stored
for the backward pass, without the compiler's temporary buffers.
"""

import sys

from absl import flags

from octolike import config as configs
from octolike.config import Config, ConfigError

CHIPS = flags.DEFINE_string("chips", "h100:8", "name:number of devices, such as h100:32 or v5e:64")
MFU = flags.DEFINE_float("mfu", 0.4, "assumed share of the peak rate that a step reaches")
PER_HOST = flags.DEFINE_integer("per_host", 8, "devices per host")


def plan(config: Config) -> None:
    """Print the plan of a config."""
    from octolike.data.specs import planned
    from octolike.train import resource_plan

    try:
        data = planned.plan_data(config)
        cluster = resource_plan.parse_chips(CHIPS.value, PER_HOST.value)
        needs = resource_plan.plan(config, data.spec, data.names, cluster, MFU.value)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(resource_plan.describe(needs, config, cluster, MFU.value))
    if data.steps:
        epochs = config.train.steps * config.data.batch_size / data.steps
        print(f"the mixture's datasets have {data.steps:,} steps: {epochs:.1f} epochs of them")


if __name__ == "__main__":
    configs.run(plan)
