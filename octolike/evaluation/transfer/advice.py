"""Advice on training two groups together, from their dataset specs and their comparison."""

from __future__ import annotations

import re
from dataclasses import dataclass

from octolike.embodiment import one_is_open
from octolike.evaluation.transfer.action_agreement import MIN_PROBES
from octolike.evaluation.transfer.group_comparison import GroupComparison
from octolike.evaluation.transfer.group_sample import GroupTraits

# From best to worst; the worst verdict of the findings is the advice.
VERDICTS = (
    "share",
    "share with conditioning",
    "convert first",
    "separate heads",
    "keep apart",
)
MAX_RATE_RATIO = 1.25  # between control rates; beyond, equal actions mean different speeds
MIN_OVERLAP = 0.1  # of states; below, the groups have no common ground
FAR = 3.0  # a distance of that many floors is large
MIN_COLOURS = 0.2  # a smaller distance of colours is not worth a finding

# Patterns of end-effectors in specs, in the order of matching.
EFFECTORS = (
    ("stick", r"stick|pusher"),
    ("suction cup", r"suction|vacuum"),
    ("hand", r"\bhand\b(?!-e)"),
    ("gripper", r"gripper|2f-|hand-e|robotiq|finger"),
)


@dataclass(frozen=True)
class Finding:
    """A reason for a verdict; about: its subject in a word or two."""

    about: str
    verdict: str
    sentence: str


@dataclass(frozen=True)
class Advice:
    """The verdict on a pair of groups and its reasons."""

    a: str
    b: str
    verdict: str
    findings: tuple[Finding, ...]

    @property
    def sentence(self) -> str:
        """The advice and its main reasons as sentences."""
        reasons = [f.sentence for f in self.findings if f.verdict == self.verdict]
        return f"{self.a} and {self.b}: {self.verdict}. {' '.join(reasons)}"


def advise(a: GroupTraits, b: GroupTraits, pair: GroupComparison) -> Advice:
    """Return the advice on a pair of groups."""
    findings = [*spec_mismatches(a, b), *_action_findings(pair), *_image_findings(pair)]
    worst = max((VERDICTS.index(f.verdict) for f in findings), default=0)
    if worst == 0:
        findings.insert(0, Finding("common ground", "share", _sharing_sentence(pair)))
    return Advice(pair.a, pair.b, VERDICTS[worst], tuple(findings))


def spec_mismatches(a: GroupTraits, b: GroupTraits) -> list[Finding]:
    """Return a finding for each disagreement between two dataset specs."""
    findings = []
    effectors = end_effector(a), end_effector(b)
    if effectors[0] != effectors[1] and all(effectors):
        text = f"{effectors[0].capitalize()} against {effectors[1]}: keep apart."
        findings.append(Finding("end-effector", "keep apart", text))
    spaces = action_space(a), action_space(b)
    if spaces[0] != spaces[1]:
        text = f"{spaces[0].capitalize()} against {spaces[1]}: use a head per action space."
        findings.append(Finding("action space", "separate heads", text))
    elif a.action != b.action:
        names = ", ".join(sorted(set(a.action) ^ set(b.action)))
        text = f"Only one group has {names}: use a head per action space."
        findings.append(Finding("action space", "separate heads", text))
    findings += _convention_mismatches(a, b)
    rates = a.control_hz, b.control_hz
    if min(rates) > 0 and max(rates) > MAX_RATE_RATIO * min(rates):
        text = (
            f"{rates[0]:g} against {rates[1]:g} actions per second: equal deltas per step mean "
            "different speeds. Resample one group (`every` in its spec), or normalise each "
            "separately."
        )
        findings.append(Finding("control rate", "convert first", text))
    if a.robot != b.robot and a.robot and b.robot:
        text = f"Different robots ({a.robot}; {b.robot}): use an embodiment record for each."
        findings.append(Finding("robot", "share", text))
    if not set(a.cameras) & set(b.cameras):
        text = (
            f"No common camera ({', '.join(a.cameras)}; {', '.join(b.cameras)}): expect little "
            "transfer of visual features."
        )
        findings.append(Finding("cameras", "share with conditioning", text))
    return findings


def end_effector(traits: GroupTraits) -> str:
    """Return the kind of end-effector in a spec; "" if unknown."""
    for text in (traits.end_effector, traits.robot):
        for name, pattern in EFFECTORS:
            if re.search(pattern, text.lower()):
                return name
    return "gripper" if any("gripper" in name for name in traits.action) else ""


