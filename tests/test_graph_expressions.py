"""Dataset specs in TensorFlow give the standard steps that they give in numpy."""

import dataclasses
import zlib

import numpy as np
import pytest
import tensorflow as tf
from fake_oxe import schemas, write_fake_oxe

from octolike.data.rlds import graph_expressions
from octolike.data.rlds.graph_expressions import graph_standard_steps, runs_in_python
from octolike.data.rlds.reader import Reader
from octolike.data.rlds.record_fields import EPISODE, thin_steps
from octolike.data.specs import expressions
from octolike.data.specs.catalog import DATASETS, find_spec
from octolike.data.specs.standardize import StandardSteps
from octolike.types import unflatten

LENGTHS = (1, 2, 40)
DTYPES = {"string": tf.string, "zlib": tf.string}


def raw_steps(spec, length: int, seed: int) -> dict:
    """Return the raw steps of an episode with random values, in the dtypes of the schema."""
    rng = np.random.default_rng(seed)
    kinds = schemas()[spec.name]["steps"] if spec.name in schemas() else own_fields(spec)
    columns = {path: random_field(rng, kind, length * spec.every) for path, kind in kinds.items()}
    columns |= {"is_first": np.arange(length * spec.every) == 0}
    episode = {"episode_metadata": {"success": np.bool_(True)}}
    return thin_steps(unflatten(columns), spec.every) | {EPISODE: episode}


def own_fields(spec) -> dict[str, str]:
    return {
        "action": f"float64 {len(spec.action)}",
        "observation.state": f"float32 {len(spec.proprio)}",
    }


def random_field(rng, kind: str, length: int) -> np.ndarray:
    """Return values on both sides of all thresholds, some of them not finite."""
    name, _, width = kind.partition(" ")
    if name == "string":
        return np.array([b"text"] * length, object)
    x = rng.choice([1, 0.02, 4], (length, int(width or 1))) * rng.normal(size=(length, 1))
    x = np.where(rng.random(x.shape) < 0.03, rng.choice([np.nan, np.inf], x.shape), x)
    if name == "zlib":
        return np.array([zlib.compress(row.astype("<f4").tobytes()) for row in x], object)
    if name == "bool":
        x = x > 0
    elif name.startswith("int"):
        x = np.nan_to_num(x * 100, posinf=0)
    x = x.astype(name)
    return x if width else x[:, 0]


def traced(spec, steps):
    """Return a tf.function of the raw steps, traced with an unknown number of steps."""

    def tensor_spec(x: np.ndarray) -> tf.TensorSpec:
        shape = (None, *x.shape[1:]) if x.ndim else ()
        return tf.TensorSpec(shape, tf.string if x.dtype == object else x.dtype)

    function = tf.function(lambda steps: graph_standard_steps(spec, steps))
    return function.get_concrete_function(tf.nest.map_structure(tensor_spec, steps))


def operations_of(function) -> set[str]:
    definition = function.graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    return {node.op for node in nodes}


