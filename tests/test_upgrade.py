"""config.json: complete since format 2, upgraded from format 1, and refused if newer."""

import json
from pathlib import Path

import pytest

from octolike import config as c
from octolike.config import open_sets, upgrade

FROZEN = json.loads((Path(upgrade.__file__).with_name("format_1_defaults.json")).read_text())
OLD = Path(__file__).parent / "fixtures" / "run_format_1" / "run" / "config.json"


def format_1(**sections) -> dict:
    """Return the object of a config.json of format 1 with the given options alone."""
    return {"workdir": "runs/x", **sections}


def read(data: dict) -> c.Config:
    return c.from_json(json.dumps(data), "runs/x/config.json")


def stored() -> dict:
    """Return the object of a config.json of the present format."""
    config = c.Config(workdir="runs/x")
    config.model.heads["action"] = c.Component(kind="l1")
    return json.loads(c.to_json(c.resolve(config)))


def test_a_file_of_format_1_gets_the_defaults_of_its_time(monkeypatch):
    frozen = json.loads(json.dumps(FROZEN))
    frozen["options"]["data"]["pool"] = 77
    frozen["components"]["heads"]["l1"]["limit"] = 3.5
    monkeypatch.setattr(upgrade, "_format_1", lambda: frozen)
    config = read(format_1(model={"heads": {"action": {"kind": "l1"}}}))
    assert config.data.pool == 77
    assert config.model.heads["action"]["limit"] == 3.5


def test_components_inside_components_are_filled():
    image = {"kind": "image", "encoder": {"kind": "patch", "width": 8}}
    head = {"kind": "per_group", "head": {"kind": "diffusion"}}
    config = read(format_1(model={"tokenizers": {"a": image}, "heads": {"b": head}}))
    assert config.model.tokenizers["a"]["encoder"] == {"kind": "patch", "width": 8, "patch": 16}
    assert config.model.heads["b"]["head"]["network"]["hidden"] == 256


def test_the_sizes_of_a_pretrained_text_encoder_stay_with_its_file():
    encoder = {"kind": "t5", "path": "t5-base"}
    words = {"kind": "text_encoder", "encoder": encoder}
    config = read(format_1(model={"tokenizers": {"words": words}}))
    assert config.model.tokenizers["words"]["encoder"] == encoder
    assert c.resolve(config) == config


def test_the_renamed_options_are_read():
    config = read(format_1(train={"fresh": ["heads_*"]}, evaluate={"tell": ["goal"]}))
    assert config.train.reinit == ("heads_*",)
    assert config.evaluate.condition_on == ("goal",)


def test_format_1_had_no_plug_ins():
    assert read(format_1()).plugins == ()


def test_the_run_of_format_1_is_complete_after_the_upgrade():
    config = c.from_json(OLD.read_text())
    assert c.resolve(config) == config


@pytest.mark.parametrize("name", open_sets.OPEN_SETS)
def test_every_kind_of_format_1_is_complete_after_the_upgrade(name):
    """A new field needs a value for old runs: in a change of the format, or in the frozen file."""
    required = {"language": {"vocabulary": 8}}
    inner = {
        "image": ("encoder", "encoders", "patch"),
        "goal_image": ("encoder", "encoders", "patch"),
    }
    inner["text_encoder"] = ("encoder", "text_encoders", "t5")
    inner |= dict.fromkeys(("per_group", "hypernet"), ("head", "heads", "l1"))
    special = {"curriculum": {"scores": {"*": 1.0}}, "cotrain": {"target": "x"}}
    for kind in FROZEN["components"][name]:
        component = {"kind": kind, **required.get(kind, {}), **special.get(kind, {})}
        if name in ("tokenizers", "heads") and kind in inner:
            component[inner[kind][0]] = {"kind": inner[kind][2]}
        table, filled = open_sets.OPEN_SETS[name].table, upgrade._fill_component(name, component)
        open_sets.complete(table, filled, f"{name}.{kind}", defaults=False)


def test_runs_before_format_6_have_the_first_draw_of_their_demonstrations():
    data = stored()
    del data["collect"]["draw"]
    assert read({**data, "format": 5}).collect.draw == 0


def test_runs_before_format_6_drop_goal_and_instruction_independently():
    data = stored()
    del data["data"]["exclusive"]
    assert read({**data, "format": 5}).data.exclusive is False


def test_runs_before_format_7_have_no_auxiliary_heads():
    data = stored()
    del data["data"]["closings"], data["model"]["auxiliary"]
    config = read({**data, "format": 6})
    assert config.data.closings is False
    assert config.model.auxiliary == {}


