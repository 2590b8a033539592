"""Cameras: black frames, the bytes of images, and pictures that are not stored as images."""

from pathlib import Path

import numpy as np
import pytest
import stored
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.data.onboarding import infer_spec, survey_figures
from octolike.data.onboarding.problems import find_problems
from octolike.data.onboarding.survey import describe_survey, survey_dataset
from octolike.data.rlds import decode, statistics
from octolike.data.rlds.reader import Reader
from octolike.errors import DataError

SIDE, STEPS = 8, 6
IMAGE = tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png")
RAW = tfds.features.Tensor(shape=(SIDE, SIDE, 3), dtype=np.uint8)


def index_of(reader: Reader, **settings):
    defaults = {"threads": 2, "cache": "", "drop_bad": False}
    return statistics.index_episodes(reader, **(defaults | settings))


def write_black(root: Path, feature, *black) -> Reader:
    """Write episodes of six steps; black: the steps of each that are all zero."""

    def episode(number, steps):
        def observe(t, rng):
            image = stored.picture(rng)
            return {"image": image * 0 if t in steps else image}

        return stored.example(STEPS, observe, seed=number)

    episodes = [episode(i, steps) for i, steps in enumerate(black)]
    stored.write(root, "dark", {"image": feature}, {"train": [episodes]})
    return Reader(stored.spec("dark"), str(root), "train")


def episodes_of(reader: Reader, index):
    rows = zip(index.shard, index.offset, index.length, strict=True)
    return [reader.read_episode(*map(int, row)) for row in rows]


@pytest.mark.parametrize("feature", [IMAGE, RAW], ids=["image", "raw array"])
def test_a_camera_is_absent_where_most_of_its_frames_are_black(tmp_path, feature):
    black = ({0}, {1, 2, 3, 4, 5}, {0, 1, 2}, {}, {0, 2, 4, 5})
    reader = write_black(tmp_path, feature, *black)
    index = index_of(reader)
    assert index.black_frames[:, 0].tolist() == [1, 5, 3, 0, 4]
    assert index.has_image[:, 0].tolist() == [True, False, True, True, False]
    present = ["primary" in e.images for e in episodes_of(reader, index)]
    assert present == index.has_image[:, 0].tolist()


def test_black_frames_are_found_among_large_ones_and_decoded_once(monkeypatch):
    rng = np.random.default_rng(0)
    black = tf.io.encode_jpeg(np.zeros((64, 64, 3), np.uint8)).numpy()
    frames = [tf.io.encode_jpeg(stored.picture(rng, 64)).numpy() for _ in range(6)]
    frames[2] = frames[4] = black
    frames[3] = b""
    decoded = []
    are_black = decode._are_black
    monkeypatch.setattr(decode, "_are_black", lambda x: decoded.append(x) or are_black(x))
    assert decode.black_frames(tf.constant(frames)).tolist() == [False, False, *[True] * 3, False]
    assert decoded == [[black]]


@pytest.mark.parametrize("encode", [tf.io.encode_jpeg, tf.io.encode_png])
@pytest.mark.parametrize("side", [1, 8, 64, 300])
def test_every_black_frame_is_found_between_flat_frames(encode, side):
    grey = encode(np.full((side, side, 3), 90, np.uint8)).numpy()
    black = encode(np.zeros((side, side, 3), np.uint8)).numpy()
    single_pixel = side == 1
    for frames in ([black, grey, grey, black], [grey, black, black, black]):
        expected = [x == black or single_pixel for x in frames]
        assert decode.black_frames(tf.constant(frames)).tolist() == expected


def test_no_steps_have_no_black_frames():
    assert decode.black_frames(tf.zeros(0, tf.string)).shape == (0,)


def test_the_index_counts_the_bytes_of_images_and_depth(tmp_path):
    depth = tfds.features.Tensor(shape=(SIDE, SIDE, 1), dtype=np.float32)

    def observe(t, rng):
        return {"image": stored.picture(rng), "depth": np.ones((SIDE, SIDE, 1), np.float32)}

    features = {"image": IMAGE, "depth": depth}
    stored.write(tmp_path, "deep", features, {"train": [[stored.example(STEPS, observe)]]})
    reader = Reader(stored.spec("deep", depth={"primary": "depth"}), str(tmp_path), "train")
    index = index_of(reader)
    (episode,) = episodes_of(reader, index)
    assert index.image_bytes.tolist() == [[sum(map(len, episode.images["primary"]))]]
    assert index.depth_bytes.tolist() == [[STEPS * SIDE * SIDE * 4]]


