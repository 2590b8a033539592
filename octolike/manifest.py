"""Manifests: the sha256 and size of each file of a directory, to notice damage before it is used.

    manifest.json
      {"format": 1, "about": {"step": 200}, "files": {name: [{"sha256": …, "size": …}]}}

A checkpoint has one (train.checkpoint_store), written before the checkpoint gets its name, and a
run has one over its other files (train.checkpoint). A file usually has one entry; while it is being
replaced it has two, and either content is intact. Manifests detect accidents: bit rot, truncated
copies, edited files. They are not signatures: anyone who can write the files can write the
manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from octolike import files
from octolike.errors import RunError

NAME = "manifest.json"
FORMAT = 1
THREADS = 4  # hashing releases the interpreter's lock
BLOCK = 1 << 20  # bytes per read of a file in a bucket


class Entry(NamedTuple):
    """The content of a file."""

    sha256: str
    size: int


class Manifest(NamedTuple):
    """The entries of the files of a directory, and facts about it.

    about: {name: number or text}, such as the step; entries: {path relative to the directory: its
    permitted contents}.
    """

    about: Mapping[str, Any]
    entries: Mapping[str, tuple[Entry, ...]]


def entry_of(content: bytes) -> Entry:
    """Return the entry of a content."""
    return Entry(hashlib.sha256(content).hexdigest(), len(content))


def hash_files(directory: files.PathLike, names: Iterable[str]) -> dict[str, Entry]:
    """Return {name: entry} of files of a directory, local or in a bucket; hashed in parallel."""
    root, names = files.as_path(directory), sorted(names)
    with ThreadPoolExecutor(THREADS) as pool:
        entries = list(pool.map(lambda name: _hash(root / name), names))
    return dict(zip(names, entries, strict=True))


def list_files(directory: files.PathLike, exclude: Collection[str] = ()) -> list[str]:
    """Return the paths of all files below a directory, relative to it; not the manifest's own."""
    root = files.as_path(directory)
    names, folders = [], [""]
    while folders:
        folder = folders.pop()
        for path in (root / folder).iterdir() if folder else root.iterdir():
            name = f"{folder}/{path.name}" if folder else path.name
            if path.is_dir():
                # A linked folder may lead out of the directory, or around in circles.
                if files.is_remote(root) or not os.path.islink(path):
                    folders.append(name)
            elif name not in (*exclude, NAME):
                names.append(name)
    return sorted(names)


def write(directory: files.PathLike, manifest: Manifest) -> None:
    """Write the manifest of a directory atomically."""
    entries = {k: [e._asdict() for e in v] for k, v in sorted(manifest.entries.items())}
    data = {"format": FORMAT, "about": dict(manifest.about), "files": entries}
    files.write_json(files.as_path(directory) / NAME, data, indent=1)


def read(directory: files.PathLike) -> Manifest | None:
    """Return the manifest of a directory; None if it has none.

    Raises RunError if it is corrupted or of a newer format.
    """
    path = files.as_path(directory) / NAME
    if not path.exists():
        return None
    try:
        return parse(files.read_text(path).encode())
    except RunError:
        raise
    except ValueError as error:
        raise RunError(f"{path} is corrupted: {error}") from None


def parse(content: bytes) -> Manifest:
    """Return the manifest with this content; ValueError, in one line, for any other content."""
    try:
        data = json.loads(content)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(data, dict) or data.keys() != {"format", "about", "files"}:
        raise ValueError("expected the keys format, about and files")
    if data["format"] != FORMAT or isinstance(data["format"], bool):
        raise ValueError(f"its format is {data['format']!r:.40}; this version reads {FORMAT}")
    if not isinstance(data["files"], dict) or not isinstance(data["about"], dict):
        raise ValueError("expected objects at about and files")
    entries = {name: _entries(name, items) for name, items in data["files"].items()}
    return Manifest(data["about"], entries)


def faults(
    directory: files.PathLike,
    manifest: Manifest,
    about: Mapping[str, Any] | None = None,
    names: Collection[str] | None = None,
) -> list[str]:
    """Return a clause for each file that is missing or has another content.

    Args:
        directory: holds the files.
        manifest: manifest of the directory.
        about: facts that the manifest should state.
        names: the files to check; default: all of the manifest.
    """
    root = files.as_path(directory)
    clauses = [
        f"its manifest is of {key} {manifest.about.get(key)!r}, not {value!r}"
        for key, value in (about or {}).items()
        if manifest.about.get(key) != value
    ]
    expected = {k: v for k, v in manifest.entries.items() if names is None or k in names}
    present = [name for name in sorted(expected) if files.is_regular(root / name)]
    clauses += [f"{name} is missing" for name in sorted(expected.keys() - set(present))]
    for name, entry in hash_files(root, present).items():
        if entry not in expected[name]:
            clauses.append(_difference(name, entry, expected[name]))
    return clauses


def _difference(name: str, actual: Entry, expected: tuple[Entry, ...]) -> str:
    sizes = sorted({entry.size for entry in expected})
    if actual.size not in sizes:
        return f"{name} has {actual.size:,} bytes, expected {' or '.join(f'{x:,}' for x in sizes)}"
    digests = " or ".join(entry.sha256[:12] for entry in expected)
    return f"{name} has changed (sha256 {actual.sha256[:12]}, expected {digests})"


def _entries(name: str, items: Any) -> tuple[Entry, ...]:
    parts = name.split("/")
    if not name or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"the file name {name!r:.80} leaves the directory")
    if not isinstance(items, list) or not items:
        raise ValueError(f"expected a list of entries for {name!r:.80}")
    result = []
    for item in items:
        is_entry = isinstance(item, dict) and item.keys() == {"sha256", "size"}
        if not is_entry or not isinstance(item["sha256"], str) or type(item["size"]) is not int:
            raise ValueError(f"expected sha256 and size for {name!r:.80}")
        if not re.fullmatch(r"[0-9a-f]{64}", item["sha256"]) or item["size"] < 0:
            raise ValueError(f"expected a sha256 and a size for {name!r:.80}")
        result.append(Entry(item["sha256"], item["size"]))
    return tuple(result)


def _hash(path: files.Path) -> Entry:
    if not files.is_regular(path):
        raise RunError(f"{path} is not a regular file; restore the file that was written there")
    if not files.is_remote(path):
        with open(path, "rb", buffering=0) as file:  # into one buffer: 7 % quicker than blocks
            return Entry(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return Entry(digest.hexdigest(), size)
