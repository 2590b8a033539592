"""Push and pull a run: a Hugging Face hub repository (hf://), a bucket, or a directory.

A revision names a content that never changes: the commit of a hub repository; elsewhere the sha256
over all files. `push` returns it, `pull` refuses any other content. A push contains the run's own
files with one checkpoint, without the optimizer's state, and a model card. Every file is checked
against the run's manifests (octolike.manifest) before the push and after the pull. No code of a
run is executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path as LocalPath
from typing import Any, NamedTuple

from octolike import files, manifest
from octolike.errors import ConfigError, RunError
from octolike.files import Path, PathLike
from octolike.hub.card import REPORT, model_card, read_json
from octolike.train import checkpoint_manifest, run_manifest
from octolike.train.checkpoint_store import CHECKPOINTS, cause_of, checkpoint_steps

HUB = "hf://"
MIN_PIN = 12  # characters of a sha256
CARD, ORIGIN = "README.md", "origin.json"
OPTIONAL = ("costs.json", "versions.json", "scores.json", "parameters.txt", manifest.NAME, REPORT)
FOR_TRAINING = ("optimizer/", "data/")  # items of a checkpoint that acting does not need


class Location(NamedTuple):
    """The location of a run. place: a repository of the hub ("owner/name"), or a path or URI."""

    place: str
    is_hub: bool
    revision: str

    def __str__(self) -> str:
        return f"{HUB if self.is_hub else ''}{self.place}"


def parse_location(text: str) -> Location:
    """Return the location of "hf://owner/name@revision", "gs://bucket/run@…" or "path@…".

    Raises ConfigError for a hub address that is not of this form.
    """
    place, at, revision = text.rpartition("@")
    if not at or "/" in revision:  # an @ in a folder's name
        place, revision = text, ""
    if not place.startswith(HUB):
        return Location(place, False, revision)
    repository = place.removeprefix(HUB).strip("/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"{text} names no repository of the hub; expected hf://OWNER/NAME")
    return Location(repository, True, revision)


def push(
    run_dir: PathLike,
    target: str,
    step: int | None = None,
    *,
    message: str = "",
    license: str = "",
    public: bool = False,
    with_optimizer: bool = False,
) -> str:
    """Copy a run with one checkpoint to a location; return it with the pinned revision.

    Args:
        run_dir: the run directory.
        target: "hf://owner/name", or a directory (local or in a bucket) that is absent or empty.
        step: the checkpoint's step; default: the newest.
        message: message of the hub's commit.
        license: stated in the model card.
        public: whether a repository that is created is public.
        with_optimizer: also the optimizer's state and the position in the data, for training.

    Raises:
        ConfigError: a bad location, or a directory that is not empty.
        FileNotFoundError: the run or the checkpoint does not exist.
        RunError: a file is damaged, or the hub refuses.
    """
    location, run = parse_location(target), files.as_path(run_dir)
    if location.revision:
        raise ConfigError(f"{target} has a revision; a push makes a new one: remove @…")
    with tempfile.TemporaryDirectory() as folder:
        staged = LocalPath(folder) / "run"
        step = stage(run, staged, step, with_optimizer)
        (staged / CARD).write_text(model_card(staged, step, str(location), license), "utf-8")
        if location.is_hub:
            message = message or f"octolike: checkpoint {step}"
            revision = _upload(staged, location.place, message, public)
        else:
            with _one_line(location):
                revision = _copy_out(staged, location.place)
    return f"{location}@{revision}"


def pull(source: str, directory: PathLike) -> str:
    """Copy a run from a location into a new directory; return the location with its revision.

    The files are checked before the directory gets its name, so it is complete or absent. Without
    a revision the newest content is taken, and its revision is returned.

    Raises:
        ConfigError: a bad location, or a directory that exists.
        FileNotFoundError: the run does not exist.
        RunError: the content is not that of the revision, is damaged, or the hub refuses.
    """
    location, target = parse_location(source), files.output_directory(directory, "the directory")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty; name another directory")
    is_pinned = location.revision and not location.is_hub  # the hub resolves its own, and tags
    if is_pinned and len(location.revision) < MIN_PIN:
        raise ConfigError(f"{source}: a revision needs at least {MIN_PIN} characters")
    with files.replacing(target) as staged:
        staged.mkdir()
        if location.is_hub:
            revision = _download(location, staged)
        else:
            with _one_line(location):
                revision = _copy_in(location, staged)
        if is_pinned and not revision.startswith(location.revision):
            raise RunError(
                f"{location} has the revision {revision}, not {location.revision}: its content has "
                "changed. Ask whoever pushed it, or pull it without a revision"
            )
        check(staged, str(location))
        pinned = f"{location}@{revision}"
        files.write_json(staged / ORIGIN, {"pulled_from": pinned})
    return pinned


def stage(run: Path, staged: LocalPath, step: int | None, with_optimizer: bool) -> int:
    """Copy the files to be pushed of a run into a new directory; return the checkpoint's step."""
    steps = checkpoint_steps(run / CHECKPOINTS)
    if not run.is_dir() or not (run / "config.json").exists():
        raise FileNotFoundError(f"{run} is not a run: it has no config.json")
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(f"{run} has no checkpoint {step or ''}; it has {steps}")
    step = steps[-1] if step is None else step
    run_manifest.check(run)
    checkpoint = run / CHECKPOINTS / str(step)
    _check_checkpoint(checkpoint)
    # Only files that training wrote: a folder may link anywhere.
    listed, stored = manifest.read(run), manifest.read(checkpoint)
    kept = [k for k in run_manifest.kept_files(run) if listed is None or k in listed.entries]
    names = [*run_manifest.JSON_FILES, *OPTIONAL, *kept]
    for name in dict.fromkeys(names):
        if (run / name).exists():
            _copy(run / name, staged / name)
    inside = manifest.list_files(checkpoint)
    if stored is not None:
        written = {*stored.entries, *checkpoint_manifest.COMMIT_FILES}
        inside = [name for name in inside if name in written]
    if not with_optimizer:
        inside = [name for name in inside if not name.startswith(FOR_TRAINING)]
    copied = staged / CHECKPOINTS / str(step)
    for name in inside:
        _copy(checkpoint / name, copied / name)
    if stored is not None:
        entries = {k: v for k, v in stored.entries.items() if k in inside}
        manifest.write(copied, manifest.Manifest(stored.about, entries))
    return step


