"""The configs of the studies: every variant is valid, and samples what its docstring says."""

from pathlib import Path

import numpy as np
import pytest

from octolike.config import ConfigError, build_component, load_module
from octolike.data.pipeline.sampling import SAMPLING, SamplingGroups
from octolike.envs.demonstrations import plan
from octolike.envs.tabletop import tabletop_tasks as tasks
from octolike.envs.tabletop.conventions import ROBOTS

EXPERIMENTS = Path(__file__).parents[1] / "configs" / "experiments"
STUDIES = [
    path for path in sorted(EXPERIMENTS.glob("*.py")) if hasattr(load_module(path), "VARIANTS")
]
# steps of the expert's episodes: RESULTS.md, "The scripted experts"
LENGTHS = {"touch": 4.6, "push": 7.4, "lift": 8.3}


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_variant_has_a_config_and_a_directory_of_its_own(path):
    module, directories = load_module(path), set()
    for variant in module.VARIANTS:
        for seed, debug in ((0, ""), (1, ""), (0, ",debug")):
            config = module.get_config(f"variant={variant},seed={seed}{debug}")
            config.check()
            assert config.workdir.endswith(f"/{variant}-{seed}")
            assert ("debug" in config.workdir) == ("debug" in config.data.root) == bool(debug)
            directories.add(config.workdir)
    assert len(directories) == 3 * len(module.VARIANTS)


