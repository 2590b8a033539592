"""Synthetic episodes of the Open X-Embodiment datasets, stored like the real ones.

`oxe_schemas.json` holds the raw features of each dataset of `oxe`: nested actions, compressed
strings, instructions as code points, encoded and plain depth. The contents are synthetic: smooth
motions, a gripper that closes and opens, unit quaternions, in the ranges that the expressions of
the spec expect. If no source states the width of a state, it is the smallest that the spec can
read; "assumed" marks datasets without a public list of features.
"""

from __future__ import annotations

import ast
import json
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.config import ConfigError, unknown
from octolike.data.rlds.fields import IS_FIRST, IS_LAST, IS_TERMINAL, OBSERVATION, REWARD, STEPS
from octolike.data.specs import expressions
from octolike.data.specs.catalog import find_spec
from octolike.data.specs.spec import DatasetSpec
from octolike.types import unflatten

WORDS = ("pick up the red cup", "push the blue block left", "open the drawer", "wipe the table")
VERSION = "1.0.0"  # of a dataset if its spec states none


@cache
def schemas() -> dict[str, Any]:
    """Return the raw features per dataset: {"steps": {path: "dtype width"}, "images": {...}}."""
    return json.loads(Path(__file__).with_name("oxe_schemas.json").read_text(encoding="utf-8"))


def write_fake_oxe(
    root: str | Path,
    name: str,
    *,
    episodes: int = 3,
    val: int = 0,
    shards: int = 1,
    steps: int = 6,
    side: int = 16,
    seed: int = 0,
) -> Path:
    """Write a synthetic copy of one dataset under `root` and return its directory.

    episodes: of the split train; val: of the split val, omitted if 0. An episode has `steps` to
    1.5 · `steps` steps after thinning, and images with a longer side of at most `side`. Raises
    ConfigError for a dataset without a schema.
    """
    if name not in schemas():
        raise ConfigError(unknown("dataset with known raw features", name, schemas()))
    spec, schema = find_spec(name), schemas()[name]
    directory = Path(root) / spec.name / (spec.version or VERSION)
    directory.mkdir(parents=True)
    features = _features(schema, side)
    infos = []
    for split, count, files in (("train", episodes, shards), ("val", val, 1)):
        if not count:
            continue
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory,
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            dataset_name=spec.name,
            split=split,
            filetype_suffix="tfrecord",
        )
        lengths, size = [], 0
        for shard in range(files):
            path = template.sharded_filepath(shard_index=shard, num_shards=files)
            members = range(shard, count, files)
            with tf.io.TFRecordWriter(str(path)) as file:
                for i in members:
                    rng = np.random.default_rng((seed, split == "val", i))
                    example = fake_oxe_episode(rng, spec, steps=steps, side=side)
                    record = features.serialize_example(example)
                    file.write(record)
                    size += len(record)
            lengths.append(len(members))
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=infos,
        version=directory.name,
        check_data=False,
    )
    return directory


def fake_oxe_episode(
    rng: np.random.Generator, spec: DatasetSpec, *, steps: int, side: int
) -> dict[str, Any]:
    """Return one raw episode, with its steps as a list, as TFDS encodes it."""
    schema = schemas()[spec.name]
    length = spec.every * int(rng.integers(steps, steps + steps // 2 + 1))
    roles = _roles(spec, schema)
    texts = list(rng.permutation(WORDS))
    columns: dict[str, Any] = {}
    for path, kind in schema["steps"].items():
        if path in spec.language_paths:
            columns[path] = _texts(
                texts[spec.language_paths.index(path) % len(texts)], kind, length
            )
        else:
            columns[path] = _numbers(rng, path, kind, length, roles)
    for key, kind in schema["images"].items():
        columns[f"{OBSERVATION}.{key}"] = _frames(rng, kind, length, side)
    last = np.arange(length) == length - 1
    columns |= {IS_FIRST: np.arange(length) == 0, IS_LAST: last, IS_TERMINAL: last}
    columns[REWARD] = last.astype(np.float32)
    step_list = [unflatten({k: column[t] for k, column in columns.items()}) for t in range(length)]
    return {STEPS: step_list} | dict.fromkeys(schema.get("episode", {}), True)


def _features(schema: Mapping[str, Any], side: int) -> tfds.features.FeaturesDict:
    leaves = {path: _feature(kind) for path, kind in schema["steps"].items()}
    for key, kind in schema["images"].items():
        leaves[f"{OBSERVATION}.{key}"] = _image(kind, side)
    for key in (IS_FIRST, IS_LAST, IS_TERMINAL):
        leaves[key] = tfds.features.Scalar(np.bool_)
    leaves[REWARD] = tfds.features.Scalar(np.float32)
    flags = {k: tfds.features.Scalar(np.bool_) for k in schema.get("episode", {})}
    return tfds.features.FeaturesDict({STEPS: tfds.features.Dataset(unflatten(leaves))} | flags)


def _feature(kind: str) -> Any:
    name, _, width = kind.partition(" ")
    if name == "string":
        return tfds.features.Text()
    if name == "zlib":
        return tfds.features.Tensor(shape=(), dtype=np.str_)
    shape = (int(width),) if width else ()
    return tfds.features.Tensor(shape=shape, dtype=np.dtype(name))


def _image(kind: str, side: int) -> Any:
    dtype, shape, encoding = _picture(kind, side)
    if encoding == "array":
        return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype))
    return tfds.features.Image(shape=shape, dtype=np.dtype(dtype), encoding_format=encoding)


