"""Check a trained policy against its data and its simulator.

    octolike check_policy RUN [--frames 64] [--demonstrations 50]

(a) Demonstrations are replayed in their simulator; (b) frames of each dataset go through the policy
as on a robot, and are compared with training's batches, bit for bit, and its validation. Expect a
table and a figure, also in RUN/check_policy. The exit code is 1 if something differs.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

RUN = flags.DEFINE_string("run", None, "directory of the run")
ROOT = flags.DEFINE_string("root", None, "directory of the datasets, if they have moved")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "step of the checkpoint; default: the newest")
PLUGINS = flags.DEFINE_multi_string("plugins", [], "plug-in of the run whose code may be executed")
FRAMES = flags.DEFINE_integer("frames", 64, "frames per dataset", lower_bound=1)
DEMONSTRATIONS = flags.DEFINE_integer("demonstrations", 50, "demonstrations to replay", 0)


def main(arguments: list[str]) -> None:
    """Run both checks; expected errors are one line without a traceback."""
    logging.set_verbosity(logging.WARNING)
    run = RUN.value or next(iter(arguments[1:]), "")
    if not run:
        sys.exit("error: no run given: octolike check_policy RUN")
    try:
        report = check(run)
        print(f"{report.table()}\n\nfigure: {report.write(Path(run) / 'check_policy')}")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if report.faults else 0)


def check(directory: str):
    """Return the report of both checks."""
    from octolike import files  # here: worker processes must not import tensorflow
    from octolike.data import open_data
    from octolike.data.pipeline import recorded_frames
    from octolike.envs.registry import environment_of
    from octolike.errors import DataError
    from octolike.evaluation import frame_check
    from octolike.evaluation.policy_check import CheckReport
    from octolike.evaluation.replay_check import replay_demonstrations
    from octolike.policy import Policy
    from octolike.progress import progress
    from octolike.train.checkpoint import load_run

    directory = files.output_directory(directory, "the run")
    config = (run := load_run(directory, CHECKPOINT.value, PLUGINS.value)).config
    (d := config.data).move(ROOT.value)
    data = open_data(config)
    compared, replays, simulators = [], [], []
    reason = f"no simulator is known for {', '.join(data.datasets)}, or --demonstrations is 0"
    for name, source in ((name, data.source(name)) for name in data.datasets):
        policy = Policy(run, run.embodiments[source.record].name, recorded_frames.BATCH)
        frames = recorded_frames.sample_frames(data, d, name, FRAMES.value, policy.conditioning)
        batches = -(-FRAMES.value // recorded_frames.BATCH)
        with progress(f"frames of {name}", batches, "batches") as bar:
            compared.append(frame_check.compare_frames(policy, name, frames, run, bar.update))
        robot = recorded_frames.source_environment(source.reader)
        if robot is None and name == config.collect.dataset and config.environment:
            robot = environment_of(config.environment, name)
        if not robot or not DEMONSTRATIONS.value:
            continue
        count, episodes = recorded_frames.sample_episodes(source, DEMONSTRATIONS.value)
        with progress(f"replays of {name}", count, "episodes") as bar:
            try:
                replays += replay_demonstrations(episodes, policy.embodiment, robot, bar.update)
                simulators.append(robot["kind"])
            except DataError as error:
                reason = str(error)
    return CheckReport(replays, compared, ", ".join(simulators), f"(a) no replay: {reason}")


if __name__ == "__main__":
    app.run(main)