def assert_same(spec, standard: StandardSteps, expected: StandardSteps) -> None:
    exact = "quat_to_euler" not in str(spec.action_from) and spec.standardize is None
    for part, x in zip(standard, expected, strict=True):
        assert (part is None) == (x is None)
        if x is None:
            continue
        assert part.dtype == tf.float32
        assert part.shape == x.shape
        if exact:
            np.testing.assert_array_equal(part, np.float32(x))
        else:
            np.testing.assert_allclose(part, np.float32(x), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")  # the values that are not finite
@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_spec_gives_the_same_standard_steps_in_tensorflow(name):
    spec = find_spec(name)
    episodes = [raw_steps(spec, length, seed) for seed, length in enumerate(LENGTHS)]
    function = traced(spec, episodes[0])
    for steps in episodes:
        expected = spec.standard_steps(steps)
        expected = StandardSteps(expected.action, expected.proprio if spec.proprio else None)
        tensors = tf.nest.map_structure(tf.constant, steps)
        assert_same(spec, graph_standard_steps(spec, tensors), expected)
        assert_same(spec, function(tensors), expected)
    assert not runs_in_python(spec)
    assert not operations_of(function) & {"PyFunc", "EagerPyFunc", "PyFuncStateless"}


def test_both_back_ends_have_the_same_operations():
    functions = graph_expressions.OPERATIONS.functions
    assert list(functions) == list(expressions.FUNCTIONS)
    twins = dict(graph_expressions.STANDARDIZE_TWINS)
    assert {function.__name__ for function in twins} == {f.__name__ for f in twins.values()}
    used = {spec.standardize for spec in DATASETS.values() if spec.standardize}
    assert used == twins.keys()


@pytest.mark.parametrize(
    "texts",
    [
        ("-clip(action, -0.5, 2) * action[0:1] / 3", "2 / 4 - action[-2:]"),
        ("next(next(action)) + wrap(action)", "ones(2) - zeros(2) / 7"),
        ("rel2abs(action[0:1], 1)", "binarize(next(action[1:2]), 0.2, 0.6)"),
    ],
)
@pytest.mark.parametrize("length", [1, 2, 30])
def test_arithmetic_is_the_same_in_a_stored_pipeline(texts, length):
    action = np.random.default_rng(length).normal(size=(length, 3)) * 2
    action[length // 2, 1] = np.nan
    steps = {"is_first": np.zeros(length, bool), "action": action}
    expected = expressions.evaluate(texts, steps)
    dataset = tf.data.Dataset.from_tensors(steps).map(
        lambda steps: expressions.evaluate(texts, steps, graph_expressions.OPERATIONS)
    )
    np.testing.assert_array_equal(next(iter(dataset)), expected)


@pytest.mark.parametrize("name", ["kuka", "bc_z", "droid", "gnm_dataset", "aloha_static_dataset"])
def test_a_graph_standardises_the_records_that_the_reader_reads(tmp_path, name):
    spec = find_spec(name)
    write_fake_oxe(tmp_path, name, episodes=2, steps=6, side=16)
    reader = Reader(spec, str(tmp_path), "train")
    parse = reader.graph_parse()

    def standard_steps(record):
        return graph_standard_steps(spec, parse(record).steps)

    dataset = tf.data.TFRecordDataset(reader.files).map(standard_steps)
    records = [
        record for shard in range(len(reader.files)) for record in reader.read_records(shard)
    ]
    for record, standard in zip(records, dataset, strict=True):
        steps = reader.parse_steps(record, name)
        assert_same(spec, standard, reader.standardize(steps, name))


def own_function(steps):
    scale = 2 if steps["episode"]["episode_metadata"]["success"] else 1
    assert set(steps["observation"]) == {"state"}
    assert steps["text"][0] == b"go"
    action = np.asarray(steps["action"], np.float64) * scale
    return StandardSteps(action[:-1], steps["observation"]["state"][:-1])


def test_a_specs_own_function_runs_in_python_without_images():
    spec = dataclasses.replace(find_spec("tabletop"), standardize=own_function)
    assert runs_in_python(spec)
    state, images = np.ones((3, 7), np.float32), np.array([b"jpeg"] * 3, object)
    steps = {
        "is_first": np.zeros(3, bool),
        "action": state,
        "text": np.array([b"go"] * 3, object),
        "observation": {"state": state} | dict.fromkeys(spec.cameras.values(), images),
        "episode": {"episode_metadata": {"success": np.bool_(True)}},
    }
    tensors = tf.nest.map_structure(tf.constant, steps)
    action, proprio = traced(spec, steps)(tensors)
    np.testing.assert_array_equal(action, np.full((2, 7), 2, np.float32))
    np.testing.assert_array_equal(proprio, state[:2])
    blind = dataclasses.replace(spec, proprio=None)
    assert graph_standard_steps(blind, tensors).proprio is None


def test_missing_fields_and_other_widths_are_errors():
    spec = find_spec("bridge_dataset")
    steps = raw_steps(spec, 3, 0)
    with pytest.raises(ValueError, match="binarize takes one column"):
        traced(spec, {**steps, "action": steps["action"][:, :0]})
    narrow = {**steps["observation"], "state": steps["observation"]["state"][:, :5]}
    with pytest.raises(ValueError, match="must be equal, but are 7 and 6"):
        traced(spec, {**steps, "observation": narrow})
    del steps["observation"]["state"]
    with pytest.raises(KeyError, match=r"observation\.state"):
        traced(spec, steps)


def test_an_expression_without_a_field_is_an_error():
    steps = {"is_first": np.zeros(2, bool), "action": np.ones((2, 3))}
    for operations in (expressions.NUMPY, graph_expressions.OPERATIONS):
        for text in ("1", "clip(2, 0, 1)"):
            with pytest.raises(ValueError, match="field"):
                expressions.evaluate((text,), steps, operations)
