"""Does sharing help? Datasets compared before, during and after training together.

    python scripts/transfer.py --config configs/transfer.py                 all stages
    python scripts/transfer.py --config configs/bridge.py --stage before --root DIR    data alone
    ... --config configs/transfer.py:debug                                  to see that all is wired

before: actions, pictures and rows of each pair, and advice. during: the runs together, and how
their gradients agree. after: each group alone, and the mix without each. A config for the last two
takes variant=… and seed=…, and names its workdir <runs>/<variant>-<seed>; for the first any will
do. Expect <runs>/transfer/report.html and report.json. Stopped half-way, the same command goes on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STAGES = ("before", "during", "after", "all", "report")


def main() -> None:
    """Run the stages that are asked for, then write the report of all that is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, help="configs/x.py or configs/x.py:arguments")
    parser.add_argument("--root", default="", help="of the datasets, in place of data.root")
    parser.add_argument("--stage", choices=STAGES, default="all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … of each variant")
    parser.add_argument("--episodes", type=int, default=300, help="looked at of each dataset")
    args = parser.parse_args()
    try:
        transfer(args)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


def transfer(args: argparse.Namespace) -> None:
    """Go through the stages; each does only what is not done yet."""
    from octolike.config import load_module
    from octolike.data.pipeline.decoded_episodes import decode_mix
    from octolike.evaluation.transfer import group_comparison, study, transfer_effects

    path, _, arg = args.config.partition(":")
    module = load_module(path)
    config, runs = module.get_config(arg), study.plan(module, arg, args.seeds)
    directory = Path(config.workdir).parent if runs else Path(config.workdir)
    config.data.move(args.root)
    root = [f"--config.data.root={args.root}"] if args.root else []
    for run in runs:  # a group's data are what the run of it alone asks for
        alone = run.variant.startswith(transfer_effects.ONLY) and not run.seed
        if alone and config.environment and args.stage != "report":
            call("collect.py", f"--config={path}:{run.arg}", *root)
    if args.stage in ("before", "all"):
        found = decode_mix(config.data, pictures=16, episodes=args.episodes, steps=8)
        study.compare(group_comparison.samples(found), directory)
    if args.stage in ("during", "after", "all"):
        held_out = decode_mix(config.data, held_out=True, episodes=32)
        for run in study.chosen(runs, args.stage):
            call("train.py", f"--config={path}:{run.arg}", *root)
            if run.config.environment and args.stage != "during":
                call("evaluate.py", f"--run={run.config.workdir}")
            transfer_effects.measure_errors(
                Path(run.config.workdir), transfer_effects.demonstrations(held_out)
            )
    material = study.write_report(directory)
    print("\n".join(study.transfer_report.summary(material)))
    print(f"\nreport: {directory / study.FOLDER / 'report.html'}")


def call(script: str, *flags: str) -> None:
    """Run a script of this folder in a process of its own: simulators and tensorflow go apart."""
    print(f"--- {script} {' '.join(flags)}", flush=True)
    subprocess.run([sys.executable, HERE / script, *flags], check=True)


if __name__ == "__main__":
    main()
