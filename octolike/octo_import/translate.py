"""An Octo checkpoint's config.json, as this project's settings: pure functions of plain data.

Files of the first releases are brought up to date first (`modernize`): they say `pred_horizon`,
`tasks` and `pad_mask` where later ones say `action_horizon`, `task` and `timestep_pad_mask`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from octolike.config import Component, Config, ConfigError, ModelConfig, unknown
from octolike.octo_import import octo_components
from octolike.octo_import.octo_components import REQUIRED, WORDS, Seen

_OLD_NAMES = {
    "pred_horizon": "action_horizon",
    "tasks": "task",
    "pad_mask": "timestep_pad_mask",
    "action_dim_and_pred_horizon": "action_dim_and_action_horizon",
}
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


class Translation(NamedTuple):
    """The settings, and what they do not hold.

    proprio: the observation keys that lie side by side in observation.proprio. notes: what the
    source left open, or what has no counterpart here and does not matter when acting.
    """

    config: Config
    action_dim: int
    proprio: tuple[str, ...]
    notes: tuple[str, ...]


def modernize(stored: Any) -> Any:
    """Return nested data with the names of Octo's first releases replaced by the later ones."""
    if isinstance(stored, Mapping):
        return {_OLD_NAMES.get(k, k): modernize(v) for k, v in stored.items()}
    if isinstance(stored, (list, tuple)):
        return [modernize(v) for v in stored]
    return _OLD_NAMES.get(stored, stored) if isinstance(stored, str) else stored


def translate(stored: Mapping[str, Any], batch: Mapping[str, Any]) -> Translation:
    """Return the settings of a modern config.json and example batch.

    Raises ConfigError naming what this project cannot represent.
    """
    seen = Seen(batch["observation"], batch["task"])
    notes: list[str] = []
    model = octo_components.fields({"kwargs": stored["model"]}, "model", _MODEL)
    config = Config()
    made = config.model
    _transformer(made, model, notes)
    proprio = _tokenizers(made, model, seen, notes)
    made.readouts = {name: int(n) for name, n in model["readouts"].items()}
    if not model["use_correct_attention"]:
        made.registers = _first_release(made.readouts)
    horizon, action_dim = _heads(made, model["heads"])
    config.data.window = seen.observation["timestep_pad_mask"].shape[1]
    if "window_size" in stored and stored["window_size"] != config.data.window:
        raise ConfigError(
            f"window_size is {stored['window_size']}, but the example batch has windows of "
            f"{config.data.window}"
        )
    config.data.horizon = horizon
    config.data.use_proprio = bool(proprio)
    config.data.normalization = _normalization(stored, notes)
    _images(config, seen)
    if any(t["kind"] == "text_encoder" for t in made.tokenizers.values()):
        config.data.text = _text(stored, seen)
    return Translation(config, action_dim, proprio, tuple(notes))


# Parts of `translate`


def _transformer(made: ModelConfig, model: Mapping[str, Any], notes: list[str]) -> None:
    path = "model.transformer_kwargs"
    given = octo_components.fields({"kwargs": model["transformer_kwargs"]}, path, _TRANSFORMER)
    octo_components.only(path, given, add_position_embedding=False)
    if given["attention_dropout_rate"]:
        notes.append(
            f"{path}.attention_dropout_rate {given['attention_dropout_rate']} is left out: "
            "octolike drops activations, not attention (acting is the same)"
        )
    made.width = int(model["token_embedding_size"])
    made.layers, made.mlp_width = int(given["num_layers"]), int(given["mlp_dim"])
    made.attention_heads = int(given["num_attention_heads"])
    made.dropout = float(given["dropout_rate"])
    made.max_window = int(model["max_horizon"])
    made.repeat_task_tokens = bool(model["repeat_task_tokens"])


def _first_release(readouts: Mapping[str, int]) -> tuple[str, ...]:
    """Return the registers that make up the attention of Octo's first releases.

    There, the first token of each group attends, and is attended to, as one of the group before
    it. That matters only to readouts: the first one's first token counts as an observation, which
    is what a register is; the others', if they are of one token, stay by themselves.
    """
    if not readouts or set(readouts.values()) != {1}:
        raise ConfigError(
            "model.use_correct_attention is false (or absent, as in Octo's first releases), and "
            f"the readouts have {dict(readouts)} tokens: there, the first token of each readout "
            "attends as one of the group before it, and octolike can do so for readouts of a "
            "single token only"
        )
    return (next(iter(readouts)),)


