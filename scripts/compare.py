"""Train and evaluate variants of one config over several seeds, and compare them.

    octolike collect --config compare
    octolike compare --config compare --variants default,task_id --seeds 3
    ... --config conflict:conflict=rescaled   further arguments for each run's config
    ... --until-decided --seeds 12              stop a variant once its difference is certain
    octolike compare --table runs/compare       only the table of existing results

A config takes the arguments variant and seed, and names its workdir <comparison>/<variant>-<seed>.
Expect the smallest difference that the study can find, before it starts; then the table in
<comparison>/comparison.md and comparison.png. An interrupted command can be repeated; a later one
with more seeds continues the study.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

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
    parser.add_argument("--until-decided", action="store_true", help="--seeds is the maximum")
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
    announce(args.seeds, module, variants, further)
    decided: set[str] = set()
    for seed in range(args.seeds):
        for name in variants:
            if name in decided:
                continue
            arg = ",".join(filter(None, (further, f"variant={name},seed={seed}")))
            config = module.get_config(arg)
            run = files.local_path(config.workdir, "run")
            # Both resume an interrupted run and do nothing for a finished one.
            overrides = flags("config.plugins", args.plugins)
            call("train.py", "--config", f"{path}:{arg}", *overrides)
            allowed = flags("plugins", args.plugins or config.plugins)
            call("evaluate.py", "--run", str(run), *allowed)
        if args.until_decided:
            decided = decided_variants(run.parent, variants)
            if len(decided) >= len(variants) - 1:
                break
    return run.parent


def announce(seeds: int, module: ModuleType, variants: Sequence[str], arg: str) -> None:
    """Print the smallest difference that the study can find, from its design."""
    from octolike.evaluation import statistics, suites

    config = module.get_config(",".join(filter(None, (arg, f"variant={variants[0]},seed=0"))))
    skills = tuple(config.collect.skills)
    plan = suites.suite_from_config(config.environment, config.evaluate, skills).plan()
    layouts = sum(e.split == plan[0].split for e in plan)
    pairs = max(1, len(variants) * (len(variants) - 1) // 2)
    smallest = statistics.detectable_difference(seeds, layouts, pairs)
    print(
        f"design: {len(variants)} variants, {seeds} seeds, {layouts} layouts in split "
        f"{plan[0].split!r}; with {statistics.POWER:.0%} probability the table shows differences "
        f"of at least {100 * smallest:.0f} points between variants at 50 % (adjusted for {pairs} "
        f"pairs; assumes that the seed explains {statistics.SEED_SHARE:.0%} of the variance)"
        + (". One seed cannot compare recipes, only policies." if seeds < 2 else ""),
        flush=True,
    )


def decided_variants(directory: Path, variants: Sequence[str]) -> set[str]:
    """Return the variants whose difference to the first is certain, and print the evidence."""
    from octolike.evaluation import comparison, statistics

    level = statistics.LEVEL / max(1, len(variants) - 1)  # Bonferroni
    summaries = [v for v in comparison.read(directory) if v.variant in variants]
    evidence = comparison.evidence(summaries, first=variants[0])
    for name, process in evidence.items():
        state = "decided" if process.p <= level else "open"
        print(
            f"{name} against {variants[0]} after {process.seeds} seeds: p = {process.p:.2g} (valid "
            f"at any time; {level:.2g} decides), {state}",
            flush=True,
        )
    return {name for name, process in evidence.items() if process.p <= level}


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
