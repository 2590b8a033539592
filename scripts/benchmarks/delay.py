"""Success and smoothness in a simulator if chunks arrive late, by way of executing them.

    octolike benchmark delay --runs runs/real-time-0,runs/real-time-1,runs/real-time-2

Expect a row per run, method and delay, and one over all runs with the difference to "continue" in
the same scenes, its p-value adjusted for the number of differences (Holm), and the number of scenes
left out of it; with --figure a figure of them. Episodes that exist in RUN/delay are not run again,
and only the planned ones count. Scenes: --block test has those that no choice of the recipe saw.
configs/experiments/real_time.py states the design.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Outcomes = dict[tuple[str, int], bool | None]  # success per (skill, seed of the scene)

WAITED = 8  # actions that a waiting robot executes per chunk
PERIOD = 2  # steps between two inferences of the others, or the delay if that is longer
METHODS: dict[str, dict[str, Any]] = {
    "wait": {"overlap": "wait", "execute": WAITED},
    "continue": {},
    "ensemble": {"ensemble": 0.1},
    "guided": {"real_time": "guided"},
    "trained": {"real_time": "trained"},
}
REFERENCE = "continue"
LABELS = {
    "wait": "wait for the chunk",
    "continue": "continue the previous chunk",
    "ensemble": "continue, ensembled",
    "guided": "real-time chunking, guided",
    "trained": "real-time chunking, trained",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--runs", required=True, help="run directories, comma-separated")
    parser.add_argument("--delays", default="0,1,2,4,6", help="control steps, comma-separated")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--episodes", type=int, default=20, help="per skill, method and delay")
    text = "of scenes: development, test or test2"
    parser.add_argument("--block", type=_block, default="", help=text)
    parser.add_argument("--slots", type=int, default=20, help="environments stepped together")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--figure", type=Path, help="figure to write")


def _block(text: str) -> str:
    """Return the name of a block of scenes; an unknown one is an error of the command line."""
    from octolike.config import ConfigError
    from octolike.evaluation import suites

    try:
        suites.overrides(block=text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per run, method and delay, then one over all runs."""
    measured = [m for directory in args.runs.split(",") for m in _measure(args, Path(directory))]
    rows = [row for row, _ in measured]
    if args.figure:
        draw(rows, args.figure)
    return rows + over_runs(measured)


def over_runs(measured: list[tuple[dict[str, Any], Outcomes]]) -> list[dict[str, Any]]:
    """Return success over runs and scenes per method and delay, and its difference to REFERENCE.

    Prints how many differences the p-values are adjusted for.
    """
    from octolike.evaluation.statistics import (
        OutcomeGrid,
        holm,
        paired_difference,
        recipe_rate,
        seed_effect,
    )

    seeds: dict[tuple[str, int], list[Outcomes]] = {}
    for row, outcomes in measured:
        seeds.setdefault((row["method"], row["delay"]), []).append(outcomes)
    skill = {scene: scene[0] for _, outcomes in measured for scene in outcomes}
    grids = {cell: OutcomeGrid.from_seeds(runs, skill) for cell, runs in seeds.items()}
    effect = seed_effect(grids.values())
    differences = {
        (method, delay): paired_difference(grid, grids[REFERENCE, delay], effect)
        for (method, delay), grid in grids.items()
        if method != REFERENCE and (REFERENCE, delay) in grids
    }
    adjusted = dict(zip(differences, holm([d.p for d in differences.values()]), strict=True))
    rows = []
    for (method, delay), grid in grids.items():
        rate, low, high = recipe_rate(grid, effect)
        row = {"run": "all", "method": method, "delay": delay, "success": rate}
        row |= {"episodes": grid.outcomes.size, "low": low, "high": high}
        if less := differences.get((method, delay)):
            row |= {f"less {REFERENCE}": less.value, "from": less.low, "to": less.high}
            row |= {"adjusted p": adjusted[method, delay], "left out": less.left_out}
        rows.append(row)
    if differences:
        print(
            f"less {REFERENCE}: p adjusted for the whole table (Holm over {len(differences)} "
            "differences, scene by scene); left out: scenes where a side has no outcome"
        )
    return rows


