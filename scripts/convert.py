"""Convert recordings of your robot to an RLDS dataset.

    octolike convert --source recordings --target data --name my_robot
    ... --format hdf5|hdf5-robomimic|lerobot|npz              if it is not detected
    ... --instruction "fold the towel"                        for episodes without one
    ... --field action=cmd/q --field front=cam0/rgb           names in a layout of your own

Expect the progress and the directory <target>/<name>/1.0.0, with every shard read back and
compared. After an interruption, the same command resumes. Next: octolike inspect_data, with the
command that is printed.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Convert; report errors in one line, without a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", required=True, type=Path, help="file or folder of recordings")
    parser.add_argument("--target", required=True, help="folder of datasets (data.root)")
    parser.add_argument("--name", required=True, help="name of the dataset")
    parser.add_argument("--format", default="", help="hdf5, hdf5-robomimic, lerobot or npz")
    parser.add_argument(
        "--field", action="append", default=[], metavar="NAME=PATH", help="name a recorded field"
    )
    parser.add_argument("--instruction", default="", help="for episodes without one")
    parser.add_argument("--hz", type=float, default=0.0, help="steps per second, if known")
    parser.add_argument("--jpeg", type=int, default=95, help="quality of frames; 0: PNG, lossless")
    parser.add_argument("--bgr", action="store_true", help="frames are stored in BGR order")
    parser.add_argument("--validation", type=float, default=0.05, help="share held out")
    parser.add_argument("--episodes-per-shard", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    parser.add_argument("--drop-bad", action="store_true", help="leave out bad episodes")
    args = parser.parse_args()
    try:
        from octolike.data.onboarding.convert import conversion
        from octolike.data.onboarding.convert.frame_encoding import ConvertOptions

        fields = tuple(tuple(text.split("=", 1)) for text in args.field)
        if any(len(field) != 2 or not all(field) for field in fields):
            sys.exit(f"error: --field {' '.join(args.field)}; expected NAME=PATH")
        options = ConvertOptions(args.instruction, args.jpeg, args.bgr, args.hz, fields)
        plan = conversion.ConversionPlan(
            args.format,
            options,
            args.validation,
            args.episodes_per_shard,
            args.workers,
            args.drop_bad,
        )
        result = conversion.convert(args.source, args.target, args.name, plan)
    except ImportError as error:
        sys.exit(f"error: {error.name} is missing; pip install 'octolike[convert]'")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    for column, form in sorted(result.changed.items()):
        print(f"stored otherwise: {column}: {form}")
    for column, reason in sorted(result.left_out.items()):
        print(f"column left out: {column}: {reason}")
    for reason in result.dropped:
        print(f"episode left out: {reason}")
    print(f"{result.directory}\nnext: octolike inspect_data {result.directory}")


if __name__ == "__main__":
    main()
