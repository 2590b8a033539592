"""Two arms hand a cube over (gym-aloha's scenes): fourteen joints, three cameras, on a CPU.

    pip install 'octolike[sim,aloha]'
    octolike collect --config aloha
    octolike train --config aloha
    octolike evaluate --run runs/aloha --suite aloha_transfer_cube
    ... --config aloha:debug      seconds, a quick check

An episode has up to 300 steps; a demonstration takes about three seconds of a core.
"""

from octolike.config import Component, Config, base_config, parse_arg


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: demos, debug."""
    args = parse_arg(arg, demos=200, debug=False)
    config = base_config("tabletop.py", "subtasks=false", relative_to=__file__)  # its network
    config.workdir = "runs/aloha"
    # Without zoom the cube is three pixels wide.
    config.environment = Component(kind="aloha", primary_size=96, zoom=2.0, hand_size=64)
    config.collect.dataset, config.collect.skills = "aloha_wrist", {"transfer_cube": args.demos}
    config.collect.validation_share, config.collect.episodes_per_shard = 0.04, 10

    data, model = config.data, config.model
    data.root, data.mix = "runs/aloha/data", "aloha_wrist"
    data.cameras = {"primary": 96, "wrist": 64, "left_wrist": 64}
    data.window, data.horizon, data.goal = 1, 25, "none"
    data.representation = "delta"  # what `octolike inspect_data` recommends for these joints
    data.batch_size, data.pool, data.memory = 32, 8000, 4.0
    data.text = Component(kind="hash", length=20, vocabulary=1024)

    left = {**model.tokenizers["wrist"], "cameras": ("left_wrist",)}
    model.tokenizers["left_wrist"] = Component(left)
    config.train.steps, config.train.checkpoint_every, config.train.keep = 12_000, 2000, 4
    config.evaluate.execute, config.evaluate.release, config.evaluate.episodes = 12, 0, 50
    config.evaluate.splits = ("train",)

    if args.debug:
        config.workdir = "runs/aloha-debug"
        data.root = "runs/aloha-debug/data"
        config.collect.skills, config.collect.episodes_per_shard = {"transfer_cube": 2}, 1
        data.batch_size, model.width, model.layers, model.mlp_width = 4, 48, 1, 64
        config.train.steps, config.train.log_every, config.optim.warmup = 20, 5, 2
        config.train.validate_every, config.train.checkpoint_every = 10, 10
        config.train.validation_batches = 1
        config.evaluate.episodes = 1
    return config
