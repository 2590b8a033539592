"""Ranges of a record: shares, rarely used dimensions, sides of a gripper, values outside."""

import dataclasses
import re
from dataclasses import replace

import numpy as np
import pytest
from data_fakes import config, numbered, write

from octolike import ranges
from octolike.config import ConfigError
from octolike.data import open_data
from octolike.data.arrays import _statistics
from octolike.data.pipeline.dataset_split import _check_conventions, embodiment_records
from octolike.data.pipeline.reach import describe_reach
from octolike.data.rlds.quantile_sketch import QuantileSketch
from octolike.data.specs.catalog import DATASETS, find_spec
from octolike.data.specs.spec import EEF_DELTA
from octolike.embodiment import REACH, Embodiment, Layout
from octolike.model import heads


def record(x, normalized=True, normalization="normal", names=None, ways=()) -> Embodiment:
    """Return the record of actions [N, A], all of them normalised or none."""
    x = np.asarray(x, np.float32)
    width = x.shape[1]
    layout = Layout(
        names=names or tuple(f"a{i}" for i in range(width)),
        units=("",) * width,
        absolute=(True,) * width,
        normalized=(normalized,) * width,
        normalization=ways,
    )
    return Embodiment(
        name="arm",
        robot="an arm",
        control_hz=5,
        gripper="",
        action=layout,
        proprio=None,
        normalization=normalization,
        action_statistics=_statistics(x, 1),
    )


def column(*values):
    """Return values, each 100 times, as one column [N, 1]."""
    return np.repeat(np.float32(values), 100)[:, None]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 1), ""),
        ((-1, 1), ""),
        ((-0.03, 1.04), ""),  # a measured share
        ((0, 0), ""),  # unused
        ((0.95, 1.0), ""),  # a gripper that stays open
        ((3, 62), "its values are 3 to 62.*heads clip what lies outside.*to True in the spec"),
        ((0, 255), "0 to 255"),
        ((0, 0.08), "0 to 0.08.*drowns in the noise"),
        ((5, 5), "5 to 5"),
    ],
)
def test_an_unnormalised_action_must_be_a_share(values, expected):
    sentences = ranges.record_misfits(record(column(*values), normalized=False))
    if not expected:
        assert sentences == []
        return
    (sentence,) = sentences
    assert "arm: action 'a0' is not normalised" in sentence
    assert re.search(expected, sentence)
    assert ranges.record_misfits(record(column(*values))) == []  # normalised: any range


def dataset(tmp_path, values):
    """Write a dataset in which the last action, unnormalised in its spec, alternates."""
    episode = numbered(0, 20, ["image_primary", "image_wrist"])
    episode["steps"]["action"][:, 6] = np.where(np.arange(20) % 2, *values)
    write(tmp_path, "fake", {"train": [episode], "val": [episode]})


def test_data_with_a_gripper_in_percent_or_metres_are_refused_at_the_start(tmp_path):
    dataset(tmp_path, (0, 62))
    with pytest.raises(ConfigError, match=r"fake: action 'gripper' is not normalised.*0 to 62"):
        open_data(config(tmp_path))
    data = open_data(config(tmp_path, range_check="warn"))
    assert "warning: fake: action 'gripper' is not normalised" in data.describe()
    assert data.embodiments[0].action_statistics.low is None  # as runs before format 3


def test_two_valued_actions_are_reported(tmp_path):
    dataset(tmp_path, (0, 1))
    assert "two-valued actions of fake: gripper" in open_data(config(tmp_path)).describe()


def rare(share=0.01, value=0.4, n=4000):
    """Return one dimension that is used in a share of the steps, and one that always is."""
    x = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    x[:, 0] = 0
    x[: round(share * n), 0] = value
    return x


@pytest.mark.parametrize("normalization", ["normal", "bounds", "minmax"])
@pytest.mark.parametrize("share", [0.0008, 0.003, 0.01, 0.1])
def test_a_rarely_used_dimension_comes_back(normalization, share):
    arm = record(rare(share), normalization=normalization)
    y = arm.normalize_action(np.float32([[0.4, 0], [0, 0]]))
    assert np.abs(y).max() <= REACH * 1.0001
    np.testing.assert_allclose(arm.unnormalize_action(y)[:, 0], [0.4, 0], atol=1e-6)


