"""Weights & Biases beside metrics.jsonl, where installed and `train.wandb` names a project."""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octolike import files
from octolike.config import ConfigError

FILE = "wandb.json"


def load(project: str) -> Any:
    """Return the library; ConfigError where it is not installed. Called before anything is done."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"train.wandb names the project {project!r}, but Weights & Biases cannot be imported "
            f"({error}): pip install wandb, or set --config.train.wandb=''. metrics.jsonl and "
            "TensorBoard have all of it in any case"
        ) from error


class Board:
    """The run's page. A resumed run goes on on the same one: its id is kept in the workdir."""

    def __init__(self, project: str, workdir: Path) -> None:
        """Open the page, with the config that the workdir holds, if it does."""
        stored = workdir / "config.json"
        config = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
        path = workdir / FILE
        if path.exists():
            name = json.loads(path.read_text(encoding="utf-8"))["id"]
        else:
            name = uuid.uuid4().hex[:12]
            files.write_json(path, {"id": name}, indent=None)
        self._run = load(project).init(
            project=project,
            name=workdir.name,
            dir=str(workdir),
            id=name,
            resume="allow",
            config=config,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step. What a page has of later steps already, it keeps."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
