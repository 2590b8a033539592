"""Learn a mix's shares by group DRO: more of what a proxy finds harder than a reference did.

    python scripts/learn_mix.py --config configs/bridge.py --config.data.mix=fractal,bridge_dataset

Two runs of the given (better: a small) network: a reference that samples in proportion to size, and
a proxy whose shares follow its held-out error's excess over the reference's last one, per dataset
or, with --config.data.sampling.over=task, per task. Expect `mix.txt` and `mix.png` in the workdir:
the proxy's shares, averaged over the run. Needs data.validation_split; train.validate_every is how
often the shares move. Killed runs resume; what the proxy had noted is kept in `shares.jsonl`.
"""

import copy
import json
import sys
from pathlib import Path

from octolike import config as configs
from octolike import files


def main(config: configs.Config) -> None:
    """Train reference and proxy, then write the averaged shares."""
    from octolike.data.pipeline import learned_mix
    from octolike.data.rlds import reader

    over = "task" if config.data.sampling.get("over") == "task" else "dataset"
    try:
        workdir = files.output_directory(config.workdir, "config.workdir")
        errors, shares = workdir / "reference.json", workdir / "shares.jsonl"
        if not config.data.validation_split or not config.train.validate_every:
            raise configs.ConfigError(
                "learning a mix needs data.validation_split and train.validate_every"
            )
        if config.data.service:
            raise configs.ConfigError(
                "data.service cannot serve two runs of different sampling; leave it empty here"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        train(config, "proportional", over, lambda b: learned_mix.ReferenceStream(b, over, errors))
        reference = json.loads(errors.read_text())
        proxy = lambda b: learned_mix.ProxyStream(b, over, shares, reference)
        train(config, "group_dro", over, proxy)
    except (configs.ConfigError, reader.DataError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    line = learned_mix.write_mix(learned_mix.average_shares(shares), workdir)
    print(f"--config.data.mix_weights=shares --config.data.mix={line}")


def train(config: configs.Config, kind: str, over: str, wrap) -> None:
    """Train one of the two runs in a directory of its own."""
    from octolike.data import open_data
    from octolike.data.pipeline import learned_mix
    from octolike.train import loop

    config = copy.deepcopy(config)
    config.workdir = str(Path(config.workdir) / kind)
    config.data.sampling = configs.Component(kind=kind, over=over)
    data = open_data(config)
    print(data.describe())
    loop.train(config, learned_mix.WrappedSource(data, wrap))


if __name__ == "__main__":
    configs.run(main)
