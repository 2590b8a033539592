"""Full storage, signals and second starts: subprocesses that train the small network."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import kills
from tally import EXACT, LOST, REFUSED, SILENT, Tally

SMALL_MIB = 3  # of the small file system
STEPS = 24


Pending = list[tuple[str, Path]]  # (fault, directory of a finished run)


def signal_runs(tally: Tally, folder: Path, steps: int, times: int, seed: int) -> Pending:
    """Send SIGTERM or Ctrl-C at a random moment; the run must save, and resume to the same end."""
    random, pending = Random(seed), []
    for number in range(times):
        signum = random.choice([signal.SIGTERM, signal.SIGINT])
        workdir, name = folder / f"signal_{number}", signal.Signals(signum).name
        process = kills.start(workdir, steps, folder / "cache")
        while process.is_alive() and "\nstep " not in kills.read_log(workdir):
            process.join(0.02)
        process.join(random.uniform(0, 0.6))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signum)
        process.join()
        text = kills.read_log(workdir)
        # -signum: before the first step, when there is nothing to save
        if process.exitcode not in (0, 128 + signum, -signum) or "Traceback" in text:
            tally.add(name, LOST, text[-300:])
            continue
        kills.finish(kills.start(workdir, steps, folder / "cache"), kills.log_of(workdir))
        pending.append((name, workdir))
    return pending


def second_starts(tally: Tally, folder: Path, steps: int, times: int) -> Pending:
    """Start a second process in the directory of a running one."""
    pending = []
    for number in range(times):
        workdir, log = folder / f"twice_{number}", folder / f"twice_{number}.second"
        first = kills.start(workdir, steps, folder / "cache")
        while first.is_alive() and not (workdir / "owner.json").exists():
            first.join(0.02)
        second = kills.start(workdir, steps, folder / "cache", log=log)
        second.join()
        text = log.read_text()
        refused = second.exitcode != 0 and "belongs to a running process" in text
        finished = second.exitcode == 0 and "steps are done" in text  # the first was quicker
        outcome = REFUSED if refused else EXACT if finished else LOST
        tally.add("second start: the second", outcome, text[-300:])
        kills.finish(first, kills.log_of(workdir))
        pending.append(("second start: the first", workdir))
    return pending


@contextlib.contextmanager
def small_file_system(place: Path) -> Iterator[bool]:
    """Mount a file system of a few MiB at a directory; False if this user may not."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_MIB}m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=False)


def full_disks(tally: Tally, folder: Path, steps: int, times: int, seed: int) -> Pending:
    """Fill a small file system during training, free it, and resume."""
    random, pending = Random(seed), []
    with small_file_system(folder / "small") as mounted:
        for number in range(times if mounted else 0):
            workdir, ballast = folder / "small" / "run", folder / "small" / "ballast"
            log = folder / f"full_{number}.log"
            process = kills.start(workdir, steps, folder / "cache", log=log)
            while process.is_alive() and not (workdir / "checkpoints").is_dir():
                process.join(0.02)
            process.join(random.uniform(0, 0.5))
            with contextlib.suppress(OSError), ballast.open("wb") as file:
                while file.write(bytes(4096)):
                    file.flush()
            process.join()
            ballast.unlink()
            if process.exitcode and "Traceback" in log.read_text():
                tally.add("full disk", LOST, log.read_text()[-600:])
            else:
                kills.finish(kills.start(workdir, steps, folder / "cache", log=log), log)
                pending.append(("full disk", shutil.copytree(workdir, folder / f"full_{number}")))
            shutil.rmtree(workdir)
    if not mounted:
        print("full disk: skipped, this user may not mount a tmpfs", file=sys.stderr)
    return pending


def run(tally: Tally, folder: Path, times: int, seed: int) -> Pending:
    """Run all; return the finished runs, to be compared once no process is forked any more.

    folder/uninterrupted, a run of STEPS steps, is made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = STEPS
    workdir = folder / "uninterrupted"
    if not workdir.exists():
        kills.finish(kills.start(workdir, steps, folder / "cache"), kills.log_of(workdir))
    pending = signal_runs(tally, folder, steps, times, seed)
    pending += second_starts(tally, folder, steps, max(times // 4, 1))
    return pending + full_disks(tally, folder, steps, max(times // 2, 1), seed)


def compare(tally: Tally, pending: Pending, reference: Path) -> None:
    """Compare finished runs with the uninterrupted one."""
    for fault, workdir in pending:
        try:
            kills.compare(workdir, reference)
            tally.add(fault, EXACT)
        except AssertionError:
            tally.add(fault, SILENT, f"{workdir.name} differs")
