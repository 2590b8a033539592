"""A transfer study: its plan of runs, what is kept of each stage, and the report of what is there.

<runs>/
  <variant>-<seed>/          the runs (see `transfer_effects`)
  transfer/before.json       the comparison of the data
  transfer/report.html, report.json, *.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from octolike import files
from octolike.config import Config, stored_config
from octolike.evaluation.transfer import gradient_agreement, transfer_effects, transfer_report
from octolike.evaluation.transfer.advice import Advice, Finding, advise
from octolike.evaluation.transfer.group_comparison import GroupComparison, GroupSample, compare_all

FOLDER, BEFORE = "transfer", "before.json"


@dataclass(frozen=True)
class StudyRun:
    """A run of a study: its variant, seed, config, and the argument of the config file."""

    variant: str
    seed: int
    config: Config
    arg: str


def plan(module: ModuleType, arg: str, seeds: int) -> list[StudyRun]:
    """Return the runs of a config file, the plain mix first; none where it has no VARIANTS.

    arg: further arguments of the file, e.g. "debug".
    """
    names = sorted(
        getattr(module, "VARIANTS", ()), key=lambda name: name not in transfer_effects.PLAIN
    )
    runs = []
    for seed in range(seeds):
        for name in names:
            own = ",".join(filter(None, (f"variant={name},seed={seed}", arg)))
            runs.append(StudyRun(name, seed, module.get_config(own), own))
    return runs


def chosen(runs: Sequence[StudyRun], stage: str) -> list[StudyRun]:
    """Return the runs that a stage makes: "during" those of the plain mix, others all."""
    return [r for r in runs if stage != "during" or r.variant == runs[0].variant]


def compare(samples: Sequence[GroupSample], directory: Path) -> None:
    """Compare the groups' data and keep what is found in <directory>/transfer/before.json."""
    facts = {s.name: s.facts for s in samples}
    pairs = compare_all(samples)
    advices = [advise(facts[p.a], facts[p.b], p) for p in pairs]
    found = {
        "groups": [s.name for s in samples],
        "steps": {s.name: len(s) for s in samples},
        "pairs": [p.to_json() for p in pairs],
        "advice": [
            {"a": a.a, "b": a.b, "verdict": a.verdict, "findings": [vars(f) for f in a.findings]}
            for a in advices
        ],
    }
    (directory / FOLDER).mkdir(parents=True, exist_ok=True)
    files.write_text(
        directory / FOLDER / BEFORE, json.dumps(found, indent=1, allow_nan=False) + "\n"
    )


def write_report(directory: Path, title: str = "") -> transfer_report.TransferReportContent:
    """Write the report of all that a study has found so far; returns what it is made of."""
    kept = directory / FOLDER / BEFORE
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    variants = transfer_effects.find(directory)
    gradients = {v: g for v, runs in variants.items() if (g := gradient_agreement.read(v, runs))}
    names = found.get("groups") or next((list(g.groups) for g in gradients.values()), [])
    material = transfer_report.TransferReportContent(
        title=title or f"Does sharing help? {directory.name}",
        names=names,
        facts=_facts(found, variants),
        pairs=[GroupComparison.from_json(p) for p in found.get("pairs", ())],
        advices=[
            Advice(a["a"], a["b"], a["verdict"], tuple(Finding(**f) for f in a["findings"]))
            for a in found.get("advice", ())
        ],
        gradients=gradients,
        effects=transfer_effects.effects(transfer_effects.read(variants)),
    )
    transfer_report.write(material, directory / FOLDER)
    return material


def _facts(found: Mapping, variants: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    facts = {f"Steps of {k}": f"{n:,} compared" for k, n in found.get("steps", {}).items()}
    for variant, runs in variants.items():
        config = stored_config(runs[0])
        facts[f"Runs {variant}"] = (
            f"{len(runs)} seeds, {config.train.steps:,} steps of {config.data.batch_size} examples "
            f"of {config.data.mix}"
        )
    return facts
