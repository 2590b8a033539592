"""A policy in numpy that is as slow as a test wants, and a server of it in a thread."""

import asyncio
import contextlib
import subprocess
import threading
import time
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
from policy_fakes import NAMES, P, robot

from octolike.policy.execution import NonFiniteActionsError
from octolike.policy.serving.options import ServeOptions
from octolike.policy.serving.server import PolicyServer

SIDE, W, H, A = 16, 2, 4, 7


class NumpyPolicy:
    """Actions [H, A] that state their request: seed, mean of the image, number of frames.

    wait: an event that a call waits for, so that a test decides when it ends. seconds: its
    duration.
    """

    def __init__(self, seconds=0.0, step=7, window=W, wait=None):
        self.seconds, self.step, self.window, self.horizon = seconds, step, window, H
        self.wait = wait
        self.started = threading.Event()
        self.embodiment = robot()
        self.observation_keys = ("image_primary", "proprio")
        self.image_shapes = {"image_primary": (SIDE, SIDE, 3)}
        self.conditioning, self.real_time = frozenset({"language"}), "guided"
        self.config = types.SimpleNamespace(
            data=types.SimpleNamespace(resize="area"), evaluate=types.SimpleNamespace(execute=2)
        )
        self.batches, self.threads, self.warm = [], set(), False
        self.broken_seed = None

    @property
    def metadata(self):
        action = {"names": list(NAMES), "units": ["m"] * A, "absolute": [False] * A}
        return {
            "step": self.step,
            "embodiment": "arm",
            "robot": "simulated",
            "control_hz": 5.0,
            "gripper": "1 = open",
            "action": {**action, "not_averaged": [False] * A},
            "proprio": {"names": list(NAMES), "units": ["m"] * P},
            "observation": {"image_primary": [SIDE, SIDE, 3], "proprio": [P]},
            "goal_images": {},
            "conditioning": ["language"],
            "task_ids": [],
            "window": self.window,
            "horizon": H,
            "real_time": "guided",
        }

    def warmup(self):
        self.warm = True

    def create_task(self, instruction=None, goal_images=None, task_id=None):
        if not instruction:
            raise ValueError("the task lacks an instruction")
        return types.SimpleNamespace(inputs={"length": np.float32(len(instruction))})

    def inputs(self, observations, tasks):
        (observation,), (task,) = observations, tasks
        for key in observation:
            if key not in (*self.observation_keys, "timestep_mask"):
                raise ValueError(f"unknown key of the observation: {key!r}")
        image = np.asarray(observation["image_primary"])
        if image.dtype != np.uint8 or image.ndim not in (3, 4):
            raise ValueError(f"image_primary is {image.dtype} {list(image.shape)}; expected uint8")
        proprio = np.asarray(observation["proprio"])
        if proprio.shape[-1] != P or not np.isfinite(proprio).all():
            raise ValueError("proprio has values that are not finite, or another width")
        frames = np.sum(observation.get("timestep_mask", np.ones(image.shape[:-3])))
        values = [image.mean(), frames, proprio.reshape(-1, P)[-1, 0]]
        return {"values": np.array([values], np.float32)}, {"length": task.inputs["length"][None]}

    def states(self, observations):
        return None

    def encode_prefixes(self, prefixes, states):
        return prefixes if any(prefixes) else None

    def sample_normalized(self, observation, task, seeds, prefix=None):
        self.batches.append(len(seeds))
        self.threads.add(threading.get_ident())
        self.started.set()
        if self.wait is not None:
            assert self.wait.wait(10)
        time.sleep(self.seconds)
        if self.broken_seed in seeds:
            bad = [i for i, seed in enumerate(seeds) if seed == self.broken_seed]
            raise NonFiniteActionsError("sampled actions that are not finite", bad)
        values = np.stack([observation["values"][:, i] for i in range(3)], axis=-1)
        rows = np.concatenate([np.array(seeds, np.float32)[:, None], values], axis=-1)
        rows = np.pad(np.concatenate([rows, task["length"][:, None]], -1), ((0, 0), (0, A - 5)))
        return np.repeat(rows[:, None], H, axis=1) + np.arange(H)[:, None] * 0.01

    def unnormalize(self, actions, states=None):
        return actions.astype(np.float32)

    def with_params(self, params, step):
        return NumpyPolicy(self.seconds, step, self.window, self.wait)


@contextlib.contextmanager
def serving(policy, watcher=None, **options):
    """Yield a ready server on a free port; it is stopped at the end."""
    lines = []
    options = ServeOptions(**{"port": 0, "drain_seconds": 5.0, **options})
    server = PolicyServer(policy, options, watcher, lines.append)
    server.lines = lines
    errors = []

    def run():
        try:
            asyncio.run(server.run())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    server.thread = thread
    try:
        until(lambda: errors or any(line.startswith("ready") for line in lines), 120)
        if errors:
            raise errors[0]
        yield server
    finally:
        server.stop()
        thread.join(15)
        assert not thread.is_alive(), "the server does not stop"


def until(condition, seconds=10.0):
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


def get(server, path, headers=None, scheme="http", context=None):
    """Return (status, text) of a plain request."""
    request = urllib.request.Request(
        f"{scheme}://127.0.0.1:{server.port}{path}", headers=headers or {}
    )
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def observation(value=0, frames=None):
    lead = () if frames is None else (frames,)
    return {
        "image_primary": np.full((*lead, SIDE, SIDE, 3), value, np.uint8),
        "proprio": np.zeros((*lead, P), np.float32),
    }


def self_signed(directory):
    """Write a certificate of localhost and its key; return their paths."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    try:
        result = subprocess.run(
            [*command, "-keyout", key, "-out", certificate], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert result.returncode == 0, result.stderr
    return certificate, key