def check(run: LocalPath, name: str) -> None:
    """Raise RunError unless a directory holds a run with the files of its manifests."""
    read_json(files.as_path(run / "config.json"))
    steps = checkpoint_steps(files.as_path(run / CHECKPOINTS))
    if not steps:
        raise RunError(f"{name} holds no checkpoint")
    run_manifest.check(files.as_path(run))
    for step in steps:
        _check_checkpoint(files.as_path(run / CHECKPOINTS / str(step)))


def _check_checkpoint(checkpoint: Path) -> None:
    try:
        checkpoint_manifest.check(checkpoint)
    except RunError as error:
        raise RunError(f"checkpoint {checkpoint} cannot be used: {error}") from error


def _copy(source: PathLike, target: PathLike) -> None:
    if not files.is_regular(source):
        raise RunError(f"{source} is not a regular file, so it is not copied; remove it")
    path = files.as_path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(files.as_path(source).read_bytes())


# Directories and buckets


def digest(directory: PathLike) -> str:
    """Return the revision of a directory: sha256 over the names and contents of all files."""
    root = files.as_path(directory)
    names = manifest.list_files(root, (ORIGIN,))
    if (root / manifest.NAME).exists():
        names.append(manifest.NAME)
    total = hashlib.sha256()
    for name, entry in sorted(manifest.hash_files(root, names).items()):
        total.update(f"{name}\0{entry.sha256}\n".encode())
    return total.hexdigest()


@contextlib.contextmanager
def _one_line(location: Location) -> Iterator[None]:
    """Turn the errors of a bucket's file system, which may have any type, into RunError."""
    try:
        yield
    except (ValueError, OSError):  # of this module and of local files
        raise
    except Exception as error:
        scheme = location.place.partition("://")[0]
        raise RunError(
            f"{location} cannot be opened: {cause_of(error)}. If {scheme}:// is not implemented "
            "here, copy the run to a local directory with the provider's own command"
        ) from error


def _copy_out(staged: LocalPath, place: str) -> str:
    target = files.as_path(place)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{place} exists and is not empty; push to another directory")
    files.check_writable(place, "the target")
    for path in sorted(p for p in staged.rglob("*") if p.is_file()):
        _copy(path, target / str(path.relative_to(staged)))
    return digest(staged)


def _copy_in(location: Location, staged: LocalPath) -> str:
    source = files.as_path(location.place)
    if not source.is_dir():
        raise FileNotFoundError(f"the directory {location.place} does not exist")
    for name in _all_files(source):
        try:
            path = files.child(source, name)
        except ValueError as error:  # a link would copy any file of this machine
            raise RunError(f"{error}: a link; put a copy of the file in its place") from None
        _copy(path, staged / name)
    return digest(staged)


def _all_files(root: Path) -> list[str]:
    names = manifest.list_files(root)
    return [*names, manifest.NAME] if (root / manifest.NAME).exists() else names


# The hub


def hub_api() -> Any:
    """Return huggingface_hub's API with the machine's login; ConfigError if it is missing."""
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{HUB} needs huggingface_hub, which is not installed: install 'octolike[hub]'"
        ) from error
    return HfApi(library_name="octolike")


def _upload(staged: LocalPath, repository: str, message: str, public: bool) -> str:
    api = hub_api()
    try:
        api.create_repo(repository, repo_type="model", private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            repo_type="model",
            folder_path=str(staged),
            commit_message=message,
            delete_patterns=["*"],  # a revision holds the one checkpoint of its push
        )
    except Exception as error:  # of the hub, of the network, of the login
        raise RunError(
            f"{HUB}{repository} cannot be written: {cause_of(error)}. Log in with: hf auth login"
        ) from error
    return str(commit.oid)


def _download(location: Location, staged: LocalPath) -> str:
    api = hub_api()
    try:
        info = api.model_info(location.place, revision=location.revision or None)
        api.snapshot_download(
            location.place,
            repo_type="model",
            revision=info.sha,
            local_dir=str(staged),
        )
    except Exception as error:
        raise RunError(f"{location} cannot be read: {cause_of(error)}") from error
    shutil.rmtree(staged / ".cache", ignore_errors=True)  # huggingface_hub's own
    (staged / ".gitattributes").unlink(missing_ok=True)
    return str(info.sha)
