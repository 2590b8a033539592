"""The quick start: five skills on the simulated table, demonstrations included.

make quickstart                         everything, from installation to report
octolike train --config quickstart      only the training
... --config quickstart:debug           few demonstrations and steps, a quick check
... --config quickstart:subtasks=false  without the subtask level: one text for a whole episode
... --config quickstart:seed=1          another training seed, on demonstrations of its own (0 to 9)
"""

from octolike.config import Component, Config, parse_arg


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: debug, subtasks, seed."""
    args = parse_arg(arg, debug=False, subtasks=True, seed=0)
    run = f"runs/quickstart-{args.seed}" if args.seed else "runs/quickstart"
    config = Config(workdir=run, seed=args.seed)
    config.collect.draw = args.seed
    config.environment = Component(kind="tabletop", primary_size=64, wrist_size=48)
    config.collect.skills = {"touch": 1000, "push": 900, "lift": 500, "put": 800, "stack": 800}

    data = config.data
    data.root, data.mix = f"{run}/data", "tabletop"
    data.cameras = {"primary": 64, "wrist": 48}
    data.window, data.horizon, data.goal = 1, 8, "none"
    data.batch_size, data.pool = 32, 4096
    data.text = Component(kind="hash", length=12, vocabulary=1024)
    # the policy acts on "grasp the red cube", then on "put it into the blue bowl"
    data.subtasks = args.subtasks
    language = Component(kind="language", vocabulary=1024, pooled=True)
    subtask = Component(kind="subtask", vocabulary=1024)

    def camera(name: str) -> Component:
        encoder = Component(
            kind="keypoints", features=(48, 64, 64), kernels=(4, 3, 3), strides=(4, 2, 1)
        )
        return Component(kind="image", cameras=(name,), film=True, encoder=encoder)

    model = config.model
    model.width, model.layers, model.attention_heads, model.mlp_width = 128, 2, 4, 512
    model.tokenizers = {
        **({"subtask": subtask} if args.subtasks else {"language": language}),
        "primary": camera("primary"),
        "wrist": camera("wrist"),
        "proprio": Component(kind="proprio"),
    }
    model.heads = {
        "action": Component(
            kind="diffusion",
            steps=20,
            network=Component(kind="mlp", blocks=2, expansion=2),
            samples_per_example=4,
            prediction="sample",
            sampler="ddim",
            inference_steps=10,
        )
    }
    config.optim.learning_rate, config.optim.warmup, config.optim.ema = 1e-3, 100, 0.999
    config.train.steps, config.train.validate_every = 6000, 1000
    config.train.checkpoint_every, config.train.log_every = 3000, 100
    config.evaluate.execute, config.evaluate.release = 1, 4
    config.evaluate.splits = ("train", "held_out_combination", "held_out_phrasing")

    if args.debug:
        config.workdir = "runs/quickstart-debug"
        data.root = "runs/quickstart-debug/data"
        config.collect.skills = {"touch": 4, "push": 2}
        config.collect.episodes_per_shard = 2
        config.train.steps, config.train.log_every, config.optim.warmup = 20, 5, 2
        config.train.validate_every, config.train.checkpoint_every = 10, 10
        config.train.validation_batches = 1
        config.evaluate.episodes, config.evaluate.splits = 2, ("train",)
    return config
