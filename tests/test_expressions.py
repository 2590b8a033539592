"""Expressions of dataset specs in numpy: functions, values, and texts that are refused."""

import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octolike.data.specs.expressions import (
    FUNCTIONS,
    binarize_gripper,
    check_expression,
    evaluate,
    quaternion_to_euler,
    relative_to_absolute,
    wrap_angle,
)


def test_small_angles_do_not_change():
    x = np.linspace(-3.14, 3.14, 1001).astype(np.float32)
    np.testing.assert_array_equal(wrap_angle(x), x)


def test_wrapped_angles_are_equivalent_and_in_the_half_open_interval():
    x = np.concatenate([np.linspace(-20, 20, 4001), np.pi * np.arange(-5, 6)])
    y = wrap_angle(x)
    assert (y > -np.pi).all()
    assert (y <= np.pi).all()
    np.testing.assert_allclose(np.exp(1j * y), np.exp(1j * x), atol=1e-12)
    assert wrap_angle(np.array([np.pi, -np.pi])).tolist() == [np.pi, np.pi]


def by_definition(x):
    """Return the gripper per step: the next extreme, or the side of the last command."""
    result = []
    for t in range(len(x)):
        extremes = [v for v in x[t:] if v < 0.05 or v > 0.95]
        result.append(float(extremes[0] > 0.95) if extremes else float(x[-1] > 0.5))
    return result


def test_binary_grippers_equal_their_definition():
    for x in itertools.product((0.0, 0.04, 0.3, 0.7, 1.0), repeat=5):
        actual = binarize_gripper(np.array(x, np.float32))
        assert actual.dtype == np.float32
        assert actual.tolist() == by_definition(x), x


def test_a_gripper_command_that_is_not_finite_gives_nan():
    actual = binarize_gripper(np.array([1, 0.5, np.nan, 0.5, 0, np.inf, 0.5], np.float32))
    np.testing.assert_array_equal(actual, [1, np.nan, np.nan, 0, 0, np.nan, 0])


def test_binary_grippers_equal_those_of_octo(shared):
    with np.load(shared / "golden" / "octo_parts" / "helpers.npz") as golden:
        for i in range(3):
            x, octo = golden[f"binarize/{i}/in"], golden[f"binarize/{i}/out"]
            # after the last extreme Octo keeps the raw value, so round it here
            np.testing.assert_array_equal(binarize_gripper(x), np.where(octo > 0.5, 1, 0))


def steps(**fields):
    length = len(next(iter(fields["observation"].values())))
    return {"is_first": np.zeros(length, bool), **fields}


def test_gripper_events_become_states():
    close = np.array([[0], [0.9], [0], [-0.9], [0.05], [0.9]], np.float32)
    open_ = relative_to_absolute(close)
    assert open_[:, 0].tolist() == [1, 0, 0, 1, 1, 0]
    assert relative_to_absolute(close[:1])[:, 0].tolist() == [1]
    assert relative_to_absolute(-close[1:2])[:, 0].tolist() == [1]
    nan = relative_to_absolute(np.float32([[0.5], [np.nan]]))
    assert np.isnan(nan[1, 0])
    assert np.isnan(relative_to_absolute(np.float32([[0], [np.nan]]))[1, 0])


def test_expressions_trim_wrap_decompress_and_rotate():
    angle = np.float32([[0], [3], [-3], [0.1]])
    position = {"angle": angle, "present/xyz": np.arange(12.0).reshape(4, 3)}
    packed = np.array([zlib.compress(np.float32([i, -i]).tobytes()) for i in range(4)], object)
    raw_steps = steps(observation={**position, "packed": packed}, action=np.ones((4, 5), np.int64))

    def run(*texts):
        return evaluate(texts, raw_steps)

    change = run("wrap(next(observation.angle) - observation.angle)", "action[-1:]")
    assert change.shape == (3, 2)
    np.testing.assert_allclose(change[:, 0], [3, 2 * np.pi - 6, 3.1], rtol=1e-6)
    assert run("observation['present/xyz'][1:3]").tolist()[1] == [4, 5]
    assert run("zlib_f32(observation.packed, 2)").tolist()[3] == [3, -3]
    assert run("1 - clip(action[0:1] * 3, 0, 1) / 2", "zeros(2)", "ones(1)")[0].tolist() == [
        0.5,
        0,
        0,
        1,
    ]
    half = np.float32([[0, 0, np.sin(0.5), np.cos(0.5)]])
    np.testing.assert_allclose(quaternion_to_euler(half)[0], [0, 0, 1.0], atol=1e-6)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("__import__('os')", "unknown function '__import__'"),
        ("action.world.__class__()", "unknown function"),
        ("[x for x in action]", "not supported"),
        ("action +", "is not an expression"),
        ("clip(action, min=0)", "'clip' does not take keyword arguments"),
        ("action[0:6:2]", "skips columns"),
        ("action[~1:3]", "not a column number"),
        ("clip(action)", "has 1 arguments; clip takes 3"),
        ("clip(action, action, 1)", "must be numbers"),
        ("clip(1, 0, 1)", "must be a field"),
        ("zeros(2.5)", "as a whole number"),
        ("zeros(1000000000)", "as a whole number"),
        ("action * 1e999", "not a finite number"),
        ("action / (1 - 1)", "divides by 0"),
        ("action ** 2", "not supported"),
        ("step + 1", "write step.NAME"),
        ("2", "reads no field"),
        ("True + action", "not supported"),
        ("-" * 100 + "action", "50 levels deep"),
        ("action" + ".a" * 1500, "nested too deeply|no field"),
        ("(" * 5000, "5,000 characters"),
        ("action\0", "is not an expression"),
        ("binarize(action[0:2])", "takes one column"),
        ("rel2abs(action)", "takes one column"),
    ],
)
def test_other_python_syntax_is_rejected(expression, message):
    raw_steps = steps(observation={"a": np.ones(3)}, action=np.ones((3, 2)))
    with pytest.raises(ValueError, match=message):
        evaluate((expression,), raw_steps)


