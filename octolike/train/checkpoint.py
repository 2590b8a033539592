"""The files of a run on disk: written before the first step, and loaded again.

    workdir/
      config.json        the whole config, with every field of its components
      plugins/           a copy of each plug-in
      embodiments.json   each robot's action and proprio layout, with statistics
      batch_spec.json    shape and dtype of everything in a batch
      names.json         datasets, embodiments and tasks, in the order of their index in a batch
      costs.json         parameters, floating-point operations per step, seconds to compile it
      versions.json      of Python and the libraries
      tokenizer/         of the instructions, if it is pretrained
      text_encoder/      config.json of a pretrained one, and its weights if it stays frozen
      scores.json        validation scores at each checkpoint (octolike.train.retention)
      checkpoints/       octolike.train.checkpoint_store
      manifest.json      sha256 of the files above that do not change (octolike.train.run_manifest)

All but the scores and checkpoints are written before the first step, so a run can be loaded from
its directory alone.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from octolike import files, types
from octolike.config import (
    Component,
    Config,
    ConfigError,
    build_component,
    from_json,
    plugins,
    resolve,
    stored_config,
    to_json,
)
from octolike.config.open_sets import complete
from octolike.config.paths import aligned, portable, resolved
from octolike.config.upgrade import FORMAT, format_of
from octolike.embodiment import Embodiment, embodiments_from_json, embodiments_to_json
from octolike.errors import RunError
from octolike.files import Path, PathLike
from octolike.model import language
from octolike.text import TOKENIZERS
from octolike.train import lora, run_manifest
from octolike.train.checkpoint_store import (
    CHECKPOINTS,
    cause_of,
    checkpoint_steps,
    read_policy_params,
)
from octolike.train.state import Params

_Value = TypeVar("_Value")
FILES = {
    "config.json": "the run's config",
    "embodiments.json": "the robots' action and proprio layouts with their statistics",
    "batch_spec.json": "shape and dtype of everything in a batch",
    "names.json": "the names of the datasets, embodiments and tasks",
}
TOKENIZER, TEXT_ENCODER = "tokenizer", "text_encoder"
COSTS = "costs.json"
# Conventions of an embodiment record, compared when a run starts from another one.
RECORD_FIELDS = (
    *("robot", "control_hz", "gripper", "normalization"),
    *("representation", "proprio_representation"),
)
LAYOUT_FIELDS = ("names", "units", "absolute", "normalized", "normalization")
MOST_LEVELS = 40  # of nested JSON
LIBRARIES = ("octolike", "jax", "flax", "optax", "orbax-checkpoint", "numpy")

# Settings that may change when a run is resumed; a change of any other makes it another run.
MAY_CHANGE = (
    "workdir",
    "data.root",  # and data.roots: the statistics show whether it is the same data
    "data.cache",
    "data.threads",
    "data.prefetch",
    "train.steps",
    "train.log_every",
    "train.validate_every",
    "train.checkpoint_every",
    "train.conflicts_every",
    "train.keep",  # also keep_every, keep_best
    "train.wandb",
    "train.fsdp",
    "train.distributed",
    "train.compilation_cache",
    "model.remat",
    "evaluate.",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run.

    Attributes:
        config: with paths to the run's own tokenizer and text encoder (`with_own_files`).
        embodiments: records in the order of a batch's `embodiment`.
        spec: the batch spec.
        names: names of datasets, embodiments and tasks.
        params: numpy arrays; averaged if the run averages.
        step: the checkpoint's step.
    """

    config: Config
    embodiments: list[Embodiment]
    spec: types.BatchSpec
    names: types.Names
    params: Params
    step: int


def write_run_files(
    config: Config,
    embodiments: Sequence[Embodiment],
    spec: types.BatchSpec,
    names: types.Names,
) -> None:
    """Write the JSON files of a run, its plug-ins, and its files of a pretrained text encoder.

    Each file is complete or absent. An existing text encoder or tokenizer is kept; so is a
    config.json of an older format, as config.format_<n>.json.
    """
    config = resolve(config)
    directory, source = files.as_path(config.workdir), readable(config)
    directory.mkdir(parents=True, exist_ok=True)
    _keep_old_config(directory)
    for path in map(files.as_path, config.plugins):
        copy_path = directory / plugins.FOLDER / path.name
        if not copy_path.exists():
            copy_path.parent.mkdir(exist_ok=True)
            files.write_bytes(copy_path, path.read_bytes())
    if config.data.text.get("path") and not (directory / TOKENIZER).is_dir():
        build_component(TOKENIZERS, source.data.text, "data.text").save(directory / TOKENIZER)
    if not (directory / TEXT_ENCODER).is_dir():
        language.write(dataclasses.asdict(source.model), directory / TEXT_ENCODER)
    run_manifest.write_with(
        directory, _contents(config, embodiments, spec, names), config.data.specs
    )


