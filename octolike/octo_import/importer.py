"""Imports an Octo checkpoint as a run directory (octolike import_octo).

    CKPT_DIR/                              written by Octo's save_pretrained
      config.json                          → config.json            octo_config.py
      dataset_statistics.json              → embodiments.json       `embodiments`
      example_batch.msgpack                → batch_spec.json        `to_batch`
      <step>/default/checkpoint, or orbax  → checkpoints/<step>     `PATHS`

The imported run is an ordinary run: it acts, is evaluated, and can be finetuned.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from octolike import files, types
from octolike.config import Config, ConfigError
from octolike.embodiment import MIN_SPREAD, STATISTICS, Embodiment, Layout, Statistics
from octolike.model import language
from octolike.model.network import build_network
from octolike.octo_import import octo_config, octo_text
from octolike.octo_import.octo_components import WORDS
from octolike.octo_import.octo_config import ConfigTranslation
from octolike.train import checkpoint, checkpoint_store, state

# Octo's parameter paths → octolike's. {name} stands for one part of a path, the same on both sides;
# the rest of the path (/kernel, /bias, /scale, …) is kept. The first matching row is used.
_BLOCK = "octo_transformer/BlockTransformer_0/Transformer_0/encoderblock_{i}"
_OBSERVATION = "octo_transformer/observation_tokenizers_{t}"
_SCORE = "heads_{h}/diffusion_model"
_POOL = (  # attention pooling, in heads and token learners
    ("probe", "probe"),
    ("MultiHeadDotProductAttention_0/{part}", "{part}"),
    ("LayerNorm_0", "norm"),
    ("MlpBlock_0/Dense_0", "mlp_in"),
    ("MlpBlock_0/Dense_1", "mlp_out"),
)
PATHS = (
    (f"{_BLOCK}/LayerNorm_0", "transformer/block_{i}/attention_norm"),
    (f"{_BLOCK}/MultiHeadDotProductAttention_0", "transformer/block_{i}/attention"),
    (f"{_BLOCK}/LayerNorm_1", "transformer/block_{i}/mlp_norm"),
    (f"{_BLOCK}/MlpBlock_0/Dense_0", "transformer/block_{i}/mlp_in"),
    (f"{_BLOCK}/MlpBlock_0/Dense_1", "transformer/block_{i}/mlp_out"),
    ("octo_transformer/BlockTransformer_0/Transformer_0/encoder_norm", "transformer/norm"),
    ("octo_transformer/{group}_projection", "{group}_projection"),
    ("octo_transformer/{group}_pos_embedding", "{group}_pos_embedding"),
    (f"{_OBSERVATION}/{{encoder}}_0/StdConv_{{i}}", "tokenizers_{t}/encoder/conv_{i}"),
    (f"{_OBSERVATION}/{{encoder}}_0/GroupNorm_{{i}}", "tokenizers_{t}/encoder/norm_{i}"),
    (f"{_OBSERVATION}/{{encoder}}_0/embedding", "tokenizers_{t}/encoder/embedding"),
    (
        f"{_OBSERVATION}/{{encoder}}_0/FilmConditioning_0/Dense_0",
        "tokenizers_{t}/encoder/film/scale",
    ),
    (
        f"{_OBSERVATION}/{{encoder}}_0/FilmConditioning_0/Dense_1",
        "tokenizers_{t}/encoder/film/shift",
    ),
    (  # the later ones of a ViTResnet
        f"{_OBSERVATION}/{{encoder}}_0/FilmConditioning_{{i}}/Dense_0",
        "tokenizers_{t}/encoder/film_{i}/scale",
    ),
    (
        f"{_OBSERVATION}/{{encoder}}_0/FilmConditioning_{{i}}/Dense_1",
        "tokenizers_{t}/encoder/film_{i}/shift",
    ),
    (f"{_OBSERVATION}/{{encoder}}_0/conv_root", "tokenizers_{t}/encoder/root"),
    (f"{_OBSERVATION}/{{encoder}}_0/gn_root", "tokenizers_{t}/encoder/root_norm"),
    (
        f"{_OBSERVATION}/{{encoder}}_0/block{{b}}/unit{{u}}/{{layer}}",
        "tokenizers_{t}/encoder/block_{b}_unit_{u}/{layer}",
    ),
    (f"{_OBSERVATION}/TokenLearner_0/pos_embed", "tokenizers_{t}/learner/pos_embedding"),
    (f"{_OBSERVATION}/TokenLearner_0/LayerNorm_0", "tokenizers_{t}/learner/norm"),
    *(
        (f"{_OBSERVATION}/TokenLearner_0/MAPHead_0/{a}", f"tokenizers_{{t}}/learner/pool/{b}")
        for a, b in _POOL
    ),
    *((f"heads_{{h}}/map_head/{a}", f"heads_{{h}}/pool/{b}") for a, b in _POOL),
    (f"{_SCORE}/time_preprocess/kernel", "heads_{h}/score/fourier"),
    (f"{_SCORE}/cond_encoder/Dense_0", "heads_{h}/score/time_in"),
    (f"{_SCORE}/cond_encoder/Dense_1", "heads_{h}/score/time_out"),
    (f"{_SCORE}/reverse_network/Dense_0", "heads_{h}/score/in"),
    (f"{_SCORE}/reverse_network/MLPResNetBlock_{{i}}/LayerNorm_0", "heads_{h}/score/norm_{i}"),
    (f"{_SCORE}/reverse_network/MLPResNetBlock_{{i}}/Dense_0", "heads_{h}/score/up_{i}"),
    (f"{_SCORE}/reverse_network/MLPResNetBlock_{{i}}/Dense_1", "heads_{h}/score/down_{i}"),
    (f"{_SCORE}/reverse_network/Dense_1", "heads_{h}/score/out"),
    ("heads_{h}/mean_proj", "heads_{h}/out"),
    ("heads_{h}/vocab_proj", "heads_{h}/out"),
)
# Substitutes for statistics that the files lack; normalization "normal" uses none of them.
_SUBSTITUTES = {
    "p01": ("min", "mean"),
    "p99": ("max", "mean"),
    "min": ("p01", "mean"),
    "max": ("p99", "mean"),
}


class OctoCheckpoint(NamedTuple):
    """The contents of an Octo checkpoint, with the names of later releases.

    config, batch, statistics: nested; params: {slash path: array}.
    """

    config: dict[str, Any]
    batch: dict[str, Any]
    statistics: dict[str, Any]
    params: dict[str, np.ndarray]
    step: int


class ImportedRun(NamedTuple):
    """An imported run. notes: settings that the source does not state or octolike does not have."""

    run: checkpoint.Run
    translation: ConfigTranslation
    notes: tuple[str, ...]


def import_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    text_encoder: str = "",
    step: int | None = None,
) -> ImportedRun:
    """Import the Octo checkpoint in `source` as the run directory `target`.

    Args:
        source: the directory that Octo's save_pretrained wrote.
        target: a directory that does not exist or is empty.
        text_encoder: directory or hub id of the tokenizer (and of the encoder's weights, if the
            checkpoint has none), default: the name that the checkpoint states; or, for a checkpoint
            of embedded instructions, the table of octo_text.read_table.
        step: the checkpoint's step; default: the newest.

    Raises:
        ConfigError: a setting that octolike cannot represent.
        FileNotFoundError, ValueError: a file is missing or corrupted, or a parameter is missing,
            unknown or of another shape.
    """
    target = files.output_directory(target, "--target")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; name a new directory, or empty this one")
    source = Path(source)
    stored = read(source, step)
    translation = octo_config.translate(stored.config, stored.batch)
    config = translation.config
    config.workdir = str(target)
    config.train.steps = max(config.train.steps, stored.step)
    records, notes = embodiments(stored, translation)
    names = types.Names(tuple(e.name for e in records), tuple(e.name for e in records))
    spec = types.batch_spec(to_batch(stored.batch, translation))
    params = octo_text.split_text_encoders(stored.params)
    try:
        words = stored.batch["task"].get(WORDS)
        encoders = octo_text.import_text(config, params, words, source, target, text_encoder)
        converted = convert(params.others, shapes_of(config, spec, names), encoders)
        checkpoint.write_run_files(config, records, spec, names)
        _save(target, converted, stored.step)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)  # a partial run would look complete
        raise
    return ImportedRun(checkpoint.load_run(target), translation, translation.notes + notes)


def shapes_of(config: Config, spec: types.BatchSpec, names: types.Names) -> state.Params:
    """Return the shapes of the model's parameters."""
    settings = dataclasses.asdict(config.model)
    spec = language.extend_spec(settings, spec)
    model = build_network(settings, spec, names)
    return jax.eval_shape(lambda key: state.init_params(model, spec, key), jax.random.key(0))


