"""Does a policy see and do outside what it saw and did in training? Two checks, and their report.

Replay: a simulator's own demonstrations, executed again as recorded and after a round trip through
the policy's record (normalise, then undo), must end in success and pass through the recorded
observations. Contacts amplify rounding, so that a few may part from the recording on the way
(`CHAOS`), but none at its start. A record that clips ("bounds") changes the actions on purpose: its
round trip is shown and not judged.

Inputs: frames of a dataset, given to the policy as a robot would give them, must reach the network
as training's pipeline makes them, bit for bit; and the error of the actions that come back, in the
robot's units, must be what training's validation finds for the same frames.

The noise of sampling differs between the two, so errors agree where they are within `SIGMAS`
standard deviations of what that noise explains; for heads without noise that is `ROUNDING`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np

from octolike import files, types
from octolike.embodiment import Embodiment
from octolike.envs.pool import CallCommand, EnvCrash, EnvPool, default_workers
from octolike.envs.registry import make_env
from octolike.envs.replays import Replay, replay
from octolike.evaluation import figures
from octolike.policy import Policy, Task
from octolike.train.checkpoint import Run
from octolike.train.validation import validate_run

DRIFT = 1e-3  # of proprio: metres, radians; another processor rounds otherwise
PIXELS = 1.0  # of 255: another graphics library draws otherwise
ROUNDING = 1e-3  # normalised units: compiled for another batch size
CHAOS = 0.05  # of the replays
UNITS = 1e-5  # of an action's scale: float32, there and back
SIGMAS = 4.5
SHOWN = 5  # replays that are told one by one
WAYS = {"recorded": "as recorded", "round_trip": "normalised and un-normalised"}
SAMPLES = 4  # chunks per frame, to know how much the noise explains


class ReplayableDemonstration(Protocol):
    """What a replay needs: octolike.data.pipeline.recorded.RecordedEpisode."""

    skill: str
    split: str
    seed: int
    actions: np.ndarray
    observation: Mapping[str, np.ndarray]


class RecordedFrames(Protocol):
    """What a comparison needs: octolike.data.pipeline.recorded.RecordedFrames."""

    observations: Sequence[Mapping[str, np.ndarray | None]]
    told: Sequence[Any]
    actions: np.ndarray
    places: Sequence[str]
    batch: types.Batch


@dataclass(frozen=True)
class DemonstrationReplays:
    """A demonstration's two replays; the crash text replaces a replay that crashed."""

    skill: str
    seed: int
    recorded: Replay | str
    round_trip: Replay | str


@dataclass(frozen=True)
class InputDifference:
    """The first place at which a key of the network's input differs, and how many values do."""

    key: str
    place: str
    policy: str
    training: str
    count: int
    of: int


@dataclass
class FrameComparison:
    """What the frames of one dataset showed.

    keys: {key: values compared}; different: one InputDifference per differing key; unread:
    keys that the network does not read. errors: float [n, SAMPLES, H, A], of the policy's chunks in
    normalised units, and mask bool [n, H, A]; units: the largest difference between the recorded
    actions and the batch's, un-normalised, as a part of each dimension's scale; clipped: the share
    of action values that the record's bounds cut off, which no policy can learn.
    """

    dataset: str
    keys: dict[str, int] = field(default_factory=dict)
    different: dict[str, InputDifference] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    names: tuple[str, ...] = ()
    errors: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    units: float = 0.0
    clipped: float = 0.0
    validation: float = float("nan")

    @property
    def frames(self) -> int:
        """How many frames were compared."""
        return sum(map(len, self.masks))

    @property
    def error(self) -> float:
        """The mean absolute error of the policy's actions, in normalised units, where valid."""
        errors, mask = self._arrays()
        return float((errors.mean(axis=1) * mask).sum() / mask.sum())

    @property
    def allowed(self) -> float:
        """How far training's validation may be from `error` without either being wrong."""
        errors, mask = self._arrays()
        per_frame = (errors * mask[:, None]).sum(axis=(2, 3))
        noise = np.sqrt(per_frame.var(axis=1, ddof=1).sum()) / mask.sum()
        return ROUNDING + SIGMAS * float(noise) * (2 / SAMPLES) ** 0.5

    def error_per(self, axis: str) -> np.ndarray:
        """Return the error per 'dimension' [A] or per 'step' of the chunk [H]."""
        errors, mask = self._arrays()
        over = (0, 1) if axis == "dimension" else (0, 2)
        total, count = (errors.mean(axis=1) * mask).sum(axis=over), mask.sum(axis=over)
        return total / np.maximum(count, 1)

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(self.errors), np.concatenate(self.masks)