def test_an_expression_names_a_missing_field():
    raw_steps = steps(observation={"a": np.ones(3)}, action={"b": np.ones((3, 2))})
    with pytest.raises(KeyError, match=r"action\.world_vector"):
        evaluate(("action.world_vector",), raw_steps)


T = 5
RNG = np.random.default_rng(0)
DATA = {
    "action": RNG.normal(size=(T, 4)).astype(np.float32),
    "observation": {
        "state": RNG.normal(size=(T, 6)).astype(np.float64),
        "scalar": np.arange(T),
        "text": np.array([b"a"] * T, object),
    },
    "is_first": np.zeros(T, bool),
}


def same_length(operation, x, y):
    """Return the operation on two arrays [T, 2], or on one and a number."""
    if not isinstance(y, float):
        length = min(len(x), len(y))
        x, y = x[:length], y[:length]
    return operation(x, y)


LEAVES = st.integers(0, 2).map(lambda i: (f"action[{i}:{i + 2}]", DATA["action"][:, i : i + 2]))
LEAVES |= st.integers(-6, -3).map(
    lambda i: (
        f"observation['state'][{i}:{i + 2}]",
        DATA["observation"]["state"][:, i : i + 2].astype(np.float32),
    )
)
NUMBERS = st.sampled_from([0.5, 2.0, 3.25]).map(lambda x: (repr(x), x))
OPERATORS = st.sampled_from([("+", np.add), ("-", np.subtract), ("*", np.multiply)])


def binary(x):
    """Return (text, value) of an operation on two operands."""
    return st.tuples(OPERATORS, x, x | NUMBERS).map(
        lambda v: (f"({v[1][0]} {v[0][0]} {v[2][0]})", same_length(v[0][1], v[1][1], v[2][1]))
    )


def called(x):
    """Return (text, value) of a function of an operand."""
    return st.one_of(
        x.filter(lambda v: len(v[1]) > 1).map(lambda v: (f"next({v[0]})", v[1][1:])),
        x.map(lambda v: (f"clip({v[0]}, -1, 0.5)", np.minimum(np.maximum(v[1], -1), 0.5))),
        x.map(lambda v: (f"-{v[0]}", -v[1])),
    )


EXPRESSIONS = st.recursive(LEAVES, lambda x: binary(x) | called(x), max_leaves=6)


@settings(max_examples=60)
@given(st.lists(EXPRESSIONS, min_size=1, max_size=3))
def test_the_value_is_that_of_the_arithmetic(expressions):
    texts, values = zip(*expressions)
    length = min(map(len, values))
    expected = np.concatenate([v[:length] for v in values], axis=1)
    np.testing.assert_allclose(evaluate(texts, DATA), expected, rtol=1e-5)


WORDS = [*FUNCTIONS, *"()[]:,.+-*/'~", "action", "observation", ".state", ".scalar", ".text"]
WORDS += [
    "step",
    "is_first",
    "0",
    "1",
    "-1",
    "3",
    "1e9",
    "2.5",
    "[0:1]",
    "[-1:]",
    "[::2]",
    "{",
    "if",
]


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@settings(max_examples=60)
@given(st.text(max_size=20) | st.lists(st.sampled_from(WORDS), max_size=8).map("".join))
def test_any_text_is_an_expression_or_one_line(text):
    """A checked expression gives columns, or an error in one line that it does not fit the data."""
    try:
        check_expression(text)
        value = evaluate((text,), DATA)
    except (ValueError, KeyError) as error:
        message = str(error)
        assert "\n" not in message
        return
    assert value.dtype == np.float32
    assert value.ndim == 2
    assert len(value) <= T
