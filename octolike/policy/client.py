"""RemotePolicy: a policy behind a server, with the interface of `Policy`; no jax, no flax.

    policy = RemotePolicy("ws://192.168.0.5:8000", key="…")
    task = policy.create_task(instruction="lift the red cube")
    actions = policy.sample_actions({"image_primary": image, "proprio": state}, task, seed=0)

Imports numpy, msgpack and websockets only, for Python 3.10 and later; `jpeg` needs pillow. The
server is `octolike serve`. Any other client of openpi's protocol works with it, too.
"""

from __future__ import annotations

import contextlib
import socket as sockets
import ssl
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from octolike.policy import wire
from octolike.policy.execution import ActionPrefix, PolicyBusyError
from octolike.policy.send_guard import SendGuard

FIRST_WAIT, LONGEST_WAIT = 0.05, 2.0  # seconds between two attempts to connect
QUIET = 2.0  # seconds without a connection before a line says so
GUARD = SendGuard()  # of the messages of all clients of this process


class ServerError(RuntimeError):
    """The server could not compute actions; the message is the server's."""


class ServerBusyError(ServerError, PolicyBusyError):
    """The server's queue is full, or the server is about to stop: ask again later."""


class RemoteTask(NamedTuple):
    """A task that the server has accepted; see `RemotePolicy.create_task`."""

    instruction: str
    request: dict[str, Any]


