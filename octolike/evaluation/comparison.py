"""Compare runs that differ in one setting: success over seeds, and cost.

A comparison is a directory of evaluated runs named <variant>-<seed>. Episode seeds are the same in
every run, so all policies meet the same scenes, and differences are taken scene by scene
(`octolike.evaluation.statistics`).
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from octolike import files
from octolike.config import stored_config
from octolike.evaluation import figures, outcomes, statistics
from octolike.evaluation.contrasts import Contrasts, Question, asked
from octolike.evaluation.equivalent_count import equivalent_count
from octolike.evaluation.statistics import OutcomeGrid, SuccessRate
from octolike.evaluation.success import SEEN, split_name, success_rate
from octolike.tables import markdown_table
from octolike.train import metrics
from octolike.train.checkpoint import COSTS

DEFAULT_QUESTION = Question()
CURVE = "alone"  # variants alone_<count>: success over the number of demonstrations


@dataclass(frozen=True)
class VariantSummary:
    """One variant, summarised over its seeds.

    success: {split: one rate per seed}, with keys "robot: split" if any run has several robots;
    grids: {split: the outcomes of all seeds}; seeds: {split: the seeds that were evaluated on it};
    action_error: per seed, in normalised units; step_seconds: per seed, the median of the run;
    parameters, flops (per step): None for older runs without that record; missing: number of
    episodes that crashed or were not run; shared_data: whether all of several seeds were trained on
    the same demonstrations.
    """

    variant: str
    success: dict[str, tuple[SuccessRate, ...]]
    grids: dict[str, OutcomeGrid]
    seeds: dict[str, tuple[str, ...]]
    action_error: tuple[float, ...]
    step_seconds: tuple[float, ...]
    parameters: int | None
    flops: float | None
    missing: int = 0
    shared_data: bool = False

    def pooled(self, split: str) -> SuccessRate:
        """Return the rate over the episodes of all seeds."""
        rates = self.success.get(split, ())
        return SuccessRate(sum(r.successes for r in rates), sum(r.episodes for r in rates))

    def strata(self, split: str) -> dict[Any, str]:
        """Return {scene: its skill} of a split."""
        grid = self.grids[split]
        return dict(zip(grid.scenes, grid.strata, strict=True))


def read(
    directory: str | Path,
    block: str = "",
    names: Sequence[str] = (),
    episodes: int | None = None,
) -> list[VariantSummary]:
    """Return the evaluated variants of a comparison in alphabetical order.

    Only episodes of the runs' own settings count, in the block of scenes and as many as given
    (`outcomes.read_outcomes`). names: of the variants; default: all. Runs without any, as in an
    unfinished study, are left out and printed, and so are names without a run. Raises
    FileNotFoundError without any evaluated run, and NoEpisodesError if none has such episodes.
    """
    evaluated = [run for run in sorted(Path(directory).glob("*")) if outcomes.result_files(run)]
    named = [r for r in evaluated if not names or {r.name, r.name.rpartition("-")[0]} & {*names}]
    variants = outcomes.by_variant(named)
    if not variants:
        raise FileNotFoundError(
            f"{directory} contains no evaluated run <variant>-<seed>/{outcomes.RESULTS}; create "
            "them with octolike compare"
        )
    if missing := [name for name in names if name not in variants]:
        print(f"note: {directory} has no evaluated run of {', '.join(missing)}")
    # If any run has several robots, splits carry the robot's name in all runs.
    runs = [run for variant_runs in variants.values() for run in variant_runs.values()]
    with_robots = any("" not in outcomes.result_files(run) for run in runs)
    summaries, reasons = [], []
    for name, of_variant in variants.items():
        robots_of = {}
        for seed, run in of_variant.items():
            try:
                robots_of[seed] = outcomes.read_outcomes(run, block, episodes)
            except outcomes.NoEpisodesError as error:
                reasons.append(error)
        if robots_of:
            summaries.append(_summarize(name, of_variant, robots_of, with_robots))
    if not summaries:
        raise reasons[0]
    for reason in reasons:
        print(f"note: left out, as {reason}")
    return summaries


def write(
    directory: Path,
    question: Question = DEFAULT_QUESTION,
    block: str = "",
    names: Sequence[str] = (),
    episodes: int | None = None,
    evidence: str = "",
) -> str:
    """Write the table and the figure into the directory; return the table and the figure's path.

    They are comparison.md and comparison.png; with a block of scenes, comparison-<block>.md, ….
    block, names, episodes: as in `read`. evidence: by which the study stopped, a note.
    """
    summaries = read(directory, block, names, episodes)
    text = table(summaries, question)
    if evidence:
        text += (
            "\n\nThe study could stop after every seed. For such a study these p-values hold, not "
            f"those of the table:\n\n{evidence}"
        )
    if block:
        text += f"\n\nScenes: the block {block}."
    name = f"comparison-{block}" if block else "comparison"
    files.write_text(directory / f"{name}.md", text + "\n")
    return f"{text}\n\n{draw(summaries, directory / f'{name}.png', question)}"


def table(summaries: Sequence[VariantSummary], question: Question = DEFAULT_QUESTION) -> str:
    """Return a Markdown table: the reference of the question, then by success on its split.

    A cell holds the rate with its 95 % interval over seeds and scenes, and the lowest and highest
    seed; further columns compare on the question's split, for each robot: letters, and the
    difference to the reference. With several skills, the table has a column per skill (there, too),
    the worst skill and the mean over skills. Notes below explain it.
    """
    rows_in_order = ordered(summaries, question)
    splits = _splits(summaries)
    compared = asked(splits, question)
    effects = {s: seed_effect(summaries, s) for s in splits}
    grids = {s: {v.variant: v.grids[s] for v in rows_in_order if s in v.grids} for s in compared}
    contrasts = Contrasts(grids, effects, question.reference)
    by_skill = {v.variant: _by_skill(v, compared) for v in rows_in_order}
    skills = list(dict.fromkeys(skill for of_skill in by_skill.values() for skill in of_skill))
    skills = skills if len(skills) > 1 else []
    headers = ["variant", "seeds", *map(split_name, splits), *contrasts.headers, *skills]
    headers += ["worst skill", "mean over skills"] if skills else []
    headers += ["action error", "parameters", "GFLOP/step", "ms/step"]
    skill_effects = {
        skill: statistics.seed_effect(x[skill] for x in by_skill.values() if skill in x)
        for skill in skills
    }
    rows = [
        [
            v.variant,
            len(v.action_error),
            *(_split_cell(v, split, effects[split]) for split in splits),
            *contrasts.cells(v.variant),
            *(_skill_cells(by_skill[v.variant], skill_effects) if skills else ()),
            f"{np.mean(v.action_error):.3f}",
            f"{v.parameters / 1e6:.2f} M" if v.parameters else "–",
            f"{v.flops / 1e9:.2f}" if v.flops else "–",
            f"{1e3 * np.median(v.step_seconds):.0f}",
        ]
        for v in rows_in_order
    ]
    notes = [*_notes(summaries, effects[splits[0]]), *contrasts.notes]
    notes += _gaps(rows_in_order, splits)
    notes += _equivalents(rows_in_order, compared[0], effects[compared[0]])
    return "\n\n".join([markdown_table(rows, headers), *notes])


def seed_effect(summaries: Sequence[VariantSummary], split: str) -> statistics.SeedEffect:
    """Return the training seed's effect on a split, pooled over all variants."""
    return statistics.seed_effect(v.grids[split] for v in summaries if split in v.grids)


