"""Evaluate a trained policy in its simulator and write a report.

    octolike evaluate --run runs/quickstart                    the run's own settings
    octolike evaluate --run runs/quickstart --suite tabletop   every skill, seen, held out
    ... --block test                            scenes that no choice of the recipe has seen
    ... --splits train,held_out_phrasing --skills touch --episodes 50   selected episodes
    ... --untrained=false                       without the untrained network's episodes
    ... --embodiment all                        every robot of the run that the simulator supports

Expect a success table next to the untrained network's, a verdict on memorising, RUN/report.html,
and rows and figures in RUN/evaluation. After an interruption, the same command continues.
"""

import sys

from absl import app, flags, logging

RUN = flags.DEFINE_string("run", None, "directory of the run", required=True)
SUITE = flags.DEFINE_string("suite", None, "a suite of octolike/evaluation/suites.py")
SPLITS = flags.DEFINE_list("splits", None, "splits, instead of the run's or the suite's")
SKILLS = flags.DEFINE_list("skills", None, "skills, instead of the run's or the suite's")
BLOCK = flags.DEFINE_string(
    "block", None, "scenes to choose a recipe (development) or report it: test, test2"
)
EPISODES = flags.DEFINE_integer("episodes", None, "episodes per skill and split", lower_bound=1)
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "step of the checkpoint; default: the newest")
PLUGINS = flags.DEFINE_multi_string("plugins", [], "plug-in of the run whose code may be executed")
UNTRAINED = flags.DEFINE_bool("untrained", None, "the untrained network as well, or not")
EMBODIMENT = flags.DEFINE_string("embodiment", None, "one robot of several; 'all': one by one")


def main(_: list[str]) -> None:
    """Run the episodes and write the report; expected errors are one line without a traceback."""
    logging.set_verbosity(logging.WARNING)
    # Here, as worker processes do not need jax.
    from octolike.evaluation import evaluate, suites

    try:
        plan = suites.overrides(SPLITS.value, SKILLS.value, EPISODES.value, BLOCK.value)
        robots, skipped = evaluate.robots_to_evaluate(RUN.value, EMBODIMENT.value, PLUGINS.value)
        for reason in skipped:
            print(f"skipped: {reason}")
        for robot in robots:
            options = SUITE.value, plan, CHECKPOINT.value, robot, PLUGINS.value
            evaluation = evaluate.Evaluation(RUN.value, *options, untrained=UNTRAINED.value)
            evaluation.run()
            page = evaluation.report(predict_chunks(evaluation))
            print(evaluation.table())
            print(f"\nreport: {page}")
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def predict_chunks(evaluation):
    """Return predicted next to demonstrated chunks; None, after printing why, if impossible."""
    from octolike.evaluation.demonstrated_episode import DemonstratedEpisode

    config, policy = evaluation.config.data, evaluation.policy
    try:
        from octolike.data.pipeline.decoded_episodes import decode_episodes
        from octolike.data.specs import catalog

        spec = catalog.find_spec(policy.embodiment.datasets[0], catalog.load_specs(config.specs))
        cameras = {key.removeprefix("image_"): 0 for key in policy.image_shapes}  # 0: as stored
        episodes = decode_episodes(spec, config, cameras, episodes=4, held_out=True)
        demonstrations = [DemonstratedEpisode.from_episode(e) for e in episodes]
        if not demonstrations:
            raise LookupError(f"{spec.name} has no held-out episode")
        return evaluation.predict_chunks(demonstrations)
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed"
    except (ValueError, LookupError) as error:
        reason = str(error)
    print(f"no comparison with demonstrations: {reason}")
    return None


if __name__ == "__main__":
    app.run(main)
