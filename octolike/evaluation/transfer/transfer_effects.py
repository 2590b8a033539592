"""After training: did it help a group that the others were there?

A group is a dataset. Runs are directories <variant>-<seed> of one comparison; what a variant is
shows in its mix:

    one group            alone
    all of them          shared: the plain mix first ("together", "default"), and remedies
    all but x            what the others are without x

An effect is a difference of a group's result between two of them, positive where sharing helped:
of success in closed loop, or of the error of sampled actions on held-out demonstrations. Equal
budgets are up to the config: with S steps of each group alone, G · S steps of all G together show
each group as often as alone, S steps are as many as one single run has.

Intervals (95 %): over seeds Welch's t, as a bootstrap over a handful of seeds is far too narrow;
over episodes Newcombe's. Of success, the wider one counts. An interval that excludes zero is a
finding; one in twenty does so by chance.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from octolike import files
from octolike.config import Config, stored_config
from octolike.evaluation import outcomes
from octolike.evaluation.evaluate import DemonstratedEpisode
from octolike.evaluation.success import SEEN, SuccessRate, rate_difference, success_rate
from octolike.evaluation.transfer.group_comparison import STILL, no_nan
from octolike.policy import Policy
from octolike.train.checkpoint import load_run

ERRORS = "transfer_errors.json"  # of a run: what was measured, {group: error of sampled actions}
MOMENTS = 4  # of each held-out demonstration
PLAIN = ("together", "default")  # names of the variant that is the plain mix
ONLY = "only_"  # begins the names of variants that collect the dataset they are alone with
FROM = "from"


@dataclass(frozen=True)
class GroupResult:
    """A group in the runs of one variant, a number per seed: success, and held-out action error.

    Either may be missing: ().
    """

    success: tuple[SuccessRate, ...] = ()
    error: tuple[float, ...] = ()

    @property
    def pooled(self) -> SuccessRate:
        """The rate over all seeds' episodes."""
        done = (sum(r.successes for r in self.success), sum(r.episodes for r in self.success))
        return SuccessRate(*done)


@dataclass(frozen=True)
class VariantResults:
    """A variant's runs: the groups in its mix, its steps, and the result of each group."""

    groups: tuple[str, ...]
    steps: int
    results: Mapping[str, GroupResult]


@dataclass(frozen=True)
class TransferEffect:
    """What sharing did to a group.

    kind: the shared variant, which is set against the group alone; or FROM: what `source` brought,
    the plain mix against the one without it. steps: of both. measure: "success" or "error". with_,
    without: the means; gain: their difference, positive where sharing helped, with its interval,
    NaN where there is one seed.
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

    @property
    def verdict(self) -> str:
        """'helps', 'hurts' (negative transfer), or 'undecided'."""
        if self.low > 0:
            return "helps"
        return "hurts" if self.high < 0 else "undecided"

    @property
    def sentence(self) -> str:
        """The effect in words."""
        steps = "{:,} against {:,} steps".format(*self.steps)
        against = f"with {self.source} in the mix" if self.kind == FROM else f"in {self.kind!r}"
        word = {"helps": "better", "hurts": "worse"}.get(self.verdict, "no different beyond chance")
        size = (
            f"success {self.without:.0%} → {self.with_:.0%}"
            if self.measure == "success"
            else f"held-out error {self.without:.3f} → {self.with_:.3f}"
        )
        low, high = self.low, self.high
        if not np.isfinite(low):
            return f"{self.group} {against} ({steps}): {size}; one seed has no interval."
        span = (
            f"{100 * low:+.0f} to {100 * high:+.0f} points"
            if self.measure == "success"
            else f"gain {low:+.3f} to {high:+.3f}"
        )
        return f"{self.group} {against} ({steps}): {word} ({size}; 95 % interval {span})."

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        return no_nan(asdict(self) | {"verdict": self.verdict, "sentence": self.sentence})


def find(directory: Path) -> dict[str, list[Path]]:
    """Return {variant: its runs that have begun}, of a comparison's directory."""
    found: dict[str, list[Path]] = {}
    for run in sorted(directory.glob("*-*")):
        if (run / "names.json").exists():
            found.setdefault(run.name.rpartition("-")[0], []).append(run)
    return found


