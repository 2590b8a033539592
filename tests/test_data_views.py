"""Interchangeable cameras: drawn per episode and epoch, the same after a resume and on any host."""

import numpy as np
import pytest
import stored
import tensorflow_datasets as tfds
from data_fakes import opened

from octolike import types
from octolike.config import ConfigError
from octolike.data.specs import catalog

CAMERAS = {"primary": "left", "secondary": "right", "wrist": "hand"}
NUMBERS = dict(zip(CAMERAS, (50, 120, 190), strict=True))  # the blue of the images of each
EPISODES, STEPS, WITHOUT = 40, 4, 3  # the first episodes lack the secondary camera
SETTINGS = {"batch_size": 16, "window": 2, "goal": "uniform", "pool": 16, "lanes": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return the directory of a dataset with views and the number of the episode in its images."""
    root = tmp_path_factory.mktemp("views")
    image = tfds.features.Image(shape=(8, 8, 3), encoding_format="png")

    def observed(episode, t):
        pixels = np.full((8, 8, 3), 9, np.uint8)
        pixels[..., 0], pixels[..., 1] = episode, t
        result = {}
        for camera, key in CAMERAS.items():
            lacking = camera == "secondary" and episode < WITHOUT
            result[key] = pixels * (not lacking)
            result[key][..., 2] = 0 if lacking else NUMBERS[camera]
        return result

    episodes = [
        stored.example(STEPS, lambda t, _, e=e: observed(e + 1, t)) for e in range(-1, EPISODES - 1)
    ]
    features = dict.fromkeys(CAMERAS.values(), image)
    stored.write(root, "stands", features, {"train": [episodes], "val": [episodes[:8]]})
    spec = stored.spec("stands", cameras=CAMERAS, views=("primary", "secondary"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(catalog.DATASETS, "stands", spec)
        yield root


def an_epoch(data, process=(0, 1), start=None, count=EPISODES * STEPS // 16):
    stream = data.train(start, process)
    batches = [next(stream) for _ in range(count)]
    state = stream.state()
    stream.close()
    return batches, state


def drawn(batches, camera="primary"):
    """Return {episode: numbers of the cameras that it shows}, in windows and goals alike."""
    numbers_of = {}
    for batch in batches:
        pictures = batch["observation"][f"image_{camera}"][:, :, 0, 0]
        goals = batch["task"][f"image_{camera}"][:, 0, 0]
        for window, goal in zip(pictures, goals, strict=True):
            for episode, _, number in (*window.tolist(), goal.tolist()):
                if number:
                    numbers_of.setdefault(episode, set()).add(number)
    return numbers_of


def test_each_episode_shows_one_of_its_views_in_an_epoch(root):
    data = opened(root, "stands", draw_views=True, cameras={"primary": 8}, **SETTINGS)
    line = "views: stands/train: primary shows primary or secondary, drawn per episode and epoch, "
    assert f"{line}in {EPISODES - WITHOUT} of {EPISODES} episodes" in data.describe()
    first, state = an_epoch(data)
    second, _ = an_epoch(data, start=state)
    epochs = [drawn(first), drawn(second)]
    for numbers_of in epochs:
        assert len(numbers_of) == EPISODES
        assert all(len(numbers) == 1 for numbers in numbers_of.values())
        assert all(numbers_of[e] == {NUMBERS["primary"]} for e in range(WITHOUT))
        swapped = sum(numbers == {NUMBERS["secondary"]} for numbers in numbers_of.values())
        assert 8 <= swapped <= 29  # of 37: in 99.8 % of all seeds
    assert epochs[0] != epochs[1]
    assert all(b["observation"]["present"]["image_primary"].all() for b in first)
    for batch in data.validation()["stands"]():
        assert set(batch["observation"]["image_primary"][:, -1, 0, 0, 2]) == {NUMBERS["primary"]}


def test_two_interchangeable_cameras_of_a_run_are_swapped_together(root):
    cameras = {"primary": 8, "secondary": 8, "wrist": 8}
    data = opened(root, "stands", draw_views=True, cameras=cameras, **SETTINGS)
    batches, _ = an_epoch(data)
    views = {camera: drawn(batches, camera) for camera in cameras}
    both = {NUMBERS["primary"], NUMBERS["secondary"]}
    for episode in range(WITHOUT, EPISODES):
        assert views["primary"][episode] | views["secondary"][episode] == both
        assert views["wrist"][episode] == {NUMBERS["wrist"]}
    for episode in range(WITHOUT):
        assert episode not in views["secondary"]
    assert len({frozenset(x) for x in views["primary"].values()}) == 2


def test_views_are_the_same_after_a_resume_and_on_two_processes(root):
    data = opened(root, "stands", draw_views=True, cameras={"primary": 8}, **SETTINGS)
    whole, _ = an_epoch(data)
    _, state = an_epoch(data, count=4)
    parts = [an_epoch(data, process=(i, 2), start=state, count=3)[0] for i in range(2)]
    for batch, *both in zip(whole[4:7], *parts, strict=True):
        leaves = [dict(types.flatten(x)) for x in both]
        for path, x in types.flatten(batch):
            np.testing.assert_array_equal(np.concatenate([p[path] for p in leaves]), x)


def test_without_the_option_cameras_are_as_stored(root):
    data = opened(root, "stands", cameras={"primary": 8}, **SETTINGS)
    assert {frozenset(x) for x in drawn(an_epoch(data)[0]).values()} == {
        frozenset({NUMBERS["primary"]})
    }
    assert "views:" not in data.describe()


def test_views_with_depth_or_another_order_of_colours_are_refused():
    for fields in ({"depth": {"primary": "d"}}, {"bgr": ("primary",)}):
        with pytest.raises(
            ConfigError, match="interchangeable only without depth, and with one or"
        ):
            stored.spec("stands", cameras=CAMERAS, views=("primary", "secondary"), **fields)