@pytest.mark.parametrize("normalization", ["normal", "bounds"])
def test_other_dimensions_are_normalised_as_before(normalization):
    arm = record(rare(), normalization=normalization)
    old = ranges.as_before(arm)
    x = np.random.default_rng(1).normal(size=(50, 2)).astype(np.float32)
    np.testing.assert_array_equal(arm.normalize_action(x)[:, 1], old.normalize_action(x)[:, 1])
    (sentence,) = ranges.describe_widened(arm)
    assert "rarely used: action a0 of arm" in sentence
    assert ranges.describe_widened(old) == []


def test_single_outliers_do_not_widen_a_dimension():
    x = np.random.default_rng(0).normal(size=(20_000, 1))
    x[7] = 1000
    for normalization in ("normal", "bounds"):
        assert ranges.describe_widened(record(x, normalization=normalization)) == []


def test_a_layout_chooses_the_normalisation_of_a_dimension():
    x = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
    mixed = record(x, ways=("minmax", "", "bounds"))
    for d, kind in enumerate(("minmax", "normal", "bounds")):
        single = record(x, normalization=kind)
        np.testing.assert_array_equal(
            mixed.normalize_action(x)[:, d], single.normalize_action(x)[:, d]
        )
        assert (np.abs(mixed.normalize_action(x)[:, d]) > 1).any() == (kind == "normal")
    with pytest.raises(ValueError, match="normalization 'most' is not one of normal"):
        record(x, ways=("most", "", ""))


def test_dimensions_with_two_values_have_sides_whatever_their_name():
    x = np.random.default_rng(0).uniform(0, 1, (1000, 4))
    x[:, 1] = np.where(x[:, 1] > 0.9, 62, 3)
    x[:, 2] = 5
    arm = record(x, names=("x", "tool", "unused", "gripper"))
    assert ranges.is_binary(arm.action_statistics).tolist() == [False, True, False, False]
    assert ranges.sided(arm).tolist() == [False, True, False, True]
    middle = arm.unnormalize_action(ranges.middles(arm)[None])[0]
    assert middle[1] == pytest.approx((3 + 62) / 2)


def test_values_outside_the_recorded_range_are_measured_in_lengths_of_it():
    s = record(column(-1, 3)).action_statistics
    np.testing.assert_allclose(
        ranges.outside(np.float32([[0], [4], [-3]]), s)[:, 0], [0, 0.25, 0.5]
    )


def test_noise_of_a_dimension_that_hardly_moved_is_no_other_unit():
    """A wrist recorded within ± 0.02 rad: 0.05 rad is noise, the same angle in degrees is not."""
    x = np.random.default_rng(0).uniform(-0.02, 0.02, (500, 1)).astype(np.float32)
    arm = record(x, names=("pitch",))
    pitch = dataclasses.replace(arm.action, units=("rad",))
    arm = dataclasses.replace(arm, proprio=pitch, proprio_statistics=arm.action_statistics)
    assert not ranges.far_outside(np.float32([[0.05]]), arm).any()
    assert ranges.far_outside(np.float32([[np.rad2deg(0.05)]]), arm).all()
    unknown = dataclasses.replace(arm.proprio, units=("",))
    assert ranges.far_outside(np.float32([[0.05]]), dataclasses.replace(arm, proprio=unknown)).all()


def test_values_too_large_for_their_unit_are_a_warning():
    arm = record(column(-62, 62))
    for unit, guess in (("rad", "degrees"), ("m", "millimetres"), ("deg", ""), ("", "")):
        units = replace(arm, action=replace(arm.action, units=(unit,)))
        text = "\n".join(ranges.describe([units]))
        assert ("a0 (-62 to 62) is" in text) == bool(guess)
        assert guess in text
    assert ranges.doubtful_units(record(column(-3, 3))) == []


# The reach of heads


def sketch(x):
    result = QuantileSketch(x.shape[1])
    result.update(np.float32(x))
    return result


