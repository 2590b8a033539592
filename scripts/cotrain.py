"""Train on a target dataset together with a prior mixture; the target's share may change over time.

    octolike cotrain --config cotrain      after both datasets are collected
    ... --config cotrain:target=my_robot,prior=bridge_dataset,base=configs/bridge.py
        --config.data.specs=my_robot.py --config.data.root=DIR

Expect the table of datasets with their shares. Validation and action statistics are per dataset.
Everything else is as in train.py.
"""

import sys

import _launch

from octolike import config as configs


def main(config: configs.Config) -> None:
    """Check that data.sampling has a target, and train."""
    if config.data.sampling.get("kind") != "cotrain":
        sys.exit(
            f"error: data.sampling is {dict(config.data.sampling)}; co-training needs kind "
            "'cotrain' with a target (octolike train accepts every other kind)"
        )
    _launch.launch(config)


if __name__ == "__main__":
    configs.run(main)