def test_heads_before_format_6_draw_all_delays_equally():
    heads = {"a": {"kind": "flow", "prefix": 2}, "b": {"kind": "per_group", "head": {"kind": "l1"}}}
    new = upgrade.add_no_prefix({"model": {"heads": heads}})["model"]["heads"]
    assert new == {"a": {"no_prefix": 0.0, **heads["a"]}, "b": heads["b"]}


def test_runs_before_format_3_keep_their_statistics_actions_and_resizing():
    data = stored()
    for name in ("range_check", "representation", "resize"):
        del data["data"][name]
    config = read({**data, "format": 2})
    assert (config.data.range_check, config.data.representation) == ("warn", "as_stored")
    assert config.data.resize == "bilinear"
    assert read(format_1()).data.range_check == "warn"
    assert read(format_1()).data.resize == "bilinear"
    assert c.Config().data.range_check == "strict"


def test_runs_before_format_4_get_the_options_that_came_with_it():
    data = stored()
    for section, name in (
        ("data", "draw_views"),
        ("train", "profile"),
        ("evaluate", "delay"),
        ("evaluate", "overlap"),
        ("evaluate", "real_time"),
        ("evaluate", "gripper_band"),
    ):
        del data[section][name]
    data["model"]["remat"] = True
    head = next(iter(data["model"]["heads"].values()))
    denoises = head["kind"] in ("diffusion", "flow")
    for name in ("guidance", "prefix") if denoises else ():
        del head[name]
    config = read({**data, "format": 3})
    assert (config.model.remat, config.evaluate.delay) == ("full", 0)
    assert not denoises or next(iter(config.model.heads.values()))["prefix"] == 0
    words = {"kind": "text_encoder", "trained": True}
    old = {"model": {"tokenizers": {"language": words, "proprio": {"kind": "proprio"}}}}
    new = upgrade.add_text_pooling(old)["model"]["tokenizers"]
    assert new == {"language": {"pooled": False, **words}, "proprio": {"kind": "proprio"}}


def test_runs_before_format_5_show_proprio_as_stored_and_have_no_subtasks():
    data = stored()
    for section, name in (
        ("data", "proprio_representation"),
        ("data", "subtasks"),
        ("evaluate", "release"),
    ):
        del data[section][name]
    config = read({**data, "format": 4})
    assert config.data.proprio_representation == "as_stored"
    assert (config.data.subtasks, config.evaluate.release) == (False, 0)


def test_runs_before_format_3_keep_the_ids_of_their_texts():
    data = stored()
    del data["data"]["text"]["segmentation"]
    assert read({**data, "format": 2}).data.text["segmentation"] == "words"
    assert read(format_1()).data.text["segmentation"] == "words"


def test_every_value_is_stored():
    data = stored()
    assert data["format"] == upgrade.FORMAT
    assert data["model"]["heads"]["action"]["limit"] == 5.0
    assert data["data"]["sampling"]["over"] == "dataset"
    assert c.to_json(read(data)) == json.dumps(data, indent=2) + "\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["data"].pop("pool"), r"config\.data\.pool is missing"),
        (
            lambda d: d["model"]["heads"]["action"].pop("limit"),
            r"heads.action \('l1'\) lacks 'limit'",
        ),
        (lambda d: d["data"].update(poll=1), "option config.data.poll.*did you mean 'pool'"),
        (lambda d: d["data"]["text"].update(lenght=1), "'lenght'; did you mean 'length'"),
        (lambda d: d["data"].update(text=None), "data.text is None; expected Component"),
        (lambda d: d.update(data=3), "config.data is 3; expected the options of DataConfig"),
    ],
)
def test_a_file_that_is_incomplete_or_wrong_is_named(change, message):
    data = stored()
    change(data)
    with pytest.raises(c.ConfigError, match=message) as caught:
        read(data)
    assert str(caught.value).startswith("runs/x/config.json: ")
    assert "restore the file" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            upgrade.FORMAT + 1,
            f"but this version of octolike reads formats up to {upgrade.FORMAT}; install",
        ),
        (0, f"has format 0; expected a number from 1 to {upgrade.FORMAT}"),
        ("2", "has format '2'; expected a number"),
        (True, "has format True; expected a number"),
    ],
)
def test_an_unknown_format_is_refused(number, message):
    with pytest.raises(c.ConfigError, match=message) as caught:
        read({**stored(), "format": number})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_text_that_is_not_a_config_is_refused(text):
    with pytest.raises(c.ConfigError, match=r"runs/x/config\.json is"):
        c.from_json(text, "runs/x/config.json")
