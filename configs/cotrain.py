"""A target with few demonstrations, co-trained with a prior mixture: by default putting.

    octolike collect --config compare     the prior
    octolike collect --config cotrain     the target
    octolike cotrain --config cotrain
    ... --config cotrain:target=my_robot,prior=magic_soup,base=bridge
        --config.data.specs=my_robot.py --config.data.root=DIR

Arguments: base, a config that provides network and settings; target, a dataset; prior, a mixture or
a dataset; share, the target's share of the examples; final, its share at the end (-1: the same).
RESULTS.md has results under few demonstrations.
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
    path, beside = (args.base, "") if args.base else ("experiments/compare.py", __file__)
    config = base_config(path, "debug" if args.debug else "", relative_to=beside)
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