def replay_all(
    demonstrations: Iterable[ReplayableDemonstration],
    embodiment: Embodiment,
    environment: Mapping[str, Any],
    progress: Callable[[], Any],
    workers: int = 0,
) -> list[DemonstrationReplays]:
    """Play demonstrations again, as recorded and through the robot's record, over processes.

    workers: 0: one per core. Raises RuntimeError where the simulator cannot be built.
    """
    done, waiting = [], []
    make = functools.partial(make_env, dict(environment))
    slots = workers or default_workers(64)
    with EnvPool(make, slots, slots) as pool:

        def play() -> None:
            replies = [pool.run({i: c[k] for i, (_, c) in enumerate(waiting)}) for k in (0, 1)]
            for i, (d, _) in enumerate(waiting):
                found = (r[i].text if isinstance(r[i], EnvCrash) else r[i] for r in replies)
                done.append(DemonstrationReplays(d.skill, d.seed, *found))
                progress()
            waiting.clear()

        for demonstration in demonstrations:
            waiting.append((demonstration, _calls(demonstration, embodiment)))
            if len(waiting) == slots:
                play()
        if waiting:
            play()
    return done


def _calls(d: ReplayableDemonstration, embodiment: Embodiment) -> list[CallCommand]:
    options = {"split": d.split, "skills": [d.skill]}
    back = embodiment.unnormalize_action(embodiment.normalize_action(d.actions))
    return [
        CallCommand(replay, (d.seed, options, x, dict(d.observation))) for x in (d.actions, back)
    ]


def compare(
    policy: Policy, dataset: str, batches: Iterable[RecordedFrames], run: Run
) -> FrameComparison:
    """Hold the policy, called as on a robot, against training's pipeline and validation."""
    out = FrameComparison(dataset, names=tuple(policy.embodiment.action.names))
    seen, clipped = [], []
    for number, frames in enumerate(batches):
        seen.append(frames.batch)
        observations = [{k: o[k] for k in policy.observation_keys} for o in frames.observations]
        tasks = [_task(policy, told) for told in frames.told]
        _compare_inputs(out, policy, observations, tasks, frames)
        first = number * SAMPLES * len(tasks)
        sampled = [
            policy.sample_batch(observations, tasks, range(first + s, first + s + len(tasks)))
            for s in range(0, SAMPLES * len(tasks), len(tasks))
        ]
        own, scale = len(out.names), _scale(policy.embodiment)
        true = policy.unnormalize(frames.batch["action"][:, -1])
        mask = frames.batch["action_mask"][:, -1, :, :own]
        out.errors.append(np.abs(np.stack(sampled, axis=1) - true[:, None]) / scale)
        out.masks.append(mask)
        apart = np.abs(true - frames.actions) / scale
        cut = _clipped(policy.embodiment, frames.actions) & mask
        clipped.append(cut.sum() / mask.sum())
        out.units = max(out.units, float(np.where(mask & ~cut, apart, 0).max()))
    out.clipped = float(np.mean(clipped))
    # The same batches again and again: validation draws other noise for each that it takes.
    found = validate_run(run, {dataset: seen * SAMPLES}).datasets
    out.validation = found[dataset]["action_error"]
    return out


def _task(policy: Policy, told: Any) -> Task:
    """Return the task as a robot's user would tell it, in the ways that training knew."""
    goal = {c: x for c, x in told.goal.items() if f"image_{c}" in policy.goal_shapes}
    by_number = "task_id" in policy.told and told.task
    return policy.create_task(
        instruction=(told.instruction or None) if "language" in policy.told else None,
        goal_images=goal or None,
        task_id=told.task if by_number else None,
    )


