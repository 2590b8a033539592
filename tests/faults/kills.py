"""Kill a run (SIGKILL) at random moments, many times, and check that it always resumes correctly.

    python tests/faults/kills.py --times 50
    python tests/faults/kills.py --times 10 --config configs/quickstart.py:debug    scripts/train.py

A subprocess trains a small network and saves a checkpoint after every second step, so a save is
under way nearly all the time. It is killed at a random moment: while it starts, restores, trains,
saves or deletes an old checkpoint. Then it is started again; after the last kill it finishes. A run
that finishes earlier is followed by another run. Expected: every start resumes or finishes, and a
finished run has the same batches (none repeated, none missing), losses and parameters as an
uninterrupted run, bit for bit. Prints a line per kill, and a summary.

With --config the run is one of scripts/train.py, with its own network and datasets (collected
before); equal losses imply equal batches.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random

import flax.linen as nn
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the fakes, if started as a program
from train_fakes import FakeSource, Stream, Tiny, compiled_once, config

from octolike.errors import ConfigError, RunError
from octolike.train import checkpoint, checkpoint_store, loop, metrics, optimizer

EVERY = 2  # steps between checkpoints
PAUSE = 0.02  # seconds that a batch takes, so that kills fall between steps too
TRAINING = 1.0  # maximum seconds of training before a kill; six times as long for a script
EARLY = 0.2  # fraction of the kills that come before the first step


class Numbered(nn.Module):
    """The tiny network, with the number of the batch as a metric."""

    tiny: nn.Module

    def __call__(self, batch, *, train):
        loss, metrics = self.tiny(batch, train=train)
        return loss, {**metrics, "batch_number": batch["task"]["task_id"].mean()}

    def sample_actions(self, *args, **kwargs):
        return self.tiny.sample_actions(*args, **kwargs)


class Slow(Stream):
    """Batches with their number as the task id, made slowly."""

    def __next__(self):
        time.sleep(PAUSE)
        number = self.index
        batch = super().__next__()
        batch["task"]["task_id"][:] = number
        return batch


def log_of(workdir: Path) -> Path:
    """Return the file with the output of a run's processes."""
    return workdir.with_suffix(".log")


def child(workdir: Path, steps: int, cache: Path, log: Path) -> None:
    """Train or resume one run as a script does; its output goes to a file."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        train(workdir, steps, cache)
    except (ConfigError, RunError, OSError) as error:  # as scripts/_launch.py
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # before the first step: there is nothing to save
        sys.exit(128 + signal.SIGINT)


def train(workdir: Path, steps: int, cache: Path) -> None:
    """Train or resume the small network."""
    run_config = config(workdir, steps=steps, checkpoint_every=EVERY, log_every=1, keep=2)
    run_config.optim.ema = 0.9
    with compiled_once(cache):
        loop.train(run_config, FakeSource(Slow), model=Numbered(Tiny(width=64)))


class Script:
    """A run of scripts/train.py, with the part of the interface of a process that is used here."""

    def __init__(self, workdir: Path, steps: int, cache: Path, config: str) -> None:
        settings = {
            "workdir": workdir,
            "train.steps": steps,
            "train.compilation_cache": cache,
            "train.checkpoint_every": EVERY,
            "train.validate_every": 0,
            "train.log_every": 1,
        }
        options = [f"--config.{name}={value}" for name, value in settings.items()]
        script = Path(__file__).parents[2] / "scripts" / "train.py"
        with log_of(workdir).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, script, "--config", config, *options], stdout=log, stderr=log
            )

    def join(self, seconds: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    @property
    def exitcode(self) -> int | None:
        return self._process.returncode


def start(
    workdir: Path, steps: int, cache: Path, config: str = "", log: Path | None = None
) -> BaseProcess | Script:
    """Start a process that trains; it is forked, which saves the imports.

    config: if given, start scripts/train.py with this config instead. log: of its output; default:
    `log_of` its directory.
    """
    if config:
        return Script(workdir, steps, cache, config)
    process = multiprocessing.get_context("fork").Process(
        target=child, args=(workdir, steps, cache, log or log_of(workdir))
    )
    process.start()
    return process


def finish(process: BaseProcess | Script, log: Path) -> None:
    """Wait until a child ends; AssertionError with the end of its log if it failed."""
    process.join()
    assert process.exitcode == 0, f"not resumable:\n{log.read_text()[-3000:]}"


def read_log(workdir: Path) -> str:
    """Return the output of a run's children so far."""
    log = log_of(workdir)
    return log.read_text() if log.exists() else ""


