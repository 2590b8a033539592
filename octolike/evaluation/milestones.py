"""Progress of episodes: the share that passes each milestone, and the object grasped first.

Objects named "colour shape" also have tables of the asked against the grasped colour and shape.

A simulator may report {milestone: passed} for each episode, in the order of a good one, and the
first object that was grasped next to the one to grasp (`octolike.evaluation.rollouts.OUTCOMES`).
"""

from __future__ import annotations

import collections
import html
from collections.abc import Mapping, Sequence

from octolike.evaluation.statistics import SuccessRate
from octolike.evaluation.success import ResultRow, split_name

SUCCESS = "success"
NOTHING, TARGET = "nothing", "the target"
OUTCOMES = (TARGET, "another of its colour", "another of its shape", "another", NOTHING)
PROPERTIES = ("colour", "shape")  # the words of an object's name


def funnels(
    rows: Sequence[ResultRow], policy: str = "trained"
) -> dict[str, dict[str, dict[str, SuccessRate]]]:
    """Return {split: {skill: {milestone: rate}}}, success last; {} without reported milestones."""
    table: dict[str, dict[str, dict[str, SuccessRate]]] = {}
    for split, skill, episodes in _groups(rows, policy, "milestones"):
        names = list(dict.fromkeys(name for r in episodes for name in r["milestones"]))
        funnel = {
            name: SuccessRate(sum(bool(r["milestones"].get(name)) for r in episodes), len(episodes))
            for name in names
        }
        successes = sum(bool(r["success"]) for r in episodes)
        table.setdefault(split, {})[skill] = funnel | {
            SUCCESS: SuccessRate(successes, len(episodes))
        }
    return table


def grasps(
    rows: Sequence[ResultRow], policy: str = "trained"
) -> dict[str, dict[str, dict[str, int]]]:
    """Return {split: {skill: {object grasped first: episodes}}}, keys of OUTCOMES.

    Objects are named "colour shape": their first and last words are compared. Skills in which no
    episode grasped anything are omitted.
    """
    table: dict[str, dict[str, dict[str, int]]] = {}
    for split, skill, episodes in _groups(rows, policy, "grasped", "target"):
        counts = dict.fromkeys(OUTCOMES, 0)
        for row in episodes:
            counts[_outcome(row["target"], row["grasped"])] += 1
        if counts[NOTHING] < len(episodes):
            table.setdefault(split, {})[skill] = counts
    return table


def confusions(
    rows: Sequence[ResultRow], policy: str = "trained"
) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Return {split: {property: {asked: {grasped first: episodes}}}}, keys of PROPERTIES.

    All skills of a split together, every value of the property in both directions. Episodes that
    grasped nothing are omitted, and so are splits without a wrong object and those with an object
    that is not named "colour shape".
    """
    pairs: dict[str, list[tuple[list[str], list[str]]]] = {}
    for split, _, episodes in _groups(rows, policy, "grasped", "target"):
        words = [(r["target"].split(), r["grasped"].split()) for r in episodes if r["grasped"]]
        pairs.setdefault(split, []).extend(words)
    table: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for split, words in pairs.items():
        if all(a == b for a, b in words) or any(len(x) != 2 for pair in words for x in pair):
            continue
        table[split] = {}
        for i, name in enumerate(PROPERTIES):
            values = sorted({x[i] for pair in words for x in pair})
            counts = collections.Counter((a[i], b[i]) for a, b in words)
            table[split][name] = {a: {b: counts[a, b] for b in values} for a in values}
    return table


def to_html(rows: Sequence[ResultRow]) -> str:
    """Return the funnels and the objects grasped first as HTML; "" without reported milestones."""
    body = ""
    for split, skills in funnels(rows).items():
        lines = "".join(
            f"<tr><th>{html.escape(skill)}</th><td>"
            + " → ".join(f"{html.escape(k)} {r.rate:.0%}" for k, r in funnel.items())
            + "</td></tr>\n"
            for skill, funnel in skills.items()
        )
        body += f"<h3>{html.escape(split_name(split))}</h3><table class='facts'>{lines}</table>\n"
    first_grasps = grasps(rows)
    if first_grasps:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in OUTCOMES)
        lines = "".join(
            f"<tr><th>{html.escape(f'{skill}, {split_name(split)}')}</th>"
            + "".join(f"<td>{n}</td>" for n in counts.values())
            + "</tr>\n"
            for split, skills in first_grasps.items()
            for skill, counts in skills.items()
        )
        body += (
            "<h3>First grasped object</h3>\n<p>Episodes, by the object that the instruction "
            f'names.</p><div class="wide"><table class="rates"><tr><th></th>{head}</tr>\n{lines}'
            "</table></div>\n"
        )
    body += "".join(
        _confusion_html(f"{split_name(split)}: {name}", table)
        for split, tables in confusions(rows).items()
        for name, table in tables.items()
    )
    return body and "<p>Share of the episodes that pass each milestone.</p>\n" + body


def _confusion_html(title: str, table: Mapping[str, Mapping[str, int]]) -> str:
    """Return a table {asked: {grasped: episodes}}, asked in rows."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table)
    lines = "".join(
        f"<tr><th>{html.escape(asked)}</th>"
        + "".join(f"<td>{f'<b>{n}</b>' if b == asked else n}</td>" for b, n in grasped.items())
        + "</tr>\n"
        for asked, grasped in table.items()
    )
    return (
        f"<h3>Asked (rows) and grasped first (columns), {html.escape(title)}</h3>\n"
        f'<div class="wide"><table class="rates"><tr><th></th>{head}</tr>\n{lines}</table></div>\n'
    )


def _groups(
    rows: Sequence[ResultRow], policy: str, *keys: str
) -> list[tuple[str, str, list[ResultRow]]]:
    """Return (split, skill, finished episodes) of a policy that report `keys`, in their order."""
    groups: dict[tuple[str, str], list[ResultRow]] = {}
    for row in rows:
        if row["policy"] == policy and row["success"] is not None and row.keys() >= set(keys):
            groups.setdefault((row["split"], row["skill"]), []).append(row)
    return [(split, skill, episodes) for (split, skill), episodes in groups.items()]


def _outcome(target: str, grasped: str) -> str:
    if not grasped:
        return NOTHING
    if grasped == target:
        return TARGET
    if target.partition(" ")[0] == grasped.partition(" ")[0]:
        return OUTCOMES[1]
    return OUTCOMES[2] if target.rpartition(" ")[2] == grasped.rpartition(" ")[2] else OUTCOMES[3]