class RemotePolicy:
    """A policy on another machine, or in another process.

    A lost connection is opened again, and the request is sent once more: a request holds its whole
    history, so that a repetition changes nothing. Calls from several threads take turns; robots in
    one process that should be batched need a RemotePolicy each.

    Attributes:
        metadata: the server's description of the policy (`Policy.metadata`).
        timing: milliseconds of the last call, as measured by the server, and "total" by the client.
        step: the checkpoint's step that computed the last actions.
    """

    batch_size = 1

    def __init__(
        self,
        address: str = "ws://127.0.0.1:8000",
        key: str = "",
        *,
        timeout: float = 10.0,
        connect_timeout: float = 60.0,
        jpeg: int = 0,
        certificate: str = "",
    ) -> None:
        """Connect, and wait until the server is ready.

        Args:
            address: "ws://host:port", "wss://host:port" with TLS, or "host:port".
            key: key of the server, if it needs one.
            timeout: seconds to wait for a reply before TimeoutError.
            connect_timeout: seconds to try to connect before ConnectionError.
            jpeg: quality, 1 to 95, of images as JPEG for slow links; 0 sends them as they are.
            certificate: file of the server's own certificate, if no authority signed it.

        Raises:
            ConnectionError: no server answers.
            PermissionError: the key is wrong or missing.
        """
        self.address = address if "://" in address else f"ws://{address}"
        self._key, self._timeout, self._connect_timeout = key, timeout, connect_timeout
        self._jpeg, self._ssl = jpeg, None
        if self.address.startswith("wss://"):
            self._ssl = ssl.create_default_context(cafile=certificate or None)
        self._lock = threading.RLock()
        self._socket: ClientConnection | None = None
        self._open = contextlib.ExitStack()  # closes the connection
        self.metadata: dict[str, Any] = {}
        self.timing: dict[str, float] = {}
        self.step = 0
        self._connect()

    @property
    def window(self) -> int:
        """W, frames of history."""
        return int(self.metadata["window"])

    @property
    def horizon(self) -> int:
        """H, actions per chunk."""
        return int(self.metadata["horizon"])

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """The keys that an observation must have: image_<camera>, …, proprio."""
        return tuple(self.metadata["observation"])

    @property
    def image_shapes(self) -> dict[str, tuple[int, ...]]:
        """{image_<camera>: (height, width, 3)} of the network's input."""
        return {k: tuple(s) for k, s in self.metadata["observation"].items() if k != "proprio"}

    @property
    def conditioning(self) -> frozenset[str]:
        """How the policy is conditioned on a task: 'language', 'goal', 'task_id'."""
        return frozenset(self.metadata["conditioning"])

    @property
    def gripper(self) -> tuple[bool, ...]:
        """Per action dimension: True for a target that must not be averaged or scaled."""
        return tuple(self.metadata["action"]["not_averaged"])

    @property
    def real_time(self) -> str:
        """How chunks continue a prefix: 'guided', 'trained', or '' if the head cannot."""
        return str(self.metadata["real_time"])

    @property
    def embodiment(self) -> SimpleNamespace:
        """The robot's name, robot, control_hz, gripper, and the layout of action and proprio."""
        names = ("robot", "control_hz", "gripper")
        layouts = {part: self.metadata[part] for part in ("action", "proprio")}
        return SimpleNamespace(
            name=self.metadata["embodiment"],
            **{name: self.metadata[name] for name in names},
            **{
                part: layout and SimpleNamespace(**{k: tuple(v) for k, v in layout.items()})
                for part, layout in layouts.items()
            },
        )

    def warmup(self) -> None:
        """Do nothing: a server compiles before it is ready."""

    def create_task(
        self,
        instruction: str | None = None,
        goal_images: Mapping[str, np.ndarray] | None = None,
        task_id: str | None = None,
    ) -> RemoteTask:
        """Return a task after the server has checked it; see `Policy.create_task`."""
        request: dict[str, Any] = {
            "prompt": instruction,
            "goal_images": {k: np.asarray(v) for k, v in (goal_images or {}).items()} or None,
            "task_id": task_id,
        }
        request = {k: v for k, v in request.items() if v is not None}
        self._call({**request, "only_check": True})
        return RemoteTask(instruction or "", request)

    def sample_actions(
        self,
        observation: Mapping[str, Any],
        task: RemoteTask,
        seed: int = 0,
        prefix: ActionPrefix | tuple[np.ndarray, int] | None = None,
    ) -> np.ndarray:
        """Return an action chunk float32 [H, A] in the robot's units; see `Policy.sample_actions`.

        prefix: the actions that the chunk must continue.

        Raises:
            ValueError: the server refuses the observation or the task.
            ServerBusyError: its queue is full, or it stops.
            ServerError: the policy failed, or its actions break a limit.
            TimeoutError: no reply in time.
            ConnectionError: the connection is lost and cannot be opened again.
        """
        sent = {k: self._image(v) if k.startswith("image_") else v for k, v in observation.items()}
        request = {**task.request, **sent, "seed": seed, "history": "client"}
        if prefix is not None and len(prefix[0]):
            actions, delay, method = ActionPrefix(*prefix)
            request["prefix"] = {"actions": np.asarray(actions, np.float32), "delay": int(delay)}
            request["prefix"] |= {"method": method} if method else {}
        reply = self._call(request)
        return np.array(reply["actions"], np.float32)

    def sample_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        tasks: Sequence[RemoteTask],
        seeds: Sequence[int],
        prefixes: Sequence[ActionPrefix | tuple[np.ndarray, int] | None] | None = None,
    ) -> np.ndarray:
        """Return action chunks float32 [B, H, A], one request after the other."""
        rows = zip(observations, tasks, seeds, prefixes or [None] * len(seeds), strict=True)
        return np.stack([self.sample_actions(*row) for row in rows])

    def close(self) -> None:
        """Close the connection; the next call opens another one."""
        with self._lock:
            self._socket = None
            self._open.close()

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _image(self, value: Any) -> Any:
        """Return an image, or a history of images, as it is sent."""
        if value is None or not self._jpeg:
            return value
        image = np.asarray(value)
        if image.dtype != np.uint8 or image.ndim not in (3, 4):
            return image  # the server names the fault
        if image.ndim == 3:
            return wire.encode_jpeg(image, self._jpeg)
        return [wire.encode_jpeg(frame, self._jpeg) for frame in image]

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the server's reply; reconnect once if the connection is lost."""
        data, start = wire.pack(request), time.perf_counter()
        with self._lock:
            try:
                reply = self._exchange(data)
            except (ConnectionClosed, OSError) as error:
                self._drop()
                if isinstance(error, TimeoutError):
                    raise TimeoutError(
                        f"no reply of {self.address} within {self._timeout:g} s"
                    ) from error
                self._connect()
                try:
                    reply = self._exchange(data)
                except (ConnectionClosed, OSError) as again:
                    self._drop()
                    raise ConnectionError(f"{self.address} closed twice: {again}") from again
            if isinstance(reply, str):
                raise _error(reply)
            message = wire.unpack(reply)
            timing = message.get("server_timing", {})
            self.timing = {**timing, "total_ms": 1e3 * (time.perf_counter() - start)}
            self.step = message.get("step", self.step)
            return message

    def _exchange(self, data: bytes) -> str | bytes:
        if self._socket is None:
            self._connect()
        assert self._socket is not None
        with GUARD.limit(self._socket.socket, self._timeout):
            self._socket.send(data)
        return self._socket.recv(timeout=self._timeout)

    def _drop(self) -> None:
        """Forget the connection without waiting for the other side."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.socket.shutdown(sockets.SHUT_RDWR)
        self.close()

    def _connect(self) -> None:
        """Connect and read the metadata; try again until the time is over."""
        begin, wait, is_said = time.monotonic(), FIRST_WAIT, False
        deadline = begin + self._connect_timeout
        headers = {"Authorization": f"Api-Key {self._key}"} if self._key else None
        while True:
            remaining = max(deadline - time.monotonic(), 0.1)
            try:
                self._socket = self._open.enter_context(
                    connect(
                        self.address,
                        additional_headers=headers,
                        compression=None,
                        max_size=wire.Limits().message,
                        open_timeout=remaining,
                        close_timeout=1,
                        ping_timeout=None,  # a call has a timeout of its own
                        ssl=self._ssl,
                    )
                )
                metadata = self._socket.recv(timeout=remaining)
                if isinstance(metadata, str):
                    raise _error(metadata)
                self.metadata = _metadata(metadata, self.address)
                self.step = int(self.metadata["step"])
                return
            except (OSError, WebSocketException, ServerBusyError, EOFError) as error:
                self._drop()
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise ConnectionError(
                        f"the certificate of {self.address} cannot be verified "
                        f"({error.verify_message}); pass certificate=, its file"
                    ) from error
                status = error.response.status_code if isinstance(error, InvalidStatus) else 0
                if status in (401, 403):
                    raise PermissionError(
                        f"{self.address} refuses the key: pass key=, the server's"
                    ) from error
                if time.monotonic() + wait >= deadline:
                    raise ConnectionError(
                        f"no policy server at {self.address} within {self._connect_timeout:g} s "
                        f"({type(error).__name__}: {error}); start one with: octolike serve RUN"
                    ) from error
                if not is_said and time.monotonic() - begin > QUIET:
                    is_said = True
                    print(
                        f"no policy server answers at {self.address} ({type(error).__name__}: "
                        f"{error}); waiting up to {self._connect_timeout:g} s",
                        file=sys.stderr,
                    )
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)


def _metadata(data: bytes, address: str) -> dict[str, Any]:
    try:
        metadata = wire.unpack(data)
    except wire.WireError:
        metadata = None
    if not isinstance(metadata, dict) or metadata.get("server") != "octolike":
        raise RuntimeError(f"{address} is no server of octolike: it sends other metadata")
    return metadata


def _error(text: str) -> Exception:
    """Return the exception of a server's error message, "kind: sentence"."""
    kind, _, sentence = text.partition(": ")
    kinds = {"busy": ServerBusyError, "invalid": ValueError, "failed": ServerError}
    return kinds[kind](sentence) if kind in kinds else ServerError(text)
