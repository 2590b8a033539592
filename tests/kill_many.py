"""Kill a run without warning (SIGKILL) at random moments, again and again, and see what is left.

    python tests/kill_many.py --times 50
    python tests/kill_many.py --times 10 --config configs/quickstart.py:debug    scripts/train.py

A small network is trained in a process of its own, with a checkpoint after every other step, so
that one is being written nearly all the time. The process is killed at a random moment: while it
starts, restores, trains, saves or deletes an old checkpoint. Then it is started again, and after
the last kill it may finish; one that finishes before is followed by another. Expected: every start
resumes or finishes; the batches of a finished run are those of a run that nobody killed, none
twice, none left out; losses and parameters too, bit for bit. Prints a line per kill, and a summary.

With --config the run is one of scripts/train.py, with its own network, its datasets (collected
before) and a start from nothing; that its losses agree bit for bit says that its batches do.
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
from train_fakes import FakeSource, Stream, Tiny, compiled_once, config

from octolike.train import checkpoint, loop, metrics, optimizer

EVERY = 2  # steps between checkpoints
PAUSE = 0.02  # seconds that a batch takes, so that kills fall between steps too
TRAINING = 1.0  # seconds of training that a life may last, of a script six times as many
EARLY = 0.2  # share of the kills that come before the first step


class Numbered(nn.Module):
    """The tiny network; tells which batch a step was on, as one of its metrics."""

    tiny: nn.Module

    def __call__(self, batch, *, train):
        loss, found = self.tiny(batch, train=train)
        return loss, {**found, "batch_number": batch["task"]["task_id"].mean()}

    def sample_actions(self, *args, **kwargs):
        return self.tiny.sample_actions(*args, **kwargs)


class Slow(Stream):
    """Batches that bear their number, and take a moment to make."""

    def __next__(self):
        time.sleep(PAUSE)
        number = self.index
        batch = super().__next__()
        batch["task"]["task_id"][:] = number
        return batch


def child(workdir: Path, steps: int, cache: Path) -> None:
    """Train, or go on with, one run; what it says goes to <workdir>.log."""
    with workdir.with_suffix(".log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    made = config(workdir, steps=steps, checkpoint_every=EVERY, log_every=1, keep=2)
    made.optim.ema = 0.9
    with compiled_once(cache):
        loop.train(made, FakeSource(Slow), model=Numbered(Tiny(width=64)))


class Script:
    """A run of scripts/train.py; what it is asked for is what `kill` and `finish` ask a process."""

    def __init__(self, workdir: Path, steps: int, cache: Path, config: str) -> None:
        given = {
            "workdir": workdir,
            "train.steps": steps,
            "train.compilation_cache": cache,
            "train.checkpoint_every": EVERY,
            "train.validate_every": 0,
            "train.log_every": 1,
        }
        options = [f"--config.{name}={value}" for name, value in given.items()]
        script = Path(__file__).parents[1] / "scripts" / "train.py"
        with workdir.with_suffix(".log").open("ab") as log:
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


def start(workdir: Path, steps: int, cache: Path, config: str = "") -> BaseProcess | Script:
    """Start a process that trains. Forked, so that it need not import everything again.

    config: of scripts/train.py, which is then started instead.
    """
    if config:
        return Script(workdir, steps, cache, config)
    process = multiprocessing.get_context("fork").Process(
        target=child, args=(workdir, steps, cache)
    )
    process.start()
    return process


def finish(process: BaseProcess | Script, workdir: Path) -> None:
    """Wait for a child's end; AssertionError with its last words if it went wrong."""
    process.join()
    log = workdir.with_suffix(".log")
    assert process.exitcode == 0, f"not resumable:\n{log.read_text()[-3000:]}"


def said(workdir: Path) -> str:
    """Return what the children of a run have said so far."""
    log = workdir.with_suffix(".log")
    return log.read_text() if log.exists() else ""


def kill(workdir: Path, process: BaseProcess | Script, before: int, random: Random) -> str:
    """Kill a child at a random moment; return what it left, in words, "" if it had finished.

    before: length of what was said when it was started.
    """
    started, early, moment = time.time(), random.random() < EARLY, random.uniform(0, TRAINING)
    moment *= 6 if isinstance(process, Script) else 1
    while not early and process.is_alive() and "\nstep " not in said(workdir)[before:]:
        time.sleep(0.01)
    process.join(moment * (4 if early else 1))
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        finish(process, workdir)
        return ""
    folder = workdir / checkpoint.CHECKPOINTS
    left = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
    return f"killed after {time.time() - started:.1f} s; left {', '.join(left) or 'no checkpoint'}"


def history(workdir: Path) -> list[tuple[int, float, float]]:
    """Return (step, number of its batch, loss) of every step of a run, as its log has them.

    The number is that of the step where the log has none.
    """
    rows = [row for row in metrics.read(workdir / metrics.FILE) if "loss" in row]
    return [(r["step"], r.get("batch_number", r["step"] - 1), r["loss"]) for r in rows]


def compare(killed: Path, whole: Path) -> None:
    """Raise AssertionError where a finished run is not what it is without kills."""
    assert history(killed) == history(whole)
    ours, theirs = (optimizer.flatten(checkpoint.load_run(d).params) for d in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[k], theirs[k]) for k in ours)


def run(directory: Path, times: int, seed: int, config: str = "") -> dict:
    """Kill runs `times` times and compare them with one that nobody killed; return a summary.

    Raises AssertionError for any difference.
    """
    steps, cache, random, partial = min(100, 20 * times), directory / "cache", Random(seed), 0
    whole, runs = directory / "whole", [directory / "killed_1"]
    finish(start(whole, steps, cache, config), whole)
    for i in range(times):
        left = ""
        while not left:
            before = len(said(runs[-1]))
            left = kill(runs[-1], start(runs[-1], steps, cache, config), before, random)
            if not left:
                runs.append(directory / f"killed_{len(runs) + 1}")
        partial += "orbax-checkpoint-tmp" in left
        print(f"{i + 1}/{times} {left}", flush=True)
    finish(start(runs[-1], steps, cache, config), runs[-1])
    assert [row[:2] for row in history(whole)] == [(n + 1, float(n)) for n in range(steps)]
    for killed in runs:  # not before: a process that has used jax must not be forked
        compare(killed, whole)
    logs = "".join(map(said, runs))
    return {
        "kills": times,
        "while a checkpoint was being written": partial,
        "starts that resumed": logs.count("resuming "),
        "starts that went back to an older checkpoint": logs.count("going back to"),
        "finished runs, each like the one nobody killed": len(runs),
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
        print(json.dumps(run(Path(directory), args.times, args.seed, args.config), indent=2))


if __name__ == "__main__":
    main()
