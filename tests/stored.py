"""Datasets with arbitrary TFDS features, written as TFDS writes them: other people's layouts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.data.specs.spec import DatasetSpec
from octolike.embodiment import Layout

VERSION, WIDTH = "1.0.0", 3
ACTION = tfds.features.Tensor(shape=(WIDTH,), dtype=np.float32)
FLAG = tfds.features.Scalar(np.bool_)


def spec(name: str, **fields: Any) -> DatasetSpec:
    """Return a spec with three actions, one camera and no proprio."""
    defaults: dict[str, Any] = {
        "cameras": {"primary": "image"},
        "action": Layout(
            names=("x", "y", "z"),
            units=("",) * 3,
            absolute=(False,) * 3,
            normalized=(True,) * 3,
        ),
        "proprio": None,
        "action_from": ("action",),
        "gripper": "",
        "robot": "a test",
    }
    return DatasetSpec(name=name, version=VERSION, **(defaults | fields))


def picture(rng: np.random.Generator, side: int = 8) -> np.ndarray:
    """Return a noisy image uint8 [side, side, 3]."""
    return rng.integers(1, 255, (side, side, 3)).astype(np.uint8)


def example(
    steps: int, observation: Any, *, first: bool = True, seed: int = 0, **more: Any
) -> dict[str, Any]:
    """Return an episode; observation: function of the step and a generator; more: step fields."""
    rng = np.random.default_rng(seed)
    rows = []
    for t in range(steps):
        row = {"action": np.full(WIDTH, t, np.float32), "observation": observation(t, rng)}
        rows.append(row | ({"is_first": t == 0} if first else {}) | more)
    return {"steps": rows}


def write(
    root: Path,
    name: str,
    observation: Any,
    splits: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    *,
    first: bool = True,
    **fields: Any,
) -> Path:
    """Write {split: shards of episodes} and return the directory.

    observation: the feature of steps.observation; fields: further features of the steps.
    """
    directory = root / name / VERSION
    directory.mkdir(parents=True)
    steps = {"action": ACTION, "observation": observation, **fields}
    steps |= {"is_first": FLAG} if first else {}
    features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(steps)})
    infos = []
    for split, shards in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory,
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            dataset_name=name,
            split=split,
            filetype_suffix="tfrecord",
        )
        size = 0
        for number, episodes in enumerate(shards):
            path = template.sharded_filepath(shard_index=number, num_shards=len(shards))
            with tf.io.TFRecordWriter(str(path)) as file:
                for episode in episodes:
                    record = features.serialize_example(episode)
                    file.write(record)
                    size += len(record)
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(x) for x in shards],
                num_bytes=size,
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=infos,
        version=VERSION,
        check_data=False,
    )
    return directory
