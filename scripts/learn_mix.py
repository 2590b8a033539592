"""Learn the sampling weights of a mixture by group DRO.

    octolike learn_mix --config bridge --config.data.mix=fractal,bridge_dataset

Trains the config's network (a small one is best) twice: a reference that samples in proportion to
size, and a proxy with sampling weights that follow the excess of its held-out error over the final
error of the reference, per dataset or, with --config.data.sampling.over=task, per task. Expect
`mix.txt` and `mix.png` in the workdir: the proxy's weights, averaged over the run. Needs
data.validation_split; the weights change every train.validate_every steps. Interrupted runs resume;
the history of the weights is in `shares.jsonl`.
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
                "learning a mixture needs data.validation_split and train.validate_every"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        train(config, "proportional", over, lambda b: learned_mix.ReferenceStream(b, over, errors))
        reference = json.loads(errors.read_text())
        train(
            config,
            "group_dro",
            over,
            lambda b: learned_mix.ProxyStream(b, over, shares, reference),
        )
    except (configs.ConfigError, reader.DataError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    line = learned_mix.write_mix(learned_mix.average_shares(shares), workdir)
    print(f"--config.data.mix_weights=shares --config.data.mix={line}")


def train(config: configs.Config, kind: str, over: str, wrap) -> None:
    """Train one of the two runs, in workdir/<kind>. wrap: stream -> stream."""
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
