"""Train a policy without tensorflow, from demonstrations held in memory.

    octolike train_arrays --config metaworld:tasks=mt50,size=27m
    ... --config metaworld:debug                  takes seconds; checks the installation

For a machine with jax and the simulator but without tensorflow. Records the same episodes as
octolike collect, and stores them as .npz files in data.root; an interrupted recording continues.
Existing files are used; it is an error if they were recorded with other settings, or if a skill has
no demonstration. Everything else is as in octolike train.
"""

import sys

import _launch

from octolike import config as configs


def main(config: configs.Config) -> None:
    """Train; an incompatible setting or unusable data end the script with one line."""
    from octolike.data.array_shards import ArrayShards
    from octolike.data.arrays import ArraySource
    from octolike.data.specs import catalog
    from octolike.embodiment import Embodiment
    from octolike.envs import demonstrations

    try:
        environment, collect = config.environment, config.collect
        plan = demonstrations.plan(environment, collect)
        shards = {s.split: s.total for s in plan}
        settings = demonstrations.settings(environment, collect)
        store = ArrayShards(config.data.root, shards, settings)
        yields = demonstrations.record_missing(environment, collect, plan, store)
        demonstrations.report_yields(yields, collect.noise)
        spec = catalog.find_spec(config.data.mix, catalog.load_specs(config.data.specs))
        names = ("robot", "control_hz", "gripper", "action", "proprio")
        fields = {name: getattr(spec, name) for name in names}
        robot = Embodiment(name=spec.embodiment or spec.name, datasets=(spec.name,), **fields)
        data = ArraySource(config, store.frames("train"), store.frames("val"), robot)
        _launch.train(config, data)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    configs.run(main)
