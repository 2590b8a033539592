"""Many environments stepped together in worker processes.

Workers add speed, and they keep a simulator out of processes that use tensorflow: software OpenGL
and tensorflow each contain an LLVM, and the second one to be loaded crashes.

A pool has numbered slots with one environment each. `run` takes at most one command per slot and
returns one reply per command. A slot's replies depend neither on the other slots nor on the number
of workers.

If an environment raises, or a worker dies or hangs, the reply is an `EnvCrash`, and the slot gets a
new environment at its next command. An environment that cannot be built raises an error at once.

Ctrl-C reaches the workers too, as does SIGTERM to the process group. Both end them if they end this
process; they continue if this process handles the signal itself (octolike.train.interrupt), for
example to save a checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from octolike import files
from octolike.config import ConfigError, plugins
from octolike.cores import usable_cores

TIMEOUT = 120.0  # seconds per command, unless it has a limit of its own
EPISODE_LIMIT = 1200.0  # seconds for a whole episode: LIBERO renders one in minutes on a slow core
QUIET = 1 / 8  # share of the time limit after which a line reports the wait


class ResetCommand(NamedTuple):
    """Start an episode; the reply is (observation, info)."""

    seed: int
    options: dict[str, Any]


class StepCommand(NamedTuple):
    """Act; the reply is (observation, reward, terminated, truncated, info)."""

    action: Any


class CallCommand(NamedTuple):
    """Call function(env, *arguments); the reply is its result. It must be importable.

    limit: seconds after which the worker is taken to hang; None: TIMEOUT.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    limit: float | None = None


class EnvCrash(NamedTuple):
    """The reply of a slot that lost its environment: the traceback, or how the worker ended."""

    text: str

    @property
    def error(self) -> str:
        """Return the last line: an exception, or how the worker ended."""
        return self.text.strip().splitlines()[-1].strip()

    @property
    def error_and_place(self) -> str:
        """Return the error and where it was raised."""
        lines = [line.strip() for line in self.text.splitlines()]
        places = [line for line in lines if line.startswith('File "')]
        return f"{self.error} ({places[-1]})" if places else self.error


Command = ResetCommand | StepCommand | CallCommand


class _BuildFailure(NamedTuple):
    text: str


def default_workers(slots: int) -> int:
    """Return one worker per core that this process may use, but at most one per slot."""
    return max(1, min(usable_cores(), slots))


class EnvPool:
    """A number of environments, spread over worker processes."""

    def __init__(self, make: Callable[[], Any], slots: int, workers: int) -> None:
        """Start the workers; environments are built at their first command.

        Args:
            make: builds one environment; picklable if there are workers.
            slots: number of environments.
            workers: number of processes; 0 runs the environments in this process.
        """
        if slots < 1 or workers < 0:
            raise ValueError(f"{slots} slots and {workers} workers; expected at least one slot")
        self.slots = slots
        processes = [_ProcessWorker(make) for _ in range(min(workers, slots))]
        self._workers: Sequence[_ProcessWorker | _InProcessWorker]
        self._workers = processes or [_InProcessWorker(make)]

    def run(self, commands: Mapping[int, Command]) -> dict[int, Any]:
        """Execute one command per slot; return {slot: reply or EnvCrash}.

        Raises:
            RuntimeError: an environment cannot be built; with the reason.
        """
        shares = [
            {s: c for s, c in commands.items() if s % len(self._workers) == i}
            for i in range(len(self._workers))
        ]
        for worker, share in zip(self._workers, shares):
            worker.send(share)
        replies: dict[int, Any] = {}
        for worker, share in zip(self._workers, shares):
            replies |= worker.receive(share)
        for reply in replies.values():
            if isinstance(reply, _BuildFailure):
                raise RuntimeError(f"the environment cannot be built: {reply.text}")
        return {slot: replies[slot] for slot in commands}

    def close(self) -> None:
        """Close all environments and end the workers."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _WorkerEnvs:
    """The environments of one worker, by slot."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._envs: dict[int, Any] = {}

    def run(self, commands: Mapping[int, Command]) -> dict[int, Any]:
        return {slot: self._execute(slot, command) for slot, command in commands.items()}

    def _execute(self, slot: int, command: Command) -> Any:
        if slot not in self._envs:
            try:
                self._envs[slot] = self._make()
            except (ImportError, ConfigError) as error:  # the message has the remedy
                return _BuildFailure(str(error))
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{frame.filename}, line {frame.lineno}"
                return _BuildFailure(f"{files.cause(error)} ({place})")
        env = self._envs[slot]
        try:
            if isinstance(command, ResetCommand):
                return env.reset(seed=command.seed, options=command.options)
            if isinstance(command, CallCommand):
                return command.function(env, *command.arguments)
            return env.step(command.action)
        except Exception:
            del self._envs[slot]  # not closed, because its state is unknown
            return EnvCrash(traceback.format_exc())

    def close(self) -> None:
        for env in self._envs.values():
            env.close()
        self._envs.clear()