def _compare_inputs(
    out: FrameComparison,
    policy: Policy,
    observations: Sequence[Mapping[str, Any]],
    tasks: Sequence[Task],
    frames: RecordedFrames,
) -> None:
    observation, task = policy.inputs(observations, tasks)
    ours = dict(types.flatten({"observation": observation, "task": task}))
    theirs = dict(types.flatten(frames.batch))
    read = set(policy.reads)
    if "task.language.states" in read:  # made of these, by the same frozen encoder
        read.add("task.language.ids")
    for key in sorted(k for k in theirs if k.startswith(("observation.", "task."))):
        if key not in read:
            out.unread.add(key)
            continue
        out.keys[key] = out.keys.get(key, 0) + theirs[key].size
        found = first_difference(key, ours.get(key), theirs[key], frames.places)
        if found is None:
            continue
        before = out.different.get(key)
        earlier = before.count if before else 0
        kept = vars(before or found) | {"count": earlier + found.count, "of": out.keys[key]}
        out.different[key] = InputDifference(**kept)


def first_difference(
    key: str, policy: np.ndarray | None, training: np.ndarray, places: Sequence[str]
) -> InputDifference | None:
    """Return where two arrays [n, ...] first differ, in value, shape or dtype; None: nowhere."""
    if policy is None or policy.shape != training.shape or policy.dtype != training.dtype:
        is_ = "nothing" if policy is None else f"{policy.dtype} {list(policy.shape)}"
        want = f"{training.dtype} {list(training.shape)}"
        return InputDifference(key, "the whole array", is_, want, training.size, training.size)
    apart = np.argwhere(policy != training)
    if not len(apart):
        return None
    at = tuple(apart[0].tolist())
    where = f"{places[at[0]]}: {key.rpartition('.')[2]}{list(at[1:])}"
    values = str(policy[at]), str(training[at])
    return InputDifference(key, where, *values, len(apart), training.size)


def _scale(embodiment: Embodiment) -> np.ndarray:
    """Return the robot's units per normalised unit, [A]."""
    one = np.ones((1, len(embodiment.action)), np.float32)
    return (embodiment.unnormalize_action(one) - embodiment.unnormalize_action(0 * one))[0]


def _clipped(embodiment: Embodiment, actions: np.ndarray) -> np.ndarray:
    """Return bool like actions: True where the record's bounds cut them off."""
    if embodiment.normalization != "bounds":
        return np.zeros(actions.shape, bool)
    kept = np.asarray(embodiment.action.normalized)
    return kept & (np.abs(embodiment.normalize_action(actions)) >= 1)


@dataclass(frozen=True)
class CheckReport:
    """Both checks. why_no_replay: in words, where there were none."""

    replays: Sequence[DemonstrationReplays] = ()
    compared: Sequence[FrameComparison] = ()
    simulator: str = ""
    why_no_replay: str = ""

    @property
    def faults(self) -> list[str]:
        """What differs, a sentence each; empty where policy and training agree."""
        return self._replays[0] + [f for c in self.compared for f in _faults(c)]

    @property
    def remarks(self) -> list[str]:
        """Replays that part from their recording, few enough to be rounding."""
        return self._replays[1]

    @property
    def _replays(self) -> tuple[list[str], list[str]]:
        return _replay_faults(self.replays, any(c.clipped for c in self.compared))

    def table(self) -> str:
        """Return both checks for a terminal."""
        lines = [self.why_no_replay]
        if self.replays:
            lines = [f"(a) recorded actions in the simulator that made them: {self.simulator}"]
            lines += _replay_table(self.replays)
            lines += [f"  remark: {r}" for r in self.remarks]
        for c in self.compared:
            lines += ["", *_inputs_table(c)]
        faults = [f"DIFFERENT: {f}" for f in self.faults]
        return "\n".join([*lines, "", *(faults or ["all is the same"])])

    def write(self, directory: Path) -> Path:
        """Write check_policy.json and check_policy.png; returns the picture's path."""
        files.write_json(directory / "check_policy.json", self.to_json())
        return draw(self, directory / "check_policy.png")

    def to_json(self) -> dict[str, Any]:
        """Return the numbers of both checks."""
        return {
            "faults": self.faults,
            "remarks": self.remarks,
            "simulator": self.simulator,
            "why_no_replay": self.why_no_replay,
            "replays": [
                {"skill": r.skill, "seed": r.seed}
                | {k: _replay_json(getattr(r, k)) for k in ("recorded", "round_trip")}
                for r in self.replays
            ],
            "inputs": [
                {
                    "dataset": c.dataset,
                    "frames": c.frames,
                    "equal": sorted(c.keys.keys() - c.different.keys()),
                    "different": [vars(d) for d in c.different.values()],
                    "not_read": sorted(c.unread),
                    "action_error": c.error,
                    "action_error_in_validation": c.validation,
                    "may_differ_by": c.allowed,
                    "error_per_dimension": dict(
                        zip(c.names, c.error_per("dimension").tolist(), strict=True)
                    ),
                    "actions_there_and_back": c.units,
                    "clipped": c.clipped,
                }
                for c in self.compared
            ],
        }


