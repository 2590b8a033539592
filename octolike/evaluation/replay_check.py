"""Check of the action space: do a simulator's own demonstrations succeed when replayed?

Each demonstration is executed twice, as recorded and after a round trip through the embodiment
record (normalise, then undo). Both must succeed and reproduce the recorded observations. Contacts
amplify rounding, so a few replays may diverge from the recording on the way (`DIVERGING_SHARE`),
but none at its start. A record that clips ("bounds") changes actions on purpose: its round trip is
reported and not judged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from octolike.embodiment import Embodiment
from octolike.envs.pool import EPISODE_LIMIT, CallCommand, EnvCrash, EnvPool, default_workers
from octolike.envs.registry import make_env
from octolike.envs.replays import Replay, replay
from octolike.evaluation import figures
from octolike.tables import text_table

PROPRIO_TOLERANCE = 1e-3  # metres, radians; rounding differs between processors
PIXEL_TOLERANCE = 1.0  # of 255; rendering differs between graphics libraries
DIVERGING_SHARE = 0.05  # of the replays
LISTED_REPLAYS = 5  # diverging replays listed one by one
VERSIONS = {"recorded": "as recorded", "round_trip": "after the round trip"}
FLOOR = 1e-10  # smallest drift on the logarithmic axis; stands for 0


class ReplayableEpisode(Protocol):
    """The required fields of a demonstration (data.pipeline.recorded_frames.RecordedEpisode)."""

    skill: str
    split: str
    seed: int
    actions: np.ndarray
    observation: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class DemonstrationReplays:
    """A demonstration's two replays; the crash text replaces a replay that crashed."""

    skill: str
    seed: int
    recorded: Replay | str
    round_trip: Replay | str

    def to_json(self) -> dict[str, Any]:
        """Return plain data for check_policy.json."""
        replays = {version: _replay_json(getattr(self, version)) for version in VERSIONS}
        return {"skill": self.skill, "seed": self.seed} | replays


def replay_demonstrations(
    demonstrations: Iterable[ReplayableEpisode],
    embodiment: Embodiment,
    environment: Mapping[str, Any],
    on_episode: Callable[[], Any],
    workers: int = 0,
) -> list[DemonstrationReplays]:
    """Replay demonstrations as recorded and after the record's round trip, in parallel.

    on_episode: called after each demonstration; workers: processes, 0 for one per core. Raises
    RuntimeError if the simulator cannot be built.
    """
    results: list[DemonstrationReplays] = []
    batch: list[tuple[ReplayableEpisode, list[CallCommand]]] = []
    make = functools.partial(make_env, dict(environment))
    slots = workers or default_workers(64)
    with EnvPool(make, slots, slots) as pool:

        def run_batch() -> None:
            replies = [
                pool.run({slot: calls[version] for slot, (_, calls) in enumerate(batch)})
                for version in range(len(VERSIONS))
            ]
            for slot, (d, _) in enumerate(batch):
                pair = (r[slot].text if isinstance(r[slot], EnvCrash) else r[slot] for r in replies)
                results.append(DemonstrationReplays(d.skill, d.seed, *pair))
                on_episode()
            batch.clear()

        for demonstration in demonstrations:
            batch.append((demonstration, _calls(demonstration, embodiment)))
            if len(batch) == slots:
                run_batch()
        if batch:
            run_batch()
    return results


def _calls(d: ReplayableEpisode, embodiment: Embodiment) -> list[CallCommand]:
    options = {"split": d.split, "skills": [d.skill]}
    states = d.observation.get("proprio")
    chunk = embodiment.encode(d.actions[:, None], states)
    round_trip = embodiment.decode(chunk, states)[:, 0]
    return [
        CallCommand(replay, (d.seed, options, actions, dict(d.observation)), EPISODE_LIMIT)
        for actions in (d.actions, round_trip)
    ]


