"""Logging to Weights & Biases, if installed and `train.wandb` names a project."""

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


def import_wandb(project: str) -> Any:
    """Return the wandb module; ConfigError if it is not installed. Called before any other work."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"train.wandb names the project {project!r}, but Weights & Biases cannot be imported "
            f"({error}): pip install wandb, or set --config.train.wandb=''. metrics.jsonl and "
            "TensorBoard hold the same numbers"
        ) from error


class WandbLogger:
    """The run's page. A resumed run continues the same page; its id is stored in the workdir."""

    def __init__(self, project: str, workdir: Path) -> None:
        """Open the page, with the config of the workdir if it has one."""
        stored = workdir / "config.json"
        config = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
        path = workdir / FILE
        if path.exists():
            name = json.loads(path.read_text(encoding="utf-8"))["id"]
        else:
            name = uuid.uuid4().hex[:12]
            files.write_json(path, {"id": name}, indent=None)
        self._run = import_wandb(project).init(
            project=project,
            name=workdir.name,
            dir=str(workdir),
            id=name,
            resume="allow",
            config=config,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step. Later steps that the page already has stay."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send pending numbers."""
        self._run.finish()
