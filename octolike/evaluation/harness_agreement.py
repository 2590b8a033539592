"""Compare vla-eval's results of a served policy with octolike's own, episode by episode.

Both run a suite from the same initial states, with the same step limits, settling steps and noise
(octolike.envs.libero.vla_eval_libero). Their episodes are therefore equal up to the rounding of
batches of another size, and a difference of success beyond chance is an error of one of the two
loops: a flipped image, another gripper, other states.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from octolike import files
from octolike.envs.libero.libero_tasks import LIMITS
from octolike.envs.simulators import LiberoSettings
from octolike.errors import RunError
from octolike.evaluation.results_file import complete_lines, parse_row
from octolike.evaluation.statistics import LEVEL, Difference, OutcomeGrid, paired_difference
from octolike.evaluation.suites import EpisodePlan
from octolike.policy.execution import ExecutionSettings
from octolike.tables import text_table

BENCHMARK = "octolike.envs.libero.vla_eval_libero:LiberoBenchmark"
VLA_EVAL_SEED, VLA_EVAL_WAIT = 7, 10  # defaults of vla-eval's benchmark
MAX_LISTED = 10  # episodes with different ends that are printed


class Outcome(NamedTuple):
    """The end of an episode; success is None if it crashed or has an error."""

    success: bool | None
    steps: int

    def __str__(self) -> str:
        if self.success is None:
            return "no outcome"
        return f"{'success' if self.success else 'failure'} after {self.steps} steps"


Outcomes = Mapping[EpisodePlan, Outcome]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The outcomes of the episodes that both ran, and the difference octolike minus vla-eval."""

    ours: Outcomes
    theirs: Outcomes
    difference: Difference
    only_one: int

    @property
    def holds(self) -> bool:
        """Whether the success rates differ by no more than chance."""
        return self.difference.p >= LEVEL

    def text(self) -> str:
        """Return the table and its conclusion."""
        rows = []
        skills = list(dict.fromkeys((e.split, e.skill) for e in self.ours))
        for split, skill in (*skills, ("", "all")):
            chosen = [e for e in self.ours if (e.split, e.skill) == (split, skill) or not split]
            pairs = [(self.ours[e], self.theirs[e]) for e in chosen]
            columns = [sum(bool(o.success) for o, _ in pairs)]
            columns += [sum(bool(t.success) for _, t in pairs)]
            columns += [sum(o.success == t.success for o, t in pairs)]
            columns += [sum(o == t for o, t in pairs)]
            rows.append((split, skill, *(f"{n} of {len(pairs)}" for n in columns)))
        headers = ("split", "skill", "octolike", "vla-eval", "same success", "and same steps")
        d = self.difference
        verdict = "within chance" if self.holds else "more than chance: one of the loops is wrong"
        lines = [
            text_table(rows, headers, "llrrrr"),
            "",
            f"octolike minus vla-eval: {100 * d.value:+.1f} points, 95 % interval "
            f"{100 * d.low:+.1f} to {100 * d.high:+.1f}, p = {d.p:.2g}: {verdict}",
        ]
        different = [e for e in self.ours if self.ours[e] != self.theirs[e]]
        for e in different[:MAX_LISTED]:
            lines.append(f"{e.split}, {e.skill}, seed {e.seed}: {self.ours[e]}; {self.theirs[e]}")
        if len(different) > MAX_LISTED:
            lines.append(f"and {len(different) - MAX_LISTED} more with different ends")
        if self.only_one:
            lines.append(f"left out, without an outcome in both: {self.only_one}")
        return "\n".join(lines)


def compare(run_dir: str | Path, aggregates: Sequence[str | Path]) -> Agreement:
    """Compare RUN/evaluation (or a directory in it) with vla-eval's *_aggregate.json files.

    Raises RunError if a file is missing or malformed, if the two ran with other settings (seed,
    settling steps, step limit, checkpoint, executed actions), or if they share no episode.
    """
    setup, ours = read_own(run_dir)
    theirs: dict[EpisodePlan, Outcome] = {}
    for path in aggregates:
        aggregate = _read_json(Path(path))
        check_settings(Path(path), aggregate, setup)
        theirs |= read_harness(Path(path), aggregate)
    common = [e for e in ours if e in theirs]
    common = [e for e in common if None not in (ours[e].success, theirs[e].success)]
    if not common:
        raise RunError(
            f"{run_dir} has {len(ours)} episodes of the trained policy, vla-eval {len(theirs)}, "
            "and no episode has an outcome in both; evaluate the same suite with both"
        )
    skills = {e: e.skill for e in common}
    own, other = (
        OutcomeGrid.from_seeds([{e: outcomes[e].success for e in common}], skills)
        for outcomes in (ours, theirs)
    )
    difference = paired_difference(own, other)
    left_out = len({*ours, *theirs}) - len(common)
    return Agreement(
        {e: ours[e] for e in common}, {e: theirs[e] for e in common}, difference, left_out
    )


