"""Fakes for the tests of octolike.train: a tiny network, batches, a data source, a robot."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octolike.config import Config
from octolike.embodiment import Embodiment, Layout
from octolike.types import Names, batch_share, batch_spec, unflatten

HORIZON, ACTION, BATCH, SIDE = 2, 3, 4, 6


class Tiny(nn.Module):
    """Predicts actions from images, with dropout; the loss is noisy, so that random keys matter."""

    width: int = 8

    @nn.compact
    def __call__(self, batch, *, train):
        predicted = self.predict(batch["observation"], train)
        noise = 0.1 * jax.random.normal(self.make_rng("noise"), predicted.shape)
        error = jnp.square(predicted + noise - batch["action"])
        per_example = error.mean(axis=(1, 2, 3))
        return per_example.mean(), {"loss_per_example": per_example}

    @nn.compact
    def sample_actions(self, observation, task, dims=None, embodiment=None):
        return self.predict(observation, train=False)[:, -1]

    @nn.compact
    def predict(self, observation, train):
        images = observation["image_primary"].astype(jnp.float32) / 255
        x = images.reshape(*images.shape[:2], -1)
        x = nn.LayerNorm(name="norm")(nn.swish(nn.Dense(self.width, name="stem")(x)))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        x = nn.Dense(HORIZON * ACTION, name="head")(x)
        return x.reshape(*images.shape[:2], HORIZON, ACTION)


class Stream:
    """Endless batches, each a pure function of its index; `indices` lists those it has returned."""

    def __init__(self, start=None, poison=None):
        self.index = 0 if start is None else start["index"]
        self.poison, self.indices = poison, []

    def __iter__(self):
        return self

    def __next__(self):
        self.indices.append(self.index)
        batch = make_batch(self.index)
        if self.index == self.poison:
            batch["action"][0] = np.nan
        self.index += 1
        return batch

    def state(self):
        return {"index": self.index}

    def feedback(self, datasets, tasks):
        self.fed = datasets, tasks

    def memory(self):
        return 2**20 * self.index

    def state_at(self, position):
        return position

    def close(self):
        self.index = None


def make_batch(seed: int, size: int = BATCH, window: int = 2) -> dict:
    """Return a random batch of two datasets; every action is valid."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, window, SIDE, SIDE, 3), np.uint8)
    return unflatten(
        {
            "observation.image_primary": image,
            "observation.timestep_mask": np.ones((size, window), bool),
            "observation.present.image_primary": np.ones((size, window), bool),
            "task.image_primary": image[:, 0].copy(),
            "task.present.image_primary": np.ones(size, bool),
            "task.task_id": np.zeros(size, np.int32),
            "action": rng.normal(size=(size, window, HORIZON, ACTION)).astype(np.float32),
            "action_mask": np.ones((size, window, HORIZON, ACTION), bool),
            "dataset": np.arange(size, dtype=np.int32) % 2,
            "embodiment": np.zeros(size, np.int32),
        }
    )


@contextlib.contextmanager
def compiled_once(directory):
    """Cache compiled functions in a directory, for all runs with the same computations."""
    names = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


SPEC = batch_spec(make_batch(0))
NAMES = Names(datasets=("one", "two"), embodiments=("fake",))


def robot() -> Embodiment:
    """Return an embodiment of three action dimensions, the last one a gripper."""
    layout = Layout(
        names=("dx", "dy", "gripper"),
        units=("m", "m", ""),
        absolute=(False, False, True),
        normalized=(True, True, False),
    )
    return Embodiment(
        name="fake", robot="none", control_hz=5.0, gripper="1 = open", action=layout, proprio=None
    )


def config(workdir, steps: int = 6, **train) -> Config:
    """Return the config of a run of `steps` steps; keywords are fields of `train`."""
    config = Config(workdir=str(workdir))
    config.data.batch_size = BATCH
    config.optim.warmup, config.optim.learning_rate = 0, 1e-2
    config.train.steps, config.train.validate_every = steps, 0
    config.train.log_every = 2
    config.train.augment.brightness = 0.1
    config.train.augment.crop_scale = (0.5, 1.0)
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


class FakeSource:
    """A DataSource of fake batches; `streams` lists the training streams it has opened."""

    def __init__(self, stream=Stream, validation=None, names=NAMES, spec=SPEC, embodiments=None):
        self.names, self.spec, self.embodiments = names, spec, embodiments or [robot()]
        self.streams, self._stream, self._validation = [], stream, validation or {}

    def train(self, start=None, process=(0, 1)):
        self.streams.append(self._stream(start))
        return self.streams[-1]

    def validation(self, process=(0, 1)):
        def shares(loader):
            return lambda: (batch_share(batch, process) for batch in loader())

        return {name: shares(loader) for name, loader in self._validation.items()}

    def describe(self):
        return "fake batches"
