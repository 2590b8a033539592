"""Train on from another run, or from an imported Octo checkpoint, on new data.

    python scripts/finetune.py --config configs/finetune.py:checkpoint=runs/quickstart,mode=lora
    ... --config.data.specs=my_robot.py --config.data.mix=my_robot --config.data.root=DIR
        --config.workdir=runs/mine

Modes: full, head, readouts, frozen_vision, frozen_language, lora. What may differ from the run is
said in the config (`head=l1`, `camera=wrist:128`, `proprio=drop`, …) or by train.reinit; anything
else that does not fit is an error. Expect the settings that differ, then a table of what is taken
over, what starts afresh and what is left behind; the rest is as in train.py.
"""

import sys

import _launch

from octolike import config as configs


def main(config: configs.Config) -> None:
    """Check that there is something to start from, and train."""
    if not config.train.init_from:
        sys.exit("error: train.init_from is empty; name the run directory to start from")
    _launch.launch(config)


if __name__ == "__main__":
    configs.run(main)