def read_own(run_dir: str | Path) -> tuple[dict[str, Any], dict[EpisodePlan, Outcome]]:
    """Return (setup, outcomes) of the trained policy in RUN/evaluation/results.jsonl."""
    directory = files.local_path(run_dir, "the run")
    path = next(
        (p for p in (directory / "evaluation", directory) if (p / "results.jsonl").is_file()),
        directory / "evaluation",
    )
    path /= "results.jsonl"
    if not path.is_file():
        raise RunError(f"{path} is missing; run octolike evaluate first")
    lines = complete_lines(path.read_text(encoding="utf-8"))
    head, *rows = [parse_row(path, i, line) for i, line in enumerate(lines, start=1)] or [{}]
    try:
        setup, outcomes = head["setup"], {}
        for row in rows:
            if row["policy"] == "trained":
                episode = EpisodePlan(row["split"], row["skill"], row["seed"])
                outcomes[episode] = Outcome(row["success"], row["steps"])
        return setup, outcomes
    except (KeyError, TypeError) as error:
        raise RunError(f"{path} is not of octolike evaluate ({files.cause(error)})") from None


def read_harness(path: Path, aggregate: Mapping[str, Any]) -> dict[EpisodePlan, Outcome]:
    """Return the outcomes of a result of vla-eval; an episode with an error has success None."""
    outcomes, processes = {}, set()
    try:
        for episode in (e for task in aggregate["tasks"] for e in task["episodes"]):
            seed = episode["octolike_seed"] + episode["episode_id"]
            plan = EpisodePlan(episode["split"], episode["skill"], seed)
            success = bool(episode["metrics"]["success"])
            has_error = bool(episode.get("failure_reason"))
            outcomes[plan] = Outcome(None if has_error else success, episode["steps"])
            processes.add(episode.get("sid"))
    except (KeyError, TypeError) as error:
        raise RunError(
            f"{path} has episodes that {BENCHMARK} did not write ({files.cause(error)}): name it "
            "as benchmark"
        ) from None
    if len(processes) > 1:
        raise RunError(
            f"{path} is of {len(processes)} shards or attempts: vla-eval draws fixtures in the "
            "order of a process's episodes, so start again without --num-shards and --eval-id"
        )
    return outcomes


def check_settings(path: Path, aggregate: Mapping[str, Any], setup: Mapping[str, Any]) -> None:
    """Raise RunError, naming the setting, unless vla-eval ran as octolike did."""
    try:
        config, server = aggregate["config"], aggregate["server_info"]
        params = config.get("params") or {}
        suite_seed = params.get("seed", VLA_EVAL_SEED)
        seed = params.get("env_seed")
        limit = LIMITS[params.get("suite", "libero_spatial").split("_")[1]]
        max_steps = config.get("max_steps") or params.get("max_steps") or limit
        settle = setup["environment"].get("settle_steps", LiberoSettings.settle_steps)
        execution = setup["execution"]
        plain = dataclasses.asdict(ExecutionSettings(execute=execution["execute"]))
        compared = {
            "params.seed": (suite_seed if seed is None else seed, 0),
            "params.num_steps_wait": (params.get("num_steps_wait", VLA_EVAL_WAIT), settle),
            "max_steps": (max_steps, limit),
            "params.absolute_action": (params.get("absolute_action", False), False),
            "the checkpoint": (server.get("checkpoint"), setup["checkpoint"]),
            "executed actions of a chunk": (server.get("execute"), execution["execute"]),
            "the execution": (plain, execution),
            "the delay": (0, setup["delay"]),
            "the conditioning": (["language"], setup["tell"]),
        }
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RunError(
            f"{path} is not a result of vla-eval with octolike's server ({files.cause(error)})"
        ) from None
    for name, (theirs, ours) in compared.items():
        if theirs != ours:
            raise RunError(
                f"{path}: {name} is {theirs!r}, octolike's evaluation has {ours!r}: the episodes "
                "differ; evaluate again with equal settings"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {files.cause(error)}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} is not a result of vla-eval; expected …_aggregate.json")
    return content
