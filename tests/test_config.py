"""The config system: unknown names are rejected at all six entries; stored configs read back."""

import dataclasses
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from octolike import config as c
from octolike.config import cli, open_sets
from octolike.config.components import component_fields, option

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def run_script(body: str, *args: str) -> subprocess.CompletedProcess:
    code = f"from octolike import config\ndef main(cfg):\n    {body}\nconfig.run(main)"
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_ctrl_c_in_main_is_one_line():
    """A second one, for example, while the first is being handled."""
    done = run_script("raise KeyboardInterrupt", "--config=configs/quickstart.py")
    assert done.returncode == 130
    assert done.stdout == "interrupted; what is on disk stays, and the same command resumes\n"
    assert done.stderr == ""


@pytest.mark.parametrize("seed", [2**64, 2**63, 2**32, -1, 1.5, True, "1"])
def test_a_seed_beyond_those_of_jax_is_refused(seed):
    """Of 2**32 JAX would take the lower half, 0."""
    for name in ("seed", "evaluate.seed"):
        config = c.Config()
        (config.evaluate if "." in name else config).seed = seed
        with pytest.raises(c.ConfigError, match=rf"\A{name} is "):
            config.check()


def test_json_round_trip_keeps_everything():
    original = c.Config(workdir="runs/x")
    original.model.heads["action"] = c.Component(kind="diffusion", steps=10)
    original.optim.frozen = ("a/*", "b")
    original = c.resolve(original)
    restored = c.from_json(c.to_json(original))
    assert restored == original
    assert isinstance(restored.model.heads["action"], c.Component)
    assert isinstance(restored.optim.frozen, tuple)


def test_door_1_constructor():
    with pytest.raises(TypeError, match="learning_rat"):
        c.OptimConfig(learning_rat=1.0)


def test_door_2_attribute():
    with pytest.raises(AttributeError, match="learning_rat"):
        c.Config().optim.learning_rat = 1.0


def test_door_3_command_line():
    done = run_script(
        "print(cfg.seed)", "--config", "configs/quickstart.py", "--config.optim.learning_rat=1"
    )
    assert done.returncode
    assert "'learning_rat'; did you mean 'learning_rate'" in done.stderr
    assert "Traceback" not in done.stderr


def test_door_3_names_a_component_that_the_config_lacks():
    done = run_script(
        "pass", "--config=configs/quickstart.py", "--config.model.heads.acton.steps=1"
    )
    assert done.returncode
    assert "--config.model.heads.acton.steps: this config has no 'acton'" in done.stderr


def test_door_3_sets_dicts_and_fields_that_a_component_leaves_at_their_default():
    done = run_script(
        "d, a = cfg.data, cfg.model.heads['action']; "
        "print(d.sampling, dict(d.roots), d.specs, d.cameras, d.depth, a['clip'], a['steps'])",
        "--config=configs/quickstart.py",
        "--config.data.sampling={'kind': 'uniform'}",
        "--config.data.sampling.over=task",
        "--config.data.roots.mine",
        "some/where",
        "--config.data.specs=mine.py",
        "--config.data.cameras.primary=32",
        "--config.data.cameras.left=16",
        "--config.data.depth={'primary': 8}",
        "--config.model.heads.action.clip=3",
        "--config.model.heads.action.steps=7",
    )
    assert done.stdout.strip() == (
        "{'kind': 'uniform', 'over': 'task'} {'mine': 'some/where'} ('mine.py',) "
        "{'primary': 32, 'wrist': 48, 'left': 16} {'primary': 8} 3 7"
    ), done.stderr


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("model.heads.action.steps", "many", "steps=many: expected int"),
        ("model.heads.action.network", "mlp", "network=mlp: expected a dict such as"),
        ("model.tokenizers.primary.film", "3", "film=3: expected true or false"),
        ("model.heads.action.steps.x", "3", "'steps' has no options there"),
        ("data.cameras", "64", "--config.data.cameras=64: expected a dict such as"),
        ("data.cameras.primary", "wide", "primary=wide: expected int"),
    ],
)
def test_an_override_of_the_wrong_type_is_named(path, text, message):
    with pytest.raises(c.ConfigError, match=message):
        cli.set_in_dict(load(ROOT / "configs" / "quickstart.py")(), path, text)


def test_a_whole_component_can_be_given():
    config = c.Config()
    cli.set_in_dict(config, "model.heads.action", "{'kind': 'l1', 'limit': 2.0}")
    cli.set_in_dict(config, "model.tokenizers", "{'a': {'kind': 'proprio'}}")
    assert config.model.heads["action"] == c.Component(kind="l1", limit=2.0)
    assert type(config.model.heads["action"]) is type(config.model.tokenizers["a"]) is c.Component