def replay_faults(
    replays: Sequence[DemonstrationReplays], clipped: bool
) -> tuple[list[str], list[str]]:
    """Return (faults, remarks), a sentence for each diverging replay.

    clipped: whether the record clips actions.
    """
    faults: list[str] = []
    remarks: list[str] = []
    for version, description in VERSIONS.items():
        divergences = [_divergence(r, version) for r in replays]
        sentences = [sentence for sentence, _ in divergences if sentence]
        any_at_start = any(at_start for _, at_start in divergences)
        is_judged = version == "recorded" or not clipped
        too_many = len(sentences) > DIVERGING_SHARE * len(replays)
        if len(sentences) > LISTED_REPLAYS:
            more = len(sentences) - LISTED_REPLAYS
            sentences = [*sentences[:LISTED_REPLAYS], f"and {more} more with actions {description}"]
        is_fault = is_judged and (any_at_start or too_many)
        (faults if is_fault else remarks).extend(sentences)
    return faults, remarks


def _divergence(r: DemonstrationReplays, version: str) -> tuple[str, bool]:
    """Return (how a replay diverges from its recording, or "", whether at its start)."""
    x, name = getattr(r, version), f"{r.skill}, seed {r.seed}, actions {VERSIONS[version]}"
    if isinstance(x, str):
        return f"{name}: the simulator crashed: {x.strip().splitlines()[-1]}", True
    diverged = (x.proprio > PROPRIO_TOLERANCE) | (x.pixels > PIXEL_TOLERANCE)
    if x.success and not diverged.any():
        return "", False
    ending = "success" if x.success else "failure"
    place = f"step {int(np.argmax(diverged))}" if diverged.any() else "the end"
    return (
        f"{name}: diverges from the recording at {place}, by up to {x.proprio.max():.2g} in "
        f"proprio and {x.pixels.max():.2g} of 255 in the images, and ends in {ending}"
    ), bool(diverged[0])


def replay_table(replays: Sequence[DemonstrationReplays]) -> str:
    """Return success and largest drift per skill, of both versions, as a text table."""
    rows = []
    for skill in [*sorted({r.skill for r in replays}), "all"]:
        of_skill = [r for r in replays if skill in (r.skill, "all")]
        versions = [
            [x for r in of_skill if isinstance(x := getattr(r, version), Replay)]
            for version in VERSIONS
        ]
        row = [skill, *(f"{sum(x.success for x in xs)}/{len(of_skill)}" for xs in versions)]
        for key in ("proprio", "pixels"):
            drifts = (max((getattr(x, key).max() for x in xs), default=np.nan) for xs in versions)
            row += [f"{drift:.1e}" if drift else "0" for drift in drifts]
        rows.append(row)
    headers = [
        f"{quantity}\n{version}"
        for quantity in ("success", "proprio drift", "pixel drift")
        for version in ("recorded", "round trip")
    ]
    return text_table(rows, ("skill", *headers), "lr", indent=2)


def draw_drift(axis: Any, replays: Sequence[DemonstrationReplays]) -> None:
    """Draw the largest drift of proprio over time, a colour per skill, on a logarithmic axis."""
    for i, skill in enumerate(sorted({r.skill for r in replays})):
        of_skill = [r for r in replays if r.skill == skill]
        for version, style in (("recorded", ":"), ("round_trip", "-")):
            drifts = [x.proprio for r in of_skill if isinstance(x := getattr(r, version), Replay)]
            steps = max((len(x) for x in drifts), default=0)
            largest = [max(x[t] for x in drifts if len(x) > t) for t in range(steps)]
            label = skill if version == "round_trip" else None
            axis.plot(np.maximum(largest, FLOOR), style, color=f"C{i}", lw=1.6, label=label)
    axis.axhline(PROPRIO_TOLERANCE, color=figures.FAILURE, lw=1, ls="--")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:.0e}")
    axis.set_title("Largest drift of proprio in replays", fontsize=10)
    axis.set_xlabel("step; dotted: as recorded, solid: round trip; dashed: tolerance")
    axis.set_ylabel(f"m, rad ({FLOOR:.0e}: equal)")
    axis.legend(fontsize=8, ncol=2)


def _replay_json(x: Replay | str) -> dict[str, Any]:
    if isinstance(x, str):
        return {"crashed": x}
    arrays = {"proprio": x.proprio.tolist(), "pixels": x.pixels.tolist()}
    return {"success": x.success, "steps": x.steps, **arrays}