def _notes(summaries: Sequence[VariantSummary], effect: statistics.SeedEffect) -> list[str]:
    """Return the notes below a table: the meaning and scope of intervals, missing episodes."""
    if effect.freedom:
        notes = [
            "Rates: 95 % intervals over training seeds and scenes (`evaluation/statistics.py`); "
            f"the seed explains {effect.share:.1%} of the variance of an outcome, estimated with "
            f"{effect.freedom:.3g} degrees of freedom. Skills likewise, each with its own share."
        ]
    else:
        notes = [
            "One training seed per variant: the intervals cover scenes only and hold for these "
            "policies, not for the variants."
        ]
    notes += _shared_data(summaries)
    missing = [f"{v.variant} {v.missing}" for v in summaries if v.missing]
    if missing:
        notes.append(f"Episodes that crashed or were not run: {', '.join(missing)}.")
    left_out = {v.variant: sum(g.left_out for g in v.grids.values()) for v in summaries}
    texts = [f"{name} {n}" for name, n in left_out.items() if n]
    if texts:
        notes.append(
            f"Scenes left out of the intervals, as a seed has no outcome there: {', '.join(texts)}."
        )
    return notes


def _shared_data(summaries: Sequence[VariantSummary]) -> list[str]:
    """Return a note if the seeds of variants share their demonstrations; [] if none do."""
    of_several = [v for v in summaries if len(v.action_error) > 1]
    names = [v.variant for v in of_several if v.shared_data]
    if not names:
        return []
    whose = "All seeds" if len(names) == len(of_several) else f"All seeds of {', '.join(names)}"
    return [
        f"{whose} were trained on the same demonstrations: intervals do not cover other "
        "demonstrations."
    ]