def with_own_files(config: Config, directory: PathLike) -> Config:
    """Return a config with paths to the tokenizer and text encoder in a run's directory.

    Paths to files that the directory does not have stay as they are.
    """
    run, local_config = files.as_path(directory), copy.deepcopy(config)
    if local_config.data.text.get("path") and (run / TOKENIZER).is_dir():
        local_config.data.text = Component({**local_config.data.text, "path": str(run / TOKENIZER)})
    if (run / TEXT_ENCODER).is_dir():
        tokenizers = {"tokenizers": local_config.model.tokenizers}
        local = language.with_paths(tokenizers, str(run / TEXT_ENCODER))
        local_config.model.tokenizers = local["tokenizers"]
    return local_config


def readable(config: Config) -> Config:
    """Return a config with paths to text files that exist, for a run that starts or resumes.

    In order of preference: the files of the run itself (`with_own_files`); those of
    train.init_from, if its text settings are the same; those that the config names.
    """

    def text(c: Config) -> tuple[Any, ...]:
        tokenizer = complete("octolike.text:TOKENIZERS", c.data.text, "data.text")
        return tokenizer, language.source(dataclasses.asdict(c.model))

    first = files.as_path(config.train.init_from)
    started = config.train.init_from and (first / "config.json").is_file()
    source = stored_config(config.train.init_from) if started else None
    if source and text(aligned(source, config)) == text(config):
        config = with_own_files(config, first)
    return with_own_files(config, config.workdir)


def check_same_run(
    config: Config,
    embodiments: Sequence[Embodiment],
    spec: types.BatchSpec,
    names: types.Names,
) -> bool:
    """Return whether `config.workdir` holds this run already.

    Settings in `MAY_CHANGE` are not compared. The files of a start that ended before its
    first metrics and checkpoint do not count as a run: they may differ, and are replaced.

    Raises:
        ConfigError: the directory holds another run: a config, embodiment, batch spec or name
            differs (the error lists the dotted paths with both values), or there are checkpoints
            without a config.
    """
    directory, config = files.as_path(config.workdir), resolve(config)
    if not (directory / "config.json").exists():
        if steps := checkpoint_steps(directory / CHECKPOINTS):
            raise ConfigError(
                f"{directory / CHECKPOINTS} holds {steps}, but {directory} has no config.json, so "
                "their run is unknown. Put that file back to resume that run, name another "
                "directory (--config.workdir=...) for a new one, or move the old directory away."
            )
        return False
    run_manifest.check(directory, run_manifest.KEPT)
    for name, text in _contents(config, embodiments, spec, names).items():
        if name == "versions.json" or not (directory / name).exists():
            continue
        stored = _read_json(directory / name)
        if name == "config.json":
            plugins.check_unchanged(directory, config.plugins)
            old = resolved(from_json(json.dumps(stored), str(directory / name)), directory)
            changes = differences(aligned(old, config), config)
            changes = [c for c in changes if not c.startswith(MAY_CHANGE)]
            if run_manifest.same_specs(directory, config.data.specs):
                changes = [c for c in changes if not c.startswith("data.specs")]
        elif name == "embodiments.json":
            changes = _differences(_verified(stored), _verified(json.loads(text)))
        else:
            changes = _differences(stored, json.loads(text))
        if changes and not has_begun(directory):
            return False
        if changes:
            raise ConfigError(
                f"{directory} holds another run; its {name} differs (stored -> now):\n  "
                + "\n  ".join(changes)
                + "\nUndo the change to resume that run, name another directory "
                + "(--config.workdir=...) for a new one, or move the old directory away."
            )
    return True


def has_begun(directory: Path) -> bool:
    """Return whether the run of a directory has trained: it has metrics or a checkpoint."""
    log = directory / "metrics.jsonl"  # created, empty, before the first step
    if log.exists() and log.read_bytes():
        return True
    return bool(checkpoint_steps(directory / CHECKPOINTS))