def read(variants: Mapping[str, Sequence[Path]]) -> dict[str, VariantResults]:
    """Return what was measured of the variants, of those with any result."""
    mixes = {v: _names(runs[0]) for v, runs in variants.items()}
    skills = {
        names[0]: tuple(stored_config(variants[v][0]).collect.skills)
        for v, names in mixes.items()
        if len(names) == 1
    }
    result = {}
    for variant, runs in variants.items():
        found: dict[str, dict[str, list[Any]]] = {g: {} for g in mixes[variant]}
        for run in runs:
            for measure, values in (("error", _errors(run)), ("success", _success(run, skills))):
                for group, value in values.items():
                    found[group].setdefault(measure, []).append(value)
        results = {
            g: GroupResult(**{k: tuple(v) for k, v in x.items()}) for g, x in found.items() if x
        }
        if results:
            steps = stored_config(runs[0]).train.steps
            result[variant] = VariantResults(mixes[variant], steps, results)
    return result


def effects(variants: Mapping[str, VariantResults]) -> list[TransferEffect]:
    """Return every effect that there are runs for: success before error."""
    everything = max((set(v.groups) for v in variants.values()), key=len, default=set())
    order = sorted(variants, key=lambda name: (name not in PLAIN, not name.startswith(ONLY)))
    of_mix = lambda groups: [n for n in order if set(variants[n].groups) == groups]
    shared, found = of_mix(everything), []
    if len(everything) < 2:
        return []
    for measure in ("success", "error"):
        for name in shared:
            for group in variants[name].groups:
                for alone in of_mix({group})[:1]:
                    pair = variants[name], variants[alone]
                    found += _effect(name, group, "", measure, *pair)
        # of two groups, what one brought to the other is what sharing did
        for source in variants[shared[0]].groups if len(everything) > 2 else ():
            for rest in of_mix(everything - {source})[:1]:
                pair = variants[shared[0]], variants[rest]
                for group in pair[1].groups:
                    found += _effect(FROM, group, source, measure, *pair)
    return found


def demonstrations(
    found: Sequence[tuple[Any, Sequence[Any]]],
) -> dict[str, list[DemonstratedEpisode]]:
    """Return {dataset: its demonstrations}, of specs and episodes (octolike.data.pipeline)."""
    result = {}
    for row, episodes in found:
        result[row.name] = [
            DemonstratedEpisode(
                {f"image_{c}": x for c, x in e.images.items()}
                | ({} if e.proprio is None else {"proprio": e.proprio}),
                e.action,
                e.instruction,
                e.label,
            )
            for e in episodes
        ]
    return result


def measure_errors(run: Path, held_out: Mapping[str, Sequence[DemonstratedEpisode]]) -> None:
    """Write a run's errors on held-out demonstrations, of the groups that it was trained on.

    The mean absolute difference between sampled and demonstrated actions, at a few moments of each
    demonstration, in standard deviations of the group's own held-out actions: runs of other mixes
    normalise by other numbers. Noise is the same for all runs. Done already, at the same step and
    on the same demonstrations: nothing happens.
    """
    loaded = load_run(run)
    actions = b"".join(d.action.tobytes() for found in held_out.values() for d in found)
    key = {
        "step": loaded.step,
        "tell": list(loaded.config.evaluate.condition_on),
        "held_out": hashlib.sha256(actions).hexdigest()[:16],
    }
    if {k: v for k, v in _measured(run).items() if k != "errors"} == key:
        return
    errors, policies = {}, {}
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
    seen, tasks, true = [], [], []
    tell, kind = config.evaluate.condition_on, config.data.tasks
    for d in demonstrations:
        known = {"dataset": group, "label": d.task, "instruction": d.instruction}[kind]
        goals = {k.removeprefix("image_"): d.observation[k][-1] for k in policy.goal_shapes}
        task = policy.create_task(
            instruction=d.instruction if "language" in tell else None,
            goal_images=goals if "goal" in tell else None,
            task_id=known if "task_id" in tell else None,
        )
        for part in (np.arange(MOMENTS) + 0.5) / MOMENTS:
            t = int(part * len(d.action))
            frames = slice(max(0, t + 1 - policy.window), t + 1)
            seen.append({k: d.observation[k][frames] for k in policy.observation_keys})
            tasks.append(task)
            true.append(d.action[t : t + policy.horizon])
    predicted = policy.sample_batch(seen, tasks, range(len(seen)))
    spread = np.concatenate([d.action for d in demonstrations]).std(axis=0)
    moving = spread > STILL
    apart = [
        np.abs(p[: len(a)] - a)[:, moving] / spread[moving]
        for p, a in zip(predicted, true, strict=True)
    ]
    return float(np.concatenate(apart).mean())


