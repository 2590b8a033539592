"""A transfer study: its plan of runs, the stored comparison of the data, and the report.

<runs>/
  <variant>-<seed>/          the runs (see `transfer_effects`)
  transfer/before.json       the comparison of the data
  transfer/report.html, report.json, *.png
  transfer-<block>/          the same with the success in another block of scenes
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from octolike import files
from octolike.config import stored_config
from octolike.evaluation import study_design, suites
from octolike.evaluation.study_design import StudyRun
from octolike.evaluation.transfer import gradient_agreement, transfer_effects, transfer_report
from octolike.evaluation.transfer.advice import Advice, Finding, advise
from octolike.evaluation.transfer.group_comparison import GroupComparison, compare_all
from octolike.evaluation.transfer.group_sample import GroupSample
from octolike.evaluation.transfer.transfer_report import TransferReportContent

FOLDER, BEFORE = "transfer", "before.json"
OLD_VERDICTS = {"share, told apart": "share with conditioning"}  # in older before.json files


def plan_runs(module: ModuleType, arg: str, seeds: int) -> list[StudyRun]:
    """Return the runs of a config file, the plain mix first; [] if it defines no VARIANTS.

    arg: further arguments of the file, e.g. "debug".
    """
    names = sorted(
        getattr(module, "VARIANTS", ()), key=lambda name: name not in transfer_effects.PLAIN
    )
    return study_design.plan_runs(module, names, arg, seeds)


def runs_of_stage(runs: Sequence[StudyRun], stage: str) -> list[StudyRun]:
    """Return the runs of a stage: of the plain mix for "during", otherwise all."""
    return [r for r in runs if stage != "during" or r.variant == runs[0].variant]


def design(runs: Sequence[StudyRun], seeds: int) -> str:
    """Return the design as a sentence, with the smallest effect on success that it can find."""
    mixes = {
        r.variant: frozenset(x.partition("=")[0].strip() for x in r.config.data.mix.split(","))
        for r in runs
    }
    alone = [run for run in runs if len(mixes[run.variant]) == 1]
    effects = transfer_effects.count_effects(list(mixes.values()))
    if not alone or not effects:
        return "design: no group is trained both alone and with others, so no effect is measured"
    return study_design.effects_sentence(alone[0].config, len(mixes), seeds, effects)


def write_comparison(samples: Sequence[GroupSample], directory: Path) -> None:
    """Compare the groups' data and write <directory>/transfer/before.json."""
    traits = {s.name: s.traits for s in samples}
    pairs = compare_all(samples)
    advices = [advise(traits[p.a], traits[p.b], p) for p in pairs]
    data = {
        "groups": [s.name for s in samples],
        "steps": {s.name: len(s) for s in samples},
        "pairs": [p.to_json() for p in pairs],
        "advice": [
            {"a": a.a, "b": a.b, "verdict": a.verdict, "findings": [vars(f) for f in a.findings]}
            for a in advices
        ],
    }
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    files.write_text(directory / FOLDER / BEFORE, text)


def report_folder(directory: Path, block: str = "") -> Path:
    """Return the folder of a study's report, which a block of scenes has of its own.

    Raises ConfigError for an unknown block.
    """
    suites.overrides(block=block)
    return directory / (f"{FOLDER}-{block}" if block else FOLDER)


def write_report(directory: Path, block: str = "", title: str = "") -> TransferReportContent:
    """Write the report of all results so far; return its content.

    block: of the scenes in which success was measured; "": the runs' own.
    """
    path = directory / FOLDER / BEFORE
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    variants = transfer_effects.find_runs(directory)
    gradients = {
        v: g for v, runs in variants.items() if (g := gradient_agreement.read_gradients(v, runs))
    }
    names = data.get("groups") or next((list(g.groups) for g in gradients.values()), [])
    content = TransferReportContent(
        title=title or f"Does sharing help? {directory.name}",
        names=names,
        facts=_facts(data, variants) | ({"Scenes": f"the block {block}"} if block else {}),
        pairs=[GroupComparison.from_json(p) for p in data.get("pairs", ())],
        advices=[_read_advice(a) for a in data.get("advice", ())],
        gradients=gradients,
        effects=transfer_effects.estimate_effects(transfer_effects.read_results(variants, block)),
    )
    transfer_report.write(content, report_folder(directory, block))
    return content


def _read_advice(data: Mapping) -> Advice:
    findings = tuple(
        Finding(f["about"], _verdict(f["verdict"]), f["sentence"]) for f in data["findings"]
    )
    return Advice(data["a"], data["b"], _verdict(data["verdict"]), findings)


def _verdict(name: str) -> str:
    return OLD_VERDICTS.get(name, name)


def _facts(data: Mapping, variants: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    facts = {f"Data of {k}": f"{n:,} steps" for k, n in data.get("steps", {}).items()}
    for variant, runs in variants.items():
        config = stored_config(runs[0])
        seeds = f"{len(runs)} {'seed' if len(runs) == 1 else 'seeds'}"
        facts[f"Variant {variant}"] = (
            f"{seeds}, {config.train.steps:,} steps of {config.data.batch_size} examples of "
            f"{config.data.mix}"
        )
    return facts