def shares(config):
    """Return {task: its share of the examples} with the demonstrations that the config collects."""
    skills = config.collect.skills
    names = [tasks.make_task(*task).name for task in tasks.tasks_of("train", tuple(skills))]
    skill_of = [name.partition("/")[0] for name in names]
    steps = np.array([skills[s] * LENGTHS[s] / skill_of.count(s) for s in skill_of])
    sampling = build_component(SAMPLING, config.data.sampling, "data.sampling")
    of_task = sampling.shares(SamplingGroups(tuple(names), steps), 0, np.full(len(names), np.nan))
    return dict(zip(names, of_task, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_more_tasks_contain_fewer_and_all_skills(seed):
    module = load_module(EXPERIMENTS / "tasks.py")
    trained = {}
    for variant in module.VARIANTS:
        of_task = shares(module.get_config(f"variant={variant},seed={seed}"))
        trained[variant] = {name for name, share in of_task.items() if share}
    assert [len(names) for names in trained.values()] == [79, 27, 9, 3, 1]
    for more, fewer in zip(trained.values(), list(trained.values())[1:], strict=False):
        assert fewer < more
    skills = sorted(name.partition("/")[0] for name in trained["tasks_9"])
    assert skills == ["lift"] * 3 + ["push"] * 3 + ["touch"] * 3
    other = module.get_config(f"variant=tasks_9,seed={seed + 1}")
    assert {name for name, share in shares(other).items() if share} != trained["tasks_9"]


@pytest.mark.parametrize("seed", range(3))
def test_a_narrow_target_has_half_of_the_examples(seed):
    module = load_module(EXPERIMENTS / "narrow.py")
    of_task = shares(module.get_config(f"variant=default,seed={seed}"))
    lifted = {name for name, share in of_task.items() if share and name.startswith("lift")}
    colour = module.COLOURS[seed]
    assert lifted == {f"lift/{colour}_cube", f"lift/{colour}_cylinder"}
    assert sum(of_task[name] for name in lifted) == pytest.approx(0.5, abs=0.03)
    narrow = shares(module.get_config(f"variant=narrow,seed={seed}"))
    assert {name for name, share in narrow.items() if share} == lifted


def test_the_second_robot_of_a_conflict_is_one_that_the_simulator_knows():
    module, roots = load_module(EXPERIMENTS / "conflict.py"), set()
    for conflict in module.CONFLICTS:
        config = module.get_config(f"conflict={conflict},robot={conflict}")
        assert config.data.mix == f"tabletop=1,{config.collect.dataset}=1"
        assert ROBOTS[config.collect.dataset]
        assert ("lift" in config.collect.skills) == (conflict in ("inverted", "turned"))
        roots.add(config.data.root)
    assert len(roots) == len(module.CONFLICTS)


def test_a_hypernetwork_is_the_one_of_the_comparison_and_knows_the_robot():
    conflict, compare = (
        load_module(EXPERIMENTS / f"{name}.py").get_config("variant=hypernet")
        for name in ("conflict", "compare")
    )
    assert conflict.model.heads == compare.model.heads
    assert conflict.model.tokenizers["robot"]["kind"] == "task_id"
    assert conflict.evaluate.condition_on == ("language", "task_id")
    assert (conflict.data.task_ids, conflict.data.tasks) == (True, "dataset")


def test_longer_stages_of_an_adaptation_keep_their_ratios():
    module = load_module(EXPERIMENTS / "adapt.py")
    configs = {
        steps: [
            module.get_config(f"variant={v}_20,seed=3,steps={steps}")
            for v in ("alone", "cotrain", "finetune")
        ]
        for steps in (1500, 6000)
    }
    assert [c.train.steps for c in configs[1500]] == [1500, 1500, 750]
    assert [c.train.steps for c in configs[6000]] == [6000, 6000, 3000]
    usual, longer = (configs[steps][2] for steps in (1500, 6000))
    assert (usual.workdir, usual.train.init_from) == (
        "runs/adapt/finetune_20-3",
        "runs/adapt/prior-3",
    )
    assert (longer.workdir, longer.train.init_from) == (
        "runs/adapt-6000/finetune_20-3",
        "runs/adapt-6000/prior-3",
    )
    prior = module.get_config("variant=prior,seed=3,steps=6000")
    assert (prior.workdir, prior.train.steps) == (longer.train.init_from, 6000)
    assert longer.train.checkpoint_every == 3000
    assert longer.data.root == prior.data.root == usual.data.root


RECIPES = {
    "quickstart": "runs/quickstart",
    "tabletop": "runs/tabletop",
    "metaworld": "runs/metaworld-mt10",
}


@pytest.mark.parametrize(("name", "run"), RECIPES.items())
def test_another_seed_of_a_recipe_has_a_run_and_demonstrations_of_its_own(name, run):
    module = load_module(EXPERIMENTS.parent / f"{name}.py")
    for seed, expected in ((0, run), (3, f"{run}-3")):
        config = module.get_config(f"seed={seed}")
        config.check()
        assert (config.workdir, config.data.root) == (expected, f"{expected}/data")
        assert (config.seed, config.collect.draw) == (seed, seed)
        plan(config.environment, config.collect)  # there are seeds enough
    assert "debug" in module.get_config("seed=3,debug").data.root


def test_the_recipe_for_fifty_tasks_can_see_more():
    module = load_module(EXPERIMENTS.parent / "metaworld.py")
    more = "zoom=1.6,wrist=true,pixels=128"
    config = module.get_config(f"tasks=mt50,size=27m,{more},stride=2")
    config.check()
    assert config.workdir == "runs/metaworld-mt50-zoom1.6-wrist-128px-27m"
    assert config.data.root == "runs/metaworld-mt50-zoom1.6-wrist-128px/data"
    assert config.environment == {
        "kind": "metaworld",
        "primary_size": 128,
        "zoom": 1.6,
        "hand_size": 128,
    }
    assert config.data.cameras == {"primary": 128, "wrist": 128}
    assert len(config.collect.skills) == 50
    assert module.get_config(f"tasks=mt50,size=27m,{more}") == config  # its stride is 2 anyway
    with pytest.raises(ConfigError, match="stride is 4; the network of size=27m has 2"):
        module.get_config("size=27m,stride=4")


def test_a_longer_comparison_has_runs_of_its_own():
    module = load_module(EXPERIMENTS / "compare.py")
    short, long = (module.get_config(x) for x in ("variant=vit", "variant=vit,steps=6000"))
    assert (short.workdir, short.train.steps) == ("runs/compare/vit-0", 1500)
    assert (long.workdir, long.train.steps) == ("runs/compare-6000/vit-0", 6000)
    assert long.data.root == short.data.root
