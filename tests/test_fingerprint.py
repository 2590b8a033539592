"""The fingerprint of a dataset spec: it depends on the spec's computation alone."""

import dataclasses
import functools
import os
import subprocess
import sys

import numpy as np
import pytest

from octolike.data.specs import expressions, fingerprint, standardize
from octolike.data.specs.catalog import DATASETS, find_spec, load_specs
from octolike.data.specs.fingerprint import code_digest

SPECS = '''
"""Specs of a user's robot."""

import functools
import math

import numpy as np

import user_helpers
from octolike.data.specs.catalog import DatasetSpec
from octolike.data.specs.spec import EEF_DELTA
from octolike.data.specs.standardize import StandardSteps

SCALE = 2.0
OFFSETS = {"x": [0.0, 1.0], "y": (2.0, np.float32(3.0))}
KEYS = {"alpha", "beta", "gamma"}
TABLE = np.arange(3)
UNUSED = 5


def scale(x, factor=10.0, *, power=2):
    """Scale the actions."""
    # a comment
    if x is None:
        raise ValueError("no actions")
    return [value * factor**power * SCALE + OFFSETS["x"][1] for value in x]


def standardize(steps):
    """Return the standard steps."""
    return StandardSteps(user_helpers.shift(scale(steps["action"])), TABLE[0])


def select(steps, threshold):
    from math import floor

    return StandardSteps([x for x in steps if x in KEYS and floor(threshold) < 4], None)


def make(limit):
    def clip(steps):
        return StandardSteps(np.minimum(steps["action"], limit), None)

    return clip


class Robot:
    """A robot."""

    GAIN = 3

    def __init__(self, width):
        self.width = width

    def standardize(self, steps):
        """Return the standard steps."""
        return StandardSteps(steps["action"] * self.width * self.GAIN, recursive(4))


def recursive(n):
    return n and recursive(n - 1)


ROBOT = Robot(0.5)


def spec(name, function):
    return DatasetSpec(
        name=name, version="", cameras={}, action=EEF_DELTA, proprio=None, gripper="", robot="",
        standardize=function,
    )


DATASETS = [
    spec("function", standardize),
    spec("partial", functools.partial(select, threshold=3.5)),
    spec("lambda", lambda steps: StandardSteps(steps["action"] + 1, None)),
    spec("closure", make(limit=7)),
    spec("method", ROBOT.standardize),
    spec("cached", functools.lru_cache(make(limit=8))),
]
'''
HELPERS = '''
"""Helpers of a user's specs."""

SHIFT = 4


def shift(x):
    return [value + SHIFT for value in x]
'''
NAMES = {"function", "partial", "lambda", "closure", "method", "cached"}


def fingerprints(folder, monkeypatch, specs=SPECS, helpers=HELPERS):
    """Return the fingerprints of the specs of a user's file, by name."""
    folder.mkdir(exist_ok=True)
    (folder / "specs.py").write_text(specs)
    (folder / "user_helpers.py").write_text(helpers)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "user_helpers", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    specs = load_specs([str(folder / "specs.py")])
    return {name: specs[name].fingerprint() for name in NAMES}


def changed(tmp_path, monkeypatch, old, new):
    """Return the names of the specs that an edit of the user's files changes."""
    assert old in SPECS + HELPERS
    before = fingerprints(tmp_path / "before", monkeypatch)
    edited = (SPECS.replace(old, new), HELPERS.replace(old, new))
    after = fingerprints(tmp_path / "after", monkeypatch, *edited)
    return {name for name in NAMES if before[name] != after[name]}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('    """Scale the actions."""\n', '    """Scale, in other words."""\n'),
        ('    """Scale the actions."""\n', ""),
        ("    def standardize(self, steps):\n", '    def standardize(self, steps):\n        "x"\n'),
        ('    """A robot."""\n', '    """Another text."""\n'),
        ("    # a comment\n", "\n\n    # another comment\n"),
        ("UNUSED = 5", "UNUSED = 6\n\n\ndef unused():\n    return UNUSED"),
        ("def scale(x, factor=10.0", "def scale(x: list, factor: float = 10.0"),
        ('"""Helpers of', '"""More helpers of'),
        ('{"alpha", "beta", "gamma"}', '{"gamma", "beta", "alpha"}'),
        ("recursive(n - 1)", "recursive(\n        n - 1\n    )"),
    ],
)
def test_docstrings_comments_and_unused_code_change_nothing(tmp_path, monkeypatch, old, new):
    assert changed(tmp_path, monkeypatch, old, new) == set()


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("SCALE = 2.0", "SCALE = 2.5", {"function"}),
        ('[0.0, 1.0], "y"', '[0.0, 1.5], "y"', {"function"}),
        ("np.float32(3.0)", "np.float32(3.5)", {"function"}),
        ("np.arange(3)", "np.arange(1, 4)", {"function"}),
        ("factor=10.0", "factor=11.0", {"function"}),
        ("power=2", "power=3", {"function"}),
        ("if x is None", "if x is not None", {"function"}),
        ("value * factor**power", "value / factor**power", {"function"}),
        ("SHIFT = 4", "SHIFT = 5", {"function"}),
        ("value + SHIFT", "value - SHIFT", {"function"}),
        ('"beta"', '"delta"', {"partial"}),
        ("threshold=3.5", "threshold=2.5", {"partial"}),
        ("import floor", "import ceil as floor", {"partial"}),
        ('steps["action"] + 1', 'steps["action"] + 2', {"lambda"}),
        ("limit=7", "limit=9", {"closure"}),
        ("np.minimum", "np.maximum", {"closure", "cached"}),
        ("limit=8", "limit=9", {"cached"}),
        ("Robot(0.5)", "Robot(0.6)", {"method"}),
        ("GAIN = 3", "GAIN = 4", {"method"}),
        ("self.width *", "self.width -", {"method"}),
        ("n and recursive(n - 1)", "n or recursive(n - 1)", {"method"}),
    ],
)
def test_a_change_of_the_computation_changes_its_specs_only(tmp_path, monkeypatch, old, new, names):
    assert changed(tmp_path, monkeypatch, old, new) == names