def differences(old: Config, new: Config) -> list[str]:
    """Return 'path: old -> new' for every setting that differs between two configs."""
    # Plug-ins are compared by name: the files may be missing for one of the configs.
    names = [sorted(files.as_path(path).name for path in c.plugins) for c in (old, new)]
    old, new = (dataclasses.replace(c, plugins=()) for c in (old, new))
    changes = _differences(json.loads(to_json(old)), json.loads(to_json(new)))
    if names[0] != names[1]:
        changes.append(f"plugins: {json.dumps(names[0])} -> {json.dumps(names[1])}")
    return changes


def record_differences(old: Embodiment, new: Embodiment) -> list[str]:
    """Return 'path: old -> new' for conventions that differ between two embodiment records.

    Fields that the new record's specs only infer are marked. Statistics are not compared.
    """
    changes = []
    for part in ("", "action", "proprio"):
        a, b = (getattr(e, part) if part else e for e in (old, new))
        names = LAYOUT_FIELDS if part else RECORD_FIELDS
        for name in names if a is not None and b is not None else ():
            values = getattr(a, name), getattr(b, name)
            path = f"{part}.{name}" if part else name
            if values[0] != values[1]:
                mark = " (inferred, not verified)" if path in new.inferred else ""
                old_and_new = " -> ".join(json.dumps(x) for x in values)
                changes.append(f"{path}: {old_and_new}{mark}")
        if (a is None) != (b is None):
            changes.append(
                f"{part}: {'absent' if a is None else 'present'} -> "
                f"{'absent' if b is None else 'present'}"
            )
    return changes


def load_run(run_dir: PathLike, step: int | None = None, plugin_files: Sequence[str] = ()) -> Run:
    """Load a run for inference: its JSON files and the parameters of a checkpoint.

    Args:
        run_dir: the run directory.
        step: the checkpoint's step; default: the newest.
        plugin_files: plug-ins of the run that may be executed.

    Raises:
        FileNotFoundError: a missing file or checkpoint; the message lists the existing ones.
        RunError: a file or checkpoint that is corrupted or differs from its manifest.
        ConfigError: a config of another version, or plug-ins that are not allowed.
    """
    directory = files.as_path(run_dir)
    if not directory.is_dir():
        raise FileNotFoundError(f"no run directory {directory}; {_listing(directory.parent)}")
    for name, purpose in FILES.items():
        if not files.is_regular(directory / name):
            raise FileNotFoundError(
                f"{directory} has no {name} ({purpose}; written by octolike train before the "
                f"first step): {_listing(directory)}"
            )
    run_manifest.check(directory)
    texts = {name: _read_json(directory / name) for name in FILES}
    copies = plugins.allow(directory, plugin_files)
    config = from_json(json.dumps(texts["config.json"]), str(directory / "config.json"))
    config = dataclasses.replace(resolved(config, directory), plugins=copies)
    config.data.specs = plugins.approved(config.data.specs, plugin_files)
    step, params = load_params(directory, step)
    embodiments = _parsed(directory, "embodiments.json", embodiments_from_json, texts)
    names = _parsed(directory, "names.json", types.names_from_json, texts)
    if (records := tuple(e.name for e in embodiments)) != names.embodiments:
        raise RunError(
            f"{directory}: embodiments.json has the robots {records}, but names.json "
            f"{names.embodiments}; restore the files that training wrote"
        )
    spec = _parsed(directory, "batch_spec.json", types.spec_from_json, texts)
    widest, width = max((len(e.learned) for e in embodiments), default=0), spec["action"][0][-1]
    if widest > width:
        raise RunError(
            f"{directory}: a robot of embodiments.json has {widest} action dimensions, but "
            f"batch_spec.json {width}; restore the files that training wrote"
        )
    return Run(
        config=with_own_files(config, directory),
        embodiments=embodiments,
        spec=spec,
        names=names,
        params=lora.merge(params, config.optim.lora_scale),
        step=step,
    )


def _parsed(
    directory: Path, name: str, parse: Callable[[Any], _Value], texts: Mapping[str, Any]
) -> _Value:
    """Return the parsed content of a JSON file of a run; RunError names the file."""
    try:
        return parse(texts[name])
    except ValueError as error:
        raise RunError(
            f"{directory / name} is malformed: {error}. Restore the file that training wrote"
        ) from error