def test_another_choice_of_cameras_makes_another_index(tmp_path):
    write_black(tmp_path, IMAGE, {0})
    with_camera = stored.spec("dark")
    without = stored.spec("dark", cameras={})
    assert with_camera.fingerprint() != without.fingerprint()
    assert index_of(Reader(without, str(tmp_path), "train")).image_bytes.shape == (1, 0)


def test_an_image_that_cannot_be_decoded_is_a_bad_episode(tmp_path):
    text = tfds.features.Tensor(shape=(), dtype=np.str_)
    good = tf.io.encode_png(np.full((SIDE, SIDE, 3), 90, np.uint8)).numpy()
    episodes = [
        stored.example(3, lambda t, rng: {"image": good}),
        stored.example(3, lambda t, rng: {"image": b"no image"}),
    ]
    stored.write(tmp_path, "broken", {"image": text}, {"train": [episodes]})
    reader = Reader(stored.spec("broken"), str(tmp_path), "train")
    with pytest.raises(DataError, match=r"episode 1: primary image of step 0 cannot be decoded"):
        index_of(reader)
    index = index_of(reader, drop_bad=True)
    assert (len(index.steps), len(index.bad)) == (1, 1)


FRAMES = {
    "image": (IMAGE, lambda image: image),
    "raw array": (RAW, lambda image: image),
    "three images per step": (
        tfds.features.Sequence(IMAGE, length=3),
        lambda image: [image * 0, image // 2, image],
    ),
    "any number of images per step": (
        tfds.features.Sequence(IMAGE),
        lambda image: [image * 0, image],
    ),
    "grey array": (
        tfds.features.Tensor(shape=(SIDE, SIDE, 1), dtype=np.uint8),
        lambda image: image[..., :1],
    ),
}


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize("first", [True, False], ids=["is_first", "no is_first"])
def test_pictures_are_read_however_they_are_stored(tmp_path, kind, first):
    feature, store = FRAMES[kind]
    pictures: list[np.ndarray] = []

    def observe(t, rng):
        pictures.append(stored.picture(rng))
        return {"image": store(pictures[-1])}

    episode = stored.example(STEPS, observe, first=first)
    stored.write(tmp_path, "kinds", {"image": feature}, {"train": [[episode]]}, first=first)
    reader = Reader(stored.spec("kinds"), str(tmp_path), "train")
    index = index_of(reader)
    assert index.has_image.all()
    (read,) = episodes_of(reader, index)
    channels = 1 if kind == "grey array" else 3
    for encoded, image in zip(read.images["primary"], pictures, strict=True):
        np.testing.assert_array_equal(tf.io.decode_image(encoded), image[..., :channels])
    assert read.proprio is None
    assert read.action[:, 0].tolist() == list(range(STEPS))
    survey = survey_dataset(tmp_path / "kinds")
    assert list(survey.images) == ["observation.image"]
    assert infer_spec.infer(survey).cameras == {"primary": "image"}
    frame = survey.images["observation.image"][0][0]
    np.testing.assert_array_equal(tf.io.decode_image(frame), pictures[0][..., :channels])


def test_an_observation_can_be_a_picture_itself(tmp_path):
    episode = stored.example(STEPS, lambda t, rng: stored.picture(rng))
    stored.write(tmp_path, "whole", IMAGE, {"train": [[episode]]})
    spec = stored.spec("whole", cameras={"primary": "observation"})
    reader = Reader(spec, str(tmp_path), "train")
    (read,) = episodes_of(reader, index_of(reader))
    assert len(read.images["primary"]) == STEPS
    survey = survey_dataset(tmp_path / "whole")
    assert infer_spec.infer(survey).cameras == {"primary": "observation"}


def test_a_nested_camera_is_named_with_dots(tmp_path):
    episode = stored.example(3, lambda t, rng: {"images": {"front": stored.picture(rng)}})
    feature = {"images": {"front": IMAGE}}
    stored.write(tmp_path, "nested", feature, {"train": [[episode]]})
    spec = stored.spec("nested", cameras={"primary": "images.front"})
    reader = Reader(spec, str(tmp_path), "train")
    (read,) = episodes_of(reader, index_of(reader))
    assert len(read.images["primary"]) == 3


@pytest.mark.parametrize(
    ("feature", "shown"),
    [
        (tfds.features.Tensor(shape=(SIDE, SIDE, 3), dtype=np.float32), r"float32 \[8, 8, 3\]"),
        (tfds.features.Tensor(shape=(3, SIDE, SIDE), dtype=np.uint8), r"uint8 \[3, 8, 8\]"),
    ],
)
def test_a_field_that_is_not_a_picture_is_rejected_as_a_camera(tmp_path, feature, shown):
    zeros = np.zeros(feature.shape, feature.np_dtype)
    episode = stored.example(3, lambda t, rng: {"image": zeros})
    stored.write(tmp_path, "odd", {"image": feature}, {"train": [[episode]]})
    with pytest.raises(DataError, match=rf"but it is {shown} in .*; expected images, or uint8 arr"):
        Reader(stored.spec("odd"), str(tmp_path), "train")


def observe(t, rng):
    return {"image": stored.picture(rng)}


def test_an_episode_without_steps_is_bad(tmp_path):
    episodes = [stored.example(0, observe), stored.example(3, observe)]
    stored.write(tmp_path, "short", {"image": IMAGE}, {"train": [episodes]})
    reader = Reader(stored.spec("short"), str(tmp_path), "train")
    with pytest.raises(DataError, match="episode 0 has no steps"):
        index_of(reader)
    index = index_of(reader, drop_bad=True)
    assert (index.steps.tolist(), len(index.bad)) == ([3], 1)


def test_a_survey_counts_black_and_corrupted_images(tmp_path):
    write_black(tmp_path, IMAGE, {0}, {0, 1, 2, 3})
    survey = survey_dataset(tmp_path / "dark")
    assert survey.black == {"observation.image": [1, 4]}
    problems = "\n".join(find_problems(survey, infer_spec.infer(survey)))
    assert "observation.image: 5 of 12 frames are black or empty, in 2 of 2 episodes" in problems


def test_only_empty_episodes_cannot_be_surveyed(tmp_path):
    directory = stored.write(
        tmp_path, "none", {"image": IMAGE}, {"train": [[stored.example(0, observe)]]}
    )
    with pytest.raises(DataError, match="none of the 1 episodes read has steps"):
        survey_dataset(directory)


@pytest.mark.parametrize("lengths", [(0, 3), (1, 1)])
def test_episodes_of_no_or_one_step_can_be_inspected(tmp_path, lengths):
    shards = [[stored.example(n, observe) for n in lengths]]
    directory = stored.write(tmp_path / str(lengths), "short", {"image": IMAGE}, {"train": shards})
    survey = survey_dataset(directory)
    assert survey.lengths.tolist() == list(lengths)
    problems = find_problems(survey, infer_spec.infer(survey))
    assert any("fewer than 3 steps" in x for x in problems)
    describe_survey(survey)
    survey_figures.histograms(survey, infer_spec.infer(survey))
    survey_figures.contact_sheet(survey, "observation.image")


def red_first(encode) -> bytes:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[..., 0] = 200
    return encode(pixels).numpy()


@pytest.mark.parametrize(
    ("encode", "order", "swapped"),
    [
        (tf.io.encode_png, "", True),
        (tf.io.encode_jpeg, "", False),
        (tf.io.encode_png, "rgb", False),
        (tf.io.encode_jpeg, "bgr", True),
        (tf.io.encode_jpeg, "spec", True),
    ],
)
def test_red_and_blue_are_swapped_as_the_images_on_disk_need(tmp_path, encode, order, swapped):
    """Copies as JPEG by prepare_open_x are swapped already; the raw releases are PNG."""
    text = tfds.features.Tensor(shape=(), dtype=np.str_)
    image = red_first(encode)
    episodes = [stored.example(3, lambda t, rng: {"image": image if t else b""})]
    stored.write(tmp_path, "robot", {"image": text}, {"train": [episodes]})
    spec = stored.spec("robot", bgr=("primary",))
    reader = Reader(spec, str(tmp_path), "train", channel_order=order)
    assert reader.channels.swapped == (("primary",) if swapped else ())
    line = reader.channels.describe()
    assert ("primary swapped" if swapped else "no camera swapped") in line
    assert "data.channel_orders.robot" in line
    plain = Reader(stored.spec("robot"), str(tmp_path), "train")
    assert (plain.channels.swapped, plain.channels.describe()) == ((), "")