class _InProcessWorker:
    """A worker without a process."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._envs = _WorkerEnvs(make)
        self._commands: Mapping[int, Command] = {}

    def send(self, commands: Mapping[int, Command]) -> None:
        self._commands = commands

    def receive(self, _: Mapping[int, Any]) -> dict[int, Any]:
        return self._envs.run(self._commands)

    def close(self) -> None:
        self._envs.close()


class _ProcessWorker:
    """A worker process; it is restarted if it dies."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._start()

    def _start(self) -> None:
        # spawn: a forked child would inherit locks of jax's threads and a foreign GL context
        context = multiprocessing.get_context("spawn")
        self._pipe, child_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child_end, plugins.loaded()), daemon=True
        )
        with _signals_blocked_for_children():
            self._process.start()
        # The exit handler of multiprocessing only sends SIGTERM, which the worker may block.
        weakref.finalize(self, _kill, self._process)
        self._ready = False
        child_end.close()
        with contextlib.suppress(BrokenPipeError):  # the worker died; `receive` reports it
            self._pipe.send(self._make)

    def send(self, commands: Mapping[int, Command]) -> None:
        with contextlib.suppress(OSError):  # the worker died; `receive` reports it
            self._pipe.send(commands)

    def receive(self, commands: Mapping[int, Any]) -> dict[int, Any]:
        if not commands:
            return {}
        replies: dict[int, Any] = {}
        limits = [c.limit for c in commands.values() if isinstance(c, CallCommand) and c.limit]
        limit = max(limits, default=TIMEOUT)
        try:
            while self._wait(limit, commands.keys() - replies.keys()):
                if not self._ready:
                    self._ready = self._pipe.recv()
                    continue
                replies |= self._pipe.recv()
                if len(replies) == len(commands):
                    return replies
            outcome = f"did not answer within {limit:.0f} s"
        except (EOFError, OSError):
            self._process.join(5)
            outcome = f"ended with exit code {self._process.exitcode}"
        if not self._ready:  # a restart would end the same way
            reason = f"the worker process {outcome} before it was ready; see its output"
            return dict.fromkeys(commands, _BuildFailure(reason))
        self._end()
        self._start()
        # Slots that had already replied are included, since their environments are lost too.
        return {slot: EnvCrash(f"the worker process {outcome}") for slot in commands}

    def _wait(self, limit: float, slots: Set[int]) -> bool:
        """Return whether a reply arrives within `limit` seconds; a line names a quiet worker."""
        quiet = QUIET * limit
        if self._pipe.poll(quiet):
            return True
        print(
            f"environments {', '.join(map(str, sorted(slots)))} (process {self._process.pid}) have "
            f"not answered for {quiet:.0f} s; waiting up to {limit:.0f} s",
            file=sys.stderr,
        )
        return self._pipe.poll(limit - quiet)

    def close(self) -> None:
        try:
            self._pipe.send(None)
            self._process.join(5)
        except OSError:
            pass
        self._end()

    def _end(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()


def _kill(process: BaseProcess) -> None:
    with contextlib.suppress(ValueError):  # closed
        if process.is_alive():
            process.kill()


@contextlib.contextmanager
def _signals_blocked_for_children() -> Iterator[None]:
    """Start processes with those of SIGINT and SIGTERM blocked that do not end this process.

    Blocking takes effect from the child's first instruction; a handler set by the child itself
    would come after its imports.
    """
    ends = (signal.default_int_handler, signal.SIG_DFL)
    handled = {s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) not in ends}
    if not handled:
        yield
        return
    resource_tracker.ensure_running()  # otherwise `start` does this, and unblocks SIGINT after it
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    try:
        yield
    finally:  # a signal that arrived meanwhile is delivered now
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _serve(pipe: Connection, plugin_paths: Sequence[str]) -> None:
    """Run commands from the pipe until it closes: the main function of a worker process.

    The first object in the pipe builds an environment. It, and later commands, may be of a plug-in.
    """
    try:
        plugins.load(plugin_paths)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    envs = _WorkerEnvs(pipe.recv())
    try:
        pipe.send(True)
        while (commands := pipe.recv()) is not None:
            for slot, command in commands.items():  # one reply each: the limit is per command
                pipe.send(envs.run({slot: command}))
    except (EOFError, ConnectionError, KeyboardInterrupt):  # the parent is gone
        pass
    envs.close()
