"""Rules of the whole suite.

Most of the suite's time is XLA's compilation. Code is therefore compiled without XLA's costly
optimizations, and each computation once for all processes of the suite. Set the variables below to
other values to test optimized code, or to keep the compiled code for the next run.
"""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import hypothesis
import pytest

# The same examples each time, without time limits and without files of their own.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")

TEMPORARY, PREFIX = "OCTOLIKE_TESTS_TEMPORARY", "octolike-tests-"


def _remove_remains() -> None:
    """Remove the temporary directories of sessions that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        pid = path.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True)


# A shell's background job ignores Ctrl-C, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before JAX is imported; the processes that xdist and the tests start inherit these.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if TEMPORARY not in os.environ:  # in the first process of a session
    _remove_remains()
    # tensorflow_datasets leaves a directory for each builder; this one is removed at the end.
    SESSION = tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-")
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ[TEMPORARY] = os.environ["TMPDIR"] = tempfile.tempdir = SESSION.name
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{os.environ[TEMPORARY]}/compiled")


def pytest_collection_modifyitems(config, items):
    """Refuse simulator tests together with others: OpenGL and tensorflow crash in one process."""
    folders = {"simulator", "libero"}
    simulator = sum(bool(folders & {*item.path.parts}) for item in items)
    if 0 < simulator < len(items):
        raise pytest.UsageError(
            "tests/simulator and tests/libero must run in processes of their own (software OpenGL "
            "and tensorflow each bring an LLVM): pytest; pytest tests/simulator"
        )


@pytest.fixture
def optimized():
    """Compile with all of XLA's optimizations: for values that were recorded with them."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The golden arrays and real episodes in the folder shared next to the checkout."""
    path = Path(__file__).parents[2] / "shared"
    if not (path / "golden").is_dir():
        pytest.skip(f"no golden data in {path}")
    return path


@pytest.fixture
def patience():
    """End a test that waits for a pipe or reads a device without end."""

    def stop(*args):
        raise TimeoutError("it waits forever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
