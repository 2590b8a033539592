"""Shared by compare.py and transfer.py: other scripts in processes of their own, with plug-ins."""

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options --block and --plugins, a list of files."""
    text_format = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=text_format)
    text = "plug-in of every run, in place of those that the config names"
    parser.add_argument("--plugins", action="append", default=[], help=text)
    parser.add_argument("--block", default="", help="of scenes: development, test or test2")
    return parser


def add_question(parser: argparse.ArgumentParser) -> None:
    """Add --episodes, and --against and --split, which replace what a study names."""
    text = "of each skill and split; default: those of the runs' settings"
    parser.add_argument("--episodes", type=positive, help=text)
    against = "variant with which the others are compared; default: that of the study"
    parser.add_argument("--against", default="", help=against)
    parser.add_argument("--split", default="", help="where; default: that of the study, or seen")


def positive(text: str) -> int:
    """Return the number of an argument that must be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def flags(name: str, values: Iterable[str]) -> list[str]:
    """Return a flag for each value."""
    return [f"--{name}={value}" for value in values]


def call(script: str, *arguments: str) -> None:
    """Run a script in its own process: simulators and tensorflow must not share one."""
    print(f"--- {script} {' '.join(arguments)}", flush=True)
    path = Path(__file__).with_name(script)
    try:
        subprocess.run([sys.executable, path, *arguments], check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"error: {path} {' '.join(arguments)} ended with exit code {error.returncode}; its "
            "output is above"
        )


def complete_run(run: Any, args: argparse.Namespace) -> Path:
    """Collect (args.collect), train and evaluate a run of a study; return its directory.

    The scripts resume what was interrupted and do nothing for what is finished.
    """
    config = args.config.partition(":")[0]
    options = (*run.overrides, *flags("config.plugins", args.plugins))
    for script in ["collect.py"] * args.collect + ["train.py"]:
        call(script, f"--config={config}:{run.arg}", *options)
    return evaluate(run, args, *flags("episodes", [args.episodes] * bool(args.episodes)))


def evaluate(run: Any, args: argparse.Namespace, *options: str) -> Path:
    """Evaluate a run of a study in the scenes of args.block, "": its own; return its directory."""
    from octolike import files

    directory = files.local_path(run.config.workdir, "run")
    allowed = flags("plugins", args.plugins or run.config.plugins)
    scenes = flags("block", [args.block] * bool(args.block))
    call("evaluate.py", f"--run={directory}", *scenes, *options, *allowed)
    return directory