def _demonstrations(run: Path) -> tuple[Any, ...]:
    """Return what tells a run's demonstrations from those of the other seeds of its variant."""
    config = stored_config(run)
    return config.data.root, tuple(sorted(config.data.roots.items())), config.collect.draw


def _equivalents(
    summaries: Sequence[VariantSummary], split: str, effect: statistics.SeedEffect
) -> list[str]:
    """Return a note per variant <way>_<count>: the demonstrations alone that it is worth.

    The variants `alone_<count>` are the curve; without two of them there is nothing to say.
    """
    curve, others = {}, []
    for summary in summaries:
        way, _, count = summary.variant.rpartition("_")
        if split in summary.grids and way and count.isdecimal():
            if way == CURVE:
                curve[int(count)] = summary.grids[split]
            else:
                others.append(summary)
    if len(curve) < 2 or not others:
        return []
    if len({len(g.outcomes) for g in curve.values()}) > 1:
        return [f"Equivalent demonstrations: none yet, {CURVE}_<count> have unequal seeds."]
    texts = []
    for summary in others:
        worth = equivalent_count(summary.grids[split], curve, effect)
        low, high = (_count_text(x, curve) for x in (worth.low, worth.high))
        texts.append(f"{summary.variant} {_count_text(worth.value, curve)} [{low}, {high}]")
    return [
        f"Equivalent demonstrations ({split_name(split)}), with 95 % intervals: as many alone, "
        f"with equal settings, as reach the same success, interpolated between "
        f"{', '.join(f'{CURVE}_{n}' for n in sorted(curve))}: {'; '.join(texts)}."
    ]


def _count_text(count: float, curve: Mapping[int, Any]) -> str:
    if count == 0:
        return f"below {min(curve)}"
    return f"above {max(curve)}" if np.isinf(count) else f"{count:.0f}"


def _gaps(summaries: Sequence[VariantSummary], splits: Sequence[str]) -> list[str]:
    """Return a note: how each variant with several seeds differs on tasks that are not seen."""
    texts = []
    for summary in summaries:
        for split in splits:
            robot, _, name = split.rpartition(": ")
            seen = f"{robot}: {SEEN}" if robot else SEEN
            both = [summary.seeds.get(x, ()) for x in (seen, split)]
            if name == SEEN or len(both[0]) < 2 or both[0] != both[1]:
                continue
            a, b = summary.grids[split], summary.grids[seen]
            skills = {*a.strata} & {*b.strata}
            if not skills:  # held-out tasks are of other skills
                continue
            d = statistics.split_difference(a.of_strata(skills), b.of_strata(skills))
            value, low, high = (100 * x for x in (d.value, d.low, d.high))
            text = f"{summary.variant} on {split_name(split)} "
            text += f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
            left_out = statistics.left_out_note(d.left_out)
            texts.append(f"{text} ({left_out})" if left_out else text)
    if not texts:
        return []
    return [
        f"Points more than on {split_name(SEEN)} tasks of the same skills, with 95 % intervals "
        f"over seeds and scenes (not adjusted): {'; '.join(texts)}."
    ]