def test_the_fingerprint_is_the_same_in_every_process(tmp_path, monkeypatch):
    expected = fingerprints(tmp_path, monkeypatch)
    code = (
        "import json; from octolike.data.specs.catalog import load_specs;"
        f"specs = load_specs([{str(tmp_path / 'specs.py')!r}]);"
        f"print({{n: specs[n].fingerprint() for n in {sorted(specs_to_compare())!r}}})"
    )
    for seed in ("1", "2"):
        paths = [str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        ours = expected | {n: find_spec(n).fingerprint() for n in specs_to_compare() - NAMES}
        assert eval(done.stdout) == ours


def specs_to_compare():
    return NAMES | {"bridge_dataset", "gnm_dataset", "kuka", "tabletop"}


def test_all_fields_that_statistics_depend_on_count():
    spec = find_spec("bridge_dataset")
    edits = {
        "version": "2.0.0",
        "language": "instruction",
        "label": "episode.task",
        "action": find_spec("tabletop").proprio,
        "proprio": find_spec("tabletop").action,
        "action_from": spec.action_from[::-1],
        "proprio_from": spec.proprio_from[:1],
        "every": 2,
        "keep": "episode.success",
    }
    digests = {n: dataclasses.replace(spec, **{n: v}).fingerprint() for n, v in edits.items()}
    assert len({spec.fingerprint(), *digests.values()}) == len(edits) + 1
    words = {"gripper": "in other words", "uncertain": ("a doubt",), "robot": "another"}
    assert dataclasses.replace(spec, **words).fingerprint() == spec.fingerprint()


def test_expressions_count_by_the_functions_that_they_call(monkeypatch):
    names = {"bridge_dataset", "kuka", "viola", "gnm_dataset", "tabletop"}

    def digests():
        return {name: DATASETS[name].fingerprint() for name in names}

    before = digests()
    monkeypatch.setitem(expressions.FUNCTIONS, "square", np.square)
    assert digests() == before
    binarize = functools.partial(expressions.binarize_gripper, low=0.1)
    monkeypatch.setitem(expressions.FUNCTIONS, "binarize", binarize)
    assert {name for name in names if digests()[name] != before[name]} == {"bridge_dataset"}
    monkeypatch.setattr(expressions, "ROOTS", (*expressions.ROOTS, "episode"))
    expected = {"bridge_dataset", "kuka", "viola"}  # the others have a function of their own
    assert {name for name in names if digests()[name] != before[name]} == expected


def test_libraries_count_by_their_version(monkeypatch):
    before = find_spec("gnm_dataset").fingerprint(), code_digest(zip)
    monkeypatch.setattr(fingerprint, "_version", lambda module: (module, "another version"))
    assert find_spec("gnm_dataset").fingerprint() != before[0]
    assert code_digest(zip) != before[1]


def test_a_decorator_of_a_library_shows_the_function_inside():
    def decorated(constant):
        @functools.wraps(standardize.as_stored)
        def function(steps):
            return constant

        return functools.singledispatch(function)

    assert code_digest(decorated(1)) == code_digest(decorated(1))
    assert code_digest(decorated(1)) != code_digest(decorated(2))


def test_values_of_different_types_or_structure_differ():
    values = [1, 1.0, True, "1", b"1", None, (1,), [1], {1}, {1: 1}, (1, (1,)), (1, 1, ())]
    values += [np.int64(1), np.float64(1), np.ones(1), np.ones((1, 1)), np.array(["1"], object)]
    values += [range(1), slice(1), ..., int, np.sin, np.cos, len, DATASETS["kuka"]]
    assert len({code_digest(x) for x in values}) == len(values)
    cycle = [1]
    cycle.append(cycle)
    assert code_digest(cycle) == code_digest(cycle) != code_digest([1, [1]])
