"""Train and evaluate variants of one config over several seeds, and compare them.

    octolike compare --config compare --variants default,task_id --seeds 3     after collect
    ... --collect                               demonstrations first, where a run's are missing
    ... --config conflict:conflict=rescaled     further arguments for each run's config
    ... --until-decided --seeds 12              stop a variant once its difference is certain
    ... --equal-time                            steps that take as long as the first variant's
    ... --block test --episodes 200             scenes that no choice of the recipe has seen, more
    octolike compare --table runs/compare       only the table of existing results
    ... --against alone_20 --split held_out_combination      another question than the study's

A config takes the arguments variant and seed, and names its workdir <comparison>/<variant>-<seed>.
Expect the difference that the study can find, then <comparison>/comparison.md and comparison.png.
Repeat an interrupted command; one with more seeds continues the study.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

from _children import add_question, complete_run, positive, study_parser
from _step_seconds import measure_steps


def main() -> None:
    """Run the missing variants and seeds, then draw the figure and print the table."""
    parser = study_parser(__doc__)
    parser.add_argument("--config", help="configs/x.py or configs/x.py:arguments")
    parser.add_argument("--variants", default="", help="comma-separated; default: all")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds 0, 1, … of each variant")
    parser.add_argument("--until-decided", action="store_true", help="--seeds is the maximum")
    parser.add_argument("--equal-time", action="store_true", help="measured before the runs")
    parser.add_argument("--collect", action="store_true", help="collect missing demonstrations")
    add_question(parser)
    parser.add_argument("--table", default="", help="print only the table of this directory")
    args = parser.parse_args()
    if bool(args.config) == bool(args.table):
        parser.error("give either --config or --table")
    from octolike.evaluation import comparison, study_design

    try:
        question = study_design.question(args.config, args.against, args.split)
        directory, evidence = run_all(args, question) if args.config else (Path(args.table), "")
        names = args.variants.split(",") if args.table and args.variants else ()
        scenes = args.block, names, args.episodes
        print(comparison.write(directory, question, *scenes, evidence))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def run_all(args: argparse.Namespace, question: Any) -> tuple[Path, str]:
    """Complete the runs of every variant and seed; return their directory and the evidence."""
    from octolike.evaluation import equal_time, study_design, suites

    suites.overrides(block=args.block)  # a wrong name ends before any training
    variants, runs = study_design.plan_study(args.config, args.variants, args.seeds)
    if args.equal_time:
        runs, table = equal_time.plan(runs, measure_steps)
        print(table, flush=True)
    design = {r.variant: r.config for r in runs}, args.seeds, question, args.until_decided
    print(study_design.sentence(*design), flush=True)
    decided, evidence = set(), ""
    for _, of_seed in itertools.groupby(runs, key=lambda run: run.seed):
        for run in (r for r in of_seed if r.variant not in decided):
            directory = complete_run(run, args)
        if args.until_decided:
            known = directory.parent, variants, question, args.block, args.episodes
            decided, evidence = study_design.decided(*known)
            print(evidence, flush=True)
        if len(decided) >= max(1, len(variants) - 1):
            break
    return directory.parent, evidence


if __name__ == "__main__":
    main()
