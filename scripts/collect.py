"""Collect demonstrations from a simulator's scripted experts, as an ordinary RLDS dataset.

    octolike collect --config quickstart
    ... --config quickstart:debug                  a handful of episodes

Expect a progress bar (in a log: a line every 10 s) and then the directory
<data.root>/<collect.dataset>/<version>. Failed demonstrations are counted and repeated with other
seeds, and left out after eight failures. A table shows how many were recorded per skill; if a skill
has none, the dataset of the others is written, and the script ends with an error. If the script is
interrupted, the same command continues with the missing shards; a finished dataset is left
unchanged, and its table printed again.
"""

import sys

from octolike import config as configs
from octolike.envs import demonstrations

FIRST_VERSION = "1.0.0"


def main(config: configs.Config) -> None:
    """Collect; print an expected error as one line, without a traceback."""
    try:
        collect(config)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def collect(config: configs.Config) -> None:
    """Plan the shards, record and write them in parallel, finish the dataset."""
    from octolike.data.rlds.writer import Writer
    from octolike.data.specs import catalog

    spec = catalog.find_spec(config.collect.dataset, catalog.load_specs(config.data.specs))
    plan = demonstrations.plan(config.environment, config.collect)
    shards = {s.split: s.total for s in plan}
    settings = demonstrations.settings(config.environment, config.collect)
    version = spec.version or FIRST_VERSION  # a public dataset's may be unknown
    writer = Writer(config.data.root, spec.name, version, shards, settings)
    if writer.finished:
        print(f"{writer.directory} exists already; remove it to collect again")
        demonstrations.report_yields(writer.summary().get("yields", {}), config.collect.noise)
        return
    yields = demonstrations.record_missing(config.environment, config.collect, plan, writer)
    recorded = sum(counts.recorded for counts in yields.values())
    total = sum(len(s.episodes) for s in plan)
    print(f"{recorded} of {total} demonstrations in {writer.finish({'yields': yields})}")
    demonstrations.report_yields(yields, config.collect.noise)


if __name__ == "__main__":
    configs.run(main)
