"""After training: does a group profit from training together with the others?

A group is a dataset. Runs are directories <variant>-<seed> of one comparison; the mix of a variant
determines its role:

    one group            alone
    all groups           shared: the plain mix first ("together", "default"), then remedies
    all groups but x     leave-one-out: the others without x

An effect is the difference of a group's result between two variants, positive if sharing helped:
in closed-loop success, or in the error of sampled actions on held-out demonstrations. The config
chooses the budget: if each group alone has S steps, G · S steps of all G groups together show each
group as often as alone, and S steps cost as much as one single run.

Intervals are 95 %: of success over training seeds and scenes, paired by scene, of errors over
seeds (`octolike.evaluation.statistics`). An effect is a finding if its p-value is below 0.05 after
Holm's adjustment over all effects of its measure: the whole list has a 5 % chance of one false
alarm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.config import Config, stored_config
from octolike.evaluation import outcomes
from octolike.evaluation.demonstrated_episode import DemonstratedEpisode
from octolike.evaluation.statistics import (
    LEVEL,
    Difference,
    OutcomeGrid,
    SeedEffect,
    holm,
    left_out_note,
    paired_difference,
    seed_difference,
    seed_effect,
)
from octolike.evaluation.success import SEEN
from octolike.evaluation.transfer.distances import CONSTANT
from octolike.evaluation.transfer.finite_json import finite_json
from octolike.policy import Policy
from octolike.train.checkpoint import load_run

ERRORS = "transfer_errors.json"  # in a run: {group: error of sampled actions} and its conditions
FRAMES = 4  # per held-out demonstration
PLAIN = ("together", "default")  # names of the variant with the plain mix
ONLY = "only_"  # prefix of variants with a single dataset, which they also collect
FROM = "from"  # kind of a leave-one-out effect


@dataclass(frozen=True)
class GroupResult:
    """The results of a group in the runs of a variant, one per seed.

    success: the outcomes, None if not measured; error: of sampled actions on held-out
    demonstrations, () if not measured.
    """

    success: OutcomeGrid | None = None
    error: tuple[float, ...] = ()


@dataclass(frozen=True)
class VariantResults:
    """The groups in a variant's mix, its training steps, and the result of each group."""

    groups: tuple[str, ...]
    steps: int
    results: Mapping[str, GroupResult]


