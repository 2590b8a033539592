"""What a run leaves on disk, and how it is read back.

    workdir/
      config.json        the whole config, with every field of its components
      plugins/           a copy of each plug-in
      embodiments.json   each robot's action and proprio layout, with statistics
      batch_spec.json    shape and dtype of everything in a batch
      names.json         datasets, embodiments and tasks, in the order of their index in a batch
      costs.json         parameters, floating-point operations per step, seconds to compile it
      versions.json      of Python and the libraries
      tokenizer/         of the instructions, where it is a pretrained one
      text_encoder/      config.json of a pretrained one, and its weights if it stays frozen
      scores.json        what validation found at each checkpoint (octolike.train.retention)
      checkpoints/<step>/{params, ema, optimizer, data}

All but the last two is written before the first step, so that a run is loaded from its directory
alone. Checkpoints are written in the background; one has its name <step> only once it is whole.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import itertools
import json
import logging
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

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
from octolike.train import lora, optimizer, sharding
from octolike.train.retention import Keep
from octolike.train.state import Params, TrainState, merge_strictly

FILES = {
    "config.json": "the run's config",
    "embodiments.json": "the robots' action and proprio layouts with their statistics",
    "batch_spec.json": "shape and dtype of everything in a batch",
    "names.json": "the names of the datasets, embodiments and tasks",
}
CHECKPOINTS = "checkpoints"
TOKENIZER, TEXT_ENCODER = "tokenizer", "text_encoder"
COSTS = "costs.json"
LIBRARIES = ("octolike", "jax", "flax", "optax", "orbax-checkpoint", "numpy")

# What a second run in the same directory may change; all else would make it another run.
MAY_CHANGE = (
    "workdir",
    "data.root",  # and data.roots: the statistics show whether it is the same data
    "data.cache",
    "data.service",
    "train.steps",
    "train.log_every",
    "train.validate_every",
    "train.checkpoint_every",
    "train.conflicts_every",
    "train.keep",  # and all that begins so
    "train.wandb",
    "train.fsdp",
    "train.distributed",
    "train.compilation_cache",
    "model.remat",
    "evaluate.",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run. params: numpy arrays, the averaged ones where they are kept.

    config: with the run's own tokenizer and text encoder (`with_own_files`).
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
    for name, text in _contents(config, embodiments, spec, names).items():
        files.write_text(directory / name, text)


def with_own_files(config: Config, directory: PathLike) -> Config:
    """Return a config that reads the tokenizer and text encoder kept in a run's directory.

    What is not there (yet) is read from where the config says.
    """
    directory, own = files.as_path(directory), copy.deepcopy(config)
    if own.data.text.get("path") and (directory / TOKENIZER).is_dir():
        own.data.text = Component({**own.data.text, "path": str(directory / TOKENIZER)})
    if (directory / TEXT_ENCODER).is_dir():
        tokenizers = {"tokenizers": own.model.tokenizers}
        moved = language.with_paths(tokenizers, str(directory / TEXT_ENCODER))
        own.model.tokenizers = moved["tokenizers"]
    return own


def readable(config: Config) -> Config:
    """Return the config of a run that starts or goes on, with text files that are there.

    Of the run itself (`with_own_files`); before it has any, of the run it starts from, where that
    one means the same by them; else where the config says.
    """

    def text(c: Config) -> tuple[Any, ...]:
        tokenizer = complete("octolike.text:TOKENIZERS", c.data.text, "data.text")
        return tokenizer, language.source(dataclasses.asdict(c.model))

    first = files.as_path(config.train.init_from)
    started = config.train.init_from and (first / "config.json").is_file()
    other = stored_config(config.train.init_from) if started else None
    if other and text(aligned(other, config)) == text(config):
        config = with_own_files(config, first)
    return with_own_files(config, config.workdir)


def check_same_run(
    config: Config,
    embodiments: Sequence[Embodiment],
    spec: types.BatchSpec,
    names: types.Names,
) -> bool:
    """Return whether `config.workdir` holds this run already.

    Raises ConfigError if it holds another one: a config, embodiment, batch spec or name that
    differs, or checkpoints and no config. The error lists the dotted paths with both values. What
    `MAY_CHANGE` names does not count.
    """
    directory, config = files.as_path(config.workdir), resolve(config)
    if not (directory / "config.json").exists():
        if steps := _steps(directory / CHECKPOINTS):
            raise ConfigError(
                f"{directory / CHECKPOINTS} holds {steps}, but {directory} has no config.json to "
                "say of which run. Put that file back to resume that run, name another directory "
                "(--config.workdir=...) for a new one, or move the old directory away."
            )
        return False
    for name, text in _contents(config, embodiments, spec, names).items():
        if name == "versions.json" or not (directory / name).exists():
            continue
        stored = _read_json(directory / name)
        if name == "config.json":
            plugins.check_unchanged(directory, config.plugins)
            old = resolved(from_json(json.dumps(stored), str(directory / name)), directory)
            changes = differences(aligned(old, config), config)
            changes = [c for c in changes if not c.startswith(MAY_CHANGE)]
        else:
            changes = _differences(stored, json.loads(text))
        if changes:
            raise ConfigError(
                f"{directory} holds another run; its {name} differs (stored -> now):\n  "
                + "\n  ".join(changes)
                + "\nTake the change back to resume that run, name another directory "
                + "(--config.workdir=...) for a new one, or move the old directory away."
            )
    return True


def differences(old: Config, new: Config) -> list[str]:
    """Return 'path: old -> new' for every setting of two configs that is not the same."""
    # of plug-ins the names are compared: one of the configs may lack the files
    names = [sorted(files.as_path(path).name for path in c.plugins) for c in (old, new)]
    old, new = (dataclasses.replace(c, plugins=()) for c in (old, new))
    changes = _differences(json.loads(to_json(old)), json.loads(to_json(new)))
    if names[0] != names[1]:
        changes.append(f"plugins: {json.dumps(names[0])} -> {json.dumps(names[1])}")
    return changes


def load_run(run_dir: PathLike, step: int | None = None, plugin_files: Sequence[str] = ()) -> Run:
    """Load a run for acting: its JSON files and the parameters of a checkpoint (the newest).

    Raises FileNotFoundError or ValueError that names what is missing or broken, and what is there.
    """
    directory = files.as_path(run_dir)
    if not directory.is_dir():
        raise FileNotFoundError(f"no run directory {directory}; {_listing(directory.parent)}")
    texts = {}
    for name, purpose in FILES.items():
        path = directory / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} has no {name} ({purpose}; written by scripts/train.py before the "
                f"first step): {_listing(directory)}"
            )
        texts[name] = _read_json(path)
    copies = plugins.allow(directory, plugin_files)
    config = from_json(json.dumps(texts["config.json"]), str(directory / "config.json"))
    config = dataclasses.replace(resolved(config, directory), plugins=copies)
    step, params = _read_policy_params(directory, step)
    return Run(
        config=with_own_files(config, directory),
        embodiments=embodiments_from_json(texts["embodiments.json"]),
        spec=types.spec_from_json(texts["batch_spec.json"]),
        names=types.Names(**{k: tuple(v) for k, v in texts["names.json"].items()}),
        params=lora.merged(params, config.optim.lora_scale),
        step=step,
    )


class SaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpoints:
    """The checkpoints of one run, written in the background: complete ones under <step>.

    A context manager: leaving it waits for what is still being written.
    """

    def __init__(
        self, workdir: PathLike, keep: int, keep_every: int = 0, keep_best: str = ""
    ) -> None:
        """Open or make workdir/checkpoints and remove what an interrupted save left there.

        The `keep` newest stay, those at multiples of `keep_every` steps, and the one that was best
        by the score `keep_best`.
        """
        self.directory = files.absolute(workdir) / CHECKPOINTS
        self._keep = Keep(self.directory.parent, keep, keep_every, keep_best)
        self._saving: tuple[int, int] | None = None  # step and bytes
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        with _quiet():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        try:  # what went wrong first is the news
            self.close()
        except SaveError as second:
            error.add_note(str(second))

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, which may be still on its way."""
        return self._manager.latest_step()

    def complete(self) -> list[int]:
        """Return the steps of the checkpoints that are whole on disk, once none is on its way."""
        with _quiet(), contextlib.suppress(Exception):  # `wait` is where it is told
            self._manager.wait_until_finished()
        return _steps(self.directory)

    def save(
        self,
        state: TrainState,
        data: Mapping[str, Any],
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Start to save the state and the position in the data, unless this step is saved already.

        The state may be donated as soon as this returns. scores: by which checkpoints are compared;
        lower is better. Raises SaveError for this save or for the one before.
        """
        step = int(state.step)
        if step == self.latest:
            return
        self.wait()
        items = {
            "params": ocp.args.StandardSave(state.all_params()),
            "optimizer": ocp.args.StandardSave(state.opt_state),
            "data": ocp.args.JsonSave(dict(data)),
        }
        if state.ema:
            items["ema"] = ocp.args.StandardSave(state.ema)
        size = sum(x.nbytes for x in jax.tree.leaves((state.all_params(), state.opt_state)))
        size += sum(x.nbytes for x in jax.tree.leaves(state.ema))
        self._saving = step, size
        try:
            if scores:
                self._keep.note(step, scores, write=sharding.is_first())
            with _quiet():
                begun = self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax raises what its storage raises
            self._saving = None
            raise self._failed(step, size, error) from error
        if not begun:  # orbax refuses a step before its newest
            self._saving = None
            raise SaveError(
                f"checkpoint {step} was not written: {self.directory} holds {self.complete()} "
                "already, and the later ones are another run's. Name another directory "
                "(--config.workdir=...), or move that one away"
            )

    def check(self) -> None:
        """Raise SaveError if the save under way has failed; do not wait for it."""
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way; raise SaveError if it failed."""
        if self._saving is None:
            return
        (step, size), self._saving = self._saving, None
        try:
            with _quiet():
                self._manager.wait_until_finished()
        except Exception as error:  # orbax raises what its storage raises
            raise self._failed(step, size, error) from error

    def close(self) -> None:
        """Wait for what is still being written; SaveError if that fails."""
        try:
            self.wait()
        finally:
            with _quiet(), contextlib.suppress(Exception):  # told by `wait`
                self._manager.close()

    def _failed(self, step: int, size: int, error: Exception) -> SaveError:
        free = ""
        if not files.is_remote(self.directory):
            free = f"{shutil.disk_usage(self.directory).free:,} are free on that disk"
            free = f", and {free} (a quota may allow less)"
        whole = [s for s in self.complete() if s != step]
        left = f"Checkpoints {whole} are intact" if whole else "There is no other checkpoint yet"
        return SaveError(
            f"checkpoint {step} could not be written to {self.directory}: {_first_line(error)}. "
            f"It needs up to {size:,} bytes{free}. {left}. Make room, or lower train.keep; the "
            "same command then resumes, and removes the partial checkpoint"
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return the newest state that can be read, and the position in the data.

        `like` is abstract and carries shardings. A broken checkpoint newer than the one returned is
        moved to checkpoints.broken/<step>, or <step>.1, …, and said so. Raises RunError if none
        can be read, ConfigError if the parameters are those of another model.
        """
        faults: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                stored = _metadata(self.directory / str(step) / "params")
            except (
                Exception
            ) as error:  # orbax raises what its storage raises: ValueError, KeyError, …
                faults[step] = error
                continue
            merge_strictly(like.all_params(), stored, f"checkpoint {step} in {self.directory}")
            try:
                restored = self._read(step, like)
            except Exception as error:
                faults[step] = error
                continue
            for broken, error in faults.items():
                self._move_aside(broken, error, step)
            return restored
        raise RunError(f"no checkpoint can be read.{_faults(self.directory, faults)}")

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        items = {
            "params": ocp.args.StandardRestore(like.all_params()),
            "optimizer": ocp.args.StandardRestore(like.opt_state),
            "data": ocp.args.JsonRestore(),
        }
        if like.ema:
            items["ema"] = ocp.args.StandardRestore(like.ema)
        with _quiet():
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        params, frozen = optimizer.split(found["params"], optimizer.flatten(like.frozen))
        counter = jax.device_put(np.int32(step), like.step.sharding)
        ema = found["ema"] if like.ema else {}
        state = like.replace(
            step=counter, params=params, frozen=frozen, ema=ema, opt_state=found["optimizer"]
        )
        return state, found["data"]

    def _move_aside(self, step: int, error: Exception, good: int) -> None:
        aside = self.directory.with_name(CHECKPOINTS + ".broken")
        names = (f"{step}.{n}" if n else f"{step}" for n in itertools.count())
        place = next(aside / name for name in names if not (aside / name).exists())
        sharding.wait("before a broken checkpoint is moved")
        if sharding.is_first():
            aside.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(place)
        sharding.wait("after a broken checkpoint was moved")
        with _quiet():
            self._manager.reload()
        print(
            f"checkpoint {step} cannot be read ({_first_line(error)}): going back to {good}; "
            f"the broken one is now {place}"
        )


def _read_policy_params(directory: Path, step: int | None) -> tuple[int, Params]:
    folder = directory / CHECKPOINTS
    steps = _steps(folder)
    if not steps:
        raise FileNotFoundError(
            f"{directory} has no checkpoint (a folder {CHECKPOINTS}/<step>): {_listing(directory)}"
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{folder} has no checkpoint {step}; it has {steps}")
    step = steps[-1] if step is None else step
    try:
        params = _read_arrays(folder / str(step) / "params")
        if (folder / str(step) / "ema").is_dir():
            params = optimizer.merge(params, _read_arrays(folder / str(step) / "ema"))
    except Exception as error:  # orbax raises what its storage raises: ValueError, KeyError, …
        others = [s for s in steps if s != step]
        remedy = f"; load another one with step=, of {others}" if others else ""
        raise RunError(
            f"checkpoint {step} of {directory} cannot be read ({_first_line(error)}){remedy}"
        ) from error
    return step, params


def _steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, which need not be there."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in paths if path.name.isdigit())


def _metadata(path: Path) -> Params:
    """Return the nested dict of a stored tree's shapes."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing")
    with _quiet():
        return ocp.PyTreeCheckpointer().metadata(files.absolute(path)).item_metadata.tree


def _read_arrays(path: Path) -> Params:
    """Return a stored tree as numpy arrays, whatever devices it was saved from."""
    to_numpy = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
    arguments = ocp.args.PyTreeRestore(restore_args=jax.tree.map(to_numpy, _metadata(path)))
    with _quiet():
        return ocp.PyTreeCheckpointer().restore(files.absolute(path), args=arguments)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence orbax's remarks about its own files, which nobody can act upon."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
    """Return 'path: old -> new' for every leaf of two JSON values that is not the same."""
    old, new = dict(types.flatten(_nested(old))), dict(types.flatten(_nested(new)))
    show = lambda values, path: json.dumps(values[path]) if path in values else "absent"
    return [
        f"{path}: {show(old, path)} -> {show(new, path)}"
        for path in sorted(old.keys() | new.keys())
        if path not in old or path not in new or old[path] != new[path]
    ]


def _nested(x: Any) -> Any:
    """Return JSON data with its lists of objects as objects, so that paths reach into them."""
    if isinstance(x, list) and not all(isinstance(y, (int, float)) for y in x):
        x = {str(i): y for i, y in enumerate(x)}
    return {k: _nested(v) for k, v in x.items()} if isinstance(x, dict) else x


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is no JSON: {error}") from error


def _dump(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"


def _listing(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} does not exist"
    return (
        f"{directory} holds {', '.join(sorted(p.name for p in directory.iterdir())) or 'nothing'}"
    )


def _faults(directory: Path, faults: Mapping[int, Exception]) -> str:
    lines = "".join(f"\n  {step}: {_first_line(error)}" for step, error in faults.items())
    return f" {directory}:{lines}\nMove that folder away to start again from step 0."


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
