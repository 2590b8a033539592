"""Every source of batches has the attributes and methods of the DataSource protocol."""

import inspect

import numpy as np
import pytest
from data_fakes import opened, write_numbered
from test_data_arrays import opened as opened_arrays

from octolike import types

SOURCES = ("RldsSource", "ArraySource")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return {class name: source}."""
    root = tmp_path_factory.mktemp("data")
    write_numbered(root, "fake", [3, 4, 5])
    return {type(source).__name__: source for source in (opened(root), opened_arrays())}


def methods(protocol):
    """Return {name: function} of a protocol's own methods; properties are left out."""
    methods = {k: v for k, v in vars(protocol).items() if inspect.isfunction(v)}
    dunder = ("__next__",)
    return {k: v for k, v in methods.items() if not k.startswith("_") or k in dunder}


def check_signatures(source, protocol):
    for name, function in methods(protocol).items():
        expected = list(inspect.signature(function).parameters.values())[1:]  # without self
        actual = list(inspect.signature(getattr(source, name)).parameters.values())
        assert [p.name for p in actual] == [p.name for p in expected], (source, name)
        for a, e in zip(actual, expected, strict=True):
            assert a.kind == e.kind, (source, name)
            # A default of the protocol is a promise; a source may have more.
            assert e.default in (inspect.Parameter.empty, a.default), (source, name)


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_has_the_methods_and_attributes_of_the_protocol(sources, name):
    source = sources[name]
    check_signatures(source, types.DataSource)
    assert all(isinstance(shape, tuple) and np.dtype(d) for shape, d in source.spec.values())
    assert isinstance(source.names, types.Names)
    assert [e.name for e in source.embodiments] == list(source.names.embodiments)
    assert isinstance(source.describe(), str)
    for dataset, batches in source.validation().items():
        assert dataset in source.names.datasets
        types.check_batch(next(batches()), source.spec)


@pytest.mark.parametrize("name", SOURCES)
def test_its_stream_has_the_methods_of_the_protocol(sources, name):
    stream = sources[name].train(None, (0, 1))
    check_signatures(stream, types.BatchStream)
    types.check_batch(next(stream), sources[name].spec)
    assert stream.state_at(stream.state()) == stream.state()
    stream.feedback({}, {})
    assert stream.memory() > 0
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_the_protocols_list_what_is_checked():
    assert set(methods(types.DataSource)) == {"train", "validation", "describe"}
    assert set(types.DataSource.__annotations__) | {"names"} == {"spec", "embodiments", "names"}
    stream = {"__next__", "state", "state_at", "feedback", "memory", "close"}
    assert set(methods(types.BatchStream)) == stream
