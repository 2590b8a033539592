"""A target with few demonstrations beside a prior mix: by default putting, and the other skills.

    python scripts/collect.py --config configs/compare.py     the prior
    python scripts/collect.py --config configs/cotrain.py     the target
    python scripts/cotrain.py --config configs/cotrain.py
    ... --config configs/cotrain.py:target=my_robot,prior=magic_soup,base=configs/bridge.py
        --config.data.specs=my_robot.py --config.data.root=DIR

Arguments: base, another config file whose network and settings are used; target, a dataset; prior,
a mix or a dataset; share, the target's share of the examples, and final, what it ends with (-1: as
it was). What to expect: RESULTS.md, few demonstrations.
"""

from octolike.config import Component, Config, base_config, parse_arg


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: above, and debug."""
    args = parse_arg(
        arg,
        base="",
        target="tabletop_target",
        prior="tabletop",
        share=0.5,
        final=-1.0,
        debug=False,
    )
    path, beside = (args.base, "") if args.base else ("compare.py", __file__)
    config = base_config(path, "debug" if args.debug else "", beside=beside)
    config.workdir = "runs/cotrain-debug" if args.debug else "runs/cotrain"
    data = config.data
    data.mix = f"{args.target},{args.prior}"
    data.sampling = Component(
        kind="cotrain",
        target=args.target,
        share=args.share,
        final=args.final,
        batches=config.train.steps,
    )
    if args.target == "tabletop_target":
        data.roots = {args.prior: data.root}
        data.root = f"{config.workdir}/data"
        config.collect.dataset = args.target
        config.collect.skills = {"put": 2 if args.debug else 20}
        config.collect.validation_share = 0.5
        config.evaluate.skills = ("put",)
    return config
