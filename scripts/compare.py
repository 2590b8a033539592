"""Train and evaluate variants of one config over several seeds, and put them side by side.

    python scripts/collect.py --config configs/compare.py
    python scripts/compare.py --config configs/compare.py --variants default,task_id --seeds 3
    ... --config configs/conflict.py:conflict=rescaled   further arguments go to each run's config
    python scripts/compare.py --table runs/compare       the table of what is there, nothing run

A config takes the arguments variant and seed, and names its workdir <comparison>/<variant>-<seed>.
Expect <comparison>/comparison.md and comparison.png. Stopped half-way, the same command goes on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Run what is missing, one after the other, then draw and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", help="configs/x.py or configs/x.py:arguments")
    parser.add_argument("--variants", default="", help="comma-separated; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … of each variant")
    parser.add_argument("--table", default="", help="only the table of this directory")
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
        sys.exit(f"error: {command} ended with exit code {error.returncode}; what it says is above")


def run_all(args: argparse.Namespace) -> Path:
    """Train and evaluate every variant and seed that has no results; return their directory."""
    from octolike.config import ConfigError, load_module, unknown

    path, _, further = args.config.partition(":")
    module = load_module(path)
    if not hasattr(module, "VARIANTS"):
        raise ConfigError(f"{path} has no VARIANTS to compare; configs/compare.py shows how")
    variants = args.variants.split(",") if args.variants else list(module.VARIANTS)
    for name in variants:
        if name not in module.VARIANTS:
            raise ConfigError(unknown("variant", name, module.VARIANTS))
    for seed in range(args.seeds):
        for name in variants:
            own = ",".join(filter(None, (further, f"variant={name},seed={seed}")))
            config, run = f"{path}:{own}", Path(module.get_config(own).workdir)
            # both go on where they were, and do nothing where all is done
            for command in (["train.py", "--config", config], ["evaluate.py", "--run", str(run)]):
                print(f"--- {' '.join(command)}", flush=True)
                subprocess.run([sys.executable, HERE / command[0], *command[1:]], check=True)
    return run.parent


def write(directory: Path) -> None:
    """Write comparison.md and comparison.png into the directory and print the table."""
    from octolike import files
    from octolike.evaluation import comparison

    entries = comparison.read(directory)
    text = comparison.table(entries, first="default")
    files.write_text(directory / "comparison.md", text + "\n")
    picture = comparison.draw(entries, directory / "comparison.png", first="default")
    print(f"{text}\n\n{picture}")


if __name__ == "__main__":
    main()
