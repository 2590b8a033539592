"""Train and evaluate variants of one config over several seeds, and compare them.

    octolike collect --config compare
    octolike compare --config compare --variants default,task_id --seeds 3
    ... --config conflict:conflict=rescaled   further arguments for each run's config
    octolike compare --table runs/compare       only the table of existing results

A config takes the arguments variant and seed, and names its workdir <comparison>/<variant>-<seed>.
Expect <comparison>/comparison.md and comparison.png. An interrupted command can be repeated.
"""

import argparse
import sys
from pathlib import Path

from _children import add_plugins, call, flags, positive

from octolike import files


def main() -> None:
    """Run the missing variants and seeds, then draw the figure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", help="configs/x.py or configs/x.py:arguments")
    parser.add_argument("--variants", default="", help="comma-separated; default: all")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds 0, 1, … of each variant")
    add_plugins(parser)
    parser.add_argument("--table", default="", help="print only the table of this directory")
    args = parser.parse_args()
    if bool(args.config) == bool(args.table):
        parser.error("give either --config or --table")
    try:
        directory = Path(args.table) if args.table else run_all(args)
        write(directory)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


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
            # Both resume an interrupted run and do nothing for a finished one.
            overrides = flags("config.plugins", args.plugins)
            call("train.py", "--config", f"{path}:{arg}", *overrides)
            allowed = flags("plugins", args.plugins or config.plugins)
            call("evaluate.py", "--run", str(run), *allowed)
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