def _tokenizers(
    made: ModelConfig, model: Mapping[str, Any], seen: Seen, notes: list[str]
) -> tuple[str, ...]:
    """Fill `made.tokenizers`; return the observation keys that make up observation.proprio."""
    proprio: tuple[str, ...] = ()
    for place in ("task", "observation"):
        for name, spec in model[f"{place}_tokenizers"].items():
            path = f"model.{place}_tokenizers.{name}"
            component, keys = octo_components.component(
                octo_components.TOKENIZERS, spec, path, seen
            )
            if component is None:
                notes.append(f"{path} is left out: the data have nothing that it reads, as in Octo")
                continue
            if name in made.tokenizers:
                raise ConfigError(f"{path}: a task tokenizer has that name too; rename one")
            if keys and proprio not in ((), keys):
                raise ConfigError(
                    f"{path}.obs_keys reads {list(keys)}, another tokenizer {list(proprio)}; "
                    "octolike has one observation.proprio, which every tokenizer reads whole"
                )
            proprio = keys or proprio
            made.tokenizers[name] = component
    return proprio


def _heads(made: ModelConfig, heads: Mapping[str, Any]) -> tuple[int, int]:
    """Fill `made.heads`; return (horizon, action dimensions), which all heads must share."""
    sizes = {}
    for name, spec in heads.items():
        path = f"model.heads.{name}"
        made.heads[name] = octo_components.component(octo_components.HEADS, spec, path)
        sizes[name] = tuple(int({**octo_components.HEAD, **spec["kwargs"]}[k]) for k in _SIZE)
    if len(set(sizes.values())) != 1:
        raise ConfigError(
            f"model.heads differ in (action_horizon, action_dim): {sizes}; in octolike all heads "
            "of a run predict the same chunk"
        )
    return next(iter(sizes.values()))


def _text(stored: Mapping[str, Any], seen: Seen) -> Component:
    """Return the text tokenizer; its path is the name that Octo has for it."""
    path, spec = "text_processor", stored.get("text_processor") or {}
    if spec.get("name") != "HFTokenizer":
        raise ConfigError(unknown(f"class at {path}", str(spec.get("name")), ["HFTokenizer"]))
    given = octo_components.fields(spec, path, _TEXT)
    options = given["tokenizer_kwargs"]
    for name, value in {"padding": "max_length", "truncation": True}.items():
        if options.get(name, value) != value:
            raise ConfigError(
                f"{path}.tokenizer_kwargs.{name} is {options[name]!r}; octolike has only {value!r}"
            )
    words = seen.task[WORDS]
    length = (words["input_ids"] if isinstance(words, Mapping) else words).shape[1]
    return Component(kind="huggingface", length=int(length), path=given["tokenizer_name"])


def _normalization(stored: Mapping[str, Any], notes: list[str]) -> str:
    """Return how the training data were normalised: data settings are stored beside the model."""
    found = {str(v).rpartition(".")[2].lower() for v in _values(stored, _NORMALIZATION)}
    if len(found) > 1:
        raise ConfigError(f"config.json has several {_NORMALIZATION}: {sorted(found)}")
    if not found:
        notes.append(f"config.json has no {_NORMALIZATION}; taken to be 'normal' (mean and std)")
    return found.pop() if found else "normal"


def _values(tree: Any, name: str) -> list[Any]:
    """Return every value of the key `name` anywhere in nested data."""
    if isinstance(tree, Mapping):
        here = [tree[name]] if name in tree else []
        return here + [v for k in tree if k != name for v in _values(tree[k], name)]
    return [v for x in tree for v in _values(x, name)] if isinstance(tree, list) else []


def _images(config: Config, seen: Seen) -> None:
    tokenizers = [t for t in config.model.tokenizers.values() if t["kind"] == "image"]
    config.data.goal = "uniform" if any(t["goal"] for t in tokenizers) else "none"
    config.data.cameras = {}
    for camera in sorted({c for t in tokenizers for c in t["cameras"]}):
        height, width, channels = seen.observation[f"image_{camera}"].shape[-3:]
        if height != width or channels != 3:
            raise ConfigError(
                f"the example batch's image_{camera} is {height}×{width}×{channels}; octolike's "
                "images are square and have 3 channels"
            )
        config.data.cameras[camera] = height