def test_door_4_config_argument():
    with pytest.raises(c.ConfigError, match="did you mean 'debug'"):
        c.parse_arg("debgu", debug=False)
    with pytest.raises(c.ConfigError, match="expected int"):
        c.parse_arg("size=big", size=3)


def test_door_5_stored_json():
    data = json.loads(c.to_json(c.resolve(c.Config())))
    data["model"]["widht"] = 3
    with pytest.raises(c.ConfigError, match=r"config\.model\.widht.*did you mean 'width'"):
        c.from_json(json.dumps(data))


def test_a_key_that_a_component_lacks_is_named():
    component = c.Component(kind="l1")
    with pytest.raises(
        c.ConfigError, match=r"unknown key of a component: 'kidn'.*'kind'"
    ) as caught:
        component["kidn"]
    assert isinstance(caught.value, KeyError)
    assert component.get("limit") is None


@dataclasses.dataclass
class Thing:
    size: int = 1
    horizon: int = 0


def test_door_6_component_field():
    table = {"thing": Thing}
    build = lambda **f: c.build_component(table, f, "model.heads.action", horizon=4)
    assert build(kind="thing", size=3) == Thing(3, 4)
    with pytest.raises(c.ConfigError, match=r"model\.heads\.action.*'sise'; did you mean 'size'"):
        build(kind="thing", sise=3)
    with pytest.raises(c.ConfigError, match="did you mean 'thing'"):
        build(kind="thin")
    with pytest.raises(c.ConfigError, match="no 'kind'"):
        build(size=3)
    with pytest.raises(c.ConfigError, match="rest of the config"):
        build(kind="thing", horizon=8)


@dataclasses.dataclass
class Bounded:
    size: int = option(1, "its size", low=1, high=8)
    mode: str = option("fast", choices=("fast", "slow"))
    widths: tuple[int, ...] = option((4,), low=2)
    scale: float = option(1.0, low=0)
    seed: int = option(0, low=0, high=2**32 - 1)
    network: "dict[str, float]" = option(dict, low=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, r"^heads\.a\.size is 0; it must lie in \[1, 8\] \(its size\)$"),
        ({"seed": 2**32}, r"seed is 4294967296; it must lie in \[0, 4294967295\]"),
        ({"size": 9}, r"size is 9; it must lie in \[1, 8\]"),
        ({"size": True}, "size is True; expected int"),
        ({"size": "3"}, "size is '3'; expected int"),
        ({"mode": "slwo"}, "value of heads.a.mode: 'slwo'; did you mean 'slow'"),
        ({"widths": (4, 1)}, r"widths\[1\] is 1; it must be at least 2"),
        ({"widths": 4}, r"widths is 4; expected tuple"),
        ({"widths": ("a",)}, r"widths is \('a',\); expected tuple"),
        ({"scale": float("nan")}, "scale is nan; it must be at least 0"),
        ({"network": {"x": -1}}, r"network\.x is -1; it must be at least 0"),
    ],
)
def test_a_component_field_that_is_not_allowed_is_named(fields, message):
    table = {"bounded": Bounded}
    with pytest.raises(c.ConfigError, match=message) as caught:
        c.build_component(table, {"kind": "bounded", **fields}, "heads.a")
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_lists_and_whole_floats_are_allowed():
    fields = {"kind": "bounded", "size": np.int64(3), "scale": 2, "widths": [3, 4]}
    assert c.build_component({"bounded": Bounded}, fields, "x").size == 3


def test_overrides_and_arguments_reach_main():
    done = run_script(
        "print(cfg.optim.learning_rate, cfg.model.heads['action']['steps'])",
        "--config=configs/quickstart.py:debug",
        "--config.optim.learning_rate=0.5",
        "--config.model.heads.action.steps=7",
    )
    assert done.stdout.split() == ["0.5", "7"], done.stderr


WORDS = c.Component(kind="language", vocabulary=7)
NEITHER = {"exclusive": True, "keep_goal": 0.0, "keep_language": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: setattr(x.data, "window", 0), "data.window is 0"),
        (lambda x: setattr(x.model, "attention_heads", 7), "not a multiple"),
        (lambda x: setattr(x.optim, "schedule", "cosin"), "did you mean 'cosine'"),
        (lambda x: setattr(x.evaluate, "execute", 99), "exceeds the chunk"),
        (lambda x: setattr(x.data, "keep_goal", 1.5), r"\[0, 1\]"),
        (
            lambda x: [setattr(x.data, k, v) for k, v in NEITHER.items()],
            "data.exclusive keeps the goal image or the instruction, but .* are 0",
        ),
        (lambda x: setattr(x.train, "steps", "many"), "train.steps is 'many'"),
        (lambda x: setattr(x.train, "validation_batches", 0), "at least 1.*validation_split=''"),
        (lambda x: setattr(x.train, "validate_every", -1), "validate_every is -1; .* least 0"),
        (lambda x: setattr(x.train, "keep_every", -2), "train.keep_every is -2; .* least 0"),
        (lambda x: setattr(x.train, "conflicts_every", -3), "conflicts_every is -3; .* least 0"),
        (lambda x: setattr(x.data, "prefetch", -1), "data.prefetch is -1; .* least 0"),
        (lambda x: setattr(x, "workdir", ""), "workdir is empty"),
        (
            lambda x: x.model.tokenizers.update(words=WORDS),
            "differs from data.text.vocabulary 4096",
        ),
    ],
)
def test_check_names_the_setting(change, message):
    config = c.Config(workdir="runs/x")
    config.check()
    change(config)
    with pytest.raises(c.ConfigError, match=message):
        config.check()


