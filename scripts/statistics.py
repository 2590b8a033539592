"""Make the statistics of every dataset of a mix, and print them.

    octolike statistics --config bridge --config.data.root=DIR
    ... --config.data.mix=magic_soup             all of a mix; finished ones are only read

Expect a progress bar with rate and time left, and per dataset a table of its action and proprio:
mean, spread, extremes, 1st and 99th percentile, with the dimensions that hardly move marked.
Training does this by itself when it must. Stopped half-way, the same command goes on with the
shards that are left.
"""

import os
import sys
import time

import numpy as np

from octolike import config as configs
from octolike.embodiment import MIN_SPREAD, STATISTICS, Layout, Statistics


def main(config: configs.Config) -> None:
    """Make and print; data that do not fit are one line, without a traceback."""
    from octolike.data.rlds import reader, statistics
    from octolike.data.specs import catalog, mixes

    d = config.data
    settings = {
        "threads": d.threads or os.cpu_count() or 1,
        "cache": d.cache,
        "drop_bad": d.bad_episodes == "drop",
    }
    try:
        rows = catalog.load_specs(d.specs)
        for name in mixes.parse(d.mix, d.mix_weights, rows).weights:
            spec, begin = catalog.find_spec(name, rows), time.monotonic()
            reader = reader.Reader(spec, d.root_of(spec.name), d.train_split)
            index = statistics.index_episodes(reader, **settings)
            tasks = len(set(index.tasks) - {""})
            print(
                f"{name}: {len(index.steps):,} episodes, {index.steps.sum():,} steps, {tasks:,} "
                f"instructions, {len(index.bad)} left out; {time.monotonic() - begin:.1f} s"
            )
            for part, layout in (("action", spec.action), ("proprio", spec.proprio)):
                if layout is not None:
                    print(f"  {part}\n{table(layout, getattr(index, part))}")
    except (configs.ConfigError, reader.DataError) as error:
        sys.exit(f"error: {error}")


def table(layout: Layout, statistics: Statistics) -> str:
    """Return a line per dimension: its unit, its statistics, and whether it hardly moves."""
    rows = [("", "unit", *STATISTICS, "")]
    values = np.stack([getattr(statistics, name) for name in STATISTICS], axis=1)
    for name, unit, numbers in zip(layout.names, layout.units, values, strict=True):
        constant = "constant" if numbers[STATISTICS.index("std")] < MIN_SPREAD else ""
        rows.append((name, unit or "-", *(f"{x:.4g}" for x in numbers), constant))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        (
            "    " + "  ".join([r[0].ljust(wide[0]), *map(str.rjust, r[1:-1], wide[1:-1]), r[-1]])
        ).rstrip()
        for r in rows
    )


if __name__ == "__main__":
    configs.run(main)
