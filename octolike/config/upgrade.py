"""Configs that older versions wrote: one function for each change of the format.

A function takes the object of config.json and returns it as the next change expects it. Format 2
holds every value that a run used, and lacks the options added since. Format 1, of commit 182e15f,
had no number and only the fields of a component that the config file set; its
defaults are frozen in format_1_defaults.json, with the values of constants that became fields.
"""

import functools
import json
from pathlib import Path
from typing import Any

from octolike.errors import ConfigError

FORMAT = 7  # of the config.json that this version writes
Json = dict[str, Any]

# Places of components in format 1: sections and option -> open set; "*": one per name.
OPTIONS = {
    ("data", "text"): "text_tokenizers",
    ("data", "sampling"): "samplings",
    ("model", "experts"): "experts",
    ("model", "tokenizers", "*"): "tokenizers",
    ("model", "heads", "*"): "heads",
    ("environment",): "environments",
}
# Components inside components: (open set, kind, field) -> open set.
FIELDS = {
    ("tokenizers", "image", "encoder"): "encoders",
    ("tokenizers", "goal_image", "encoder"): "encoders",
    ("tokenizers", "text_encoder", "encoder"): "text_encoders",
    ("heads", "diffusion", "network"): "denoisers",
    ("heads", "flow", "network"): "denoisers",
    ("heads", "per_group", "head"): "heads",
    ("heads", "hypernet", "head"): "heads",
}


def upgrade(config: Json, source: str) -> Json:
    """Return the options of a config.json of any format as those of the present one.

    `source` names the file in errors. Raises ConfigError for a format that is newer or unknown.
    """
    number = format_of(config, source)
    for change in CHANGES[number - 1 :]:
        for function in change:
            config = function(config)
    return {k: v for k, v in config.items() if k != "format"}


def format_of(config: Json, source: str) -> int:
    """Return the format of a config.json; ConfigError for one that is newer or unknown."""
    number = config.get("format", 1)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ConfigError(
            f"{source} has format {number!r}; expected a number from 1 to {FORMAT}. Restore the "
            "file that training wrote"
        )
    if number > FORMAT:
        raise ConfigError(
            f"{source} has format {number}, but this version of octolike reads formats up to "
            f"{FORMAT}; install the version that wrote the run (its versions.json) or a newer one"
        )
    return number


def fill_options(config: Json) -> Json:
    """Give the options that a config of format 1 lacks the defaults of that time."""
    return _merge(_format_1()["options"], config)


def fill_components(config: Json) -> Json:
    """Give the fields that a component of format 1 lacks the defaults of that time."""
    for place, open_set in OPTIONS.items():
        config = _apply(config, place, functools.partial(_fill_component, open_set))
    return config


def rename_options(config: Json) -> Json:
    """Rename train.fresh to train.reinit, and evaluate.tell to evaluate.condition_on."""
    config = _rename(config, "train", "fresh", "reinit")
    return _rename(config, "evaluate", "tell", "condition_on")


def add_plugins(config: Json) -> Json:
    """Add the option plugins: format 1 had none."""
    return {**config, "plugins": {}}


def add_range_check(config: Json) -> Json:
    """Add data.range_check: before format 3, ranges were neither checked nor widened."""
    return _default(config, "data", "range_check", "warn")


def add_representation(config: Json) -> Json:
    """Add data.representation: before format 3, actions were learned as stored."""
    return _default(config, "data", "representation", "as_stored")


def add_proprio_representation(config: Json) -> Json:
    """Add data.proprio_representation: before format 5, proprio was shown as stored."""
    return _default(config, "data", "proprio_representation", "as_stored")


def add_resize(config: Json) -> Json:
    """Add data.resize: before format 3, images were resized bilinearly."""
    return _default(config, "data", "resize", "bilinear")


def add_absent_cameras(config: Json) -> Json:
    """Add data.absent_cameras: before format 3, some dataset had every camera."""
    return _default(config, "data", "absent_cameras", [])


def add_real_time_chunking(config: Json) -> Json:
    """Add guidance and prefix to denoising heads: before format 4, they had no such prefix."""
    fields = functools.partial(_add_fields, guidance=5.0, prefix=0)
    return _apply(config, ("model", "heads", "*"), fields)


def add_execution(config: Json) -> Json:
    """Add how chunks are executed: before format 4, a simulated inference took no time."""
    options: Json = {"delay": 0, "overlap": "continue", "real_time": "", "gripper_band": 0.0}
    for name, value in options.items():
        config = _default(config, "evaluate", name, value)
    return config


def add_text_segmentation(config: Json) -> Json:
    """Add the hash tokenizer's segmentation: before format 3, it split texts into words alone."""
    data = config.get("data")
    if not isinstance(data, dict):
        return config  # an error that reading it reports
    text = data.get("text")
    if not isinstance(text, dict) or text.get("kind") != "hash":
        return config
    return {**config, "data": {**data, "text": {"segmentation": "words", **text}}}


def drop_service(config: Json) -> Json:
    """Drop data.service: every host reads its own part of the episodes since format 3."""
    data = {k: v for k, v in config.get("data", {}).items() if k != "service"}
    return {**config, "data": data}


def add_lanes(config: Json) -> Json:
    """Add data.lanes: before format 3, each host read a part of every batch."""
    return _default(config, "data", "lanes", 0)


