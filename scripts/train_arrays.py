"""Train a policy without tensorflow, from demonstrations held in memory.

    python scripts/train_arrays.py --config configs/metaworld.py:tasks=mt50,size=27m
    ... --config configs/metaworld.py:debug                  seconds, to see that all is wired

For a machine with jax and the simulator but no tensorflow. The experts demonstrate on the spot, the
same episodes as scripts/collect.py writes; frames are kept as <data.root>/<split>.npz, and used
where they are there; made with other settings, they are refused. The rest is as in
scripts/train.py, and the same command resumes.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _launch

from octolike import config as configs
from octolike.progress import progress


def frames(config: configs.Config, split: str):
    """Return the frames of a split: read, or made by the experts and kept; None without any."""
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
    total = sum(len(shard.episodes) for shard in shards)
    with (
        progress(f"{split} demonstrations", total=total, unit="episodes") as bar,
        ThreadPoolExecutor(workers) as threads,
    ):

        def episodes():
            for shard in threads.map(recorders.record, shards):
                yield from (episode for episode, _ in shard)
                bar.update(len(shard))

        result = ArrayFrames.from_episodes(episodes())
    result.save(path, settings)
    return result


def main(config: configs.Config) -> None:
    """Train; a setting or data that do not fit are one line, without a traceback."""
    from octolike.data.arrays import ArraySource
    from octolike.data.specs import catalog
    from octolike.embodiment import Embodiment

    try:
        row = catalog.find_spec(config.data.mix, catalog.load_specs(config.data.specs))
        names = ("robot", "control_hz", "gripper", "action", "proprio")
        fields = {name: getattr(row, name) for name in names}
        robot = Embodiment(name=row.embodiment or row.name, datasets=(row.name,), **fields)
        data = ArraySource(config, frames(config, "train"), frames(config, "val"), robot)
        _launch.train(config, data)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    configs.run(main)
