"""Rules of the whole suite."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(config, items):
    """Refuse to run simulator tests beside others: OpenGL and tensorflow crash in one process."""
    simulator = sum("simulator" in item.path.parts for item in items)
    if 0 < simulator < len(items):
        raise pytest.UsageError(
            "tests/simulator must run in a process of its own (software OpenGL and tensorflow "
            "each bring an LLVM): pytest; pytest tests/simulator"
        )


@pytest.fixture(scope="session")
def shared() -> Path:
    """The golden arrays and real episodes that lie beside the checkout."""
    path = Path(__file__).parents[2] / "shared"
    if not (path / "golden").is_dir():
        pytest.skip(f"no golden data in {path}")
    return path
