"""The result rows of an evaluation on disk: results.jsonl, a line per episode."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.errors import RunError
from octolike.evaluation.success import ResultRow
from octolike.evaluation.suites import EpisodePlan

NAME = "results.jsonl"


class ResultsFile:
    """The result rows of an evaluation in results.jsonl, which grows line by line.

    The first line holds the setup of the rows (checkpoint, execution, environment). Rows of two
    setups are never mixed: a file with another setup is renamed to results.old.jsonl, or
    results.old-2.jsonl, …, until that setup is evaluated again.
    """

    def __init__(self, directory: str | Path, setup: Mapping[str, Any], videos: int = 0) -> None:
        """Open or create the file; the actions of `videos` episodes of each kind are stored."""
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path = self.directory / NAME
        self.videos = videos
        self._rows: dict[tuple[str, EpisodePlan], dict[str, Any]] = {}
        if self.path.exists() and not self._read(dict(setup)):
            self._exchange(dict(setup))
        if not self.path.exists():
            files.write_json(self.path, {"setup": setup}, indent=None)

    @property
    def rows(self) -> list[ResultRow]:
        """All rows; for an episode that was run several times, the latest."""
        return list(self._rows.values())

    def done(self, policy: str, episode: EpisodePlan) -> bool:
        """Return whether an episode has an outcome; a crashed one does not."""
        row = self._rows.get((policy, episode))
        return row is not None and row["success"] is not None

    def add(self, row: dict[str, Any], actions: Sequence[np.ndarray]) -> None:
        """Append a row; store the actions of the first few of each kind for `render_episodes`."""
        kind = ("policy", "split", "skill", "success")
        stored = [r for r in self.rows if r["actions"] and all(r[k] == row[k] for k in kind)]
        row["actions"] = ""
        if row["success"] is not None and len(stored) < self.videos:
            name = files.file_name("{policy}-{split}-{skill}-{seed}".format(**row))
            row["actions"] = f"actions/{name}.npy"
            path = self.directory / row["actions"]
            path.parent.mkdir(exist_ok=True)
            np.save(path, np.concatenate(actions))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._rows[row["policy"], planned_episode(row)] = row

    def _exchange(self, setup: dict[str, Any]) -> None:
        """Rename the file of another setup; continue an earlier file of this setup, if any."""
        count = len(list(self.directory.glob("results.old*.jsonl")))
        names = ["results.old.jsonl", *(f"results.old-{n}.jsonl" for n in range(2, count + 2))]
        paths = [self.directory / name for name in names]
        free = next(path for path in paths if not path.exists())
        self.path.replace(free)
        print(f"note: {self.path} was of another checkpoint or other settings: now {free.name}")
        head = json.dumps({"setup": setup}) + "\n"
        for path in (p for p in paths if p.exists() and p != free):
            if complete_lines(path.read_text(encoding="utf-8"))[:1] == [head]:
                path.replace(self.path)
                self._read(setup)
                print(f"note: {path.name} is of this checkpoint and these settings: continued")
                return

    def _read(self, setup: dict[str, Any]) -> bool:
        """Read the rows; return False if they belong to another setup."""
        text = self.path.read_text(encoding="utf-8")
        lines = complete_lines(text)
        if not lines or parse_row(self.path, 1, lines[0]) != json.loads(
            json.dumps({"setup": setup})
        ):
            return False
        for number, line in enumerate(lines[1:], start=2):
            row = parse_row(self.path, number, line)
            try:
                self._rows[row["policy"], planned_episode(row)] = row
            except (KeyError, TypeError) as error:
                raise RunError(
                    f"{self.path}, line {number}, is not the row of an episode "
                    f"({files.cause(error)}); move the file away to start again"
                ) from None
        if "".join(lines) != text:
            files.write_text(self.path, "".join(lines))
        return True


def parse_row(path: Path, number: int, line: str) -> dict[str, Any]:
    """Return the object of a line of results.jsonl; RunError, naming it, if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{path}, line {number}, is not JSON ({files.cause(error)}); move the file away to "
            "start again"
        ) from None
    if not isinstance(row, dict):
        raise RunError(f"{path}, line {number}, is not an object; move the file away")
    return row


def complete_lines(text: str) -> list[str]:
    """Return the lines of a results.jsonl without a last line truncated by a kill."""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def planned_episode(row: ResultRow) -> EpisodePlan:
    """Return the planned episode of a result row."""
    return EpisodePlan(row["split"], row["skill"], row["seed"])