def load_params(run_dir: PathLike, step: int | None = None) -> tuple[int, Params]:
    """Return (step, parameters of the policy) of a checkpoint, its files checked before.

    The one way to parameters for inference: `load_run`, and a server that follows a run. LoRA's
    updates are not merged. step: default: the newest.

    Raises:
        FileNotFoundError: the checkpoint does not exist; the message lists the existing ones.
        RunError: the checkpoint is corrupted or differs from its manifest.
    """
    directory = files.as_path(run_dir)
    folder = directory / CHECKPOINTS
    steps = checkpoint_steps(folder)
    if not steps:
        raise FileNotFoundError(
            f"{directory} has no checkpoint (a folder {CHECKPOINTS}/<step>): {_listing(directory)}"
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{folder} has no checkpoint {step}; it has {steps}")
    step = steps[-1] if step is None else step
    try:
        params = read_policy_params(folder, step)
    except Exception as error:  # orbax passes on ValueError, KeyError, …
        remaining = [s for s in steps if s != step]
        remedy = f"; load another checkpoint with step=, one of {remaining}" if remaining else ""
        raise RunError(
            f"checkpoint {step} of {directory} cannot be read ({cause_of(error)}){remedy}"
        ) from error
    return step, params


def _keep_old_config(directory: Path) -> None:
    """Copy a config.json of an older format before it is replaced."""
    path = directory / "config.json"
    if path.exists():
        text = path.read_text(encoding="utf-8")
        number = format_of(json.loads(text), str(path))
        old = directory / f"config.format_{number}.json"
        if number != FORMAT and not old.exists():
            files.write_text(old, text)


def _contents(
    config: Config,
    embodiments: Sequence[Embodiment],
    spec: types.BatchSpec,
    names: types.Names,
) -> dict[str, str]:
    versions = {name: _version(name) for name in LIBRARIES}
    return {
        "config.json": to_json(portable(config)),
        "embodiments.json": _dump(embodiments_to_json(embodiments)),
        "batch_spec.json": _dump(types.spec_to_json(spec)),
        "names.json": _dump({k: list(v) for k, v in names._asdict().items()}),
        "versions.json": _dump({"python": platform.python_version(), **versions}),
    }


def _differences(old: Any, new: Any) -> list[str]:
    """Return 'path: old -> new' for every leaf that differs between two JSON values."""
    trees = [_nested(x) for x in (old, new)]  # a damaged file may hold no object
    old, new = (dict(types.flatten(x if isinstance(x, dict) else {"content": x})) for x in trees)
    show = lambda values, path: json.dumps(values[path]) if path in values else "absent"
    return [
        f"{path}: {show(old, path)} -> {show(new, path)}"
        for path in sorted(old.keys() | new.keys())
        if path not in old or path not in new or old[path] != new[path]
    ]


def _nested(x: Any) -> Any:
    """Return JSON data with lists of objects as dicts, so that each element has a path."""
    if isinstance(x, list) and not all(isinstance(y, (int, float)) for y in x):
        x = {str(i): y for i, y in enumerate(x)}
    return {k: _nested(v) for k, v in x.items()} if isinstance(x, dict) else x


def _verified(records: Any) -> Any:
    """Return embodiments.json without the marks of inferred, unverified fields."""
    if not (isinstance(records, list) and all(isinstance(record, dict) for record in records)):
        return records  # of a damaged file
    return [{k: v for k, v in record.items() if k != "inferred"} for record in records]


def read_names(run_dir: PathLike) -> types.Names:
    """Return the names of a run; RunError, in one line, if names.json is malformed."""
    directory, name = files.as_path(run_dir), "names.json"
    return _parsed(directory, name, types.names_from_json, {name: _read_json(directory / name)})


def _read_json(path: Path) -> Any:
    try:
        data = json.loads(files.read_text(path))
    except RunError:
        raise
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON: {error}") from error
    level = [data]
    for _ in range(MOST_LEVELS):
        nodes = [
            x.values() if isinstance(x, dict) else x for x in level if isinstance(x, (dict, list))
        ]
        level = [child for node in nodes for child in node]
    if level:
        raise RunError(f"{path} is nested too deeply; restore the file that training wrote")
    return data


def _dump(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"


def _listing(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} does not exist"
    return (
        f"{directory} holds {', '.join(sorted(p.name for p in directory.iterdir())) or 'nothing'}"
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