def _picture(kind: str, side: int) -> tuple[str, tuple[int, ...], str | None]:
    """Return (dtype, reduced shape, encoding) of an image feature."""
    dtype, size, *encoding = kind.split()
    height, width, *channels = map(int, size.split("x"))
    scale = min(1.0, side / max(height, width))
    small = max(2, round(height * scale)), max(2, round(width * scale))
    return dtype, (*small, *channels), encoding[0] if encoding else None


def _roles(spec: DatasetSpec, schema: Mapping[str, Any]) -> dict[str, list[tuple[str, slice]]]:
    """Return the roles of the columns that the spec reads: {field: [(role, columns)]}.

    Roles: "gripper" (a state), "events" (its changes), "quaternion".
    """
    roles: dict[str, list[tuple[str, slice]]] = {}
    blank = {path: _blank(kind) for path, kind in schema["steps"].items()}
    steps = unflatten(blank | {IS_FIRST: np.zeros(2)})
    for parts, layout in ((spec.action_from, spec.action), (spec.proprio_from, spec.proprio)):
        start = 0
        for part in parts:
            dims = expressions.evaluate((part,), steps).shape[1]
            names, start = layout.names[start : start + dims], start + dims
            for field, columns in _reads(part):
                low = columns.start or 0
                if "quat_to_euler" in part:
                    roles.setdefault(field, []).append(("quaternion", columns))
                elif "qx" in names and low >= 0:
                    low += names.index("qx")
                    roles.setdefault(field, []).append(("quaternion", slice(low, low + 4)))
                elif all("gripper" in name for name in names):
                    role = "events" if "rel2abs" in part else "gripper"
                    roles.setdefault(field, []).append((role, columns))
    return roles


def _reads(part: str) -> list[tuple[str, slice]]:
    """Return the fields that an expression reads, with their columns."""
    fields, inner = [], set()
    for node in ast.walk(ast.parse(part, mode="eval").body):  # outer nodes come first
        sliced = isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice)
        path = _dotted(node.value if sliced else node)
        if path and id(node) not in inner:
            bounds = (node.slice.lower, node.slice.upper) if sliced else (None, None)
            fields.append((path, slice(*(b and ast.literal_eval(b) for b in bounds))))
        if sliced or path:
            inner |= {id(n) for n in ast.walk(node)}
    return fields


def _dotted(node: ast.AST) -> str:
    """Return the path under steps of a node of an expression; "" if it is not a field."""
    if isinstance(node, ast.Name) and node.id in expressions.ROOTS:
        return node.id
    if isinstance(node, ast.Attribute):
        parent, key = _dotted(node.value), node.attr
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        parent, key = _dotted(node.value), node.slice.value
    else:
        return ""
    return f"{parent}.{key}".removeprefix("step.") if parent else ""


def _blank(kind: str) -> np.ndarray:
    """Return two steps of a field, all zero."""
    name, _, width = kind.partition(" ")
    if name == "zlib":
        return np.array([_deflate(np.zeros(int(width)))] * 2, object)
    return np.zeros((2, int(width or 1)))


def _deflate(x: np.ndarray) -> bytes:
    return zlib.compress(np.asarray(x, "<f4").tobytes())


def _numbers(
    rng: np.random.Generator,
    path: str,
    kind: str,
    length: int,
    roles: Mapping[str, list[tuple[str, slice]]],
) -> list[Any] | np.ndarray:
    """Return a field over the steps: smooth, except for the columns in `roles`."""
    name, _, width = kind.partition(" ")
    if name == "string":
        return ["none"] * length
    n = int(width or 1)
    phase, speed = rng.uniform(0, 2 * np.pi, n), rng.uniform(0.2, 0.6, n)
    x = 0.3 * np.sin(phase + speed * np.arange(length)[:, None])
    # One closing and one opening, both inside the episode.
    close, release = np.sort(rng.choice(np.arange(1, length), 2, replace=False))
    t = np.arange(length)
    for role, columns in roles.get(path, []):
        if role == "quaternion":
            x[:, columns] += rng.normal(size=4)
            x[:, columns] /= np.linalg.norm(x[:, columns], axis=1, keepdims=True)
        elif role == "events":
            x[:, columns] = ((t == close) * 1.0 - (t == release))[:, None]
        else:
            x[:, columns] = ((close <= t) & (t < release))[:, None]
    if name == "zlib":
        return [_deflate(row) for row in x]
    if name == "bool":
        x = x > 0.5
    elif name.startswith("int"):
        x = x.round()
    x = x.astype(name)
    return x if width else x[:, 0]


def _texts(words: str, kind: str, length: int) -> list[Any]:
    if kind == "string":
        return [words] * length
    points = np.zeros(int(kind.split()[1]), np.int32)
    points[: len(words)] = list(map(ord, words))
    return [points] * length


def _frames(rng: np.random.Generator, kind: str, length: int, side: int) -> list[np.ndarray]:
    """Return images that change over time; depth is never 0."""
    dtype, shape, _ = _picture(kind, side)
    slope = np.add.outer(np.arange(shape[0]), np.arange(shape[1]))
    base = rng.uniform(40, 120) + 3 * slope.reshape(*slope.shape, *([1] * (len(shape) - 2)))
    frames = [np.broadcast_to(base + 5 * t, shape) for t in range(length)]
    if dtype == "float32":
        return [np.float32(f / 100) for f in frames]
    return [np.clip(f, 1, 255).astype(dtype) * (4 if dtype != "uint8" else 1) for f in frames]
