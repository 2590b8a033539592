"""A small run with random parameters, as training writes it, for tests of policies."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from octolike.config import Component, Config
from octolike.embodiment import Embodiment, Layout, Statistics
from octolike.model.network import build_network
from octolike.train import checkpoint, checkpoint_store, state
from octolike.train.checkpoint import Run
from octolike.train.state import init_params
from octolike.types import Names

W, H, A, P, SIDE = 2, 3, 7, 7, 16
RUN_NAMES = Names(("data",), ("arm",))
NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def layout(width=A):
    names = NAMES[-width:]
    gripper = tuple(n == "gripper" for n in names)
    free = tuple(not g for g in gripper)
    return Layout(names=names, units=("m",) * width, absolute=gripper, normalized=free)


def statistics(width=A):
    values = np.linspace(1, 2, width, dtype=np.float32)
    extremes = np.where(np.array(NAMES[-width:]) == "gripper", [[0], [1]], [values, values])
    low, high = extremes.astype(np.float32)
    values = {"mean": values, "std": values, "min": low, "max": high, "p01": low, "p99": high}
    return Statistics(**values, steps=9, episodes=3)


def robot(name="arm", width=A):
    return Embodiment(
        name=name,
        robot="simulated",
        control_hz=5.0,
        gripper="1 = open",
        action=layout(width),
        proprio=layout(),
        action_statistics=statistics(width),
        proprio_statistics=statistics(),
    )


def spec(language=True, goal=False):
    out = {
        "observation.image_primary": ((W, SIDE, SIDE, 3), "uint8"),
        "observation.proprio": ((W, P), "float32"),
        "observation.timestep_mask": ((W,), "bool"),
        "observation.present.image_primary": ((W,), "bool"),
        "observation.present.proprio": ((W,), "bool"),
        "action": ((W, H, A), "float32"),
        "action_mask": ((W, H, A), "bool"),
        "task.task_id": ((), "int32"),
        "task.present.task_id": ((), "bool"),
        "dataset": ((), "int32"),
        "embodiment": ((), "int32"),
    }
    if language:
        out["task.language.ids"] = out["task.language.mask"] = ((8,), "int32")
        out["task.language.mask"] = ((8,), "bool")
        out["task.present.language"] = ((), "bool")
    if goal:
        out["task.image_primary"] = ((SIDE, SIDE, 3), "uint8")
        out["task.present.image_primary"] = ((), "bool")
    return out


def run_of(robots=None, language=True, goal=False, subtask=False):
    robots = [robot()] if robots is None else robots
    run = _run(language, goal, subtask)
    names = run.names._replace(embodiments=tuple(r.name for r in robots))
    config = copy.deepcopy(run.config)
    return dataclasses.replace(run, config=config, embodiments=robots, names=names)


@functools.cache
def _run(language, goal, subtask):
    config = Config(workdir="unused")
    config.data.cameras, config.data.window, config.data.horizon = {"primary": SIDE}, W, H
    config.data.text = Component(kind="hash", length=8, vocabulary=64)
    model = config.model
    model.width, model.layers, model.attention_heads, model.mlp_width = 16, 1, 2, 16
    encoder = {"kind": "patch", "patch": 8, "width": 8}
    model.tokenizers = {
        "primary": Component(kind="image", cameras=("primary",), goal=goal, encoder=encoder),
        "proprio": Component(kind="proprio"),
    }
    if language:
        model.tokenizers["language"] = Component(kind="language", vocabulary=64, width=8)
    shapes = spec(language, goal)
    if subtask:
        del model.tokenizers["language"]
        model.tokenizers["subtask"] = Component(kind="subtask", vocabulary=64, width=8)
        shapes |= {"task.subtask.ids": ((W, 8), "int32"), "task.subtask.mask": ((W, 8), "bool")}
    network = {"kind": "mlp", "hidden": 16, "blocks": 1}
    model.heads = {"action": Component(kind="diffusion", network=network, steps=4)}
    network = build_network(dataclasses.asdict(model), shapes, RUN_NAMES)
    tree = jax.eval_shape(lambda: init_params(network, shapes, jax.random.key(0)))
    rng = np.random.default_rng(0)  # sampled here: compiling the initialisation takes seconds
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), tree)
    return Run(config, [], shapes, RUN_NAMES, params, 7)


def save_params(directory, run):
    """Save a checkpoint of the run's parameters in the trainer's format."""
    params = jax.tree.map(jnp.asarray, run.params)
    trained = state.create(params, optax.sgd(0.1), (), ema=False)
    checkpoints = checkpoint_store.CheckpointStore(directory, keep=1)
    checkpoints.save(trained.replace(step=jnp.int32(run.step)), {})
    checkpoints.close()


def save_run(directory, run):
    """Write the directory of a trained run; return the run."""
    config = dataclasses.replace(run.config, workdir=str(directory))
    checkpoint.write_run_files(config, run.embodiments, run.spec, run.names)
    save_params(directory, run)
    return dataclasses.replace(run, config=config)