def ordered(
    summaries: Sequence[VariantSummary], question: Question = DEFAULT_QUESTION
) -> list[VariantSummary]:
    """Return the question's reference, then by descending success on its split.

    Variants without that split come last.
    """
    split = asked(_splits(summaries), question)[0]
    by_rate = sorted(summaries, key=lambda v: -v.pooled(split).rate if split in v.success else 1)
    return sorted(by_rate, key=lambda v: v.variant != question.reference)


def _splits(summaries: Sequence[VariantSummary]) -> list[str]:
    """Return the splits: those of most variants first, as variants are compared on the first."""
    counts = collections.Counter(split for v in summaries for split in v.success)
    return [split for split, _ in counts.most_common()]


def draw(
    summaries: Sequence[VariantSummary], path: Path, question: Question = DEFAULT_QUESTION
) -> Path:
    """Draw success per variant and split, with intervals and a dot per seed; return the path."""
    summaries = ordered(summaries, question)
    splits = _splits(summaries)
    with matplotlib.rc_context({"text.parse_math": False}):
        figure, (axis,) = figures.new(9, 0.42 * len(summaries) * len(splits) / 2 + 1.2, 1)
        height = 0.8 / len(splits)
        for i, split in enumerate(splits):
            y = np.arange(len(summaries)) + (i - (len(splits) - 1) / 2) * height
            _draw_split(axis, summaries, split, y, height, figures.split_colour(split, i))
        axis.set_yticks(np.arange(len(summaries)), [v.variant for v in summaries])
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("success rate; bar: all seeds, line: 95 % interval, dots: seeds")
        axis.legend(loc="lower right")
        return figures.save(figure, path)


def _draw_split(
    axis: Any,
    summaries: Sequence[VariantSummary],
    split: str,
    y: np.ndarray,
    height: float,
    colour: str,
) -> None:
    effect = seed_effect(summaries, split)
    empty = (np.nan, np.nan, np.nan)
    share, low, high = np.array(
        [
            statistics.recipe_rate(v.grids[split], effect) if split in v.grids else empty
            for v in summaries
        ]
    ).T
    finite = np.isfinite(share)
    axis.barh(y[finite], share[finite], height, color=colour, label=split_name(split))
    errors = np.stack([share - low, high - share])[:, finite]
    axis.errorbar(
        share[finite], y[finite], xerr=errors, fmt="none", ecolor=figures.INK, elinewidth=0.8
    )
    for position, summary in zip(y, summaries, strict=True):
        dots = [r.rate for r in summary.success.get(split, ())]
        axis.plot(dots, [position] * len(dots), ".", color=figures.INK, markersize=4)


def _summarize(
    variant: str,
    runs: Mapping[str, Path],
    robots_of: Mapping[str, Sequence[outcomes.RobotOutcomes]],
    with_robots: bool,
) -> VariantSummary:
    """Return the summary of a variant from its runs, and the outcomes of its evaluated seeds."""
    success: dict[str, list[SuccessRate]] = {}
    by_scene: dict[str, list[dict[Any, bool | None]]] = {}
    errors, seconds, costs = [], [], {}
    missing = 0
    seeds_of: dict[str, list[str]] = {}
    runs = {seed: runs[seed] for seed in robots_of}
    outcomes.check_settings({runs[seed]: robots for seed, robots in robots_of.items()})
    for seed, run in runs.items():
        robots = robots_of[seed]
        rows = []
        for outcome in robots:
            robot = f"{outcome.robot}: " if with_robots else ""
            rows += [row | {"split": f"{robot}{row['split']}"} for row in outcome.rows]
            missing += outcome.missing
        for split in dict.fromkeys(r["split"] for r in rows):
            success.setdefault(split, []).append(success_rate(rows, split=split))
            seeds_of.setdefault(split, []).append(seed)
            of_split = [r for r in rows if r["split"] == split]
            by_scene.setdefault(split, []).append(
                {(r["skill"], r["seed"]): r["success"] for r in of_split}
            )
        log = metrics.read(run / metrics.FILE)
        action_errors = [v for r in log for k, v in r.items() if k.endswith("/action_error")]
        errors.append(action_errors[-1] if action_errors else np.nan)
        times = np.array([(r["step"], r["seconds"]) for r in log if "loss" in r])
        seconds.append(float(np.median(np.diff(times[:, 1]) / np.diff(times[:, 0]))))
        if (run / COSTS).exists():
            costs = json.loads((run / COSTS).read_text(encoding="utf-8"))
    return VariantSummary(
        variant,
        {split: tuple(rates) for split, rates in success.items()},
        {split: _grid(seeds) for split, seeds in by_scene.items()},
        {split: tuple(seeds) for split, seeds in seeds_of.items()},
        tuple(errors),
        tuple(seconds),
        costs.get("parameters"),
        costs.get("flops_per_step"),
        missing,
        shared_data=len(runs) > 1 and len({_demonstrations(run) for run in runs.values()}) == 1,
    )


