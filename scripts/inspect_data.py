"""Inspect an RLDS dataset without a spec, and write a spec for it.

    octolike inspect_data data/my_robot                 or data/my_robot/1.0.0
    ... --spec my_robot.py --pictures runs/my_robot              the files to write

Expect fields, lengths, problems, the inferred spec, histograms and contact sheets as PNG, and a
spec file that works at once with --config.data.specs; the command is printed.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Inspect; report data errors in one line, without a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="<root>/<name> or <root>/<name>/<version>")
    parser.add_argument("--split", default="", help="default: train")
    parser.add_argument("--episodes", type=int, default=200, help="number to read; 0: all")
    parser.add_argument("--spec", type=Path, help="file to write; default <name>.py")
    parser.add_argument("--pictures", type=Path, help="folder; default <name>_pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace the spec file")
    args = parser.parse_args()
    try:
        inspect(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def inspect(args: argparse.Namespace) -> None:
    """Print the survey, save its figures, write the spec file."""
    from octolike import files
    from octolike.data.onboarding import infer_spec, survey_figures
    from octolike.data.onboarding.problems import find_problems
    from octolike.data.onboarding.spec_fields import describe_unused
    from octolike.data.onboarding.survey import describe_survey, survey_dataset

    survey = survey_dataset(args.directory, args.episodes, args.split)
    spec = infer_spec.infer(survey)
    print(describe_survey(survey))
    problems = find_problems(survey, spec)
    print("\nproblems:" if problems else "\nno problems found")
    for problem in problems:
        print(f"  - {problem}")
    print("\ninferred spec:")
    print(infer_spec.describe_spec(spec))
    print(describe_unused(spec.unused, survey.about))
    folder = args.pictures or Path(f"{survey.name}_pictures")
    histograms = survey_figures.histograms(survey, spec)
    paths = [survey_figures.save(histograms, folder / "histograms.png")]
    for key in survey.images:
        if survey.images[key]:
            sheet = survey_figures.contact_sheet(survey, key)
            name = files.file_name(key.removeprefix("observation.").replace(".", "_"))
            paths.append(survey_figures.save(sheet, folder / f"{name}.png"))
    print("\npictures: " + ", ".join(map(str, paths)))
    path = args.spec or Path(f"{survey.name}.py")
    if path.exists() and not args.overwrite:
        sys.exit(f"error: {path} exists; use --overwrite, or another name with --spec")
    infer_spec.write_spec(path, survey, spec)
    root = survey.directory.parent.parent
    print(f"{path}: verify and correct it, then add to a training command")
    options = (
        f"--config.data.root={root} --config.data.specs={path} --config.data.mix={survey.name}"
    )
    print(" ", options, *infer_spec.representation_options(spec))


if __name__ == "__main__":
    main()
