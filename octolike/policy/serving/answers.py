"""Answers: a client's message to the reply, in openpi's protocol and in vla-eval's.

Every error of a client or the policy becomes a reply of one sentence; only the end of the
connection is raised (ConnectionClosed, ClientGoneError).
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from octolike.policy import wire
from octolike.policy.policy import Policy
from octolike.policy.serving.batcher import Batcher, BusyError, FailureError, Result
from octolike.policy.serving.harness import Episode, HarnessProtocol, parse
from octolike.policy.serving.limits import LimitError, action_limits
from octolike.policy.serving.metrics import ServerMetrics
from octolike.policy.serving.options import ServeOptions
from octolike.policy.serving.requests import RequestEncoder, Session

ENCODERS = 2  # threads that decode and check requests
TEXT = "the message is text; expected msgpack in a binary message"
Reply = tuple[str | bytes, str]  # the message, and the outcome: a label of requests_total


class ClientGoneError(Exception):
    """The connection has ended while its request was answered."""


class Answers:
    """Answers requests with a batcher's policy.

    Attributes:
        stopping: set when further requests are refused.
        encoder: encodes requests.
        limits: limits of the robot's actions.
    """

    def __init__(
        self, policy: Policy, batcher: Batcher, options: ServeOptions, metrics: ServerMetrics
    ) -> None:
        """Raises ValueError for options that do not fit the policy."""
        self.stopping = asyncio.Event()
        self.encoder = RequestEncoder(policy, options)
        self.limits = action_limits(options, policy.embodiment)
        self._batcher, self._metrics = batcher, metrics
        self._harness = HarnessProtocol(policy, options)
        self._wire_limits = wire.Limits(message=options.message_mb << 20)
        self._threads = ThreadPoolExecutor(ENCODERS, thread_name_prefix="octolike-encode")

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # openpi

    async def openpi(
        self, socket: ServerConnection, session: Session, data: str | bytes, previous: float
    ) -> Reply:
        """Return the reply to an observation. previous: seconds that the last answer took."""
        start = time.perf_counter()
        try:
            self._check_running()
            prepared = await self._encode(self._prepare, data, session)
            if prepared is None:
                return self._count("ok", wire.pack({"ok": True}))
            encoded = time.perf_counter() - start
            result = await self._compute(socket, session, prepared.inputs, prepared.seed)
            actions, clipped = self._limit(result.actions)
        except Exception as error:
            outcome, text = _outcome(error)
            return self._count(outcome, text)
        session.frames, session.calls = prepared.frames, session.calls + 1
        timing = self._timing(result, encoded, time.perf_counter() - start)
        if previous:
            timing["prev_total_ms"] = 1e3 * previous
        reply = {"actions": actions, "step": result.step, "server_timing": timing}
        if clipped:
            reply["clipped"] = clipped
        return self._count("ok", wire.pack(reply))

    # vla-eval

    async def harness(
        self, socket: ServerConnection, session: Session, episode: Episode, data: str | bytes
    ) -> Reply:
        """Return the reply to a message of the harness; b"" for one that has no reply."""
        seq, outcome = 0, "ok"
        try:
            self._check_running()
            kind, payload, seq = await self._encode(self._parse, data)
            if kind == "hello":
                episode.benchmark = self._harness.benchmark(payload.get("benchmark"))
                checkpoint = int(self._batcher.policy.metadata["step"])
                reply = kind, self._harness.hello(episode.benchmark, payload, checkpoint)
            elif kind == "observation":
                action = await self._harness_action(socket, session, episode, payload)
                reply = "action", {"actions": action}
                self._count(outcome, "")
            else:
                episode.start(payload if kind == "episode_start" else {})
                return b"", outcome
        except Exception as error:
            outcome, text = _outcome(error)
            self._count(outcome, "")
            reply = "error", {"error": text}
        message = {"type": reply[0], "payload": reply[1], "seq": seq, "timestamp": time.time()}
        return wire.pack(message, text_keys=True), outcome

    async def _harness_action(
        self, socket: ServerConnection, session: Session, episode: Episode, payload: Any
    ) -> np.ndarray:
        """Return the action [A] of one observation, in the benchmark's conventions."""
        start = time.perf_counter()
        benchmark = episode.benchmark or self._harness.benchmark("")
        observation, instruction = self._harness.observation(benchmark, payload)
        stacked, frames = await self._encode(self.encoder.with_history, observation, episode.frames)
        has_language = "language" in self._batcher.policy.conditioning
        words = instruction if has_language else None
        task = await self._encode(self.encoder.task, words, None, None)
        # at every step: a bad observation must not enter the history
        inputs = await self._encode(self.encoder.encode, stacked, task)
        if not episode.chunk:
            encoded = time.perf_counter() - start
            if episode.seed is None:
                seed = self.encoder.draw_seed(*episode.seeds, episode.step)
            else:
                seed = self.encoder.draw_episode_seed(episode.seed, episode.step)
            result = await self._compute(socket, session, inputs, seed)
            actions, _ = self._limit(result.actions)
            episode.chunk = list(actions[: self._harness.execute])
            self._timing(result, encoded, time.perf_counter() - start)
        episode.frames, episode.step = frames, episode.step + 1
        return self._harness.action(benchmark, episode.chunk.pop(0))

    # Parts of both

    def _prepare(self, data: str | bytes, session: Session) -> Any:
        if isinstance(data, str):
            raise ValueError(TEXT)
        return self.encoder.prepare(wire.unpack(data, self._wire_limits), session)

    def _parse(self, data: str | bytes) -> tuple[str, Any, Any]:
        if isinstance(data, str):
            raise ValueError(TEXT)
        return parse(wire.unpack(data, self._wire_limits))

    def _check_running(self) -> None:
        if self.stopping.is_set():
            raise BusyError("the server is stopping")

    async def _encode(self, function: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *arguments)

    async def _compute(
        self, socket: ServerConnection, session: Session, inputs: Any, seed: int
    ) -> Result:
        """Return the chunk of a request; ClientGoneError if the client goes away meanwhile."""
        job = asyncio.ensure_future(self._batcher.submit(session, inputs, seed))
        closed = asyncio.ensure_future(socket.wait_closed())
        try:
            await asyncio.wait({job, closed}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                self._metrics.add("requests_total", "gone")
                raise ClientGoneError
            return job.result()
        finally:
            job.cancel()
            closed.cancel()

    def _limit(self, actions: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        actions, clipped = self.limits.apply(actions)
        for name, count in clipped.items():
            self._metrics.add("limited_actions_total", name, count)
        return actions, clipped

    def _timing(self, result: Result, encoded: float, total: float) -> dict[str, float]:
        """Return a reply's durations in milliseconds, and count them."""
        seconds = {
            "queue": result.queue,
            "preprocess": encoded,
            "model": result.model,
            "total": total,
        }
        self._metrics.observe(seconds)
        timing = {f"{stage}_ms": 1e3 * value for stage, value in seconds.items()}
        return {**timing, "infer_ms": timing["model_ms"], "batch": result.batch}

    def _count(self, outcome: str, reply: str | bytes) -> Reply:
        self._metrics.add("requests_total", outcome)
        return reply, outcome


def _outcome(error: Exception) -> tuple[str, str]:
    """Return (outcome, text for the client) of an error; one of ours is logged with its trace."""
    if isinstance(error, (ConnectionClosed, ClientGoneError)):
        raise error
    if isinstance(error, BusyError):
        return "busy", f"busy: {error}"
    if isinstance(error, LimitError):
        return "limit", f"failed: {error}"
    if isinstance(error, ValueError):
        return "invalid", f"invalid: {error}"
    if isinstance(error, FailureError):
        return "failed", f"failed: {error}"
    traceback.print_exception(error, file=sys.stderr)
    return "failed", f"failed: {type(error).__name__} on the server; see its log"
