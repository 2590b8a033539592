"""Translates the config.json of an Octo checkpoint to a Config: pure functions of plain data.

Files of Octo's first releases are first updated to the names of later ones (`modernize`):
`pred_horizon` to `action_horizon`, `tasks` to `task`, `pad_mask` to `timestep_pad_mask`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from octolike.config import Component, Config, ConfigError, ModelConfig, unknown
from octolike.model.language import READERS
from octolike.octo_import import octo_components
from octolike.octo_import.octo_components import REQUIRED, WORDS, ExampleBatch

_OLD_NAMES = {
    "pred_horizon": "action_horizon",
    "tasks": "task",
    "pad_mask": "timestep_pad_mask",
    "action_dim_and_pred_horizon": "action_dim_and_action_horizon",
}
FILM = "instruction_vector"  # the name, and the kind, of the tokenizer that conditions FiLM
_SIZE = ("action_horizon", "action_dim")
_NORMALIZATION = "action_proprio_normalization_type"
_MODEL = {
    "observation_tokenizers": REQUIRED,
    "task_tokenizers": REQUIRED,
    "heads": REQUIRED,
    "readouts": REQUIRED,
    "transformer_kwargs": REQUIRED,
    "token_embedding_size": REQUIRED,
    "max_horizon": REQUIRED,
    "repeat_task_tokens": False,
    "use_correct_attention": False,
}
_TRANSFORMER = {
    "num_layers": REQUIRED,
    "mlp_dim": REQUIRED,
    "num_attention_heads": REQUIRED,
    "dropout_rate": 0.1,
    "attention_dropout_rate": 0.1,
    "add_position_embedding": False,
}
_TEXT = {"tokenizer_name": REQUIRED, "tokenizer_kwargs": REQUIRED, "encode_with_model": False}


class ConfigTranslation(NamedTuple):
    """The config, and facts that it does not hold.

    proprio: the observation keys that are concatenated to observation.proprio. notes: settings that
    the source does not state, or that have no counterpart here and do not affect acting.
    """

    config: Config
    action_dim: int
    proprio: tuple[str, ...]
    notes: tuple[str, ...]


def modernize(data: Any) -> Any:
    """Return nested data with the names of Octo's first releases replaced by the later ones."""
    if isinstance(data, Mapping):
        return {_OLD_NAMES.get(k, k): modernize(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [modernize(v) for v in data]
    return _OLD_NAMES.get(data, data) if isinstance(data, str) else data


def translate(stored: Mapping[str, Any], batch: Mapping[str, Any]) -> ConfigTranslation:
    """Return the config for a modernized config.json and example batch.

    Raises:
        ConfigError: names a setting that octolike cannot represent.
    """
    example = ExampleBatch(batch["observation"], batch["task"])
    notes: list[str] = []
    model = octo_components.fields({"kwargs": stored["model"]}, "model", _MODEL)
    config = Config()
    _set_transformer(config.model, model, notes)
    proprio = _set_tokenizers(config.model, model, example, notes)
    readouts = config.model.readouts = {name: int(n) for name, n in model["readouts"].items()}
    if not model["use_correct_attention"]:
        config.model.registers = _first_release_registers(readouts)
    horizon, action_dim = _set_heads(config.model, model["heads"])
    config.data.window = example.observation["timestep_pad_mask"].shape[1]
    if "window_size" in stored and stored["window_size"] != config.data.window:
        raise ConfigError(
            f"window_size is {stored['window_size']}, but the example batch has windows of "
            f"{config.data.window}"
        )
    config.data.horizon = horizon
    config.data.use_proprio = bool(proprio)
    config.data.normalization = _normalization(stored, notes)
    _set_images(config, example)
    if any(t["kind"] in READERS for t in config.model.tokenizers.values()):
        config.data.text = _text(stored, example, notes)
    return ConfigTranslation(config, action_dim, proprio, tuple(notes))


# Parts of `translate`


def _set_transformer(config: ModelConfig, model: Mapping[str, Any], notes: list[str]) -> None:
    path = "model.transformer_kwargs"
    settings = octo_components.fields({"kwargs": model["transformer_kwargs"]}, path, _TRANSFORMER)
    octo_components.require_values(path, settings, add_position_embedding=False)
    if settings["attention_dropout_rate"]:
        notes.append(
            f"{path}.attention_dropout_rate {settings['attention_dropout_rate']} is ignored: "
            "octolike applies dropout to activations, not to attention (acting is the same)"
        )
    config.width = int(model["token_embedding_size"])
    config.layers, config.mlp_width = int(settings["num_layers"]), int(settings["mlp_dim"])
    config.attention_heads = int(settings["num_attention_heads"])
    config.dropout = float(settings["dropout_rate"])
    config.max_window = int(model["max_horizon"])
    config.repeat_task_tokens = bool(model["repeat_task_tokens"])


def _first_release_registers(readouts: Mapping[str, int]) -> tuple[str, ...]:
    """Return the registers that reproduce the attention mask of Octo's first releases.

    There, the first token of each group is masked like a token of the previous group. This affects
    only readouts: the first token of the first readout counts as an observation, i.e. it is a
    register; readouts of a single token otherwise behave as usual.
    """
    if not readouts or set(readouts.values()) != {1}:
        raise ConfigError(
            "model.use_correct_attention is false (or absent, as in Octo's first releases), and "
            f"the readouts have {dict(readouts)} tokens: there, the first token of each "
            "readout is masked like the previous group, which octolike reproduces only for "
            "readouts of a single token"
        )
    return (next(iter(readouts)),)


def _set_tokenizers(
    config: ModelConfig, model: Mapping[str, Any], example: ExampleBatch, notes: list[str]
) -> tuple[str, ...]:
    """Set `config.tokenizers`; return the observation keys of observation.proprio."""
    proprio: tuple[str, ...] = ()
    for place in ("task", "observation"):
        for name, spec in model[f"{place}_tokenizers"].items():
            path = f"model.{place}_tokenizers.{name}"
            component, keys = octo_components.component(
                octo_components.TOKENIZERS, spec, path, example
            )
            if component is None:
                notes.append(f"{path} is left out, as in Octo: the data have none of its inputs")
                continue
            if name in config.tokenizers:
                raise ConfigError(f"{path}: a task tokenizer has the same name; rename one")
            if keys and proprio not in ((), keys):
                raise ConfigError(
                    f"{path}.obs_keys reads {list(keys)}, another tokenizer {list(proprio)}; "
                    "all proprio tokenizers of octolike read the same observation.proprio"
                )
            proprio = keys or proprio
            config.tokenizers[name] = component
    if any(tokenizer.get("film") for tokenizer in config.tokenizers.values()):
        if FILM in config.tokenizers:
            raise ConfigError(f"a tokenizer has the name {FILM!r}, which FiLM needs; rename it")
        config.tokenizers[FILM] = Component(kind=FILM)
    return proprio


def _set_heads(config: ModelConfig, heads: Mapping[str, Any]) -> tuple[int, int]:
    """Set `config.heads`; return (horizon, action dimensions), which all heads must share."""
    sizes = {}
    for name, spec in heads.items():
        path = f"model.heads.{name}"
        config.heads[name] = octo_components.component(octo_components.HEADS, spec, path)
        kwargs = {**octo_components.HEAD, **spec["kwargs"]}
        horizon, width = (int(kwargs[k]) for k in _SIZE)
        sizes[name] = horizon, width
    if len(set(sizes.values())) != 1:
        raise ConfigError(
            f"model.heads differ in (action_horizon, action_dim): {sizes}; in octolike all heads "
            "of a run predict the same chunk"
        )
    return next(iter(sizes.values()))


def _text(stored: Mapping[str, Any], example: ExampleBatch, notes: list[str]) -> Component:
    """Return the text tokenizer; its path is the name in Octo's config, "" for a table.

    A table replaces text processors that embed an instruction: only HFTokenizer's states of a
    pretrained encoder are computed here.
    """
    path, spec = "text_processor", stored.get("text_processor") or {}
    words, name = example.task[WORDS], spec.get("name")
    embedded = isinstance(words, np.ndarray)
    if embedded and (name != "HFTokenizer" or words.ndim == 2):
        notes.append(
            f"{path} {name or '(not stated)'} is not run: the vectors of instructions "
            f"{list(words.shape[1:])} come from the table that was given as --text_encoder"
        )
        return Component(kind="table", length=int(words.shape[1]) if words.ndim == 3 else 1)
    if name != "HFTokenizer":
        raise ConfigError(unknown(f"class at {path}", str(name), ["HFTokenizer"]))
    settings = octo_components.fields(spec, path, _TEXT)
    options = settings["tokenizer_kwargs"]
    for name, value in {"padding": "max_length", "truncation": True}.items():
        if options.get(name, value) != value:
            raise ConfigError(
                f"{path}.tokenizer_kwargs.{name} is {options[name]!r}; octolike only "
                f"supports {value!r}"
            )
    length = (words if embedded else words["input_ids"]).shape[1]
    return Component(kind="huggingface", length=int(length), path=settings["tokenizer_name"])


def _normalization(stored: Mapping[str, Any], notes: list[str]) -> str:
    """Return data.normalization, which is stored in Octo's data settings."""
    kinds = {str(v).rpartition(".")[2].lower() for v in _values(stored, _NORMALIZATION)}
    if len(kinds) > 1:
        raise ConfigError(f"config.json has several {_NORMALIZATION}: {sorted(kinds)}")
    if not kinds:
        notes.append(f"config.json has no {_NORMALIZATION}; 'normal' (mean and std) is assumed")
    return kinds.pop() if kinds else "normal"


def _values(tree: Any, name: str) -> list[Any]:
    """Return every value of the key `name` anywhere in nested data."""
    if isinstance(tree, Mapping):
        values = [tree[name]] if name in tree else []
        return values + [v for k in tree if k != name for v in _values(tree[k], name)]
    return [v for x in tree for v in _values(x, name)] if isinstance(tree, list) else []


def _set_images(config: Config, example: ExampleBatch) -> None:
    tokenizers = [t for t in config.model.tokenizers.values() if t["kind"] == "image"]
    config.data.resize = "lanczos3"  # of dlimp, which Octo's data pipeline uses
    config.data.goal = "uniform" if any(t["goal"] for t in tokenizers) else "none"
    config.data.cameras = {}
    for camera in sorted({c for t in tokenizers for c in t["cameras"]}):
        height, width, channels = example.observation[f"image_{camera}"].shape[-3:]
        if height != width or channels != 3:
            raise ConfigError(
                f"the example batch's image_{camera} is {height}×{width}×{channels}; octolike's "
                "images are square and have 3 channels"
            )
        config.data.cameras[camera] = height
