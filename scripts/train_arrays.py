"""Train a policy without tensorflow, from demonstrations held in memory.

    octolike train_arrays --config metaworld:tasks=mt50,size=27m
    ... --config metaworld:debug                  takes seconds; checks the installation

For a machine with jax and the simulator but without tensorflow. Records the same episodes as
octolike collect, and stores them as <data.root>/<split>.npz; if a skill has none, it ends with an
error. An existing file is used; it is an error if it was recorded with other settings. Everything
else is as in octolike train.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _launch

from octolike import config as configs
from octolike.progress import progress


def frames(config: configs.Config, split: str):
    """Return the frames of a split, loaded or recorded now; None for a split without episodes."""
    from octolike.data.arrays import ArrayFrames
    from octolike.envs import demonstrations, pool

    path = Path(config.data.root) / f"{split}.npz"
    settings = demonstrations.settings(config.environment, config.collect)
    if path.exists():
        return ArrayFrames.load(path, settings)
    plan = demonstrations.plan(config.environment, config.collect)
    shards = [shard for shard in plan if shard.split == split]
    if not shards:
        return None
    workers = config.collect.workers or pool.default_workers(len(shards))
    recorders = demonstrations.RecorderPool(config.environment, config.collect, workers)
    total, tries = sum(len(shard.episodes) for shard in shards), []
    with (
        progress(f"{split} demonstrations", total=total, unit="episodes") as bar,
        ThreadPoolExecutor(workers) as threads,
    ):

        def episodes():
            all_recorded = threads.map(lambda s: recorders.record(s, bar.update), shards)
            for shard, recorded in zip(shards, all_recorded, strict=True):
                tries.append((shard, demonstrations.count_tries(recorded)))
                yield from (r.episode for r in recorded if r.episode is not None)

        result = ArrayFrames.from_episodes(episodes())
    result.save(path, settings)
    yields = demonstrations.yields(tries)
    print(demonstrations.yield_table(yields))
    if split == "train":
        demonstrations.check_yields(yields, config.collect.noise)
    return result


def main(config: configs.Config) -> None:
    """Train; an incompatible setting or unusable data end the script with one line."""
    from octolike.data.arrays import ArraySource
    from octolike.data.specs import catalog
    from octolike.embodiment import Embodiment

    try:
        spec = catalog.find_spec(config.data.mix, catalog.load_specs(config.data.specs))
        names = ("robot", "control_hz", "gripper", "action", "proprio")
        fields = {name: getattr(spec, name) for name in names}
        robot = Embodiment(name=spec.embodiment or spec.name, datasets=(spec.name,), **fields)
        data = ArraySource(config, frames(config, "train"), frames(config, "val"), robot)
        _launch.train(config, data)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    configs.run(main)
