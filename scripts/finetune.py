"""Finetune a run, or an imported Octo checkpoint, on new data.

    octolike finetune --config finetune:checkpoint=runs/quickstart,mode=lora
    ... --config.data.specs=my_robot.py --config.data.mix=my_robot --config.data.root=DIR
        --config.workdir=runs/mine

Modes: full, head, readouts, frozen_vision, frozen_language, lora. Differences from the run are
declared in the config (`head=l1`, `camera=wrist:128`, `proprio=drop`, …) or by train.reinit; any
other mismatch is an error. Expect the settings that differ, then a table of parameters taken over,
reinitialised and unused; everything else is as in train.py.
"""

import sys

import _launch

from octolike import config as configs


def main(config: configs.Config) -> None:
    """Check that train.init_from is set, and train."""
    if not config.train.init_from:
        sys.exit("error: train.init_from is empty; name the run directory to start from")
    _launch.launch(config)


if __name__ == "__main__":
    configs.run(main)
