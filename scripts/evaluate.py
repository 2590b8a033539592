"""Run a trained policy in its simulator and write the report.

    python scripts/evaluate.py --run runs/quickstart                    with the run's own settings
    python scripts/evaluate.py --run runs/quickstart --suite tabletop   every skill, seen, held out
    ... --splits train,held_out_phrasing --skills touch --episodes 50   one's own choice
    ... --embodiment all                        each robot of the run that the simulator can be

Expect a success table with 95 % intervals beside the untrained network's, whether it memorised or
learned in words, and RUN/report.html; rows, numbers and pictures are in RUN/evaluation. Stopped
half-way, the same command goes on.
"""

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
        robots, left_out = evaluate.robots(RUN.value, EMBODIMENT.value)
        for why in left_out:
            print(f"left out: {why}")
        for robot in robots:
            step = CHECKPOINT.value
            evaluation = evaluate.Evaluation(RUN.value, SUITE.value, given, step, robot)
            evaluation.run()
            page = evaluation.report(compare(evaluation))
            print(report.text_table(evaluation.rows, evaluation.groups))
            print(f"\nreport: {page}")
    except (ValueError, FileNotFoundError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def compare(evaluation):
    """Return predicted beside demonstrated chunks; None, and why, where there is nothing to do."""
    from octolike.evaluation.evaluate import DemonstratedEpisode

    config, policy = evaluation.config.data, evaluation.policy
    try:
        from octolike.data.pipeline import excerpts
        from octolike.data.specs import catalog

        spec = catalog.find_spec(policy.embodiment.datasets[0], catalog.load_specs(config.specs))
        cameras = {key.removeprefix("image_"): 0 for key in policy.image_shapes}  # 0: as stored
        found = []
        for e in excerpts.take(spec, config, config.validation_split, cameras, episodes=4):
            seen = {"proprio": e.proprio} | {f"image_{k}": v for k, v in e.images.items()}
            seen = {key: seen[key] for key in policy.observation_keys}
            found.append(DemonstratedEpisode(seen, e.action, e.instruction, e.label))
        why = "" if found else f"{config.validation_split!r} of {spec.name} holds no episode"
    except ModuleNotFoundError as error:
        why = f"{error.name} is not installed"
    except (ValueError, LookupError) as error:
        why = str(error)
    if why:
        print(f"no comparison with demonstrations: {why}")
        return None
    return evaluation.imitate(found)


if __name__ == "__main__":
    app.run(main)