def draw(report: CheckReport, path: Path) -> Path:
    """Draw drift over time per skill, and per dataset the error per dimension and per step."""
    panels = bool(report.replays) + 2 * len(report.compared)
    with matplotlib.rc_context(figures.STYLE):
        figure, axes = figures.new(4.6 * panels, 3.6, 1, panels)
        left = iter(axes)
        if report.replays:
            _draw_drift(next(left), report.replays)
        for c in report.compared:
            axis, per_step = next(left), next(left)
            axis.barh(c.names, c.error_per("dimension"), color=figures.PREDICTED)
            axis.invert_yaxis()
            axis.axvline(c.validation, color=figures.INK, ls="--", lw=1)
            axis.set_title(f"{c.dataset}: error per dimension", fontsize=10)
            axis.set_xlabel("normalised units; dashed: validation, all dimensions")
            steps = c.error_per("step")
            per_step.plot(range(1, len(steps) + 1), steps, "o-", color=figures.PREDICTED)
            per_step.axhline(c.validation, color=figures.INK, ls="--", lw=1)
            per_step.set_ylim(0)
            per_step.set_title(f"{c.dataset}: error per step of the chunk", fontsize=10)
            per_step.set_xlabel("step of the chunk")
        return figures.save(figure, path)


def _inputs_table(c: FrameComparison) -> list[str]:
    lines = [f"(b) {c.frames} frames of {c.dataset}, seen by the policy as by a robot"]
    for key, size in c.keys.items():
        d = c.different.get(key)
        verdict = f"DIFFERENT in {d.count:,} of {d.of:,}" if d else f"{size:,} values equal"
        lines.append(f"  {key:36}{verdict}")
    lines += [f"  not read by the network: {', '.join(sorted(c.unread))}"] if c.unread else []
    lines += [
        f"  action error: {c.error:.4f} as a robot, {c.validation:.4f} in validation; chance "
        f"explains {c.allowed:.4f}",
        f"  actions there and back: {c.units:.1e} of their scale",
    ]
    cut = f"  beyond the record's bounds and so clipped: {c.clipped:.1%} of the action values"
    return [*lines, cut] if c.clipped else lines


def _draw_drift(axis: Any, replays: Sequence[DemonstrationReplays]) -> None:
    least = 1e-10  # where a logarithm shows what is exactly 0
    for i, skill in enumerate(sorted({r.skill for r in replays})):
        mine = [r for r in replays if r.skill == skill]
        for kind, style in (("recorded", ":"), ("round_trip", "-")):
            runs = [getattr(r, kind).proprio for r in mine if isinstance(getattr(r, kind), Replay)]
            longest = max((len(x) for x in runs), default=0)
            worst = [max(x[t] for x in runs if len(x) > t) for t in range(longest)]
            label = skill if style == "-" else None
            axis.plot(np.maximum(worst, least), style, color=f"C{i}", lw=1.6, label=label)
    axis.axhline(DRIFT, color=figures.FAILURE, lw=1, ls="--")
    axis.set_yscale("log")
    axis.set_title("Largest drift of proprio in replays", fontsize=10)
    axis.set_xlabel("step; dotted: as recorded, solid: through the record")
    axis.set_ylabel("m, rad (floor: equal)")
    axis.legend(fontsize=8, ncol=2)


