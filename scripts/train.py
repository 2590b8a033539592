"""Train a policy.

    python scripts/train.py --config configs/quickstart.py    once scripts/collect.py has run
    python scripts/train.py --config configs/bridge.py --config.data.root=DIR
    ... --config configs/quickstart.py:debug                  seconds, to see that all is wired

Expect a table of parameters, a progress line with loss and examples per second, the held-out loss
and action error now and then, and in the run's directory (config.workdir) checkpoints,
metrics.jsonl and TensorBoard events. Ctrl-C (exit code 130) or SIGTERM (143) saves; the same
command resumes where it was.
"""

import _launch

from octolike import config as configs

if __name__ == "__main__":
    configs.run(_launch.launch)
