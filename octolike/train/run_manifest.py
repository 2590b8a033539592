"""The manifest of a run's own files: config, records, plug-ins, tokenizer, text encoder.

Written at each start of training, checked by every load. Files that grow or change during training
(metrics, scores, costs) are not listed; checkpoints have manifests of their own. `about` holds the
sha256 of the dataset spec files that the config names, which lie outside the run.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping

from octolike import files, manifest
from octolike.config import plugins
from octolike.errors import RunError

# A resumed run keeps the files in these folders; the JSON files are compared and written again.
KEPT = ("plugins", "tokenizer", "text_encoder")
JSON_FILES = (
    "config.json",
    "embodiments.json",
    "batch_spec.json",
    "names.json",
    "versions.json",
)
SPECS = "dataset specs"
_noted: set[str] = set()  # run directories; their lack of a manifest was printed


def write_with(directory: files.Path, texts: Mapping[str, str], specs: Iterable[str]) -> None:
    """Write texts as files of a run, and the manifest of all its files.

    During the writes the manifest permits the old and the new texts, so a kill at any moment leaves
    a run that loads.
    """
    new = {name: (manifest.entry_of(text.encode()),) for name, text in texts.items()}
    unchanged = {k: (v,) for k, v in manifest.hash_files(directory, kept_files(directory)).items()}
    about = {SPECS: _spec_digests(specs)}
    before = manifest.read(directory)
    if before is not None:
        both = {k: tuple(dict.fromkeys((*before.entries.get(k, ()), *v))) for k, v in new.items()}
        manifest.write(directory, manifest.Manifest(about, unchanged | both))
    for name, text in texts.items():
        files.write_text(directory / name, text)
    manifest.write(directory, manifest.Manifest(about, unchanged | new))


def kept_files(directory: files.Path) -> list[str]:
    """Return the paths, relative to a run, of its plug-ins, tokenizer and text encoder."""
    return [
        f"{folder}/{name}"
        for folder in KEPT
        if (directory / folder).is_dir()
        for name in manifest.list_files(directory / folder, ())
        if "__pycache__" not in name
    ]


def check(directory: files.Path, folders: Iterable[str] | None = None) -> None:
    """Raise RunError, naming the file and the remedy, if a file differs from the run's manifest.

    A run without one, of an older version, is not verified; that is printed once. Plug-ins are
    compared with the digests in config.json instead (config.plugins), which the manifest covers.

    folders: check only the files in these; default: all files.
    """
    stored = manifest.read(directory)
    if stored is None:
        _note_once(directory)
        return
    names = [name for name in stored.entries if not name.startswith(f"{plugins.FOLDER}/")]
    if folders is not None:
        names = [name for name in names if name.partition("/")[0] in folders]
    if clauses := manifest.faults(directory, stored, names=names):
        raise RunError(
            f"{directory} has changed since training: {'; '.join(clauses)}. Restore the files from "
            f"a copy, or, if you changed them on purpose: octolike verify {directory} --accept"
        )


def accept(directory: files.Path) -> list[str]:
    """Write a manifest of a run's files as they are now; return the names of those that differ."""
    names = [name for name in JSON_FILES if (directory / name).is_file()]
    entries = manifest.hash_files(directory, [*names, *kept_files(directory)])
    before = manifest.read(directory)
    old = before.entries if before is not None else {}
    about = before.about if before is not None else {SPECS: {}}
    manifest.write(directory, manifest.Manifest(about, {k: (v,) for k, v in entries.items()}))
    changed = {name for name, entry in entries.items() if entry not in old.get(name, ())}
    return sorted(changed | (old.keys() - entries.keys()))


def changed_specs(directory: files.Path, specs: Iterable[str]) -> list[str]:
    """Return a clause for each dataset spec file that is missing or differs from training's."""
    stored = manifest.read(directory)
    recorded = stored.about.get(SPECS, {}) if stored is not None else {}
    clauses = []
    for path in specs:
        expected, present = recorded.get(files.as_path(path).name), _spec_digests([path])
        if not present:
            clauses.append(f"{path} is missing")
        elif expected and expected not in present.values():
            clauses.append(f"{path} has changed since training")
    return clauses


def same_specs(directory: files.Path, specs: Iterable[str]) -> bool:
    """Return whether dataset spec files are those of training, wherever they lie now."""
    stored = manifest.read(directory)
    recorded = stored.about.get(SPECS) if stored is not None else None
    return bool(recorded) and recorded == _spec_digests(specs)


def _spec_digests(paths: Iterable[str]) -> dict[str, str]:
    existing = [path for path in map(files.as_path, paths) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in existing}


def _note_once(directory: files.Path) -> None:
    if str(directory) not in _noted:
        _noted.add(str(directory))
        print(
            f"note: {directory} has no {manifest.NAME} (written by an older version of octolike), "
            f"so changes of its files would not be noticed; to add one: octolike verify "
            f"{directory} --accept",
            file=sys.stderr,
        )
