"""The quick start grown up: finer images, more demonstrations, a larger network, more steps.

    octolike collect --config tabletop
    octolike train --config tabletop
    octolike evaluate --run runs/tabletop
    ... --config tabletop:subtasks=false  without the subtask level: one text for a whole episode
    ... --config tabletop:seed=1          another seed, on demonstrations of its own (0 to 4)
    ... --config tabletop:debug           seconds, a quick check

An hour and a half on one core. RESULTS.md has the results.
"""

from octolike.config import Component, Config, base_config, parse_arg


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: subtasks, seed, debug."""
    args = parse_arg(arg, subtasks=True, seed=0, debug=False)
    run = f"runs/tabletop-{args.seed}" if args.seed else "runs/tabletop"
    level = "" if args.subtasks else "subtasks=false"
    config = base_config("quickstart.py", level, relative_to=__file__)
    config.workdir, config.seed, config.collect.draw = run, args.seed, args.seed
    config.environment = Component(kind="tabletop", primary_size=96, wrist_size=64)
    skills = {"touch": 1600, "push": 1800, "lift": 1000, "put": 1800, "stack": 1800}
    config.collect.skills, config.collect.validation_share = skills, 0.02

    data, model = config.data, config.model
    data.root, data.cameras = f"{run}/data", {"primary": 96, "wrist": 64}
    data.pool, data.memory = 16_384, 6.0
    model.width, model.layers, model.attention_heads, model.mlp_width = 192, 3, 6, 768
    for camera in data.cameras:
        encoder = model.tokenizers[camera]["encoder"]
        encoder["features"], encoder["keypoints"] = (48, 96, 96), 32

    config.optim.warmup = 500
    config.train.steps, config.train.validate_every = 12_000, 2000
    config.train.checkpoint_every, config.train.keep = 2000, 8
    config.evaluate.episodes = 50
    config.evaluate.splits = (*config.evaluate.splits, "held_out_family")

    if args.debug:
        config.workdir = "runs/tabletop-debug"
        data.root = "runs/tabletop-debug/data"
        config.collect.skills = {"touch": 4, "put": 2}
        config.collect.episodes_per_shard = 2
        data.batch_size, model.width, model.layers, model.mlp_width = 4, 48, 1, 64
        config.train.steps, config.train.log_every, config.optim.warmup = 20, 5, 2
        config.train.validate_every, config.train.checkpoint_every = 10, 10
        config.train.validation_batches = 1
        config.evaluate.episodes, config.evaluate.splits = 2, ("train",)
    return config
