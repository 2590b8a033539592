"""Who may know whom: the import rules of the README's architecture section, read off the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "octolike"
FRAMEWORKS = {"jax", "flax", "optax", "orbax", "tensorflow", "tensorflow_datasets", "rlds", "torch"}
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "rlds"}

# The ground floor: modules without a framework that every room may import.
GROUND = {"types", "errors", "config", "files", "tables", "progress"}
# room: the rooms of octolike that it may import
MAY_SEE = {
    "types": set(),
    "errors": set(),
    "config": {"config", "errors", "tables"},
    "files": {"errors"},
    "tables": set(),
    "progress": set(),
    "images": set(),
    "embodiment": GROUND,
    "text": GROUND,
    "data": {*GROUND, "embodiment", "text", "data"},
    "model": {*GROUND, "model"},
    "train": {*GROUND, "embodiment", "text", "model", "train"},
    "octo_import": {*GROUND, "embodiment", "text", "model", "train", "octo_import"},
    "policy": {*GROUND, "images", "embodiment", "text", "model", "train", "policy"},
    "envs": {*GROUND, "envs"},
    "evaluation": {*GROUND, "embodiment", "policy", "envs", "train", "evaluation"},
}


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; write the whole name"
            names |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return names


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_sees_only_what_it_may(path):
    if room(path) == "__init__":
        assert not imports(path)
        return
    rooms = {n.split(".")[1] for n in imports(path) if n.startswith("octolike.")}
    extra = rooms - MAY_SEE[room(path)] - {"errors"}  # which every room may see
    assert not extra, f"{path} imports {extra}; {room(path)} may see {MAY_SEE[room(path)]}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_frameworks_stay_in_their_rooms(path):
    roots = {n.split(".")[0] for n in imports(path)}
    assert not roots & {"scripts", "configs", "notebooks"}
    if room(path) != "data":
        assert not roots & TENSORFLOW, "tensorflow belongs to octolike/data alone"
    if room(path) in GROUND | {"__init__", "embodiment", "envs"}:
        assert not roots & FRAMEWORKS


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_are_data_only(path):
    assert {n.split(".")[0] for n in imports(path)} <= {"octolike", "__future__", "copy", "types"}


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_scripts_are_thin(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("octolike", ["numpy", "jax", "tensorflow", "ml_collections"]),
        ("octolike.config", ["numpy", "jax", "tensorflow", "ml_collections"]),
        ("octolike.types", ["jax", "tensorflow"]),
        ("octolike.files", ["numpy", "jax", "tensorflow"]),
        ("octolike.policy", ["tensorflow", "tensorflow_datasets"]),
        ("octolike.train.loop", ["tensorflow", "tensorflow_datasets"]),
        ("octolike.data.service.service_source", ["tensorflow", "tensorflow_datasets", "jax"]),
        ("octolike.evaluation.rollouts", ["tensorflow", "mujoco"]),
    ],
)
def test_import_stays_light(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