def load(path: Path):
    return runpy.run_path(str(path))["get_config"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
@pytest.mark.parametrize("arg", ["", "debug"])
def test_every_config_checks_and_has_a_debug_form(path, arg):
    config = load(path)(arg)
    config.check()
    complete = c.resolve(config)
    assert c.from_json(c.to_json(complete)) == complete
    if arg:
        assert config.train.steps <= 100


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_opens_with_its_command(path):
    head = path.read_text(encoding="utf-8")[:800]
    assert re.search(rf"octolike \w+ --config {path.stem}\b", head)


def test_describe_names_every_option():
    text = c.describe()
    assert "optim.learning_rate" in text
    assert "peak learning rate" in text


def test_describe_lists_the_kinds_with_types_defaults_choices_and_meanings():
    text, page = c.describe(), c.describe(markdown=True)
    for listing in (text, page):
        for name in ("data.goal", "uniform", "hash", "vocabulary", "4096", "samplings", "cotrain"):
            assert name in listing
    assert page.count("\n## ") > 10
    assert "| data.window" in page


def test_the_listing_is_a_command():
    command = [sys.executable, "scripts/config.py", "--markdown"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "## heads" in done.stdout


def test_every_nested_component_belongs_to_an_open_set():
    """Tables are named in one place, so that a renamed module is an error here."""
    for name, open_set in open_sets.OPEN_SETS.items():
        for kind, cls in open_set.load().items():
            for f in component_fields(cls):
                table = f.metadata.get("table")
                assert not table or table in open_sets.BY_TABLE, f"{name} {kind}: {f.name}"


def test_resolving_fills_every_field_and_changes_nothing_else():
    config = c.Config()
    config.data.sampling = c.Component(kind="temperature")
    config.model.heads["action"] = c.Component(kind="l1", limit=2.0)
    complete = c.resolve(config)
    assert complete.data.sampling == {"kind": "temperature", "over": "dataset", "t": 2.0}
    head = complete.model.heads["action"]
    assert (head["limit"], head["readout"]) == (2.0, "readout_action")
    assert not head.keys() & {"horizon", "action_dim", "dtype", "parent", "name"}
    assert config.data.sampling == {"kind": "temperature"}
    assert c.resolve(complete) == complete


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"kind": "l2"}, "unknown kind at model.heads.action: 'l2'.*'l1'"),
        ({"kind": "l1", "limti": 1.0}, r"field of model.heads.action \('l1'\): 'limti'.*'limit'"),
        ({"kind": "l1", "limit": "x"}, "model.heads.action.limit is 'x'; expected float"),
        ({"limit": 1.0}, "model.heads.action has no 'kind'"),
    ],
)
def test_resolving_names_values_that_are_not_allowed(component, message):
    config = c.Config()
    config.model.heads["action"] = c.Component(component)
    with pytest.raises(c.ConfigError, match=message):
        c.resolve(config)


@pytest.mark.parametrize(
    ("source", "argument", "message"),
    [
        ("c.parse_arg(arg, head='l1')", ":haed=l1", "error: unknown config argument: 'haed'; did"),
        ("undefined()", "", "error: NameError: name 'undefined' is not defined: {path}, line 4"),
        ("((", "", "error: SyntaxError: '(' was never closed: {path}, line 4"),
    ],
)
def test_an_error_of_a_config_file_is_one_line(tmp_path, source, argument, message):
    path = tmp_path / "mine.py"
    path.write_text(f"from octolike import config as c\n\ndef get_config(arg=''):\n    {source}\n")
    done = run_script("pass", f"--config={path}{argument}")
    assert done.returncode
    assert done.stderr.startswith(message.format(path=path))
    assert done.stderr.count("\n") == 1


def test_a_key_that_a_config_file_lacks_is_named_with_its_line():
    trace = 'Traceback:\n  File "/my/config.py", line 6, in get_config\n'
    text = cli._explain(ValueError(f"{trace}KeyError: 'wrist'"), [])
    assert text == "'wrist' is missing: /my/config.py, line 6"
    assert cli._explain(ValueError(f"{trace}octolike.errors.ConfigError: no"), []) == "no"
