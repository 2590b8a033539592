"""Check that an episode of LIBERO, stored as octolike collect does, is read by the dataset's spec.

python written_episode.py DIR DATASET reads DIR/episode.pickle and writes the dataset to DIR.
"""

import pickle
import sys
from pathlib import Path

import numpy as np

from octolike.config import load_module
from octolike.data import open_data
from octolike.data.pipeline.decoded_episodes import decode_episodes
from octolike.data.rlds.writer import Writer
from octolike.data.specs import catalog


def main(root: Path, name: str) -> None:
    """Raise AssertionError if images, actions or statistics differ from the recorded ones."""
    recorded = pickle.loads((root / "episode.pickle").read_bytes())
    steps, images = recorded["steps"], recorded["steps"]["observation"]
    spec = catalog.find_spec(name, catalog.load_specs(""))
    writer = Writer(str(root), name, spec.version or "1.0.0", {"train": 1})
    writer.write("train", 0, [recorded])
    writer.finish()
    path = Path(__file__).parents[2] / "configs" / "libero.py"
    config = load_module(str(path)).get_config("suite=object")
    config.data.root, config.data.validation_split = str(root), ""
    (read,) = decode_episodes(spec, config.data, {"primary": 0, "wrist": 0}, episodes=1)
    np.testing.assert_array_equal(read.images["primary"], images["image"])
    np.testing.assert_array_equal(read.images["wrist"], images["wrist_image"])
    np.testing.assert_allclose(read.action[:, :6], steps["action"][:, :6], atol=1e-6)
    is_open = steps["action"][:, 6] < 0  # -1 opens LIBERO's gripper, and 1 is open here
    np.testing.assert_array_equal(read.action[:, 6] > 0.5, is_open)
    (record,) = open_data(config).embodiments
    mean = steps["action"][:, :6].mean(axis=0)
    np.testing.assert_allclose(record.action_statistics.mean[:6], mean, atol=1e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
