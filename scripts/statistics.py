"""Compute the statistics of every dataset of a mixture, and print them.

    octolike statistics --config bridge --config.data.root=DIR
    ... --config.data.mix=magic_soup             all datasets of a mixture; cached ones are read

Expect a progress bar with rate and time left, and for each dataset a table of its action and
proprio: mean, standard deviation, extremes, 1st and 99th percentile; near-constant dimensions are
marked. Training computes missing statistics itself. After an interruption, the same command
continues with the remaining shards.
"""

import sys
import time
from functools import partial

from octolike import config as configs
from octolike import ranges
from octolike.cores import usable_cores
from octolike.errors import ConfigError, DataError


def main(config: configs.Config) -> None:
    """Compute and print; unusable data give a one-line error."""
    from octolike.data.pipeline.dataset_split import embodiment_records, open_training
    from octolike.data.pipeline.reach import describe_reach
    from octolike.data.rlds.statistics import index_episodes
    from octolike.data.specs import catalog, mixes
    from octolike.model import heads

    d = config.data
    settings = {
        "threads": d.threads or usable_cores(),
        "cache": d.cache,
        "drop_bad": d.bad_episodes == "drop",
    }
    try:
        specs = catalog.load_specs(d.specs)
        for name in mixes.parse(d.mix, d.mix_weights, specs).weights:
            spec, begin = catalog.find_spec(name, specs), time.monotonic()
            reader = open_training(d, spec)
            index = index_episodes(reader, **settings)
            instructions = len(set(index.tasks) - {""})
            print(
                f"{name}: {len(index.steps):,} episodes, {index.steps.sum():,} steps, "
                f"{instructions:,} instructions, {len(index.bad)} bad episodes; "
                f"{time.monotonic() - begin:.1f} s"
            )
            for c, camera in enumerate(spec.cameras):
                if black := int(index.black_frames[:, c].sum()):
                    absent = int((~index.has_image[:, c]).sum())
                    print(f"  {camera}: {black:,} black frames; absent in {absent:,} episodes")
            # The check follows the tables, so that they show the values of a refused dimension.
            make = partial(embodiment_records, [spec], [index], representation=d.representation)
            print(ranges.statistics_tables(make(d.normalization, "warn")[0][0]))
            record = make(d.normalization, d.range_check)[0][0]
            lines = ranges.describe([record])
            for head, component in config.model.heads.items():
                limits = heads.reach(component, f"model.heads.{head}")
                lines += describe_reach(record, [index.sketches["action"]], *limits)
            print("".join(f"  {line}\n" for line in dict.fromkeys(lines)), end="")
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    configs.run(main)
