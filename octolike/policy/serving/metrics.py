"""ServerMetrics: counters and durations of a server, as Prometheus reads them."""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
STAGES = ("queue", "preprocess", "model", "total")


class ServerMetrics:
    """Counts of one server; only the event loop changes them.

    Attributes:
        counts: by (name, label of the outcome).
        gauges: functions that return a present value, by name.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.gauges: dict[str, Callable[[], float]] = {}
        self._buckets = {stage: [0] * (len(BUCKETS) + 1) for stage in STAGES}
        self._seconds: dict[str, float] = defaultdict(float)
        self._batches: Counter[int] = Counter()

    def add(self, name: str, label: str = "", count: int = 1) -> None:
        """Add to a counter: a name of `HELP`."""
        self.counts[name, label] += count

    def add_batch(self, size: int) -> None:
        """Count a call of the policy for `size` requests."""
        self._batches[size] += 1

    def observe(self, seconds: Mapping[str, float]) -> None:
        """Add the durations of one request, by stage."""
        for stage, value in seconds.items():
            self._buckets[stage][bisect.bisect_left(BUCKETS, value)] += 1
            self._seconds[stage] += value

    def text(self) -> str:
        """Return everything in Prometheus' text format."""
        lines = []
        for name, (label, meaning) in HELP.items():
            lines += [f"# HELP octolike_{name} {meaning}", f"# TYPE octolike_{name} counter"]
            rows = {k: v for (n, k), v in self.counts.items() if n == name} or {"": 0}
            for key, value in sorted(rows.items()):
                mark = f'{{{label}="{key}"}}' if key else ""
                lines.append(f"octolike_{name}{mark} {value}")
        lines += ["# HELP octolike_batches_total Calls of the policy, by requests in the batch."]
        lines += ["# TYPE octolike_batches_total counter"]
        for size, value in sorted(self._batches.items()):
            lines.append(f'octolike_batches_total{{size="{size}"}} {value}')
        for name, read in self.gauges.items():
            lines += [f"# TYPE octolike_{name} gauge", f"octolike_{name} {read():g}"]
        lines += ["# HELP octolike_seconds Duration of answered requests, by stage."]
        lines += ["# TYPE octolike_seconds histogram"]
        for stage, buckets in self._buckets.items():
            total = 0
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), buckets, strict=True):
                total += count
                lines.append(f'octolike_seconds_bucket{{stage="{stage}",le="{bound}"}} {total}')
            lines.append(f'octolike_seconds_sum{{stage="{stage}"}} {self._seconds[stage]:.6f}')
            lines.append(f'octolike_seconds_count{{stage="{stage}"}} {total}')
        return "\n".join(lines) + "\n"


# {counter: (its label, its meaning)}
HELP = {
    "requests_total": ("outcome", "Requests, by outcome: ok, invalid, busy, failed, limit, gone."),
    "connections_total": (
        "outcome",
        "Connections: accepted, refused (key), full, evicted, stalled (does not read).",
    ),
    "limited_actions_total": ("dimension", "Actions clipped to a limit, by dimension."),
    "reloads_total": ("outcome", "Newer checkpoints: loaded, failed."),
}
