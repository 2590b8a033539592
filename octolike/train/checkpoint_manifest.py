"""The manifest of a checkpoint: written before the checkpoint gets its name, checked before use.

Orbax writes a checkpoint into a temporary directory and commits it at the end, by a rename or, in
gs://, by a last file. The classes here write the manifest in between, in the background thread of
the save.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Collection
from typing import Any

from orbax.checkpoint.path import atomicity

from octolike import files, manifest
from octolike.errors import RunError

# Orbax writes these two while it commits; they hold no state.
COMMIT_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")
SHOWN = 3  # faults in an error
_timings: dict[str, tuple[float, float]] = {}  # {checkpoint directory: of its last manifest}
_noted: set[str] = set()  # checkpoint directories; their lack of a manifest was printed


class CheckedRename(atomicity.AtomicRenameTemporaryPath):
    """Commits by a rename, after the manifest."""

    async def finalize(self) -> None:
        await asyncio.to_thread(write_manifest, self.get(), self.get_final())
        await super().finalize()


class CheckedCommitFile(atomicity.CommitFileTemporaryPath):
    """Commits by a last file, after the manifest."""

    async def finalize(self) -> None:
        await asyncio.to_thread(write_manifest, self.get(), self.get_final())
        await super().finalize()


def temporary_path_class(directory: files.Path) -> type[Any]:
    """Return how orbax commits in a directory: as it would choose itself, with a manifest."""
    return CheckedCommitFile if str(directory).startswith("gs://") else CheckedRename


def write_manifest(directory: files.Path, final: files.Path) -> None:
    """Write the manifest of a complete, not yet committed checkpoint; final: its path.

    Orbax also commits each item of a checkpoint, in this way: those get none of their own.
    """
    if not final.name.isdigit():
        return
    begin = time.perf_counter()
    entries = manifest.hash_files(directory, manifest.list_files(directory, COMMIT_FILES))
    about = {"step": int(final.name)}
    manifest.write(directory, manifest.Manifest(about, {k: (v,) for k, v in entries.items()}))
    _timings[str(final.parent)] = begin, time.perf_counter()


def describe_cost(directory: files.Path, opened: float, start: float) -> str:
    """Return a line on the cost of the last manifest in a checkpoint directory; "" without one.

    opened, start: when the directory was opened for training, and when the save started, in
    time.perf_counter's seconds.
    """
    if str(directory) not in _timings:
        return ""  # another process writes them
    begin, end = _timings[str(directory)]
    return (
        f"checksums of a checkpoint: {end - begin:.2f} s of a save of {end - start:.2f} s, in the "
        f"background; {(end - begin) / max(end - opened, 1e-9):.2%} of the time since the start"
    )


def check(checkpoint: files.Path, items: Collection[str] | None = None) -> None:
    """Raise RunError, naming the files, if a checkpoint differs from its manifest.

    One without a manifest, of an older version, is not verified; that is printed once.

    items: folders of the checkpoint to check, those that are read; default: all files.
    """
    stored = manifest.read(checkpoint)
    if stored is None:
        for name in manifest.list_files(checkpoint):
            if not files.is_regular(checkpoint / name):
                raise RunError(f"{name} is not a regular file")
        if str(checkpoint.parent) not in _noted:
            _noted.add(str(checkpoint.parent))
            print(
                f"note: {checkpoint} has no {manifest.NAME} (written by an older version of "
                "octolike), so damage to its files would not be noticed",
                file=sys.stderr,
            )
        return
    names = [k for k in stored.entries if items is None or k.partition("/")[0] in items]
    clauses = manifest.faults(checkpoint, stored, {"step": int(checkpoint.name)}, names)
    if clauses:
        more = f" and {len(clauses) - SHOWN} more" if len(clauses) > SHOWN else ""
        raise RunError(f"its files are damaged: {'; '.join(clauses[:SHOWN])}{more}")
