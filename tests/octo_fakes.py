"""Tiny checkpoints in Octo's layout with random parameters, for tests of the import."""

import copy
import dataclasses
import json
import pathlib

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

from octolike.model.network import build_network
from octolike.octo_import import importer, octo_config
from octolike.train import state
from octolike.types import Names, batch_spec

WINDOW, HORIZON, ACTION, PROPRIO, SIDE = 2, 3, 4, 5, 16
STEP = 7


def spec(name: str, **kwargs) -> dict:
    """Return a component as Octo stores it."""
    return {"module": "octo.somewhere", "name": name, "args": [], "kwargs": kwargs}


def stem(**kwargs) -> dict:
    """Return a stem of two convolutions, which makes 2 × 2 tokens of 16 × 16 pixels."""
    two = {"kernel_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1]}
    return spec("SmallStem16", patch_size=32, features=[32, 32], num_features=8, **two, **kwargs)


def image(*patterns: str, **kwargs) -> dict:
    return spec("ImageTokenizer", obs_stack_keys=list(patterns), **{"encoder": stem(), **kwargs})


def config(**model) -> dict:
    """Return a config.json; keywords replace entries of its model."""
    sizes = {"num_layers": 1, "mlp_dim": 32, "num_attention_heads": 2, "dropout_rate": 0.0}
    rates = {"attention_dropout_rate": 0.0, "add_position_embedding": False}
    action = spec("MSEActionHead", readout_key="readout_action", use_map=False)
    return {
        "model": {
            "observation_tokenizers": {"primary": image("image_primary")},
            "task_tokenizers": {},
            "heads": {"action": sized(action)},
            "readouts": {"action": 1},
            "token_embedding_size": 16,
            "transformer_kwargs": sizes | rates,
            "max_horizon": 4,
            "repeat_task_tokens": False,
            "use_correct_attention": True,
            **model,
        },
        "window_size": WINDOW,
    }


def sized(head: dict) -> dict:
    """Return the head with the sizes of `batch`."""
    head["kwargs"] |= {"action_horizon": HORIZON, "action_dim": ACTION}
    return head


def lowdim(**kwargs) -> dict:
    return spec("LowdimObsTokenizer", obs_keys=["proprio"], **kwargs)


def head(name: str, **kwargs) -> dict:
    return sized(spec(name, readout_key="readout_action", **kwargs))


def batch(cameras=("primary",), size: int = 1, seed: int = 0) -> dict:
    """Return a batch of Octo with proprio, goal images and everything present."""
    rng = np.random.default_rng(seed)
    shapes = {"timestep": (), "proprio": (PROPRIO,)}
    images = {
        f"image_{c}": rng.integers(0, 256, (size, WINDOW, SIDE, SIDE, 3), np.uint8) for c in cameras
    }
    observation = {
        k: rng.normal(size=(size, WINDOW, *s)).astype(np.float32) for k, s in shapes.items()
    }
    observation |= images
    there = {k: np.ones((size, WINDOW), bool) for k in observation}
    goals = {k: x[:, -1].copy() for k, x in images.items()}
    chunk = (size, WINDOW, HORIZON, ACTION)
    return {
        "observation": {
            **observation,
            "timestep_pad_mask": np.ones((size, WINDOW), bool),
            "pad_mask_dict": there,
        },
        "task": {**goals, "pad_mask_dict": {k: np.ones(size, bool) for k in goals}},
        "action": rng.normal(size=chunk).astype(np.float32),
        "action_pad_mask": np.ones(chunk, bool),
    }


def statistics() -> dict:
    """Return dataset_statistics.json of two datasets; the last action dimension is a gripper."""

    def vector(width: int, shift: float) -> dict:
        mean, std = shift + np.arange(width) / 10, 0.5 + np.arange(width) / 10
        ends = {"min": mean - 3, "max": mean + 3, "p01": mean - 2, "p99": mean + 2}
        return {k: v.tolist() for k, v in {"mean": mean, "std": std, **ends}.items()}

    def dataset(shift: float) -> dict:
        mask = [True] * (ACTION - 1) + [False]
        counts = {"num_transitions": 90, "num_trajectories": 3}
        action = {**vector(ACTION, shift), "mask": mask}
        gripper = {"mean": 0.5, "std": 0.5, "min": 0.0, "max": 1.0, "p01": 0.0, "p99": 1.0}
        for name, value in gripper.items():
            action[name][-1] = value
        return {"action": action, "proprio": vector(PROPRIO, shift), **counts}

    return {"one": dataset(0.0), "two": dataset(1.0)}


def params(stored: dict, example: dict) -> dict[str, np.ndarray]:
    """Return random parameters for a config: {Octo's slash path: array}, none zero.

    The paths come from the table that is tested; the golden checkpoints hold that table to Octo's.
    """
    translation = octo_config.translate(stored, example)
    model = dataclasses.asdict(translation.config.model)
    shapes = batch_spec(importer.to_batch(example, translation))
    network = build_network(model, shapes, Names(("one",), ("one",)))
    return leaves_of(
        stored, jax.eval_shape(lambda: state.init_params(network, shapes, jax.random.key(0)))
    )


def leaves_of(stored: dict, tree: dict) -> dict[str, np.ndarray]:
    """Return random parameters, {Octo's slash path: array}, of a network with these shapes."""
    rng, out = np.random.default_rng(0), {}
    for path, x in flax.traverse_util.flatten_dict(tree, sep="/").items():
        source = importer.source_paths(path)[0]
        for name, tokenizer in stored["model"]["observation_tokenizers"].items():
            if f"observation_tokenizers_{name}/" in source and "encoder" in tokenizer["kwargs"]:
                source = source.replace("*", tokenizer["kwargs"]["encoder"]["name"])
        middle = 1.0 if path.endswith("scale") else 0.0
        out[source] = (middle + 0.2 * rng.normal(size=x.shape)).astype(np.float32)
    return out


def write(
    folder: pathlib.Path,
    stored: dict | None = None,
    example: dict | None = None,
    numbers: dict | None = None,
    leaves: dict[str, np.ndarray] | None = None,
    *,
    orbax: bool = False,
) -> pathlib.Path:
    """Write a checkpoint as Octo does, with flax's file of parameters or as orbax alone has it."""
    stored = config() if stored is None else stored
    example = batch() if example is None else example
    leaves = params(copy.deepcopy(stored), example) if leaves is None else leaves
    tree = flax.traverse_util.unflatten_dict(leaves, sep="/")
    where = folder / str(STEP) / "default"
    where.parent.mkdir(parents=True)
    if orbax:
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        checkpointer.save(where.absolute(), args=ocp.args.PyTreeSave(tree))
    else:
        where.mkdir()
        (where / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    (folder / "config.json").write_text(json.dumps(stored))
    (folder / "example_batch.msgpack").write_bytes(flax.serialization.msgpack_serialize(example))
    numbers = statistics() if numbers is None else numbers
    (folder / "dataset_statistics.json").write_text(json.dumps(numbers))
    return folder


def import_run(tmp_path: pathlib.Path, *parts, **kwargs) -> importer.ImportedRun:
    """Write a checkpoint into tmp_path/octo and import it as tmp_path/run."""
    write(tmp_path / "octo", *parts)
    return importer.import_checkpoint(tmp_path / "octo", tmp_path / "run", **kwargs)
