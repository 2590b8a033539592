"""Rules of the whole suite."""

import pytest


def pytest_collection_modifyitems(config, items):
    """Refuse to run simulator tests beside others: OpenGL and tensorflow crash in one process."""
    simulator = sum("simulator" in item.path.parts for item in items)
    if 0 < simulator < len(items):
        raise pytest.UsageError(
            "tests/simulator must run in a process of its own (software OpenGL and tensorflow "
            "each bring an LLVM): pytest; pytest tests/simulator"
        )
