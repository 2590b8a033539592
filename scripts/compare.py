"""Train and evaluate variants of one config over several seeds, and compare them.

    octolike collect --config compare
    octolike compare --config compare --variants default,task_id --seeds 3
    ... --config conflict:conflict=rescaled   further arguments for each run's config
    octolike compare --table runs/compare       only the table of existing results

A config takes the arguments variant and seed, and names its workdir <comparison>/<variant>-<seed>.
Expect <comparison>/comparison.md and comparison.png. An interrupted command can be repeated.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from octolike import files

HERE = Path(__file__).parent


def main() -> None:
    """Run the missing variants and seeds, then draw the figure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", help="configs/x.py or configs/x.py:arguments")
    parser.add_argument("--variants", default="", help="comma-separated; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … of each variant")
    parser.add_argument(
        "--plugins",
        action="append",
        default=[],
        help="plug-in of every run, in place of the config's",
    )
    parser.add_argument("--table", default="", help="print only the table of this directory")
    args = parser.parse_args()
    if bool(args.config) == bool(args.table):
        parser.error("give either --config or --table")
    try:
        directory = Path(args.table) if args.table else run_all(args)
        write(directory)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd[1:]))
        sys.exit(f"error: {command} ended with exit code {error.returncode}; its output is above")


def run_all(args: argparse.Namespace) -> Path:
    """Train and evaluate every variant and seed without results; return their directory."""
    from octolike.config import ConfigError, load_module, unknown

    path, _, further = args.config.partition(":")
    module = load_module(path)
    if not hasattr(module, "VARIANTS"):
        raise ConfigError(f"{path} defines no VARIANTS to compare; see experiments/compare.py")
    variants = args.variants.split(",") if args.variants else list(module.VARIANTS)
    for name in variants:
        if name not in module.VARIANTS:
            raise ConfigError(unknown("variant", name, module.VARIANTS))
    for seed in range(args.seeds):
        for name in variants:
            arg = ",".join(filter(None, (further, f"variant={name},seed={seed}")))
            config = module.get_config(arg)
            run = files.local_path(config.workdir, "run")
            train = ["train.py", "--config", f"{path}:{arg}"]
            train += [f"--config.plugins={file}" for file in args.plugins]
            evaluate = ["evaluate.py", "--run", str(run)]
            evaluate += [f"--plugins={file}" for file in args.plugins or config.plugins]
            # Both resume an interrupted run and do nothing for a finished one.
            for command in (train, evaluate):
                print(f"--- {' '.join(command)}", flush=True)
                subprocess.run([sys.executable, HERE / command[0], *command[1:]], check=True)
    return run.parent


def write(directory: Path) -> None:
    """Write comparison.md and comparison.png into the directory and print the table."""
    from octolike.evaluation import comparison

    summaries = comparison.read(directory)
    text = comparison.table(summaries, first="default")
    files.write_text(directory / "comparison.md", text + "\n")
    figure = comparison.draw(summaries, directory / "comparison.png", first="default")
    print(f"{text}\n\n{figure}")


if __name__ == "__main__":
    main()
