"""Verification of a whole run: every file is read and compared with the manifests.

Nothing of the run is executed, and nothing is written.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from octolike import files, manifest, types
from octolike.config import stored_config
from octolike.embodiment import embodiments_from_json
from octolike.errors import RunError
from octolike.tables import text_table
from octolike.train import checkpoint_manifest, run_manifest
from octolike.train.checkpoint_store import CHECKPOINTS, cause_of, checkpoint_steps

INTACT, UNVERIFIED, FAULTY = "intact", "not verified", "FAULTY"


class Finding(NamedTuple):
    """The state of a part of a run: `INTACT`, `UNVERIFIED` or `FAULTY`, and details."""

    part: str
    state: str
    details: str


def verify_run(run_dir: files.PathLike) -> list[Finding]:
    """Return a finding for each part of a run. Raises FileNotFoundError without a directory."""
    directory = files.as_path(run_dir)
    if not directory.is_dir():
        raise FileNotFoundError(f"no run directory {directory}")
    findings = [_of_manifest("run files", directory)]
    for name, read in READERS.items():
        findings.append(_attempt(name, functools.partial(read, directory, name)))
    findings.append(_attempt("dataset specs", lambda: _read_specs(directory)))
    for path in _logs(directory):
        name = str(path.relative_to(directory))
        findings.append(_attempt(name, functools.partial(_read_lines, path)))
    steps = checkpoint_steps(directory / CHECKPOINTS)
    findings += [
        _of_manifest(f"checkpoint {step}", directory / CHECKPOINTS / str(step), step)
        for step in steps
    ]
    if not steps:
        findings.append(Finding("checkpoints", UNVERIFIED, "none"))
    return findings


def table(findings: list[Finding]) -> str:
    """Return the findings as a table."""
    return text_table(findings, ("part", "state", ""), "lll")


def _of_manifest(part: str, directory: files.Path, step: int | None = None) -> Finding:
    try:
        stored = manifest.read(directory)
        if stored is None:
            return Finding(part, UNVERIFIED, f"no {manifest.NAME}: of an older version")
        about = {} if step is None else {"step": step}
        clauses = manifest.faults(directory, stored, about)
    except (OSError, RunError) as error:
        return Finding(part, FAULTY, cause_of(error))
    if clauses:
        return Finding(part, FAULTY, "; ".join(clauses))
    details = f"{len(stored.entries)} files"
    if step is not None:
        listed = manifest.list_files(directory, checkpoint_manifest.COMMIT_FILES)
        if unlisted := sorted(set(listed) - stored.entries.keys()):
            return Finding(part, FAULTY, f"files that training did not write: {unlisted}")
    size = sum(entries[0].size for entries in stored.entries.values())
    return Finding(part, INTACT, f"{details}, {size:,} bytes")


def _attempt(part: str, read: Callable[[], str]) -> Finding:
    try:
        return Finding(part, INTACT, read())
    except Exception as error:  # any file may hold anything
        return Finding(part, FAULTY, cause_of(error))


def _read_json(path: files.Path) -> Any:
    return json.loads(files.read_text(path))


def _read_config(directory: files.Path, name: str) -> str:
    stored_config(directory).check()
    return ""


def _read_records(directory: files.Path, name: str) -> str:
    records = embodiments_from_json(_read_json(directory / name))
    return f"{len(records)} robots: {', '.join(r.name for r in records)}"


def _read_batch_spec(directory: files.Path, name: str) -> str:
    return f"{len(types.spec_from_json(_read_json(directory / name)))} arrays"


def _read_names(directory: files.Path, name: str) -> str:
    names = types.names_from_json(_read_json(directory / name))
    return f"{len(names.datasets)} datasets, {len(names.tasks)} tasks"


READERS: dict[str, Callable[[files.Path, str], str]] = {
    "config.json": _read_config,
    "embodiments.json": _read_records,
    "batch_spec.json": _read_batch_spec,
    "names.json": _read_names,
}


def _read_specs(directory: files.Path) -> str:
    specs = stored_config(directory).data.specs
    if clauses := run_manifest.changed_specs(directory, specs):
        raise RunError("; ".join(clauses))
    return f"{len(specs)} files" if specs else "none"


def _logs(directory: files.Path) -> list[files.Path]:
    """Return the metrics and the results of evaluations."""
    names = ["metrics.jsonl", "scores.json", "costs.json"]
    paths = [directory / name for name in names]
    folder = directory / "evaluation"
    if folder.is_dir():
        paths += sorted(folder.glob("*.jsonl")) + sorted(folder.glob("*/*.jsonl"))
        paths += sorted(folder.glob("report.json")) + sorted(folder.glob("*/report.json"))
    return [path for path in paths if path.is_file()]


def _read_lines(path: files.Path) -> str:
    """Read a JSON file, or one with a JSON object per line; a partial last line is not a fault."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        json.loads(text)
        return ""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if line.endswith("\n"):
            try:
                json.loads(line)
            except ValueError as error:
                raise RunError(f"line {number} is not JSON: {error}") from None
    return f"{len(lines)} lines"
