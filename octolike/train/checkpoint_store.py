"""The checkpoints of a run: workdir/checkpoints/<step>/{params, ema, optimizer, data}.

They are written in the background; a checkpoint gets its name <step> only once it is complete and
has a manifest of its files (checkpoint_manifest), which is checked before they are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from octolike import files
from octolike.errors import RunError
from octolike.files import Path, PathLike
from octolike.train import checkpoint_manifest, optimizer, sharding
from octolike.train.parameter_transfer import merge_strictly
from octolike.train.retention import RetentionPolicy
from octolike.train.state import Params, TrainState

CHECKPOINTS = "checkpoints"
T = TypeVar("T")


class SaveError(OSError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


class CheckpointStore:
    """Writes the checkpoints of one run in the background, and restores them.

    A context manager: on exit it waits for a save under way.
    """

    def __init__(
        self, workdir: PathLike, keep: int, keep_every: int = 0, keep_best: str = ""
    ) -> None:
        """Open or create workdir/checkpoints and remove the remains of an interrupted save.

        Args:
            workdir: the run directory.
            keep: number of newest checkpoints to retain.
            keep_every: also retain checkpoints at multiples of this step; 0 for none.
            keep_best: also retain the checkpoint with the lowest value of this score.
        """
        self.directory = files.absolute(workdir) / CHECKPOINTS
        self._policy = RetentionPolicy(self.directory.parent, keep, keep_every, keep_best)
        self._saving: tuple[int, int] | None = None  # step and bytes
        self._opened = self._started = time.perf_counter()
        self._cost_shown = False
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            temporary_path_class=checkpoint_manifest.temporary_path_class(self.directory),
        )
        with _quiet_orbax():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except SaveError as save_error:  # the first error stays the one that is reported
            error.add_note(str(save_error))

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, which may still be written."""
        return self._manager.latest_step()

    def complete(self) -> list[int]:
        """Wait for the save under way; return the steps of the complete checkpoints on disk."""
        with _quiet_orbax(), contextlib.suppress(Exception):  # `wait` reports the error
            self._manager.wait_until_finished()
        return checkpoint_steps(self.directory)

    def save(
        self,
        state: TrainState,
        data: Mapping[str, Any],
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Start to save the state and the position in the data, unless this step is saved already.

        The state may be donated as soon as this returns.

        Args:
            state: to save.
            data: the position in the data.
            scores: to compare checkpoints by; lower is better.

        Raises:
            SaveError: this save or the previous one failed.
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
        self._saving, self._started = (step, size), time.perf_counter()
        try:
            if scores:
                self._policy.record(step, scores, write=sharding.is_first())
            with _quiet_orbax():
                started = self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax passes on whatever its storage raises
            self._saving = None
            raise self._save_error(step, size, error) from error
        if not started:  # orbax rejects a step before its newest
            self._saving = None
            raise SaveError(
                f"checkpoint {step} was not written: {self.directory} holds {self.complete()} "
                "already, and the later ones belong to another run. Name another directory "
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
            with _quiet_orbax():
                self._manager.wait_until_finished()
        except Exception as error:  # orbax passes on whatever its storage raises
            raise self._save_error(step, size, error) from error
        if not self._cost_shown:
            self._cost_shown = True
            if cost := checkpoint_manifest.describe_cost(
                self.directory, self._opened, self._started
            ):
                print(cost)

    def close(self) -> None:
        """Wait for the save under way, and close; raise SaveError if it failed."""
        try:
            self.wait()
        finally:
            with _quiet_orbax(), contextlib.suppress(Exception):  # `wait` reports the error
                self._manager.close()

    def _save_error(self, step: int, size: int, error: Exception) -> SaveError:
        free = ""
        if not files.is_remote(self.directory):
            free = f"{shutil.disk_usage(self.directory).free:,} are free on that disk"
            free = f", and {free} (a quota may allow less)"
        steps = [s for s in self.complete() if s != step]
        intact = f"Checkpoints {steps} are intact" if steps else "No other checkpoint exists yet"
        remedy = files.remedy(error)
        if "space" in remedy:
            remedy += ", or lower train.keep"
        remedy = remedy or "none is known for this cause; remove it"
        return SaveError(
            f"checkpoint {step} could not be written to {self.directory}: {cause_of(error)}. "
            f"It needs up to {size:,} bytes{free}. {intact}. Remedy: {remedy}; then the "
            "same command resumes, and removes the partial checkpoint"
        )

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return the newest readable state, and the position in the data.

        A corrupted checkpoint newer than the one returned is moved to checkpoints.broken/<step>, or
        <step>.1, …, and a line is printed.

        Args:
            abstract_state: shapes, dtypes and shardings.

        Raises:
            RunError: no checkpoint can be read.
            ConfigError: the parameters are those of another model.
        """
        errors: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self.directory / str(step)
            try:
                _agreed(_check_manifest, folder)
                shapes = _agreed(lambda x: read_shapes(x, "params"), folder)
            except Exception as error:  # orbax passes on ValueError, KeyError, …
                errors[step] = error
                continue
            source = f"checkpoint {step} in {self.directory}"
            merge_strictly(abstract_state.all_params(), shapes, source)
            try:
                stored = _agreed(lambda x: self._read(x, abstract_state), folder)
            except Exception as error:
                errors[step] = error
                continue
            for corrupted, failure in errors.items():
                self._move_aside(corrupted, failure, step)
            return self._restored(step, abstract_state, stored), stored["data"]
        lines = "".join(f"\n  {step}: {cause_of(error)}" for step, error in errors.items())
        raise RunError(
            f"no checkpoint can be read. {self.directory}:{lines}\n"
            "Move that folder away to start again from step 0."
        )

    def _read(self, checkpoint: Path, abstract_state: TrainState) -> Mapping[str, Any]:
        """Return a checkpoint's items by name. No process waits for another."""
        items = {
            "params": ocp.args.StandardRestore(abstract_state.all_params()),
            "optimizer": ocp.args.StandardRestore(abstract_state.opt_state),
            "data": ocp.args.JsonRestore(),
        }
        if abstract_state.ema:
            items["ema"] = ocp.args.StandardRestore(abstract_state.ema)
        # A manager's `restore` has a barrier, where others would wait for a process that failed.
        with _quiet_orbax(), contextlib.closing(ocp.CompositeCheckpointHandler()) as handler:
            return handler.restore(checkpoint, args=ocp.args.Composite(**items))

    def _restored(
        self, step: int, abstract_state: TrainState, stored: Mapping[str, Any]
    ) -> TrainState:
        frozen_paths = optimizer.flatten(abstract_state.frozen)
        params, frozen = optimizer.split(stored["params"], frozen_paths)
        return dataclasses.replace(
            abstract_state,
            step=jax.device_put(np.int32(step), abstract_state.step.sharding),
            params=params,
            frozen=frozen,
            ema=stored["ema"] if abstract_state.ema else {},
            opt_state=stored["optimizer"],
        )

    def _move_aside(self, step: int, error: Exception, good_step: int) -> None:
        folder = self.directory.with_name(CHECKPOINTS + ".broken")
        names = (f"{step}.{n}" if n else f"{step}" for n in itertools.count())
        destination = next(folder / name for name in names if not (folder / name).exists())
        sharding.barrier("before a corrupted checkpoint is moved")
        if sharding.is_first():
            folder.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(destination)
        sharding.barrier("after a corrupted checkpoint was moved")
        with _quiet_orbax():
            self._manager.reload()
        print(
            f"checkpoint {step} cannot be read ({cause_of(error)}): going back to {good_step}; "
            f"the corrupted one is now {destination}"
        )


def _check_manifest(checkpoint: Path) -> None:
    """Raise RunError in the first process, which alone reads all files, if some are damaged."""
    if sharding.is_first():
        checkpoint_manifest.check(checkpoint)


def _agreed(read: Callable[[Path], T], checkpoint: Path) -> T:
    """Return what `read` returns for a checkpoint; raise in all processes if it does in one."""
    found, fault = cast(T, None), None
    try:
        found = read(checkpoint)
    except Exception as error:  # orbax passes on ValueError, KeyError, …
        fault = error
        if not sharding.is_first():  # its standard output is not shown
            print(f"cannot read {checkpoint}: {cause_of(error)}", file=sys.stderr)
    if sharding.agree_on_fault(fault is not None):
        raise fault or RunError("another process cannot read it")
    return found


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder; [] if it does not exist."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in paths if path.name.isdigit())


def read_policy_params(folder: Path, step: int) -> Params:
    """Return the parameters of a checkpoint that a policy uses: averaged ones if it has them.

    numpy arrays. The files that are read are checked against their manifest first. Raises
    RunError, or whatever orbax raises.
    """
    checkpoint_manifest.check(folder / str(step), ("params", "ema"))
    params = read_arrays(folder / str(step), "params")
    if (folder / str(step) / "ema").is_dir():
        params = optimizer.merge(params, read_arrays(folder / str(step), "ema"))
    return params


def read_shapes(checkpoint: Path, item: str) -> Params:
    """Return the nested dict of array metadata (shape, dtype) of a checkpoint's item."""
    # The handler raises the reason for unreadable metadata. `Checkpointer.metadata` and orbax's v1
    # API only log it; v1 also prints tracebacks from its event loop.
    with _quiet_orbax():
        return ocp.PyTreeCheckpointHandler().metadata(files.absolute(checkpoint / item)).tree


def read_arrays(checkpoint: Path, item: str) -> Params:
    """Return a checkpoint's item as numpy arrays, for any devices that it was saved from."""
    shapes = read_shapes(checkpoint, item)
    targets = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    with _quiet_orbax():
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        arguments = ocp.args.PyTreeRestore(restore_args=targets)
        return checkpointer.restore(files.absolute(checkpoint / item), args=arguments)


def cause_of(error: Exception) -> str:
    """Return the cause of an error in one line; of an error of a run, only its message."""
    return str(error) if isinstance(error, RunError) else files.cause(error)


class _NoOrbax(logging.Filter):
    """Drops orbax's notes and tracebacks: errors are raised, and reported in one line.

    Its background threads log whenever they like, so a filter stays on the logger.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is not orbax's."""
        return "orbax" not in record.pathname


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silence orbax's notes about its own files; users cannot act on them."""
    logger = logging.getLogger("absl")
    if not any(isinstance(f, _NoOrbax) for f in logger.filters):
        logger.addFilter(_NoOrbax())
    yield