def keep_all_episodes(config: Json) -> Json:
    """Hold nothing out, filter nothing, and swap red and blue as in the dataset specs."""
    options: Json = {
        "held_out": 0.0,
        "validation_splits": {},
        "filters": {},
        "channel_orders": {"*": "spec"},
    }
    for name, value in options.items():
        config = _default(config, "data", name, value)
    return config


def name_remat(config: Json) -> Json:
    """Name the policy of model.remat: before format 4, it was on or off."""
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("remat"), bool):
        return config  # an error that reading it reports
    return {**config, "model": {**model, "remat": "full" if model["remat"] else "none"}}


def add_draw_views(config: Json) -> Json:
    """Add data.draw_views: before format 4, a camera showed its own images alone."""
    return _default(config, "data", "draw_views", False)


def add_profile(config: Json) -> Json:
    """Add train.profile: before format 4, steps could not be traced."""
    return _default(config, "train", "profile", "")


def add_subtasks(config: Json) -> Json:
    """Add data.subtasks and evaluate.release: before format 5, steps had no subtask."""
    return _default(_default(config, "data", "subtasks", False), "evaluate", "release", 0)


def add_draw(config: Json) -> Json:
    """Add collect.draw: before format 6, demonstrations could be drawn once only."""
    return _default(config, "collect", "draw", 0)


def add_exclusive(config: Json) -> Json:
    """Add data.exclusive: before format 6, goal and instruction were dropped independently."""
    return _default(config, "data", "exclusive", False)


def add_no_prefix(config: Json) -> Json:
    """Add no_prefix to denoising heads: before format 6, all delays were equally frequent."""
    return _apply(config, ("model", "heads", "*"), functools.partial(_add_fields, no_prefix=0.0))


def add_auxiliary(config: Json) -> Json:
    """Add auxiliary heads and their label: before format 7, action heads alone were trained."""
    config = _default(config, "data", "closings", False)
    return _default(config, "model", "auxiliary", {})


def add_text_pooling(config: Json) -> Json:
    """Add pooled of a text_encoder: before format 4, every word was a token."""

    def pool(tokenizer: Any) -> Any:
        if not isinstance(tokenizer, dict) or tokenizer.get("kind") != "text_encoder":
            return tokenizer
        return {"pooled": False, **tokenizer}

    return _apply(config, ("model", "tokenizers", "*"), pool)


# CHANGES[n - 1] turns format n into format n + 1.
CHANGES = (
    (fill_options, fill_components, rename_options, add_plugins),
    (
        add_range_check,
        add_representation,
        add_resize,
        add_text_segmentation,
        add_absent_cameras,
        drop_service,
        add_lanes,
        keep_all_episodes,
    ),
    (
        name_remat,
        add_draw_views,
        add_profile,
        add_real_time_chunking,
        add_execution,
        add_text_pooling,
    ),
    (add_proprio_representation, add_subtasks),
    (add_draw, add_exclusive, add_no_prefix),
    (add_auxiliary,),
)


@functools.cache
def _format_1() -> Json:
    path = Path(__file__).with_name("format_1_defaults.json")
    return json.loads(path.read_text(encoding="utf-8"))


def _merge(defaults: Json, config: Json) -> Json:
    """Return the options with defaults for missing ones; only sections are merged."""
    sections = ("data", "model", "optim", "train", "augment", "collect", "evaluate")
    merged = {**defaults, **config}
    for name in sections:
        if name in defaults and isinstance(merged[name], dict):
            merged[name] = _merge(defaults[name], merged[name])
    return merged


def _apply(node: Any, place: tuple[str, ...], function: Any) -> Any:
    """Return nested objects with a function applied at a place; "*": every key."""
    if not place:
        return function(node)
    if not isinstance(node, dict):
        return node
    names = node if place[0] == "*" else [name for name in place[:1] if name in node]
    return {**node, **{name: _apply(node[name], place[1:], function) for name in names}}


def _fill_component(open_set: str, component: Any) -> Any:
    defaults = _format_1()["components"][open_set]
    if not isinstance(component, dict) or component.get("kind") not in defaults:
        return component  # {}, or an error that reading it reports
    kind = component["kind"]
    if open_set != "text_encoders" or not component.get("path"):  # else config.json of path
        component = {"kind": kind, **defaults[kind], **component}
    for name, value in component.items():
        inner = FIELDS.get((open_set, kind, name))
        if inner:
            component = {**component, name: _fill_component(inner, value)}
    return component


def _add_fields(head: Any, **fields: Any) -> Any:
    """Add fields to a denoising head, or to the one inside another head."""
    if not isinstance(head, dict):
        return head  # an error that reading it reports
    if head.get("kind") in ("diffusion", "flow"):
        return {**fields, **head}
    return {k: _add_fields(v, **fields) if k == "head" else v for k, v in head.items()}


def _rename(config: Json, section: str, old: str, new: str) -> Json:
    """Return the config with an option of a section renamed, in its place."""
    options = config[section]
    if not isinstance(options, dict) or old not in options:
        return config
    return {**config, section: {new if k == old else k: v for k, v in options.items()}}


def _default(config: Json, section: str, name: str, value: Any) -> Json:
    """Return the config with an option of a section added, if it is missing."""
    options = config.get(section)
    if not isinstance(options, dict):
        return config  # an error that reading it reports
    return {**config, section: {name: value, **options}}