def action_space(traits: GroupTraits) -> str:
    """Return a name of the action space."""
    names = traits.action
    arms = "two arms' " if any(n.startswith("left_") for n in names) else ""
    base = " and a moving base" if any(n.startswith("base") for n in names) else ""
    if any("joint" in n for n in names):
        return f"{arms}joint angles{base}"
    if any(n in names for n in ("dx", "x", "droll", "roll")):
        return f"{arms}end-effector{base}"
    return base.removeprefix(" and ") or "other actions"


def _convention_mismatches(a: GroupTraits, b: GroupTraits) -> list[Finding]:
    """Return a finding for numbers with the same name but different meanings."""
    findings = []
    for name, words in (("absolute", ("deltas", "absolute targets")), ("units", None)):
        values = [dict(zip(t.action, getattr(t, name), strict=True)) for t in (a, b)]
        differing = [n for n in values[0] if n in values[1] and values[0][n] != values[1][n]]
        if differing:
            first = [v[differing[0]] for v in values]
            texts = [words[v] if words else v or "no unit" for v in first]
            text = (
                f"{', '.join(differing)}: {texts[0]} against {texts[1]}. Convert one group first."
            )
            findings.append(Finding(name, "convert first", text))
    is_open = one_is_open(a.gripper), one_is_open(b.gripper)
    if is_open[0] != is_open[1] and None not in is_open:
        text = f"Gripper conventions differ ({a.gripper}; {b.gripper}). Invert one first."
        findings.append(Finding("gripper convention", "convert first", text))
    return findings


def _action_findings(pair: GroupComparison) -> list[Finding]:
    """Return the findings about actions in similar states."""
    if pair.probes < MIN_PROBES:
        if pair.overlap < MIN_OVERLAP:
            text = (
                f"Little common ground: about {pair.overlap:.0%} of one group's states occur in "
                "the other, so their actions can neither contradict nor support each other much."
            )
            return [Finding("states", "share", text)]
        text = (
            f"The actions were not compared: {pair.probes} similar states were found in other "
            f"episodes, {MIN_PROBES} are needed. A conflict would not show; read more episodes."
        )
        return [Finding("unknown actions", "share", text)]
    findings, matched = [], [x for x in pair.states if x in ("instruction", "task")]
    place = f"under the same {matched[0]}" if matched else "in similar states"
    if names := pair.of_kind("mirrored"):
        text = (
            f"Conflicting actions: {', '.join(names)} have opposite directions {place}. Use "
            "separate heads or experts, or fix the sign in the spec if it is wrong."
        )
        findings.append(Finding("mirrored actions", "separate heads", text))
    if names := pair.of_kind("rescaled"):
        ratio = next(d.ratio for d in pair.dimensions if d.name == names[0])
        text = (
            f"Conflicting actions: {', '.join(names)} are {ratio:.2g} times as large in {pair.b} "
            f"{place}. Give each group its own embodiment record, and thus its own normalisation; "
            "otherwise use separate heads or experts."
        )
        findings.append(Finding("rescaled actions", "separate heads", text))
    if names := pair.of_kind("shifted"):
        text = (
            f"{', '.join(names)} differ by more than a standard deviation {place}. Look for an "
            "offset between the frames, or give each group its own embodiment record."
        )
        findings.append(Finding("shifted actions", "convert first", text))
    if names := pair.of_kind("unrelated"):
        text = (
            f"Different behaviour {place} ({', '.join(names)}): these are different tasks, so "
            "condition the policy on the task, by instruction or task id."
        )
        findings.append(Finding("other actions", "share with conditioning", text))
    return findings


def _image_findings(pair: GroupComparison) -> list[Finding]:
    """Return the finding about images that differ."""
    is_far = pair.pictures > FAR * pair.pictures_floor and pair.colours > MIN_COLOURS
    if not is_far:
        return []
    text = (
        f"Different appearance (colour histograms differ by {pair.colours:.0%}): augment colours, "
        "and expect less transfer of visual features."
    )
    return [Finding("images", "share", text)]


def _sharing_sentence(pair: GroupComparison) -> str:
    if pair.probes >= MIN_PROBES and pair.of_kind("same"):
        return "Same end-effector and workspace, and agreeing actions in similar states: share."
    if pair.overlap >= MIN_OVERLAP:
        return "Same end-effector and workspace; whether the actions agree is not known."
    return "Same end-effector and conventions; no reason against sharing."
