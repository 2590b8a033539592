"""Faults on runs and data, seeded and bounded: exact resumes, refusals, losses, wrong results.

    python tests/faults/run.py            the short set, as in CI (test_faults.py)
    python tests/faults/run.py --long     ≥ 50 kills, ≥ 200 damaged files: about 20 minutes

Expect a table with a row per fault: times, resumed exactly, refused clearly, lost, silently wrong;
the last two must be 0. The exit code is 1 otherwise.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import kills  # noqa: E402
import storage  # noqa: E402
from tally import LOST, SILENT, Tally  # noqa: E402

# (kills, signals, damages of each kind of file)
SHORT, LONG = (2, 2, 3), (50, 16, 24)


def run(folder: Path, sizes: tuple[int, int, int], seed: int = 0) -> Tally:
    """Run every fault; return the table. Processes are forked first: jax forbids it afterwards."""
    tally = Tally()
    steps = storage.STEPS if sizes == SHORT else 0
    killed, summary = kills.run(folder / "kills", sizes[0], seed, steps=steps)
    for name in ("cache", "uninterrupted") if steps else ():  # compile and run it once
        (folder / "storage" / name).symlink_to(folder / "kills" / name)
    pending = storage.run(tally, folder / "storage", sizes[1], seed)
    begin = time.monotonic()
    storage.compare(tally, pending, folder / "storage" / "uninterrupted")
    for workdir in killed:
        kills.compare(workdir, folder / "kills" / "uninterrupted")
    tally.add("kill -9", storage.EXACT, times=sizes[0])  # a run that differs raises
    print(summary, file=sys.stderr)
    import damage  # only now: a process that has loaded tensorflow should not be forked either

    damage.run(tally, folder / "damage", sizes[2], seed)
    print(f"comparison and damage: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return tally


def main() -> None:
    """Read the command line; run; print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="the long set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for part in ("kills", "storage", "damage"):
            (Path(folder) / part).mkdir()
        tally = run(Path(folder), LONG if args.long else SHORT, args.seed)
    print(tally.table())
    sys.exit(1 if tally.total(LOST, SILENT) else 0)


if __name__ == "__main__":
    main()
