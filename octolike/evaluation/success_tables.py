"""Success rates in words and as tables, for a terminal and for the page of a report."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from octolike.evaluation import success
from octolike.evaluation.figures import split_colour
from octolike.evaluation.statistics import SuccessRate
from octolike.evaluation.success import (
    SPLIT_MEANINGS,
    ResultRow,
    split_name,
    steps_to_success,
)
from octolike.remarks import ONE_RUN
from octolike.tables import text_table

RateTable = Mapping[str, Mapping[str, Mapping[str, SuccessRate]]]  # of success.rate_table


def success_table(
    rows: Sequence[ResultRow],
    groups: Mapping[str, str] | None = None,
    caveats: Sequence[str] = (),
) -> str:
    """Return the success table for a terminal, followed by the verdicts on memorising.

    groups: {skill: group}; adds means over the groups. caveats: sentences on the rates.
    """
    table = success.rate_table(rows)
    trained, untrained = table.get("trained", {}), table.get("untrained", {})
    cells, means = [], []
    for split, rates in trained.items():
        for i, (skill, rate) in enumerate(rates.items()):
            steps = steps_to_success(rows, **row_fields("trained", split, skill))
            cells.append(
                (
                    "" if i else split_name(split),
                    skill,
                    _cell(rate),
                    f"{steps:g}" if steps is not None else "–",
                    _cell(untrained.get(split, {}).get(skill)),
                )
            )
        means += [f"{split_name(split)}: {_means_text(rates, groups)}"] if groups else []
    headers = ("split", "skill", "trained", "median steps", "untrained")
    lines = [text_table(cells, headers, "llr"), *means, ""]
    if groups:
        lines += [group_table(trained, groups), ""]
    sentences = [*caveats, *success.verdicts(rows), ONE_RUN]
    return "\n".join([*lines, *(f"- {sentence}" for sentence in sentences)])


def group_table(splits: Mapping[str, Mapping[str, SuccessRate]], groups: Mapping[str, str]) -> str:
    """Return the table in the form in which benchmarks publish theirs: a column per group.

    Args:
        splits: {split: {skill: rate}} of one policy; a row each.
        groups: {skill: group}.

    Returns:
        Means over the skills of each group, and over the groups, with 95 % intervals (see
        `success.mean_intervals`); "–" where none was evaluated.
    """
    names, means = _group_means(splits, groups)
    rows = [
        (split_name(split), *(f"{m.text} [{m.bounds(', ')}]" if m else "–" for m in row))
        for split, row in means.items()
    ]
    return text_table(rows, ("success", *names), "lr")


class _Mean(NamedTuple):
    """A mean of success rates with its 95 % interval."""

    rate: float
    low: float
    high: float

    @property
    def text(self) -> str:
        return f"{self.rate:.1%}"

    def bounds(self, separator: str) -> str:
        return f"{100 * self.low:.1f}{separator}{100 * self.high:.1f}"


def _group_means(
    splits: Mapping[str, Mapping[str, SuccessRate]], groups: Mapping[str, str]
) -> tuple[list[str], dict[str, list[_Mean | None]]]:
    """Return the columns of `group_table` and {split: their means}; None where none was run."""
    means = {split: success.mean_rates(rates, groups) for split, rates in splits.items()}
    intervals = {split: success.mean_intervals(rates, groups) for split, rates in splits.items()}
    names = [g for g in dict.fromkeys(groups.values()) if any(g in m for m in means.values())]
    rows = {
        split: [_Mean(m[n], *intervals[split][n]) if n in m else None for n in (*names, "groups")]
        for split, m in means.items()
    }
    return [*names, "mean"], rows


def _means_text(rates: Mapping[str, SuccessRate], groups: Mapping[str, str]) -> str:
    """Return the means over tasks, within groups and over groups, in words."""
    means = success.mean_rates(rates, groups)
    if not means:
        return "no finished episode"
    texts = {k: f"{v:.1%}" for k, v in means.items()}
    over_tasks = f"mean over tasks {texts.pop('tasks')}"
    over_groups = texts.pop("groups", None)
    if over_groups is None:
        return over_tasks
    per_group = ", ".join(f"{k} {v}" for k, v in texts.items())
    return f"{over_tasks}; over the {len(texts)} groups {over_groups} ({per_group})"


def row_fields(policy: str, split: str, skill: str) -> dict[str, str]:
    """Return the fields that select the rows of a table cell; skill 'all' selects every skill."""
    return {"policy": policy, "split": split} | ({} if skill == "all" else {"skill": skill})


def _cell(rate: SuccessRate | None) -> str:
    if rate is None or not rate.episodes:
        return "all crashed" if rate and rate.crashed else "–"
    low, high = (round(100 * v) for v in rate.interval)
    return f"{rate.rate:.0%} [{low}, {high}] of {rate.episodes}"


def success_html(
    table: RateTable,
    rows: Sequence[ResultRow],
    groups: Mapping[str, str],
    caveats: Sequence[str] = (),
) -> str:
    """Return the success table for a page, with the means over groups and the caveats below."""
    trained, untrained = table["trained"], table.get("untrained", {})
    skills = list(dict.fromkeys(k for rates in trained.values() for k in rates if k != "all"))
    head = "".join(f"<th>{html.escape(s)}</th>" for s in [*skills, "all skills"])
    body = ""
    for split, rates in trained.items():
        name = f'<i style="background:{split_colour(split)}"></i>{html.escape(split_name(split))}'
        cells = "".join(
            _rate_html(rates.get(s), steps_to_success(rows, **row_fields("trained", split, s)))
            for s in [*skills, "all"]
        )
        meaning = html.escape(SPLIT_MEANINGS.get(split, ""))
        body += f'<tr title="{meaning}"><th>{name}</th>{cells}</tr>\n'
        if split in untrained:
            cells = "".join(_rate_html(untrained[split].get(s)) for s in [*skills, "all"])
            body += f'<tr class="floor"><th>– untrained network</th>{cells}</tr>\n'
    meanings = "".join(
        f"<li><b>{html.escape(split_name(s))}</b>: {html.escape(SPLIT_MEANINGS[s])}</li>"
        for s in trained
        if s in SPLIT_MEANINGS
    )
    means = "".join(
        f"<p>{html.escape(split_name(s))}: {html.escape(_means_text(rates, groups))}.</p>\n"
        for s, rates in trained.items()
        if groups
    )
    notes = "".join(f"<li>{html.escape(sentence)}</li>\n" for sentence in caveats)
    notes = f'<ul class="caveats">\n{notes}</ul>\n' if caveats else ""
    return (
        "<p>Share of episodes in which the policy completed the instructed task. Below each rate: "
        "its 95 % confidence interval in percent, and the median number of steps of the successful "
        "episodes.</p>\n"
        f'<div class="wide"><table class="rates"><tr><th></th>{head}</tr>\n{body}</table></div>\n'
        f"{notes}{_groups_html(trained, groups)}{means}<p>{html.escape(ONE_RUN)}</p>\n"
        f"<ul>{meanings}</ul>\n"
    )


def _groups_html(splits: Mapping[str, Mapping[str, SuccessRate]], groups: Mapping[str, str]) -> str:
    """Return the table of `group_table` for a page; "" without groups."""
    names, means = _group_means(splits, groups)
    if len(names) < 2:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = ""
    for split, row in means.items():
        cells = "".join(
            f"<td><b>{m.text}</b><br><small>{m.bounds('–')}</small></td>"
            if m
            else '<td class="none">–</td>'
            for m in row
        )
        body += f"<tr><th>{html.escape(split_name(split))}</th>{cells}</tr>\n"
    return (
        "<p>In the form of published tables: the mean over the tasks of each group, then over the "
        "groups. Below each mean: its 95 % interval, which covers episodes, not the choice of "
        "tasks.</p>\n"
        f'<div class="wide"><table class="rates"><tr><th></th>{head}</tr>\n{body}</table></div>\n'
    )


def _rate_html(rate: SuccessRate | None, steps: float | None = None) -> str:
    if rate is None or not (rate.episodes or rate.crashed):
        return '<td class="none" title="no such tasks">·</td>'
    crashed = f"<br><small>{rate.crashed} crashed</small>" if rate.crashed else ""
    if not rate.episodes:
        return f"<td>–{crashed}</td>"
    low, high = (round(100 * v) for v in rate.interval)
    shade = f"background:rgba(46,139,87,{0.05 + 0.4 * rate.rate:.2f})" if rate.rate else ""
    median = f"<br><small>{steps:g} steps</small>" if steps is not None else ""
    return (
        f'<td style="{shade}" title="{rate.successes} of {rate.episodes}"><b>{rate.rate:.0%}</b>'
        f"<br><small>{low}–{high}</small>{median}{crashed}</td>"
    )
