"""Train and evaluate variants of one config over several seeds, and compare them.

    octolike compare --config compare --variants default,task_id --seeds 3     after collect
    ... --collect                               demonstrations first, where a run's are missing
    ... --config conflict:conflict=rescaled     further arguments for each run's config
    ... --until-decided --seeds 12              stop a variant once its difference is certain
    ... --equal-time                            steps that take as long as the first variant's
    ... --block test                            scenes that no choice of the recipe has seen
    octolike compare --table runs/compare       only the table of existing results

A config takes the arguments variant and seed, and names its workdir <comparison>/<variant>-<seed>.
Expect the difference that the study can find, then <comparison>/comparison.md and comparison.png.
Repeat an interrupted command; one with more seeds continues the study.
"""

import argparse
import itertools
import sys
from pathlib import Path

from _children import add_plugins, complete_run, positive
from _step_seconds import measure_steps


def main() -> None:
    """Run the missing variants and seeds, then draw the figure and print the table."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--config", help="configs/x.py or configs/x.py:arguments")
    parser.add_argument("--variants", default="", help="comma-separated; default: all")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds 0, 1, … of each variant")
    parser.add_argument("--until-decided", action="store_true", help="--seeds is the maximum")
    parser.add_argument("--equal-time", action="store_true", help="measured before the runs")
    parser.add_argument("--collect", action="store_true", help="collect missing demonstrations")
    parser.add_argument("--block", default="", help="of scenes: development, the default, or test")
    add_plugins(parser)
    parser.add_argument("--table", default="", help="print only the table of this directory")
    args = parser.parse_args()
    if bool(args.config) == bool(args.table):
        parser.error("give either --config or --table")
    from octolike.evaluation import comparison

    try:
        directory = Path(args.table) if args.table else run_all(args)
        print(comparison.write(directory, "default", args.block))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def run_all(args: argparse.Namespace) -> Path:
    """Train and evaluate every variant and seed without results; return their directory."""
    from octolike.config import load_module
    from octolike.evaluation import equal_time, study_design, suites

    suites.overrides(block=args.block)  # a wrong name ends before any training
    path, _, further = args.config.partition(":")
    module = load_module(path)
    variants = study_design.choose_variants(path, module, args.variants)
    runs = study_design.plan_runs(module, variants, further, args.seeds)
    if args.equal_time:
        runs, table = equal_time.plan(runs, measure_steps)
        print(table, flush=True)
    print(study_design.sentence({r.variant: r.config for r in runs}, args.seeds), flush=True)
    decided: set[str] = set()
    for _, of_seed in itertools.groupby(runs, key=lambda run: run.seed):
        for run in (r for r in of_seed if r.variant not in decided):
            directory = complete_run(run, path, args)
        if args.until_decided:
            decided, evidence = study_design.decided(directory.parent, variants, args.block)
            print(evidence, flush=True)
        if len(decided) >= max(1, len(variants) - 1):
            break
    return directory.parent


if __name__ == "__main__":
    main()
