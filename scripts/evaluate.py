"""Run a trained policy in its simulator and write the report.

    python scripts/evaluate.py --run runs/quickstart                    with the run's own settings
    python scripts/evaluate.py --run runs/quickstart --suite tabletop   every skill, seen, held out
    ... --splits train,held_out_phrasing --skills touch --episodes 50   one's own choice
    ... --embodiment all                                                each robot of the run

Expect a success table with 95 % intervals beside the untrained network's, whether it memorised or
learned in words, and RUN/report.html; rows, numbers and pictures are in RUN/evaluation. Stopped
half-way, the same command goes on.
"""

import io
import itertools
import sys

from absl import app, flags, logging

RUN = flags.DEFINE_string("run", None, "directory of the run", required=True)
SUITE = flags.DEFINE_string("suite", None, "a suite of octolike/evaluation/suites.py")
SPLITS = flags.DEFINE_list("splits", None, "splits, instead of the run's or the suite's")
SKILLS = flags.DEFINE_list("skills", None, "skills, instead of the run's or the suite's")
EPISODES = flags.DEFINE_integer("episodes", None, "episodes per skill and split", lower_bound=1)
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "step of the checkpoint; default: the newest")
EMBODIMENT = flags.DEFINE_string("embodiment", None, "the robot, of several; 'all': each in turn")


def main(_: list[str]) -> None:
    """Roll out, film, report; what does not fit is one line, without a traceback."""
    logging.set_verbosity(logging.WARNING)
    # Imported here: worker processes begin by importing this file, and need neither jax nor more.
    from octolike.evaluation import evaluate, report

    given = {"splits": SPLITS.value, "skills": SKILLS.value, "episodes": EPISODES.value}
    given = {k: tuple(v) if k != "episodes" else v for k, v in given.items() if v is not None}
    try:
        for robot in evaluate.robots(RUN.value, EMBODIMENT.value):
            step = CHECKPOINT.value
            evaluation = evaluate.Evaluation(RUN.value, SUITE.value, given, step, robot)
            evaluation.run()
            page = evaluation.report(compare(evaluation))
            print(report.text_table(evaluation.rows, evaluation.groups))
            print(f"\nreport: {page}")
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def compare(evaluation):
    """Return predicted beside demonstrated chunks; None, and why, without held-out episodes."""
    import imageio.v3
    import numpy as np

    from octolike.data import datasets, episodes
    from octolike.evaluation.evaluate import Demonstration

    config, policy = evaluation.config.data, evaluation.policy
    found = []
    try:
        rows = datasets.load_specs(config.specs)
        spec = datasets.find(policy.embodiment.datasets[0], rows)
        reader = episodes.Reader(spec, config.root_of(spec.name), config.validation_split)
        for raw in itertools.islice(reader.records(0), 4):
            episode = reader.episode(raw, reader.files[0])
            seen = {"proprio": episode.proprio}
            for camera, frames in episode.images.items():
                pictures = [imageio.v3.imread(io.BytesIO(frame)) for frame in frames]
                seen[f"image_{camera}"] = np.stack(pictures)
            seen = {key: seen[key] for key in policy.observation_keys}
            told = episode.instructions[0]
            told = told if isinstance(told, str) else told[0]
            found.append(Demonstration(seen, episode.action, told, reader.label(raw, "")))
    except (ValueError, LookupError) as error:
        print(f"no comparison with demonstrations: {error}")
        return None
    return evaluation.imitate(found)


if __name__ == "__main__":
    app.run(main)
