"""Plan a run without a device: memory, operations, step time, data rate, days, and limits.

    octolike plan --config pretrain:size=base --chips h100:32
    octolike plan --config bridge --chips 4090:2 --mfu 0.3 --per_host 2 --host_data '900 examples'

Nothing is compiled and no data are read: shapes come from the dataset specs. The step takes as long
as its slowest part: its operations at the vendors' peak times --mfu, an assumption; the bytes that
it moves in memory and between devices, at the vendors' bandwidths; its data, at the rate that a
host delivers (--host_data, from octolike benchmark data). The activations are those stored for the
backward pass, without the compiler's temporary buffers.
"""

import sys

from absl import flags

from octolike import config as configs
from octolike.config import Config, ConfigError

CHIPS = flags.DEFINE_string("chips", "h100:8", "name:number of devices, such as h100:32 or v5e:64")
MFU = flags.DEFINE_float(
    "mfu", 0.4, "assumed share of the peak rate that a step reaches", 0.001, 1.0
)
NETWORK = flags.DEFINE_float("network", 0.0, "GB/s that a host sends to others; 0: not stated", 0)
HOST_DATA = flags.DEFINE_string(
    "host_data", "", "delivered by a host per second: '900 examples' or '350 MB' of decoded data"
)
PER_HOST = flags.DEFINE_integer("per_host", 8, "devices per host", 1)


def plan(config: Config) -> None:
    """Print the plan of a config."""
    from octolike.data.specs import planned
    from octolike.train import cluster, resource_plan

    try:
        data = planned.plan_data(config)
        machines = cluster.parse_chips(CHIPS.value, PER_HOST.value)
        machines = machines.with_rates(NETWORK.value, HOST_DATA.value)
        needs = resource_plan.plan(config, data.spec, data.names, machines, MFU.value)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(resource_plan.describe(needs, config, machines, MFU.value))
    if data.steps:
        epochs = config.train.steps * config.data.batch_size / data.steps
        print(f"the mixture's datasets have {data.steps:,} steps: {epochs:.1f} epochs of them")


if __name__ == "__main__":
    configs.run(plan)