def _replay_table(replays: Sequence[DemonstrationReplays]) -> list[str]:
    lines = [
        f"  {'':12}{'success':^22}{'drift of proprio':^22}{'of pixels, of 255':^22}",
        f"  {'skill':12}" + f"{'recorded':>11}{'via record':>11}" * 3,
    ]
    for skill in [*sorted({r.skill for r in replays}), "all"]:
        mine = [r for r in replays if skill in (r.skill, "all")]
        ways = [[getattr(r, way) for r in mine] for way in WAYS]
        whole = [[x for x in way if isinstance(x, Replay)] for way in ways]
        row = [f"{sum(x.success for x in way)}/{len(mine)}" for way in whole]
        for part in ("proprio", "pixels"):
            worst = (max((getattr(x, part).max() for x in w), default=np.nan) for w in whole)
            row += [f"{x:.1e}" if x else "0" for x in worst]
        lines.append(f"  {skill:12}" + "".join(f"{x:>11}" for x in row))
    return lines


def _parted(r: DemonstrationReplays, way: str) -> tuple[str, bool]:
    """Return how a replay parts from its recording, "" for not at all; and whether at once."""
    x, what = getattr(r, way), f"{r.skill}, seed {r.seed}, actions {WAYS[way]}"
    if isinstance(x, str):
        return f"{what}: the simulator broke: {x.strip().splitlines()[-1]}", True
    away = (x.proprio > DRIFT) | (x.pixels > PIXELS)
    if x.success and not away.any():
        return "", False
    end = "success" if x.success else "failure"
    where = "the end" if not away.any() else f"step {int(np.argmax(away))}"
    return (
        f"{what}: parts from the recording at {where}, by up to {x.proprio.max():.2g} of proprio "
        f"and {x.pixels.max():.2g} of 255 in the pictures, and ends in {end}"
    ), bool(away[0])


def _replay_faults(
    replays: Sequence[DemonstrationReplays], clipped: bool
) -> tuple[list[str], list[str]]:
    """Return what is wrong with the replays, and what is remarkable only."""
    faults, remarks = [], []
    for way in WAYS:
        found = [_parted(r, way) for r in replays]
        parted = [text for text, _ in found if text]
        at_once = any(first for _, first in found)
        judged = way == "recorded" or not clipped
        wrong = judged and (at_once or len(parted) > CHAOS * len(replays))
        if len(parted) > SHOWN:
            parted = [*parted[:SHOWN], f"and {len(parted) - SHOWN} more with actions {WAYS[way]}"]
        (faults if wrong else remarks).extend(parted)
    return faults, remarks


def _faults(c: FrameComparison) -> list[str]:
    found = [
        f"{c.dataset}: {d.key}, first at {d.place}: the policy has {d.policy}, training "
        f"{d.training} ({d.count:,} of {d.of:,} values)"
        for d in c.different.values()
    ]
    if not abs(c.error - c.validation) <= c.allowed:
        found.append(
            f"{c.dataset}: the action error is {c.error:.4f} as on a robot, {c.validation:.4f} in "
            f"validation; chance explains {c.allowed:.4f}"
        )
    if not c.units <= UNITS:
        found.append(
            f"{c.dataset}: un-normalised actions miss the recorded ones by {c.units:.2g} of their "
            f"scale; rounding explains {UNITS:.0e}"
        )
    return found


def _replay_json(x: Replay | str) -> dict[str, Any]:
    if isinstance(x, str):
        return {"crashed": x}
    numbers = {"proprio": x.proprio.tolist(), "pixels": x.pixels.tolist()}
    return {"success": x.success, "steps": x.steps, **numbers}
