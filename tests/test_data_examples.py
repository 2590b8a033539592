"""Examples in the graph against numpy: windows, goals, numbers, wording, colours and depth."""

import numpy as np
import pytest
import stored
import tensorflow as tf
import tensorflow.experimental.numpy as tnp
import tensorflow_datasets as tfds
from data_fakes import numbered, opened, shown, write, write_numbered

from octolike.data.pipeline import example_graph, goals, windows
from octolike.data.rlds import decode
from octolike.data.specs import catalog
from octolike.embodiment import Embodiment, Layout, Statistics
from octolike.errors import DataError

RNG = np.random.default_rng(0)
IMAGE = tfds.features.Image(shape=(8, 8, 3), encoding_format="png")
FLOAT_DEPTH = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.float32)
RAW_DEPTH = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint16)
TEXT = tfds.features.Tensor(shape=(), dtype=np.str_)
WORDINGS = ("one", "two", "three")


@pytest.mark.parametrize(("window", "horizon"), [(1, 1), (2, 4), (4, 3)])
def test_windows_and_chunks_are_the_same_in_the_graph(window, horizon):
    t, length = RNG.integers(0, 9, 50), RNG.integers(9, 12, 50)
    end = RNG.integers(0, 12, 50)
    for x, y in zip(
        (*windows.window_steps(t, window), *windows.chunk_steps(t, window, horizon, length, end)),
        (
            *windows.window_steps(tf.constant(t), window, tnp),
            *windows.chunk_steps(
                tf.constant(t), window, horizon, *map(tf.constant, (length, end)), tnp
            ),
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("strategy", ["uniform", "last", "none"])
def test_goals_and_dropout_are_the_same_in_the_graph(strategy, exclusive):
    draws, n = RNG.random((500, goals.DRAWS)), 500
    length = RNG.integers(1, 9, n)
    t = (RNG.random(n) * length).astype(np.int64)
    available = {f"has_{k}": RNG.random(n) < 0.7 for k in ("language", "goal", "task_id")}
    keep = {"keep_language": 0.5, "keep_goal": 0.6, "keep_task_id": 0.3, "strategy": strategy}
    keep["exclusive"] = exclusive
    expected = goals.choose(draws, t, length, **keep, **available)
    tensors = {k: tf.constant(x) for k, x in available.items()}
    choice = goals.choose(*map(tf.constant, (draws, t, length)), **keep, **tensors, xp=tnp)
    for x, y in zip(expected, choice, strict=True):
        np.testing.assert_array_equal(x, y)


def robot(width: int, kinds: tuple[str, ...], normalization: str, seed: int) -> Embodiment:
    """Return a robot with statistics of random numbers."""
    names = tuple(f"x{i}" for i in range(width))
    normalized = tuple(kind != "none" for kind in kinds)
    layout = Layout(
        names=names, units=("",) * width, absolute=(True,) * width, normalized=normalized
    )
    sample = np.random.default_rng(seed).normal(3, 5, (1000, width)).astype(np.float32)
    p01, p99 = np.quantile(sample, (0.01, 0.99), axis=0).astype(np.float32)
    numbers = Statistics(
        mean=sample.mean(0), std=sample.std(0), min=sample.min(0), max=sample.max(0),
        p01=p01, p99=p99, steps=1000, episodes=10,
    )  # fmt: skip
    return Embodiment(
        name=f"robot {width}", robot="arm", control_hz=5, gripper="", action=layout, proprio=layout,
        normalization=normalization, action_statistics=numbers, proprio_statistics=numbers,
    )  # fmt: skip


@pytest.mark.parametrize("normalization", ["normal", "bounds", "minmax"])
def test_numbers_are_normalised_as_by_the_embodiment(normalization):
    robots = [
        robot(3, ("", "", "none"), normalization, 0),
        robot(5, ("",) * 5, normalization, 1),
    ]
    record = RNG.integers(0, 2, 200)
    values = RNG.normal(0, 40, (200, 2, 4, 5)).astype(np.float32)
    for part in ("action", "proprio"):
        dims, affine, limit = example_graph._affine(robots, part)
        np.testing.assert_array_equal(dims, np.arange(5) < np.array([[3], [5]]))
        actual = example_graph._normalized(tf.constant(values), record, affine, limit).numpy()
        for i, r in enumerate(robots):
            n = len(r.action)
            expected = getattr(r, f"normalize_{part}")(values[record == i][..., :n])
            np.testing.assert_allclose(actual[record == i][..., :n], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (48, 64), (5, 9)])
def test_depth_is_decoded_as_by_numpy(shape):
    raw = RNG.integers(0, 60000, (3, *shape, 1)).astype(np.uint16)
    metres = RNG.random((3, *shape)).astype(np.float32)
    encoded = [tf.io.encode_png(x).numpy() for x in raw]
    encoded += [tf.io.encode_png(x[..., None].view(np.uint8)).numpy() for x in metres]
    pixels = decode.decode_images(tf.constant([*encoded, b""]), 6, "area", depth=True).numpy()
    for image, content in zip(pixels, encoded, strict=False):
        np.testing.assert_array_equal(image, decode.decode_depth(content, 6))
    for image, content in zip(pixels, (*raw, *metres), strict=False):
        np.testing.assert_array_equal(image, decode.decode_depth(content, 6))
    assert not pixels[-1].any()


class Robots:
    """Two datasets with depth and several instructions; one has blue first, one a wrist camera.

    Attributes:
        data: the opened datasets.
        observations: {(dataset, episode, step): stored observation}.
    """

    def __init__(self, root):
        self.root, self.observations = root, {}
        self._write("raw", IMAGE, RAW_DEPTH, lambda rng: rng.integers(1, 9000, (8, 8, 1)))
        self._write("float", IMAGE, FLOAT_DEPTH, lambda rng: rng.random((8, 8, 1)))
        self.data = opened(
            root, "raw=1,float=1", cameras={"primary": 8, "wrist": 8}, depth={"primary": 4},
            batch_size=240, validation_split="", horizon=2, lanes=1,
        )  # fmt: skip

    def _write(self, name, image, depth, draw):
        def observed(episode, t):
            rng = np.random.default_rng((len(name), episode, t))
            result = {"image": stored.picture(rng), "depth": draw(rng).astype(depth.np_dtype)}
            if name == "float":
                result["hand"] = stored.picture(rng) * (episode != 1)
            self.observations[name, episode, t] = result
            return result

        episodes = []
        for e, length in enumerate((4, 6)):
            texts = {"one": f"{name} {e}", "two": "", "three": " again "} if e else {"one": "go"}
            texts = dict.fromkeys(WORDINGS, "") | texts
            episode = stored.example(length, lambda t, _, e=e: observed(e, t), **texts)
            for t, step in enumerate(episode["steps"]):
                step["action"] = np.array([e, t, 1], np.float32)
            episodes.append(episode)
        features = {"image": image, "depth": depth} | ({"hand": image} if name == "float" else {})
        texts = dict.fromkeys(WORDINGS, TEXT)
        stored.write(self.root, name, features, {"train": [episodes]}, **texts)


@pytest.fixture(scope="module")
def robots(tmp_path_factory):
    common = {"depth": {"primary": "depth"}, "language": WORDINGS}
    cameras = {"primary": "image", "wrist": "hand"}
    specs = [
        stored.spec("raw", bgr=("primary",), **common),
        stored.spec("float", cameras=cameras, depth_unit=1.0, **common),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for spec in specs:
            patch.setitem(catalog.DATASETS, spec.name, spec)
        yield Robots(tmp_path_factory.mktemp("robots"))


def rows_of(robots, batch):
    """Yield (row, dataset, episode, step) of a batch."""
    for b, (number, record) in enumerate(zip(batch["dataset"], batch["embodiment"], strict=True)):
        action = robots.data.embodiments[record].unnormalize_action(batch["action"][b, 0, 0])
        episode, t = action[:2].round().astype(int).tolist()
        yield b, robots.data.datasets[number], episode, t


def test_pictures_have_the_stored_colours_and_depth_its_unit(robots):
    batch = next(robots.data.train())
    observation, covered = batch["observation"], set()
    for b, name, e, t in rows_of(robots, batch):
        expected = robots.observations[name, e, t]
        image = expected["image"][..., :: -1 if name == "raw" else 1]
        np.testing.assert_array_equal(observation["image_primary"][b, 0], image)
        unit = np.float32(0.001 if name == "raw" else 1.0)
        depth = decode.decode_depth(expected["depth"], 4) * unit
        np.testing.assert_allclose(observation["depth_primary"][b, 0], depth, rtol=1e-6)
        has_wrist = name == "float" and e == 0
        assert observation["present"]["image_wrist"][b, 0] == has_wrist
        wrist = expected["hand"] if has_wrist else np.zeros((8, 8, 3), np.uint8)
        np.testing.assert_array_equal(observation["image_wrist"][b, 0], wrist)
        assert observation["present"]["depth_primary"][b, 0]
        covered.add((name, e, t))
    assert covered == set(robots.observations)


def test_one_of_several_instructions_of_a_step_is_drawn(robots):
    element = next(iter(robots.data.dataset()))
    batch = tf.nest.map_structure(lambda x: x.numpy(), element)
    texts = {}
    for b, name, e, _ in rows_of(robots, batch):
        texts.setdefault((name, e), []).append(batch["text"][b].decode())
    for name in ("raw", "float"):
        assert set(texts[name, 0]) == {"go"}
        assert set(texts[name, 1]) == {f"{name} 1", "again"}
        assert np.mean([x == "again" for x in texts[name, 1]]) == pytest.approx(0.5, abs=0.17)
    source = robots.data._sources[0]
    draws = np.full((1, goals.DRAWS), 0.99)
    example = robots.data.examples(source, np.array([[1, 2]]), draws)
    first = robots.data._wording.text.encode(["raw 1"])[0]
    np.testing.assert_array_equal(example["task"]["language"]["ids"], first)  # without dropout


def test_distinct_instructions_are_equally_frequent(robots):
    examples = robots.data._training_graph((0, 1))._examples
    rng = np.random.default_rng(0)
    draws = rng.random((3000, goals.DRAWS))
    cases = {("one", "", "three"): 2, ("one", "two", "one"): 2, ("a", "b", "c"): 3, ("",) * 3: 0}
    for options, count in cases.items():
        drawn = examples._wording(tf.constant([options] * 3000), tf.constant(draws)).numpy()
        names, counts = np.unique(drawn, return_counts=True)
        assert {x.decode() for x in names} == ({*options} - {""} or {""})
        np.testing.assert_allclose(counts / 3000, 1 / max(count, 1), atol=0.03)


def test_a_graph_without_python_can_run_in_another_process(robots):
    graph = robots.data.dataset()._as_serialized_graph()
    assert b"PyFunc" not in graph.numpy()


def test_an_example_of_a_changed_record_is_an_error(robots):
    source, draws = robots.data._sources[0], np.zeros((1, goals.DRAWS))
    (path,) = (robots.root / "raw" / stored.VERSION).glob("*.tfrecord*")
    content = path.read_bytes()
    last = len(content) - 30
    path.write_bytes(content[:last] + bytes([content[last] ^ 1]) + content[last + 1 :])
    try:
        with pytest.raises(DataError, match=rf"byte {source.index.offset[1]}: corrupted record"):
            robots.data.examples(source, np.array([[1, 2]]), draws)
        robots.data.examples(source, np.array([[0, 2]]), draws)
    finally:
        path.write_bytes(content)


def test_a_representation_is_the_same_in_the_graph_as_in_numpy(tmp_path):
    write_numbered(tmp_path, "fake", [5, 9, 7])
    settings = {"window": 2, "horizon": 3, "batch_size": 12, "range_check": "warn"}
    for representation in ("relative", "delta rotation_6d"):
        data = opened(tmp_path, representation=representation, **settings)
        batch = next(data.train())
        source = data._sources[0]
        shown_frames = np.array(shown(batch["observation"]["image_primary"]))
        for i, (episode, t) in enumerate(shown_frames[:, -1].tolist()):
            expected = source.load(episode).action  # the learned chunks, by numpy
            for w in range(2):
                step = t - 1 + w
                if step >= 0:
                    actual = batch["action"][i, w]
                    np.testing.assert_allclose(actual, expected[step], atol=1e-4)


def test_examples_of_held_out_and_training_episodes_of_one_split_differ(tmp_path):
    cameras = ["image_primary", "image_wrist"]
    write(tmp_path, "fake", {"train": [numbered(i, 3, cameras) for i in range(12)]})
    data = opened(tmp_path, held_out=0.4)
    (training,), (held_out,) = data._sources, data._held_out
    assert training.reader.split == held_out.reader.split
    draws, frames = np.zeros((2, goals.DRAWS)), np.array([[0, 1], [1, 2]])
    shown_episodes = []
    for source in (training, held_out, training):
        batch = data.examples(source, frames, draws)
        shown_episodes.append([e for ((e, _),) in shown(batch["observation"]["image_primary"])])
    assert shown_episodes[0] == shown_episodes[2]
    assert not {*shown_episodes[0]} & {*shown_episodes[1]}
