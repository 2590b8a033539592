"""Measure how fast a part of octolike is, as ratios to the limits of the same machine.

    octolike benchmark data                 the data engine
    octolike benchmark data --only decode   one of its measurements
    octolike benchmark model (or train)     acting (or a training step)

Each part is a module of scripts/benchmarks with `arguments(parser)` and `run(args)`, which returns
rows of plain values. Expect a table, and the rows with date and versions in --output as JSON.
"""

import argparse
import datetime
import importlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from octolike import files

BENCHMARKS = Path(__file__).parent / "benchmarks"
LIBRARIES = ("octolike", "jax", "flax", "numpy", "tensorflow-cpu", "tensorflow-datasets")


def main() -> None:
    """Run the part that the command line names, print its table and write its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parts = parser.add_subparsers(dest="part", required=True)
    names = sorted(path.stem for path in BENCHMARKS.glob("[a-z]*.py"))
    chosen, modules = [name for name in names if name in sys.argv[1:]], {}
    for name in names:
        part = parts.add_parser(name)
        if name in chosen:  # import only the code that is measured
            modules[name] = importlib.import_module(f"benchmarks.{name}")
            modules[name].arguments(part)
    args = parser.parse_args()
    rows = modules[args.part].run(args)
    print(table(rows))
    if args.output:
        files.write_json(args.output, circumstances(args.part) | {"rows": rows})


def circumstances(part: str) -> dict[str, object]:
    """Return the part, date, machine and versions of a measurement."""
    return {
        "part": part,
        "command": " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def version(library: str) -> str:
    """Return a library's version; '' if it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows as text; a column is a key, in the order of first appearance."""
    show = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    keys = list(dict.fromkeys(k for row in rows for k in row))
    cells = [keys, *([show(row.get(k, "")) for k in keys] for row in rows)]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(x.ljust(w) for x, w in zip(r, wide, strict=True)) for r in cells)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    main()