def _grid(seeds: Sequence[Mapping[Any, bool | None]]) -> OutcomeGrid:
    """Return the outcomes of {(skill, …): success} per seed."""
    return OutcomeGrid.from_seeds(seeds, {x: x[0] for s in seeds for x in s})


def _by_skill(summary: VariantSummary, splits: Sequence[str]) -> dict[str, OutcomeGrid]:
    """Return {skill: outcomes on the splits of all robots, of the seeds that have them all}."""
    grids = {split: summary.grids[split] for split in splits if split in summary.grids}
    seeds = [summary.seeds[split] for split in grids]
    common = [x for x in seeds[0] if all(x in s for s in seeds)] if seeds else []
    skills = dict.fromkeys(skill for grid in grids.values() for skill in grid.strata)
    result = {}
    for skill in skills:
        parts, scenes = [], []
        for split, grid in grids.items():
            rows = [summary.seeds[split].index(x) for x in common]
            of_skill = grid.of_strata({skill})
            parts.append(of_skill.outcomes[rows])
            scenes += [(split, scene) for scene in of_skill.scenes]
        joined = np.concatenate(parts, axis=1)
        result[skill] = OutcomeGrid(joined, tuple(scenes), (skill,) * len(scenes))
    return result


def _skill_cells(
    grids: Mapping[str, OutcomeGrid], effects: Mapping[str, statistics.SeedEffect]
) -> list[str]:
    """Return the cells of each skill of {skill: seed's effect}, the worst one, and the mean."""
    rates = {s: _skill_rate(grids[s], effect) for s, effect in effects.items() if s in grids}
    cells = [_rate_cell(*rates[skill]) if skill in rates else "–" for skill in effects]
    measured = {skill: rate for skill, (rate, *_) in rates.items() if np.isfinite(rate)}
    worst = min(measured, key=measured.__getitem__, default="")
    mean = _percent(float(np.mean(list(measured.values())))) if measured else "–"
    return [*cells, f"{worst} {_percent(measured[worst])}" if worst else "–", mean]


def _skill_rate(grid: OutcomeGrid, effect: statistics.SeedEffect) -> tuple[float, float, float]:
    """Return (rate, low, high): of the recipe, or of one policy's episodes without more seeds."""
    if effect.freedom or len(grid.outcomes) > 1:
        return statistics.recipe_rate(grid, effect)
    rate = SuccessRate(int(grid.outcomes.sum()), grid.outcomes.size)
    return (rate.rate, *rate.interval)


def _rate_cell(rate: float, low: float, high: float) -> str:
    if not np.isfinite(rate):
        return "–"
    return f"{_percent(rate)} [{_percent(low)}, {_percent(high)}]"


def _split_cell(summary: VariantSummary, split: str, effect: statistics.SeedEffect) -> str:
    rates = summary.success.get(split, ())
    if not rates:
        return "–"
    seeds = [r.rate for r in rates]
    spread = f"; seeds {_percent(min(seeds))} to {_percent(max(seeds))}" if len(seeds) > 1 else ""
    rate, low, high = statistics.recipe_rate(summary.grids[split], effect)
    return _rate_cell(rate, low, high) + spread


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