def kill(workdir: Path, process: BaseProcess | Script, before: int, random: Random) -> str:
    """Kill a child at a random moment; return a description of its checkpoints, "" if it finished.

    before: length of the log when the child was started.
    """
    started, early, moment = time.time(), random.random() < EARLY, random.uniform(0, TRAINING)
    moment *= 6 if isinstance(process, Script) else 1
    while not early and process.is_alive() and "\nstep " not in read_log(workdir)[before:]:
        time.sleep(0.01)
    if not early:  # on a slow or busy machine training takes longer, too
        moment *= max(1.0, (time.time() - started) / 2)
    process.join(moment * (4 if early else 1))
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        finish(process, log_of(workdir))
        return ""
    folder = workdir / checkpoint_store.CHECKPOINTS
    names = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
    return f"killed after {time.time() - started:.1f} s; left {', '.join(names) or 'no checkpoint'}"


def history(workdir: Path) -> list[tuple[int, float, float]]:
    """Return (step, number of its batch, loss) of every step in a run's log.

    Without batch numbers in the log, the number is derived from the step.
    """
    rows = [row for row in metrics.read(workdir / metrics.FILE) if "loss" in row]
    return [(r["step"], r.get("batch_number", r["step"] - 1), r["loss"]) for r in rows]


def compare(killed: Path, uninterrupted: Path) -> None:
    """Raise AssertionError if a finished run differs from the uninterrupted run."""
    assert history(killed) == history(uninterrupted)
    runs = [checkpoint.load_run(directory) for directory in (killed, uninterrupted)]
    ours, theirs = (optimizer.flatten(run.params) for run in runs)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[k], theirs[k]) for k in ours)


def run(
    directory: Path, times: int, seed: int, config: str = "", steps: int = 0
) -> tuple[list[Path], dict]:
    """Kill runs `times` times, and finish them; return their directories and a summary.

    `directory`/uninterrupted is the run to compare them with, once no process is forked any more.

    Raises:
        AssertionError: a run cannot be resumed.
    """
    steps, cache = steps or min(100, 20 * times), directory / "cache"
    random, partial = Random(seed), 0
    uninterrupted, runs = directory / "uninterrupted", [directory / "killed_1"]
    finish(start(uninterrupted, steps, cache, config), log_of(uninterrupted))
    for i in range(times):
        description = ""
        while not description:
            before = len(read_log(runs[-1]))
            description = kill(runs[-1], start(runs[-1], steps, cache, config), before, random)
            if not description:
                runs.append(directory / f"killed_{len(runs) + 1}")
        partial += "orbax-checkpoint-tmp" in description
        print(f"{i + 1}/{times} {description}", flush=True)
    finish(start(runs[-1], steps, cache, config), log_of(runs[-1]))
    assert [row[:2] for row in history(uninterrupted)] == [(n + 1, float(n)) for n in range(steps)]
    logs = "".join(map(read_log, runs))
    return runs, {
        "kills": times,
        "while a checkpoint was being written": partial,
        "starts that resumed": logs.count("resuming "),
        "starts that went back to an older checkpoint": logs.count("going back to"),
        "finished runs": len(runs),
        "steps of a run": steps,
    }


def main() -> None:
    """Read the command line; kill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="", help="of scripts/train.py; default: small arrays")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        runs, summary = run(Path(directory), args.times, args.seed, args.config)
        for killed in runs:  # only now: a process that has used jax must not be forked
            compare(killed, Path(directory) / "uninterrupted")
        summary["finished runs, equal to the uninterrupted run"] = summary.pop("finished runs")
        print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
