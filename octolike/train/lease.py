"""One owner per run directory: a second start is refused while the first one lives.

workdir/owner.json names the owner (octolike.owner_file). A start that finds a dead owner takes
over: at once on its machine or when SLURM requeues the job, else after it has been watched for a
while. Several processes of one run share the lease of the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from octolike import files
from octolike.errors import RunError
from octolike.owner_file import Owner, OwnerFile
from octolike.train import sharding

FILE = "owner.json"
INTERVAL = 5.0  # seconds between heartbeats
PATIENCE = 6  # intervals without a beat after which an owner elsewhere is dead


class RunLease:
    """The right to write to a run directory; a context manager.

    Entering raises RunError if another process owns the directory. Leaving removes the file.
    """

    def __init__(self, workdir: files.PathLike, interval: float = INTERVAL) -> None:
        """Name the directory; interval: seconds between heartbeats."""
        self._file = OwnerFile(files.as_path(workdir) / FILE, interval)
        self._directory = self._file.path.parent

    def __enter__(self) -> RunLease:
        interval = self._file.interval
        while (owner := self._file.acquire()) is not None:
            seconds = PATIENCE * interval
            print(
                f"{self._directory} has an owner, process {owner.get('pid')} on "
                f"{owner.get('host')}; watching for up to {seconds:.0f} s whether it is alive",
                flush=True,
            )
            living = self._file.watch(owner, seconds, interval / 5)
            if living is not None:
                raise self._refusal(living)
            print(f"its process has ended; taking over {self._directory}", flush=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.release()

    def check(self) -> None:
        """Raise RunError, before something is written, if the run is no longer this process's.

        Another process may have taken over while this one was suspended for long; or the run's
        files were removed, and checkpoints alone are no run.
        """
        owner = self._file.read()
        if owner and not self._file.is_mine(owner):
            raise self._refusal(owner)
        if owner is None and not (self._directory / "config.json").exists():
            raise RunError(
                f"{self._directory} was removed or emptied while its run was training; put it "
                "back from a copy to resume, or start again"
            )

    def _refusal(self, owner: Owner) -> RunError:
        return RunError(
            f"{self._directory} belongs to a running process, {owner.get('pid')} on "
            f"{owner.get('host')}; stop it, or name another directory (--config.workdir=...)"
        )


@contextlib.contextmanager
def own_run(workdir: files.PathLike) -> Iterator[RunLease | None]:
    """Own a run directory: yield the lease in the first process of a run, None in the others.

    Raises RunError in all processes if another one owns the directory.
    """
    with contextlib.ExitStack() as stack:
        lease, fault = None, ""
        if sharding.is_first():
            try:
                lease = stack.enter_context(RunLease(workdir))
            except RunError as error:
                fault = str(error)
        if sharding.agree_on_fault(bool(fault)):
            raise RunError(fault or f"{workdir} belongs to another running process")
        yield lease
