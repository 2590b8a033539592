"""Many environments stepped together, spread over worker processes.

The workers are there for speed, and because a simulator must not share a process with tensorflow:
software OpenGL and tensorflow each bring an LLVM, and the second one to be loaded crashes.

A pool has numbered slots with one environment each. Every round it is given one command per slot
that takes part, and answers with one reply per command. What a slot does never depends on the other
slots or on the number of workers, so the workers are a matter of speed alone.

If an environment raises, or a worker dies or hangs, the reply is an `EnvCrash`; the slot gets a new
environment at its next reset. An environment that cannot be built raises an error at once.

Ctrl-C is sent to the workers too. They die of it where this process does, and stay where it does
something else (octolike.train.interrupt), such as to go on and save.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

TIMEOUT = 120.0  # seconds that a worker may need for one command


class ResetCommand(NamedTuple):
    """Start an episode; the reply is (observation, info)."""

    seed: int
    options: dict[str, Any]


class StepCommand(NamedTuple):
    """Act; the reply is (observation, reward, terminated, truncated, info)."""

    action: Any


class CallCommand(NamedTuple):
    """Call a module's function with the environment; the reply is what it returns."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


class EnvCrash(NamedTuple):
    """The reply of a slot whose environment is gone: the traceback, or how the worker ended."""

    text: str


Command = ResetCommand | StepCommand | CallCommand


class _Unbuildable(NamedTuple):
    text: str


def default_workers(slots: int) -> int:
    """Return one worker per core that this process may use, but no more than slots."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(cores, slots))


class EnvPool:
    """`slots` environments made by `make`, over `workers` processes; 0: in this process."""

    def __init__(self, make: Callable[[], Any], slots: int, workers: int) -> None:
        """Set up; for worker processes `make` must be a module's function, or a partial of one."""
        if slots < 1 or workers < 0:
            raise ValueError(f"{slots} slots and {workers} workers; expected at least one slot")
        self.slots = slots
        processes = [_Process(make) for _ in range(min(workers, slots))]
        self._workers = processes or [_Local(make)]

    def run(self, commands: Mapping[int, Command]) -> dict[int, Any]:
        """Carry out one command per slot; returns {slot: reply or Crash}.

        Raises RuntimeError with the reason when an environment cannot be built.
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
            if isinstance(reply, _Unbuildable):
                raise RuntimeError(f"the environment cannot be built: {reply.text}")
        return {slot: replies[slot] for slot in commands}

    def close(self) -> None:
        """Close every environment and end the workers."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Slots:
    """The environments of one worker."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._envs = make, {}

    def run(self, commands: Mapping[int, Command]) -> dict[int, Any]:
        return {slot: self._one(slot, command) for slot, command in commands.items()}

    def _one(self, slot: int, command: Command) -> Any:
        if slot not in self._envs:
            try:
                self._envs[slot] = self._make()
            except ImportError as error:  # a library is missing; the message says which
                return _Unbuildable(str(error))
            except Exception:
                return _Unbuildable("\n" + traceback.format_exc())
        env = self._envs[slot]
        try:
            if isinstance(command, ResetCommand):
                return env.reset(seed=command.seed, options=command.options)
            if isinstance(command, CallCommand):
                return command.function(env, *command.arguments)
            return env.step(command.action)
        except Exception:
            del self._envs[slot]  # its state is unknown, so it is not closed either
            return EnvCrash(traceback.format_exc())

    def close(self) -> None:
        for env in self._envs.values():
            env.close()
        self._envs.clear()


class _Local:
    """A worker without a process."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._inner = _Slots(make)
        self._commands: Mapping[int, Command] = {}

    def send(self, commands: Mapping[int, Command]) -> None:
        self._commands = commands

    def receive(self, _: Mapping[int, Any]) -> dict[int, Any]:
        return self._inner.run(self._commands)

    def close(self) -> None:
        self._inner.close()


class _Process:
    """A worker process, started again after it died."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._start()

    def _start(self) -> None:
        # spawn: a forked child would inherit locks of jax's threads and a foreign GL context
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._make), daemon=True)
        with _own_interrupts():
            self._process.start()
        self._ready = False
        theirs.close()

    def send(self, commands: Mapping[int, Command]) -> None:
        with contextlib.suppress(OSError):  # it died; `receive` notices
            self._pipe.send(commands)

    def receive(self, commands: Mapping[int, Any]) -> dict[int, Any]:
        if not commands:
            return {}
        replies: dict[int, Any] = {}
        try:
            while self._pipe.poll(TIMEOUT):
                if not self._ready:
                    self._ready = self._pipe.recv()
                    continue
                replies |= self._pipe.recv()
                if len(replies) == len(commands):
                    return replies
            how = f"did not answer within {TIMEOUT:.0f} s"
        except (EOFError, OSError):
            self._process.join(5)
            how = f"ended with exit code {self._process.exitcode}"
        if not self._ready:  # starting it again would end the same way
            why = f"the worker process {how} before it was ready; its output says why"
            return dict.fromkeys(commands, _Unbuildable(why))
        self._end()
        self._start()
        # also where a slot has answered: its environment went with the process
        return {slot: EnvCrash(f"the worker process {how}") for slot in commands}

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


@contextlib.contextmanager
def _own_interrupts() -> Iterator[None]:
    """Let a process that starts here inherit SIGINT blocked, unless this one dies of it itself.

    Blocked from its first instruction on, while a handler of its own would come after the imports.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        yield
        return
    resource_tracker.ensure_running()  # which `start` does else, and unblocks SIGINT after it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:  # one that came meanwhile is delivered now
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, make: Callable[[], Any]) -> None:
    slots = _Slots(make)
    try:
        pipe.send(True)
        while (commands := pipe.recv()) is not None:
            for slot, command in commands.items():  # one by one, as a sign of life
                pipe.send(slots.run({slot: command}))
    except (EOFError, ConnectionError, KeyboardInterrupt):  # the other end is gone
        pass
    slots.close()
