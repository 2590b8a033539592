"""A robot with one of the run's two cameras trains and acts; the other camera is masked."""

import numpy as np
import pytest

from octolike.config import Config, ConfigError
from octolike.data import open_data
from octolike.data.rlds.synthetic import write_fake_dataset


def config(root, **changes) -> Config:
    result = Config(workdir=str(root / "run"))
    data = result.data
    data.root, data.mix, data.cache = str(root), "fake", str(root)
    data.cameras, data.batch_size, data.pool = {"primary": 32, "overhead": 32}, 8, 16
    for name, value in changes.items():
        setattr(data, name, value)
    return result


def test_a_camera_that_no_dataset_has_is_masked_by_a_setting(tmp_path):
    write_fake_dataset(tmp_path)
    with pytest.raises(ConfigError, match=r"'overhead'.*data\.absent_cameras=overhead"):
        open_data(config(tmp_path))
    data = open_data(config(tmp_path, absent_cameras=("overhead",)))
    batch = next(data.train())["observation"]
    assert batch["present"]["image_primary"].all()
    assert not batch["present"]["image_overhead"].any()
    assert not np.asarray(batch["image_overhead"]).any()