@dataclass(frozen=True)
class TransferEffect:
    """The effect of sharing on a group.

    kind: the shared variant, compared with the group alone; or FROM: the plain mix, compared with
    the mix without `source`. steps: of both. measure: "success" or "error". with_, without: the
    means; gain: their difference, positive if sharing helped; low, high: its interval, NaN for
    errors of one seed. p: adjusted over all effects of the measure. method: of the interval.
    left_out: number of scenes without an outcome on both sides.
    """

    kind: str
    group: str
    source: str
    measure: str
    steps: tuple[int, int]
    with_: float
    without: float
    gain: float
    low: float
    high: float
    p: float
    method: str
    left_out: int = 0

    @property
    def verdict(self) -> str:
        """'helps', 'hurts' (negative transfer), or 'undecided'."""
        if not self.p < LEVEL:
            return "undecided"
        return "helps" if self.gain > 0 else "hurts"

    @property
    def sentence(self) -> str:
        """The effect as a sentence."""
        steps = "{:,} against {:,} steps".format(*self.steps)
        setting = f"with {self.source} in the mix" if self.kind == FROM else f"in {self.kind!r}"
        word = {"helps": "better", "hurts": "worse"}.get(self.verdict, "no significant difference")
        change = (
            f"success {self.without:.0%} → {self.with_:.0%}"
            if self.measure == "success"
            else f"held-out error {self.without:.3f} → {self.with_:.3f}"
        )
        low, high = self.low, self.high
        if not np.isfinite(low):
            return f"{self.group} {setting} ({steps}): {change}; no interval with one seed."
        left_out = left_out_note(self.left_out)
        interval = (
            f"{100 * low:+.0f} to {100 * high:+.0f} points"
            if self.measure == "success"
            else f"gain {low:+.3f} to {high:+.3f}"
        )
        return (
            f"{self.group} {setting} ({steps}): {word} ({change}; 95 % interval {interval}, "
            f"adjusted p = {self.p:.2g}; {self.method}{left_out and f'; {left_out}'})."
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        return finite_json(asdict(self) | {"verdict": self.verdict, "sentence": self.sentence})


def find_runs(directory: Path) -> dict[str, list[Path]]:
    """Return {variant: its started runs} in the directory of a comparison."""
    started = [run for run in sorted(directory.glob("*-*")) if (run / "names.json").exists()]
    return {v: list(runs.values()) for v, runs in outcomes.by_variant(started).items()}


def read_results(
    variants: Mapping[str, Sequence[Path]], block: str = ""
) -> dict[str, VariantResults]:
    """Return the results of the variants; variants without any result are omitted.

    block: of scenes, a name of `suites.BLOCKS`; "": the runs' own.
    """
    mixes = {v: _datasets(runs[0]) for v, runs in variants.items()}
    skills = {
        names[0]: tuple(stored_config(variants[v][0]).collect.skills)
        for v, names in mixes.items()
        if len(names) == 1
    }
    variant_results = {}
    for variant, runs in variants.items():
        values_of: dict[str, dict[str, list[Any]]] = {g: {} for g in mixes[variant]}
        evaluated = [run for run in runs if outcomes.result_files(run)]
        robots_of = {run: outcomes.read_outcomes(run, block) for run in evaluated}
        outcomes.check_settings(robots_of)
        for run in runs:
            success = _success(run, robots_of.get(run, ()), skills)
            for measure, values in (("error", _errors(run)), ("success", success)):
                for group, value in values.items():
                    values_of[group].setdefault(measure, []).append(value)
        results = {
            group: GroupResult(_grid(values.get("success", ())), tuple(values.get("error", ())))
            for group, values in values_of.items()
            if values
        }
        if results:
            steps = stored_config(runs[0]).train.steps
            variant_results[variant] = VariantResults(mixes[variant], steps, results)
    return variant_results


def _grid(seeds: Sequence[Mapping[tuple[str, int], bool | None]]) -> OutcomeGrid | None:
    """Return the outcomes {(skill, seed of the episode): success} of each training seed."""
    return OutcomeGrid.from_seeds(seeds, {x: x[0] for s in seeds for x in s}) if seeds else None


def estimate_effects(variants: Mapping[str, VariantResults]) -> list[TransferEffect]:
    """Return every effect that the variants allow, success before error, p-values adjusted."""
    effects = _estimate_effects(variants)
    adjusted = []
    for measure in ("success", "error"):
        of_measure = [e for e in effects if e.measure == measure]
        p_values = holm([e.p for e in of_measure])
        adjusted += [replace(e, p=p) for e, p in zip(of_measure, p_values, strict=True)]
    return adjusted


def _estimate_effects(variants: Mapping[str, VariantResults]) -> list[TransferEffect]:
    all_groups = max((set(v.groups) for v in variants.values()), key=len, default=set())
    if len(all_groups) < 2:
        return []
    order = sorted(variants, key=lambda name: (name not in PLAIN, not name.startswith(ONLY)))

    def variants_with(groups: set[str]) -> list[str]:
        return [name for name in order if set(variants[name].groups) == groups]

    seeds = _seed_effect(variants)
    shared, effects = variants_with(all_groups), []
    for measure in ("success", "error"):
        for name in shared:
            for group in variants[name].groups:
                for alone in variants_with({group})[:1]:
                    pair = variants[name], variants[alone]
                    effects += _effect(name, group, "", measure, seeds, *pair)
        # With two groups, leaving one out is the same as the other alone.
        for source in variants[shared[0]].groups if len(all_groups) > 2 else ():
            for without in variants_with(all_groups - {source})[:1]:
                pair = variants[shared[0]], variants[without]
                for group in pair[1].groups:
                    effects += _effect(FROM, group, source, measure, seeds, *pair)
    return effects


def _seed_effect(variants: Mapping[str, VariantResults]) -> SeedEffect:
    """Return the seed's effect, pooled over variants and groups.

    The groups of a run share its seed: they add no degrees of freedom.
    """
    grids = [[r.success for r in v.results.values() if r.success] for v in variants.values()]
    effect = seed_effect(grid for of_variant in grids for grid in of_variant)
    runs = sum(bool(of_variant) for of_variant in grids)
    return replace(effect, freedom=effect.freedom * runs / max(1, sum(map(len, grids))))


def count_effects(mixes: Sequence[frozenset[str]]) -> int:
    """Return the number of effects on success that variants with these mixes of groups allow."""
    results = {g: GroupResult(OutcomeGrid(np.zeros((1, 1)), (0,), ("",))) for m in mixes for g in m}
    variants = {
        str(i): VariantResults(tuple(sorted(m)), 0, {g: results[g] for g in m})
        for i, m in enumerate(mixes)
    }
    return sum(e.measure == "success" for e in _estimate_effects(variants))


def demonstrated_episodes(
    excerpts: Sequence[tuple[Any, Sequence[Any]]],
) -> dict[str, list[DemonstratedEpisode]]:
    """Return {dataset: its demonstrations}, from specs and episodes (octolike.data.pipeline)."""
    return {
        spec.name: [DemonstratedEpisode.from_episode(e) for e in episodes]
        for spec, episodes in excerpts
    }


def measure_errors(
    run: Path,
    held_out: Mapping[str, Sequence[DemonstratedEpisode]],
    plugins: Sequence[str] = (),
) -> None:
    """Write a run's errors on held-out demonstrations, for the groups in its training mix.

    The error is the mean absolute difference between sampled and demonstrated actions at a few
    frames per demonstration, in standard deviations of the group's own held-out actions: runs with
    other mixes normalise differently. Noise is the same for all runs. Does nothing if the errors of
    the same step and demonstrations exist. `plugins`: those of the run that may be executed.
    """
    loaded = load_run(run, plugin_files=plugins)
    actions = b"".join(d.action.tobytes() for episodes in held_out.values() for d in episodes)
    key = {
        "step": loaded.step,
        "tell": list(loaded.config.evaluate.condition_on),
        "held_out": hashlib.sha256(actions).hexdigest()[:16],
    }
    if {k: v for k, v in _stored_errors(run).items() if k != "errors"} == key:
        return
    errors: dict[str, float] = {}
    policies: dict[str, Policy] = {}
    for group, demonstrations in held_out.items():
        if group not in loaded.names.datasets:
            continue
        robot = next(e.name for e in loaded.embodiments if group in e.datasets)
        policy = policies.get(robot) or Policy(loaded, robot, 32)
        policies[robot] = policy
        errors[group] = _error(policy, group, demonstrations, loaded.config)
    files.write_json(run / ERRORS, key | {"errors": errors}, indent=None)


def _error(
    policy: Policy, group: str, demonstrations: Sequence[DemonstratedEpisode], config: Config
) -> float:
    observations, tasks, chunks = [], [], []
    for d in demonstrations:
        task = d.create_task(policy, config, group)
        for fraction in (np.arange(FRAMES) + 0.5) / FRAMES:
            t = int(fraction * len(d.action))
            observations.append(d.history(policy, t))
            tasks.append(task)
            chunks.append(d.action[t : t + policy.horizon])
    predicted = policy.sample_batch(observations, tasks, range(len(observations)))
    spread = np.concatenate([d.action for d in demonstrations]).std(axis=0)
    moving = spread > CONSTANT
    errors = [
        np.abs(p[: len(chunk)] - chunk)[:, moving] / spread[moving]
        for p, chunk in zip(predicted, chunks, strict=True)
    ]
    return float(np.concatenate(errors).mean())


def gain(
    measure: str, shared: GroupResult, alone: GroupResult, seeds: SeedEffect | None = None
) -> Difference:
    """Return the gain of sharing, positive if `shared` is better.

    seeds: the training seed's effect on success, pooled over the study.
    """
    if measure == "error":
        return seed_difference(alone.error, shared.error)
    assert shared.success is not None
    assert alone.success is not None
    return paired_difference(shared.success, alone.success, seeds)


def _effect(
    kind: str,
    group: str,
    source: str,
    measure: str,
    seeds: SeedEffect,
    shared: VariantResults,
    without: VariantResults,
) -> list[TransferEffect]:
    """Return the effect in a list, or [] if one side was not measured."""
    a, b = (v.results.get(group, GroupResult()) for v in (shared, without))
    if not getattr(a, measure) or not getattr(b, measure):
        return []
    d = gain(measure, a, b, seeds)
    if a.success and b.success and measure == "success":
        means = a.success.rate, b.success.rate
    else:
        means = float(np.mean(a.error)), float(np.mean(b.error))
    steps = shared.steps, without.steps
    result = (*means, d.value, d.low, d.high, d.p)
    return [TransferEffect(kind, group, source, measure, steps, *result, d.method, d.left_out)]


def _stored_errors(run: Path) -> dict[str, Any]:
    path = run / ERRORS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _errors(run: Path) -> dict[str, float]:
    """Return the errors at the end of training; {} if they were not measured there."""
    stored = _stored_errors(run)
    return stored["errors"] if stored.get("step") == stored_config(run).train.steps else {}


def _datasets(run: Path) -> tuple[str, ...]:
    names = json.loads((run / "names.json").read_text(encoding="utf-8"))
    return tuple(names["datasets"])


def _success(
    run: Path,
    robots: Sequence[outcomes.RobotOutcomes],
    skills: Mapping[str, Sequence[str]],
) -> dict[str, dict[tuple[str, int], bool | None]]:
    """Return {dataset: {(skill, seed): success}} of the trained policy on seen tasks.

    robots: the outcomes of the run; skills: {dataset: its skills}, which assign the episodes of a
    robot with several datasets.
    """
    success: dict[str, dict[tuple[str, int], bool | None]] = {}
    records = json.loads((run / "embodiments.json").read_text(encoding="utf-8"))
    datasets_of = {record["name"]: record["datasets"] for record in records}
    for outcome in robots:
        seen = [r for r in outcome.rows if r["split"] == SEEN]
        datasets = datasets_of[outcome.robot]
        for group in datasets:
            of_group = [r for r in seen if r["skill"] in skills.get(group, ())]
            rows = seen if len(datasets) == 1 else of_group
            if any(r["success"] is not None for r in rows):
                success[group] = {(r["skill"], r["seed"]): r["success"] for r in rows}
    return success