def _measure(
    args: argparse.Namespace, directory: Path
) -> Iterator[tuple[dict[str, Any], Outcomes]]:
    """Yield the figures of a run per method and delay, and the outcome of each scene."""
    from octolike.envs.pool import EnvPool
    from octolike.envs.registry import environment_of, kind_of
    from octolike.evaluation import rollouts, suites
    from octolike.evaluation.results_file import ResultsFile, planned_episode
    from octolike.policy import Policy

    policy = Policy.load(directory, batch_size=args.slots)
    config, robot = policy.config, policy.embodiment.name
    kind, skills = kind_of(config.environment), tuple(config.collect.skills)
    suite = suites.Suite(kind, "", ("train",), skills, args.episodes, config.evaluate.seed)
    plan = dataclasses.replace(suite, **suites.overrides(block=args.block)).plan()
    make = rollouts.env_maker(policy, environment_of(config.environment, robot))
    with EnvPool(make, args.slots, args.workers) as pool:
        for method in args.methods.split(","):
            for delay in (int(d) for d in args.delays.split(",")):
                settings = _settings(method, config.evaluate.release)
                results = ResultsFile(
                    directory / "delay" / f"{method}-{delay}",
                    {"checkpoint": policy.step, **dataclasses.asdict(settings), "delay": delay},
                    videos=10**6,  # the actions of all episodes
                )
                rollouts.run_episodes(
                    policy,
                    "trained",
                    plan,
                    pool,
                    results,
                    lambda _: None,
                    rollouts.RolloutSettings(execution=settings, delay=delay),
                )
                # the file may have episodes of another block, or of a larger number
                rows = [row for row in results.rows if planned_episode(row) in plan]
                outcomes = {(row["skill"], row["seed"]): row["success"] for row in rows}
                summary = _summary(rows, results.directory, method, delay)
                yield {"run": directory.name} | summary, outcomes


def _settings(method: str, release: int) -> Any:
    from octolike.policy.execution import ExecutionSettings

    return ExecutionSettings(**{"execute": PERIOD, "release": release, **METHODS[method]})


def _summary(
    episodes: list[dict[str, Any]], directory: Path, method: str, delay: int
) -> dict[str, Any]:
    from octolike.evaluation.success import success_rate

    rate, borders, inside = success_rate(episodes), [], []
    for row in episodes:
        if not row["actions"]:
            continue
        move = _before_release(np.load(directory / row["actions"]))[:, :3]
        change = 1e3 * np.linalg.norm(np.diff(move, axis=0), axis=1)  # at steps 1, 2, …
        is_border = np.isin(np.arange(1, len(move)), takeovers(method, delay, len(move)))
        borders.extend(change[is_border])
        inside.extend(change[~is_border])
    return {
        "method": method,
        "delay": delay,
        "success": rate.rate,
        "episodes": rate.episodes,
        "border mm": float(np.mean(borders)) if borders else float("nan"),
        "inside mm": float(np.mean(inside)) if inside else float("nan"),
    }


def _before_release(actions: np.ndarray) -> np.ndarray:
    """Return the actions [n, 7] before the gripper opens: a release delays the next chunk."""
    opens = np.flatnonzero(np.diff(actions[:, 6]) > 0.5)
    return actions[: opens[0] + 1] if opens.size else actions


def takeovers(method: str, delay: int, steps: int) -> list[int]:
    """Return the steps at which a new chunk takes over, the first one of an episode aside."""
    settings = _settings(method, release=0)
    if settings.overlap == "wait":
        first, period = settings.execute + delay, settings.execute + delay
    else:
        first, period = settings.execute + delay, max(settings.execute, delay)
    return list(range(first, steps, period))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw success and the change at borders against the delay: mean and range over the runs."""
    from octolike.plain_figure import PlainFigure

    figure = PlainFigure(figsize=(9, 3.6), layout="constrained")
    for axis, key, label in zip(
        figure.subplots(1, 2),
        ("success", "border mm"),
        ("success", "change of the commanded move\nat borders of chunks, mm"),
        strict=True,
    ):
        for i, (method, name) in enumerate(LABELS.items()):
            delays = sorted({r["delay"] for r in rows if r["method"] == method})
            values = [
                [r[key] for r in rows if (r["method"], r["delay"]) == (method, d)] for d in delays
            ]
            if not delays or (key != "success" and method == "wait"):
                continue  # a robot that stops has a border in every sense
            axis.plot(delays, [np.mean(v) for v in values], f"C{i}o-", ms=4, label=name)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(delays, low, high, color=f"C{i}", alpha=0.12, lw=0)
        axis.set(xlabel="delay of inference, control steps", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