# The files


def read(source: str | Path, step: int | None = None) -> OctoCheckpoint:
    """Read an Octo checkpoint directory.

    Raises:
        FileNotFoundError, ValueError: a file is missing or corrupted.
    """
    source = Path(source)
    steps = sorted(int(p.name) for p in source.glob("*") if p.name.isdigit())
    if not source.is_dir() or not steps:
        raise FileNotFoundError(
            f"{source} holds no Octo checkpoint (config.json, dataset_statistics.json, "
            "example_batch.msgpack and a folder <step>/default)"
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{source} has no step {step}; it has {steps}")
    step = steps[-1] if step is None else step
    batch = flax.serialization.msgpack_restore(_file(source, "example_batch.msgpack").read_bytes())
    return OctoCheckpoint(
        config=octo_config.modernize(_json(_file(source, "config.json"))),
        batch=octo_config.modernize(batch),
        statistics=_json(_file(source, "dataset_statistics.json")),
        params=_read_params(source / str(step) / "default"),
        step=step,
    )


def _file(source: Path, name: str) -> Path:
    if not (source / name).is_file():
        names = ", ".join(sorted(p.name for p in source.iterdir()))
        raise FileNotFoundError(f"{source} has no {name}; it holds {names}")
    return source / name


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _read_params(folder: Path) -> dict[str, np.ndarray]:
    """Return {slash path: array}, from flax's single file or from the orbax folder."""
    file, tree = folder / "checkpoint", {}
    if file.is_file():
        tree = flax.serialization.msgpack_restore(file.read_bytes())
    leaves = flax.traverse_util.flatten_dict(tree, sep="/")
    # If orbax stores large arrays separately, the file has text placeholders for them.
    if not leaves or any(not isinstance(x, np.ndarray) for x in leaves.values()):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing; it should hold the parameters")
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        tree = checkpointer.restore(folder.absolute(), args=ocp.args.PyTreeRestore())
        leaves = flax.traverse_util.flatten_dict(tree, sep="/")
    return {path: np.asarray(x) for path, x in leaves.items()}


def _save(target: Path, params: state.Params, step: int) -> None:
    """Save a checkpoint like training does; the optimiser state is that of plain SGD: empty."""
    start = state.create(jax.tree.map(jnp.asarray, params), optax.sgd(0.0), (), ema=False)
    checkpoints = checkpoint_store.CheckpointStore(target, keep=1)
    checkpoints.save(dataclasses.replace(start, step=jnp.int32(step)), {})
    checkpoints.close()


# Parameters


def convert(
    source: Mapping[str, np.ndarray],
    shapes: state.Params,
    encoders: Mapping[str, state.Params] | None = None,
) -> state.Params:
    """Return Octo's parameters as float32 parameters of a model with the given shapes.

    source: {Octo's slash path: array}; see `fit`. encoders: {tokenizer: parameters of its text
    encoder}, already converted.
    """
    encoder_params = {
        f"tokenizers_{name}": {"encoder": params} for name, params in (encoders or {}).items()
    }
    leaves = flax.traverse_util.flatten_dict(encoder_params, sep="/")
    flat_shapes = flax.traverse_util.flatten_dict(shapes, sep="/")
    missing = {path: shape for path, shape in flat_shapes.items() if path not in leaves}
    origin = fit(source, flax.traverse_util.unflatten_dict(missing, sep="/"))
    leaves |= {target: np.asarray(source[path], np.float32) for target, path in origin.items()}
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def fit(source: Mapping[str, Any], shapes: state.Params) -> dict[str, str]:
    """Return {octolike's slash path: Octo's}. Both sides may be abstract: only shapes are read.

    Raises:
        ValueError: lists all unknown parameters of Octo, all missing ones, and all shapes that
            differ.
    """
    targets = flax.traverse_util.flatten_dict(shapes, sep="/")
    origin: dict[str, str] = {}
    faults = []
    for path, leaf in source.items():
        target = target_path(path)
        if target is None or target not in targets:
            faults.append(f"no place for {path} {list(leaf.shape)}")
            continue
        if target in origin:
            faults.append(f"{path} and {origin[target]} would both fill {target}")
        elif leaf.shape != targets[target].shape:
            shape = list(targets[target].shape)
            faults.append(f"{path} is {list(leaf.shape)}, expected {shape} (of {target})")
        origin[target] = path
    for target in targets.keys() - origin.keys():
        hints = " or ".join(source_paths(target)) or "a parameter that Octo does not have"
        faults.append(f"nothing fills {target} {list(targets[target].shape)}: {hints} is missing")
    if faults:
        raise ValueError(
            f"the checkpoint's parameters do not fit its config.json ({len(faults)} faults):\n  "
            + "\n  ".join(sorted(faults))
        )
    return origin


def target_path(path: str) -> str | None:
    """Return octolike's path of an Octo parameter; None if no row of `PATHS` matches."""
    return next(_rewrite(path, PATHS), None)


def source_paths(path: str) -> list[str]:
    """Return the possible Octo paths of a parameter; * stands for an unknown part."""
    return list(_rewrite(path, [(ours, theirs) for theirs, ours in PATHS]))


def _rewrite(path: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for old, new in rows:
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", old) + r"(?P<rest>/.*|)"
        if match := re.fullmatch(pattern, path):
            parts = match.groupdict()
            leaf_path = parts.pop("rest")
            yield _fill(new, parts) + leaf_path


def _fill(template: str, parts: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda m: parts.get(m[1], "*"), template)


# Embodiments


def embodiments(
    stored: OctoCheckpoint, translation: ConfigTranslation
) -> tuple[list[Embodiment], tuple[str, ...]]:
    """Return one record per dataset in the statistics, and notes.

    Octo stores no names, units or rates: dimensions get numbers, and the others stay unknown.
    """
    entries = stored.statistics
    if "action" in entries:  # of a single dataset, without its name
        entries = {"octo": entries}
    widths = {"action": translation.action_dim}
    if translation.proprio:
        observation = stored.batch["observation"]
        widths["proprio"] = sum(observation[k].shape[-1] for k in translation.proprio)
    records: list[Embodiment] = []
    notes: list[str] = []
    for name, entry in entries.items():
        parts = {
            part: _layout_and_statistics(
                name, part, entry, width, translation.config.data.normalization, notes
            )
            for part, width in widths.items()
        }
        action, action_statistics = parts["action"]
        proprio, proprio_statistics = parts.get("proprio", (None, None))
        records.append(
            Embodiment(
                name=name,
                robot=name,
                control_hz=0.0,
                gripper="as in the dataset",
                action=action,
                proprio=proprio,
                normalization=translation.config.data.normalization,
                datasets=(name,),
                action_statistics=action_statistics,
                proprio_statistics=proprio_statistics,
            )
        )
    return records, tuple(notes)


def _layout_and_statistics(
    name: str,
    part: str,
    entry: Mapping[str, Any],
    width: int,
    normalization: str,
    notes: list[str],
) -> tuple[Layout, Statistics]:
    """Return layout and statistics of a dataset's action or proprio."""
    stored = entry.get(part)
    field = f"dataset_statistics.json: {name}.{part}"
    if stored is None and part == "action":
        raise ValueError(f"{field} is missing; without it, actions cannot be un-normalised")
    if stored is None:
        notes.append(
            f"{field} is missing: the policy expects {part} as the network gets it, normalised"
        )
        stored = {k: [0] * width for k in STATISTICS} | {"mask": [False] * width}
    values = {k: np.asarray(stored[k], np.float32) for k in STATISTICS if k in stored}
    required = {"mean", "std"} | ({"p01", "p99"} if normalization == "bounds" else set())
    missing = required - values.keys()
    if missing:
        raise ValueError(f"{field} lacks {', '.join(sorted(missing))}")
    for key, value in values.items():
        if value.shape != values["mean"].shape or value.ndim != 1 or len(value) > width:
            raise ValueError(f"{field}.{key} has shape {value.shape}, expected ({width},)")
    is_normalized = np.asarray(stored.get("mask", np.ones(len(values["mean"]))), bool)
    tiny = np.flatnonzero(is_normalized & (values["std"] < MIN_SPREAD)).tolist()
    if tiny:
        notes.append(
            f"{field}.std of dimensions {tiny} is below {MIN_SPREAD}; {MIN_SPREAD} is used"
        )
    for key, substitutes in _SUBSTITUTES.items():
        if key not in values:
            values[key] = next(values[k] for k in substitutes if k in values)
    n = len(values["mean"])
    layout = Layout(
        names=tuple(f"{part}_{i}" for i in range(n)),
        units=("",) * n,
        absolute=tuple((~is_normalized).tolist()),  # Octo leaves gripper positions as they are
        normalized=tuple(is_normalized.tolist()),
    )
    steps, episodes = entry.get("num_transitions", 0), entry.get("num_trajectories", 0)
    return layout, Statistics(**values, steps=int(steps), episodes=int(episodes))


# The batch


def to_batch(octo_batch: Mapping[str, Any], translation: ConfigTranslation) -> types.Batch:
    """Return an Octo batch in the batch contract (octolike.types), with the keys the model reads.

    If its actions are not chunked like the config's (Octo's first releases chunk inside the head),
    they are masked.
    """
    config, octo_task = translation.config, octo_batch["task"]
    sensors = octo_batch["observation"]
    steps = np.asarray(sensors["timestep_pad_mask"], bool)
    size, window = steps.shape
    observation: dict[str, Any] = {"timestep_mask": steps, "present": {}}
    task: dict[str, Any] = {
        "task_id": np.zeros(size, np.int32),
        "present": {"task_id": np.zeros(size, bool)},
    }
    for camera in config.data.cameras:
        key = f"image_{camera}"
        observation[key] = np.asarray(sensors[key], np.uint8)
        observation["present"][key] = _present(sensors, key, (size, window))
        if config.data.goal != "none":
            blank = np.zeros_like(observation[key][:, 0])
            task[key] = np.asarray(octo_task.get(key, blank), np.uint8)
            task["present"][key] = _present(octo_task, key, (size,)) & (key in octo_task)
    if translation.proprio:
        parts = [np.asarray(sensors[key], np.float32) for key in translation.proprio]
        observation["proprio"] = np.concatenate(parts, axis=-1)
        # Octo attends to low-dimensional tokens regardless of the flags.
        observation["present"]["proprio"] = np.ones((size, window), bool)
    if WORDS in octo_task:
        task["language"] = octo_text.ids_of(octo_task[WORDS])
        task["present"]["language"] = _present(octo_task, WORDS, (size,))
    shape = (size, window, config.data.horizon, translation.action_dim)
    action, mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
    if np.shape(octo_batch["action"]) == shape:
        action = np.asarray(octo_batch["action"], np.float32)
        mask = np.asarray(octo_batch.get("action_pad_mask", np.ones(shape)), bool)
    return {
        "observation": observation,
        "task": task,
        "action": action,
        "action_mask": mask,
        "dataset": np.zeros(size, np.int32),
        "embodiment": np.zeros(size, np.int32),
    }


def _present(part: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(part.get("pad_mask_dict", {}).get(key, np.ones(shape)), bool)