@pytest.mark.parametrize(
    ("component", "expected"),
    [
        ({"kind": "l1", "limit": 2.0}, (-2, 2)),
        ({"kind": "diffusion", "clip": 3.0}, (-3, 3)),
        ({"kind": "flow"}, (-5, 5)),
        ({"kind": "bins", "bin_kind": "uniform", "low": -1.0, "high": 2.0}, (-1, 2)),
        ({"kind": "bins"}, (-4.75, 4.75)),
        ({"kind": "per_group", "head": {"kind": "l1", "limit": 1.5}}, (-1.5, 1.5)),
    ],
)
def test_a_head_states_the_range_of_its_outputs(component, expected):
    assert heads.reach(component, "model.heads.action") == pytest.approx(expected, abs=0.01)


def test_actions_that_the_head_cannot_output_are_counted_with_the_remedy():
    x = np.random.default_rng(0).normal(size=(10_000, 2))
    x[:, 1] = np.random.default_rng(1).uniform(-1, 1, 10_000)
    arm = record(x, names=("wide", "flat"))
    assert describe_reach(arm, [sketch(x)], -5, 5) == []
    (line,) = describe_reach(arm, [sketch(x[:5000]), sketch(x[5000:])], -2, 2)
    assert line.startswith("warning: the head outputs -2 to 2")
    share = np.mean(np.abs(arm.normalize_action(np.float32(x))[:, 0]) > 2)
    assert f"wide {share:.2%}" in line
    assert "flat" not in line
    assert "Layout.normalization='minmax'" in line


def test_values_that_the_bounds_clip_are_counted():
    x = np.random.default_rng(0).normal(size=(10_000, 1))
    (line,) = describe_reach(record(x, normalization="bounds"), [sketch(x)], -5, 5)
    assert line == "clipped by the normalisation of arm: a0 2.00%"
    assert describe_reach(record(x, normalization="minmax"), [sketch(x)], -5, 5) == []
    before = ranges.as_before(record(rare(), normalization="bounds"))
    lines = describe_reach(before, [sketch(rare())], -5, 5)
    assert "rarely used actions of arm" in lines[-1]
    assert "a0 1.00%" in lines[-1]


# Datasets that share a record


def spec_of(name, **change):
    return replace(find_spec("fake"), name=name, embodiment="shared", **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gripper": "absolute, 1 = closed"}, "gripper 'absolute, 1 = open' and 'absolute, 1 = cl"),
        ({"control_hz": 15}, "control_hz 5 and 15"),
        (
            {"action": replace(EEF_DELTA, units=("mm",) * 7)},
            r"action.units \('m', 'm', .* and \('mm'",
        ),
        ({"action": replace(EEF_DELTA, absolute=(True,) * 7)}, "action.absolute"),
        ({"proprio": None}, "only one has a proprio"),
    ],
)
def test_datasets_of_one_record_must_share_its_conventions(change, message):
    specs = [spec_of("a"), spec_of("b", **change)]
    with pytest.raises(ConfigError, match=message) as caught:
        embodiment_records(specs, [None, None], "normal")
    assert "datasets a and b both name the embodiment 'shared'" in str(caught.value)
    assert "Give one its own name" in str(caught.value)


def test_the_specs_of_the_package_that_share_a_record_share_its_conventions():
    first = {}
    for spec in DATASETS.values():
        first_spec = first.setdefault(spec.embodiment or spec.name, spec)
        _check_conventions(first_spec.embodiment, first_spec, spec, strict=True)


@pytest.mark.parametrize(
    ("closed", "opened"), [(0, 0.08), (3, 62), (0, 255), (-1, 1), (-3000, 3000)]
)
def test_a_gripper_in_any_unit_is_learned_as_the_share_that_it_is(closed, opened):
    share = (np.arange(200) % 40 < 15).astype(np.float32)[:, None]
    values = closed + share * (opened - closed)
    sketch = QuantileSketch(1)
    sketch.update(values.astype(np.float32))
    sketch.flush()
    layout = Layout(
        names=("gripper",),
        units=("",),
        absolute=(True,),
        normalized=(True,),
        normalization=("share",),
    )
    record = Embodiment(
        name="arm",
        robot="arm",
        control_hz=5,
        gripper="",
        action=layout,
        proprio=None,
        action_statistics=sketch.statistics(),
    )
    learned = record.normalize_action(values)
    np.testing.assert_allclose(learned, share, atol=1e-6)
    np.testing.assert_allclose(record.unnormalize_action(learned), values, rtol=1e-5, atol=1e-6)
    assert ranges.record_misfits(record) == []
    np.testing.assert_allclose(ranges.middles(record), 0.5, atol=1e-6)
