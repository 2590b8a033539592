"""Collect demonstrations by a simulator's scripted experts, as an ordinary RLDS dataset.

    python scripts/collect.py --config configs/quickstart.py
    ... --config configs/quickstart.py:debug                  a handful of episodes

Expect a progress bar and, at the end, the directory <data.root>/<collect.dataset>/<version>. Failed
demonstrations are counted and made again. Stopped half-way, the same command goes on with the
shards that are missing; a finished dataset is left alone.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from octolike import config as configs
from octolike.envs import demonstrations


def main(config: configs.Config) -> None:
    """Collect; what does not fit is one line, without a traceback."""
    try:
        collect(config)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def collect(config: configs.Config) -> None:
    """Plan the shards, write them over processes, finish the dataset."""
    from octolike.data.rlds import writer
    from octolike.data.specs import catalog

    spec = catalog.find(config.collect.dataset, catalog.load_specs(config.data.specs))
    plan = demonstrations.plan(config.environment, config.collect)
    shards = {s.split: s.total for s in plan}
    settings = demonstrations.settings(config.environment, config.collect)
    writer = writer.Writer(config.data.root, spec.name, spec.version, shards, settings)
    if writer.finished:
        print(f"{writer.directory} is there already; remove it to collect anew")
        return
    left = [s for s in plan if not writer.written(s.split, s.index)]
    total = sum(len(s.episodes) for s in plan)
    done = total - sum(len(s.episodes) for s in left)
    workers = min(config.collect.workers or os.cpu_count() or 1, max(len(left), 1))
    crew = demonstrations.RecorderPool(config.environment, config.collect, workers)

    def make(shard: demonstrations.DemonstrationShard) -> int:
        recorded = crew.record(shard)
        failed = sum(tries for _, tries in recorded)
        return writer.write(shard.split, shard.index, (e for e, _ in recorded), failed=failed)

    with (
        tqdm(total=total, initial=done, desc="demonstrations", unit=" episodes") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for count in pool.map(make, left):
            bar.update(count)
    failed = sum(writer.written(s.split, s.index)["failed"] for s in plan)
    print(f"{total} demonstrations in {writer.finish()}; {failed} failed and were made again")


if __name__ == "__main__":
    configs.run(main)
