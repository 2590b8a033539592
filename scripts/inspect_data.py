"""Look at an RLDS dataset that has no row yet, and write one for it.

    python scripts/inspect_data.py data/my_robot                 or data/my_robot/1.0.0
    ... --spec my_robot.py --pictures runs/my_robot              where its files go

Expect fields, lengths, problems, the guessed keys, histograms and contact sheets as PNG, and a spec
file that works at once with --config.data.specs; the command is printed.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Inspect; what does not fit is one line, without a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="<root>/<name> or <root>/<name>/<version>")
    parser.add_argument("--split", default="", help="default: train")
    parser.add_argument("--episodes", type=int, default=200, help="looked at; 0: all")
    parser.add_argument("--spec", type=Path, help="file to write; default <name>.py")
    parser.add_argument("--pictures", type=Path, help="folder; default <name>_pictures")
    parser.add_argument("--overwrite", action="store_true", help="write over a spec file")
    args = parser.parse_args()
    try:
        inspect(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def inspect(args: argparse.Namespace) -> None:
    """Print what is there, draw it, write the spec file."""
    from octolike.data.onboarding import infer_spec, survey_figures
    from octolike.data.onboarding.survey import describe_survey, survey

    seen = survey(args.directory, args.episodes, args.split)
    row = infer_spec.infer(seen)
    print(describe_survey(seen))
    found = infer_spec.find_problems(seen, row)
    print("\nproblems:" if found else "\nno problems found")
    for problem in found:
        print(f"  - {problem}")
    print("\nguessed:")
    for name in row.__dataclass_fields__:
        print(f"  {name}: {getattr(row, name)}")
    folder = args.pictures or Path(f"{seen.name}_pictures")
    drawn = [survey_figures.save(survey_figures.histograms(seen, row), folder / "histograms.png")]
    for key in seen.pictures:
        sheet = survey_figures.contact_sheet(seen, key)
        drawn.append(survey_figures.save(sheet, folder / f"{key.rpartition('.')[2]}.png"))
    print("\npictures: " + ", ".join(map(str, drawn)))
    spec = args.spec or Path(f"{seen.name}.py")
    if spec.exists() and not args.overwrite:
        sys.exit(f"error: {spec} is there already; --overwrite, or name another with --spec")
    infer_spec.write_spec(spec, seen, row)
    root = seen.directory.parent.parent
    print(f"{spec}: read it and correct it, then add to a training command")
    print(f"  --config.data.root={root} --config.data.specs={spec} --config.data.mix={seen.name}")


if __name__ == "__main__":
    main()