def gain(measure: str, shared: GroupResult, alone: GroupResult) -> tuple[float, float, float]:
    """Return (gain, low, high), positive where `shared` is the better one."""
    if measure == "error":
        return welch(alone.error, shared.error)
    d, low, high = rate_difference(shared.pooled, alone.pooled)
    rates = [[r.rate for r in x.success] for x in (shared, alone)]
    _, low_seeds, high_seeds = welch(*rates)
    if not np.isfinite(low_seeds):  # one seed: the interval is of this very pair of policies
        return d, low, high
    return d, max(-1.0, min(low, low_seeds)), min(1.0, max(high, high_seeds))


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return mean(a) − mean(b) and Welch's 95 % t interval; NaN ends with one value in either."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    d = float(x.mean() - y.mean())
    if min(len(x), len(y)) < 2:
        return d, math.nan, math.nan
    u, v = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    if u + v == 0:
        return d, d, d
    freedom = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1))
    half = float(stdtrit(freedom, 0.975) * math.sqrt(u + v))
    return d, d - half, d + half


def _effect(
    kind: str, group: str, source: str, measure: str, shared: VariantResults, other: VariantResults
) -> list[TransferEffect]:
    """Return the effect, or nothing where one side has not been measured."""
    a, b = (v.results.get(group, GroupResult()) for v in (shared, other))
    if not getattr(a, measure) or not getattr(b, measure):
        return []
    mean = lambda r: r.pooled.rate if measure == "success" else float(np.mean(r.error))
    steps = shared.steps, other.steps
    return [
        TransferEffect(kind, group, source, measure, steps, mean(a), mean(b), *gain(measure, a, b))
    ]


def _measured(run: Path) -> dict[str, Any]:
    path = run / ERRORS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _errors(run: Path) -> dict[str, float]:
    """Return the errors at the end of training; {} where they have not been measured there."""
    found = _measured(run)
    return found["errors"] if found.get("step") == stored_config(run).train.steps else {}


def _names(run: Path) -> tuple[str, ...]:
    names = json.loads((run / "names.json").read_text(encoding="utf-8"))
    return tuple(names["datasets"])


def _success(run: Path, skills: Mapping[str, Sequence[str]]) -> dict[str, SuccessRate]:
    """Return {dataset: rate} on tasks as in training, of the trained policy.

    skills: of each dataset that has a run alone, by which the episodes of a robot are told apart
    that several datasets share.
    """
    if not outcomes.result_files(run):
        return {}
    rates: dict[str, SuccessRate] = {}
    robots = json.loads((run / "embodiments.json").read_text(encoding="utf-8"))
    datasets = {e["name"]: e["datasets"] for e in robots}
    for found in outcomes.read_outcomes(run):
        rows = [r for r in found.rows if r["split"] == SEEN]
        mine = datasets[found.robot]
        for group in mine:
            known = (
                rows if len(mine) == 1 else [r for r in rows if r["skill"] in skills.get(group, ())]
            )
            if (rate := success_rate(known)).episodes:
                rates[group] = rate
    return rates
