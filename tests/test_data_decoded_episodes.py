"""Decoded episodes come from the right root, from all shards, and in the stored size."""

import dataclasses
import json

import data_fakes
import numpy as np

from octolike.data.pipeline import decoded_episodes
from octolike.data.rlds.writer import Writer
from octolike.data.specs import catalog

KEY = "image_primary"


def take(config, spec=None, cameras=None, episodes=4):
    cameras = {"primary": data_fakes.SIDE} if cameras is None else cameras
    spec = spec or catalog.find_spec("fake")
    return decoded_episodes.decode_episodes(spec, config.data, cameras, episodes=episodes)


def test_a_dataset_is_read_from_a_root_of_its_own(tmp_path):
    data_fakes.write_numbered(tmp_path / "here", "fake", [3, 3])
    data_fakes.write_numbered(tmp_path / "there", "tabletop", [4, 4, 4])
    config = data_fakes.config(tmp_path / "here", "fake,tabletop")
    config.data.roots = {"tabletop": str(tmp_path / "there")}
    result = decoded_episodes.decode_mix(config.data, episodes=9)
    assert [(spec.name, len(decoded)) for spec, decoded in result] == [("fake", 2), ("tabletop", 3)]


def test_an_empty_shard_is_skipped(tmp_path):
    episodes = [data_fakes.numbered(i, 3, [KEY, "image_wrist"]) for i in range(2)]
    writer = Writer(str(tmp_path), "fake", "1.0.0", {"train": 2})
    for shard, part in enumerate((episodes, episodes)):
        writer.write("train", shard, part)
    path = writer.finish() / "dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"][0]["shardLengths"][0] = "0"  # as other writers leave it; octolike does not
    path.write_text(json.dumps(info))
    next(path.parent.glob("*-00000-of-*")).write_bytes(b"")
    result = take(data_fakes.config(tmp_path))
    assert [x.action[0, 0] for x in result] == [0, 1]


def test_images_have_the_stored_size_for_side_zero(tmp_path):
    data_fakes.write_numbered(tmp_path, "fake", [3])
    config = data_fakes.config(tmp_path)
    (episode,) = take(config, cameras={"primary": 0})
    assert episode.images["primary"].shape == (3, data_fakes.SIDE, data_fakes.SIDE, 3)
    np.testing.assert_array_equal(episode.images["primary"], take(config)[0].images["primary"])
    blue_first = dataclasses.replace(catalog.find_spec("fake"), bgr=("primary",))
    (swapped,) = take(config, blue_first, {"primary": 0})
    np.testing.assert_array_equal(swapped.images["primary"][..., ::-1], episode.images["primary"])
