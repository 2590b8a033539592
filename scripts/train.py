"""Train a policy.

    octolike train --config quickstart    after octolike collect
    octolike train --config bridge --config.data.root=DIR
    ... --config quickstart:debug                  takes seconds; checks the installation

Expect a table of parameters, a progress line with loss and examples per second, the held-out loss
and action error at each validation, and in the run's directory (config.workdir) checkpoints,
metrics.jsonl and TensorBoard events. Ctrl-C (exit code 130) or SIGTERM (143) saves; the same
command resumes.
"""

import _launch

from octolike import config as configs

if __name__ == "__main__":
    configs.run(_launch.launch)
