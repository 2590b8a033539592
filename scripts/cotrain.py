"""Train on a target dataset together with a prior mix, at a share that may change over time.

    python scripts/cotrain.py --config configs/cotrain.py      once both datasets are collected
    ... --config configs/cotrain.py:target=my_robot,prior=bridge_dataset,base=configs/bridge.py
        --config.data.specs=my_robot.py --config.data.root=DIR

Expect the table of datasets with their shares; validation, and the statistics that actions are
normalised with, are each dataset's own. The rest is as in train.py.
"""

import sys

import _launch

from octolike import config as configs


def main(config: configs.Config) -> None:
    """Check that there is a target, and train."""
    if config.data.sampling.get("kind") != "cotrain":
        sys.exit(
            f"error: data.sampling is {dict(config.data.sampling)}; co-training needs kind "
            "'cotrain' with a target (scripts/train.py takes any other)"
        )
    _launch.launch(config)


if __name__ == "__main__":
    configs.run(main)
