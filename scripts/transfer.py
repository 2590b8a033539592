"""Does sharing help? Datasets compared before, during, after training together; repeat to resume.

    octolike transfer --config transfer                 all stages
    octolike transfer --config bridge --stage before --root DIR    data alone
    ... --config transfer:debug                                  quick test of all stages
    ... --block test                            scenes that no choice of the recipe has seen

before: compares actions, images and specs; gives advice. during: trains the mix; compares its
gradients. after: trains each group alone and the mix without each. The last two need a config with
variant=… and seed=…, and workdir <runs>/<variant>-<seed>. Expect <runs>/transfer/report.html, with
--block test <runs>/transfer-test/report.html.
"""

import argparse
import sys
from pathlib import Path

from _children import call, evaluate, flags, positive, study_parser

STAGES = ("before", "during", "after", "all", "report")


def main() -> None:
    """Run the chosen stages, then write the report of all results so far."""
    parser = study_parser(__doc__)
    parser.add_argument("--config", required=True, help="configs/x.py or configs/x.py:arguments")
    parser.add_argument("--root", default="", help="of the datasets, instead of data.root")
    parser.add_argument("--stage", choices=STAGES, default="all")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds 0, 1, … of each variant")
    parser.add_argument("--episodes", type=int, default=300, help="read of each dataset")
    args = parser.parse_args()
    try:
        transfer(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def transfer(args: argparse.Namespace) -> None:
    """Run the stages; each skips finished work."""
    from octolike import files
    from octolike.config import load_module, plugins
    from octolike.data.pipeline.decoded_episodes import decode_mix
    from octolike.evaluation.transfer import group_sample, study, transfer_effects

    path, _, arg = args.config.partition(":")
    module = load_module(path)
    config, runs = module.get_config(arg), study.plan_runs(module, arg, args.seeds)
    workdir = files.local_path(config.workdir, "config.workdir")
    directory = workdir.parent if runs else workdir
    folder = study.report_folder(directory, args.block)  # a wrong name ends before any training
    config.data.move(args.root)
    config.plugins = tuple(args.plugins) or config.plugins
    plugins.load_of(config)
    overrides = flags("config.data.root", [args.root] if args.root else [])
    overrides += flags("config.plugins", args.plugins)
    print(study.design(runs, args.seeds), flush=True)
    for run in runs:  # the run of a group alone collects the group's data
        is_single = run.variant.startswith(transfer_effects.ONLY) and not run.seed
        if is_single and config.environment and args.stage != "report":
            call("collect.py", f"--config={path}:{run.arg}", *overrides)
    if args.stage in ("before", "all"):
        data = decode_mix(config.data, side=16, episodes=args.episodes, steps=8)
        study.write_comparison(group_sample.group_samples(data), directory)
    if args.stage in ("during", "after", "all"):
        excerpts = decode_mix(config.data, held_out=True, episodes=32)
        held_out = transfer_effects.demonstrated_episodes(excerpts)
        for run in study.runs_of_stage(runs, args.stage):
            call("train.py", f"--config={path}:{run.arg}", *overrides)
            if run.config.environment and args.stage != "during":
                evaluate(run, args)
            transfer_effects.measure_errors(Path(run.config.workdir), held_out, config.plugins)
    content = study.write_report(directory, args.block)
    print("\n".join(study.transfer_report.summary(content)), end="\n\n")
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
