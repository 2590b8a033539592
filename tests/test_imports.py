"""The import rules of docs/architecture.md, checked on the source."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path

import pytest

import octolike

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "octolike"
FRAMEWORKS = {"jax", "flax", "optax", "orbax", "tensorflow", "tensorflow_datasets", "rlds", "torch"}
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "rlds"}

# The lowest layer: modules without a framework that every part may import.
LOWEST = {
    "types",
    "errors",
    "remarks",
    "config",
    "files",
    "manifest",
    "owner_file",
    "pictures",
    "tables",
    "progress",
    "plain_figure",
    "terminal",
    "cores",
}
# part (a package or module of octolike): the parts that it may import
MAY_IMPORT = {
    "types": set(),
    "errors": set(),
    "remarks": set(),
    "config": {"config", "errors", "files", "tables", "terminal"},
    "files": {"errors"},
    "manifest": {"errors", "files"},
    "owner_file": {"files"},
    "pictures": {"files"},
    "cores": set(),
    "commands": LOWEST,
    "tables": set(),
    "plain_figure": set(),
    "progress": set(),
    "terminal": set(),
    "images": set(),
    "representation": LOWEST,
    "state_representation": {*LOWEST, "representation"},
    "embodiment": {*LOWEST, "representation", "state_representation"},
    "ranges": {*LOWEST, "embodiment"},
    "text": LOWEST,
    "data": {*LOWEST, "embodiment", "ranges", "representation", "text", "data"},
    "model": {*LOWEST, "model"},
    "train": {*LOWEST, "embodiment", "ranges", "text", "model", "train"},
    "octo_import": {*LOWEST, "embodiment", "ranges", "text", "model", "train", "octo_import"},
    "policy": {*LOWEST, "images", "embodiment", "ranges", "text", "model", "train", "policy"},
    "hub": {*LOWEST, "embodiment", "train", "hub"},
    "envs": {*LOWEST, "envs"},
    "evaluation": {*LOWEST, "embodiment", "ranges", "policy", "envs", "train", "evaluation"},
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


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_part_imports_only_those_that_it_may(path):
    if part(path) == "__init__":
        assert not imports(path)
        return
    parts = {n.split(".")[1] for n in imports(path) if n.startswith("octolike.")}
    extra = parts - MAY_IMPORT[part(path)] - {"errors"}  # which every part may import
    assert not extra, f"{path} imports {extra}; {part(path)} may import {MAY_IMPORT[part(path)]}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_frameworks_stay_in_their_parts(path):
    roots = {n.split(".")[0] for n in imports(path)}
    assert not roots & {"scripts", "configs", "notebooks"}
    if part(path) != "data":
        assert not roots & TENSORFLOW, "tensorflow belongs to octolike/data alone"
    plain = {"embodiment", "ranges", "representation", "state_representation", "envs"}
    if part(path) in LOWEST | {"__init__"} | plain:
        assert not roots & FRAMEWORKS


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda p: p.name)
def test_configs_are_data_only(path):
    assert {n.split(".")[0] for n in imports(path)} <= {"octolike", "__future__", "copy", "types"}


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_scripts_are_thin(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_is_shadowed_by_a_script(path):
    """`python scripts/compare.py` puts scripts/ first on the path, statistics.py included."""
    scripts = {script.stem for script in (ROOT / "scripts").glob("*.py")}
    assert not {n.split(".")[0] for n in imports(path)} & scripts


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("octolike", ["numpy", "jax", "tensorflow", "ml_collections"]),
        ("octolike.config", ["numpy", "jax", "tensorflow", "ml_collections"]),
        ("octolike.types", ["jax", "tensorflow"]),
        ("octolike.files", ["numpy", "jax", "tensorflow"]),
        ("octolike.policy.policy", ["tensorflow", "tensorflow_datasets"]),
        ("octolike.policy.executor", ["jax", "flax", "tensorflow", "ml_collections"]),
        ("octolike.policy.client", ["jax", "flax", "tensorflow", "ml_collections", "PIL"]),
        ("octolike.train.loop", ["tensorflow", "tensorflow_datasets"]),
        ("octolike.evaluation.rollouts", ["tensorflow", "mujoco"]),
    ],
)
def test_import_stays_light(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def client_modules() -> list[str]:
    """Return the modules of the package in client/."""
    tree = ast.parse((ROOT / "client" / "setup.py").read_text(encoding="utf-8"))
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call))
    (names,) = (k.value for k in call.keywords if k.arg == "py_modules")
    return ast.literal_eval(names)


@pytest.mark.parametrize("module", client_modules())
def test_a_client_needs_numpy_msgpack_websockets_and_python_3_10(module):
    path = ROOT / f"{module.replace('.', '/')}.py"
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    roots = {name.partition(".")[0] for name in imports(path)} - sys.stdlib_module_names
    assert roots <= {"numpy", "msgpack", "websockets", "PIL", "octolike"}
    if module.endswith("__init__"):
        return  # imports further modules only at their first use
    files = {name for name in imports(path) if (ROOT / f"{name.replace('.', '/')}.py").exists()}
    assert files <= set(client_modules())


def test_the_client_has_the_version_of_the_whole():
    projects = [
        tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for folder in (ROOT, ROOT / "client")
    ]
    assert projects[0]["version"] == projects[1]["version"] == octolike.__version__


# Parts of octolike/data: its sub-folders and single files.
MOST_DATA_PARTS, MOST_DATA_EDGES = 15, 25


def module_graph() -> dict[str, set[str]]:
    """Return {module: modules of octolike that it imports}, also inside functions."""
    paths = {module_name(path): path for path in sources()}
    return {name: module_imports(path, paths.keys()) - {name} for name, path in paths.items()}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_imports(path: Path, modules: Collection[str]) -> set[str]:
    """Return those of `modules` that a file imports, or imports a definition from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            for submodule in (f"{node.module}.{a.name}" for a in node.names):
                names.add(submodule if submodule in modules else node.module)
    return names.intersection(modules)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of a cycle in order, the first one repeated; [] without a cycle."""
    finished, path = set(), []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        path.append(node)
        for target in sorted(graph[node]):
            if cycle := visit(target):
                return cycle
        finished.add(path.pop())
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node))), [])


def edges(graph: dict[str, set[str]], prefix: str, depth: int) -> set[tuple[str, str]]:
    """Return the (from, to) pairs between the parts `depth` names below `prefix`."""
    inside = {m: ".".join(m.split(".")[:depth]) for m in graph if f"{m}.".startswith(f"{prefix}.")}
    pairs = {(inside[m], inside[n]) for m in inside for n in graph[m] if n in inside}
    return {(a, b) for a, b in pairs if a != b}


def test_modules_import_without_cycles():
    cycle = find_cycle(module_graph())
    assert not cycle, "import cycle: " + " -> ".join(cycle)


def test_parts_import_from_lower_layers_only():
    """Each part is in a higher layer than the parts that it may import, and imports only these."""
    layers: dict[str, int] = {}
    parts = {name: allowed - {name} for name, allowed in MAY_IMPORT.items()}
    assert not find_cycle(parts), f"MAY_IMPORT has a cycle: {find_cycle(parts)}"
    while len(layers) < len(parts):
        for name, allowed in parts.items():
            if allowed <= layers.keys():
                layers[name] = 1 + max((layers[r] for r in allowed), default=0)
    for a, b in edges(module_graph(), "octolike", 2):
        a, b = a.partition(".")[2], b.partition(".")[2]
        if a and b and b != "errors":  # the package itself imports nothing
            assert layers[a] > layers[b], f"{a} (layer {layers[a]}) imports {b} ({layers[b]})"


def test_data_has_few_parts_and_edges():
    graph = module_graph()
    parts = {".".join(m.split(".")[:3]) for m in graph if f"{m}.".startswith("octolike.data.")}
    between = edges(graph, "octolike.data", 3)
    inner = {
        part: f"{sum(m.startswith(f'{part}.') for m in graph)} files, "
        f"{len(edges(graph, part, 4))} edges"
        for part in sorted(parts - {"octolike.data"})
    }
    report = "\n".join(
        [
            f"{len(parts)} parts, {len(between)} edges:",
            *(f"  {a} -> {b}" for a, b in sorted(between)),
            "inside the parts:",
            *(f"  {part}: {text}" for part, text in inner.items()),
        ]
    )
    assert len(parts) <= MOST_DATA_PARTS, report
    assert len(between) <= MOST_DATA_EDGES, report


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
