"""What to do with two groups, in the words of the field: from their rows and their comparison."""

from __future__ import annotations

import re
from dataclasses import dataclass

from octolike.evaluation.transfer.group_comparison import FEWEST, GroupComparison, GroupTraits

# From the best to the worst; the worst that a finding calls for is the advice.
VERDICTS = ("share", "share, told apart", "convert first", "separate heads", "keep apart")
RATE = 1.25  # factor between control rates from which the same action means another speed
LITTLE = 0.1  # overlap of states below which there is no common ground
FAR = 3.0  # distances count as large from so many times their floor

# End-effectors by the words that rows use, looked for in this order.
EFFECTORS = (
    ("stick", r"stick|pusher"),
    ("suction cup", r"suction|vacuum"),
    ("hand", r"\bhand\b(?!-e)"),
    ("gripper", r"gripper|2f-|hand-e|robotiq|finger"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that speaks for a verdict. about: its subject in a word or two."""

    about: str
    verdict: str
    sentence: str


@dataclass(frozen=True)
class Advice:
    """What to do with a pair, and why."""

    a: str
    b: str
    verdict: str
    findings: tuple[Finding, ...]

    @property
    def sentence(self) -> str:
        """The advice in a sentence."""
        mine = [f.sentence for f in self.findings if f.verdict == self.verdict]
        return f"{self.a} and {self.b}: {self.verdict}. {' '.join(mine)}"


def advise(a: GroupTraits, b: GroupTraits, pair: GroupComparison) -> Advice:
    """Return the advice on a pair."""
    findings = [*mismatches(a, b), *_contradictions(pair), *_looks(pair)]
    worst = max((VERDICTS.index(f.verdict) for f in findings), default=0)
    if worst == 0:
        findings.insert(0, Finding("common ground", "share", _common(pair)))
    return Advice(pair.a, pair.b, VERDICTS[worst], tuple(findings))


def mismatches(a: GroupTraits, b: GroupTraits) -> list[Finding]:
    """Return where the rows of two datasets do not agree."""
    found = []
    hands = effector(a), effector(b)
    if hands[0] != hands[1] and all(hands):
        words = f"{hands[0].capitalize()} against {hands[1]}: keep apart."
        found.append(Finding("end-effector", "keep apart", words))
    spaces = space(a), space(b)
    if spaces[0] != spaces[1]:
        words = f"{spaces[0].capitalize()} against {spaces[1]}: a head for each action space."
        found.append(Finding("action space", "separate heads", words))
    elif a.action != b.action:
        names = ", ".join(sorted(set(a.action) ^ set(b.action)))
        words = f"Only one of them has {names}: a head for each action space."
        found.append(Finding("action space", "separate heads", words))
    found += _conventions(a, b)
    rates = a.control_hz, b.control_hz
    if min(rates) > 0 and max(rates) > RATE * min(rates):
        words = (
            f"{rates[0]:g} against {rates[1]:g} actions per second: the same change per step is "
            "another speed. Resample one (`every` in its row), or normalise each by itself."
        )
        found.append(Finding("control rate", "convert first", words))
    if a.robot != b.robot and a.robot and b.robot:
        words = f"Another robot ({a.robot}; {b.robot}): an embodiment record for each."
        found.append(Finding("robot", "share", words))
    if not set(a.cameras) & set(b.cameras):
        words = (
            f"No camera in common ({', '.join(a.cameras)}; {', '.join(b.cameras)}): what is "
            "learned from pictures hardly carries over."
        )
        found.append(Finding("cameras", "share, told apart", words))
    return found


def effector(facts: GroupTraits) -> str:
    """Return the kind of end-effector that a row names, "" where it does not say."""
    for text in (facts.end_effector, facts.robot):
        for name, pattern in EFFECTORS:
            if re.search(pattern, text.lower()):
                return name
    return "gripper" if any("gripper" in name for name in facts.action) else ""


def space(facts: GroupTraits) -> str:
    """Return the action space in words."""
    names = facts.action
    arms = "two arms' " if any(n.startswith("left_") for n in names) else ""
    base = " and a moving base" if any(n.startswith("base") for n in names) else ""
    if any("joint" in n for n in names):
        return f"{arms}joint angles{base}"
    if any(n in names for n in ("dx", "x", "droll", "roll")):
        return f"{arms}end-effector{base}"
    return base.removeprefix(" and ") or "other actions"


def _conventions(a: GroupTraits, b: GroupTraits) -> list[Finding]:
    """Return where numbers of the same name mean different things."""
    found = []
    for what, words in (("absolute", ("changes", "absolute targets")), ("units", None)):
        mine, theirs = (dict(zip(f.action, getattr(f, what), strict=True)) for f in (a, b))
        differ = [n for n in mine if n in theirs and mine[n] != theirs[n]]
        if differ:
            said = [
                words[m] if words else m or "no unit" for m in (mine[differ[0]], theirs[differ[0]])
            ]
            text = f"{', '.join(differ)}: {said[0]} against {said[1]}. Convert one of them first."
            found.append(Finding(what, "convert first", text))
    signs = _open(a.gripper), _open(b.gripper)
    if signs[0] != signs[1] and None not in signs:
        text = f"Gripper conventions differ ({a.gripper}; {b.gripper}). Turn one round first."
        found.append(Finding("gripper convention", "convert first", text))
    return found


def _open(gripper: str) -> bool | None:
    """Return whether 1 means open in a row's words; None where they do not say."""
    found = re.search(r"1 = (open|close)", gripper)
    return found.group(1) == "open" if found else None


def _contradictions(pair: GroupComparison) -> list[Finding]:
    """Return what the actions in similar states say."""
    if pair.probes < FEWEST:
        if pair.overlap < LITTLE:
            words = (
                f"Little common ground: about {pair.overlap:.0%} of the states of one occur in the "
                "other, so their actions cannot contradict, nor help much."
            )
            return [Finding("states", "share", words)]
        return []
    found, same = [], [x for x in pair.states if x in ("instruction", "task")]
    under = f"under the same {same[0]}" if same else "in similar states"
    if names := pair.of_kind("mirrored"):
        words = (
            f"Conflicting actions: {', '.join(names)} point the other way {under}. Separate heads "
            "or experts, or turn the sign in the row if it is a fault."
        )
        found.append(Finding("mirrored actions", "separate heads", words))
    if names := pair.of_kind("rescaled"):
        ratio = next(d.ratio for d in pair.dimensions if d.name == names[0])
        words = (
            f"Conflicting actions: {', '.join(names)} are {ratio:.2g} times as large in {pair.b} "
            f"{under}. Give each an embodiment record of its own, so that it is normalised by "
            "itself; else separate heads or experts."
        )
        found.append(Finding("rescaled actions", "separate heads", words))
    if names := pair.of_kind("shifted"):
        words = (
            f"{', '.join(names)} lie apart by more than a standard deviation {under}. Look for an "
            "offset between the frames, or give each an embodiment record of its own."
        )
        found.append(Finding("shifted actions", "convert first", words))
    if names := pair.of_kind("unrelated"):
        words = (
            f"Other behaviour {under} ({', '.join(names)}): they are different tasks, so the "
            "policy must be told which one is meant, by instruction or task number."
        )
        found.append(Finding("other actions", "share, told apart", words))
    return found


def _looks(pair: GroupComparison) -> list[Finding]:
    """Return what the pictures say."""
    if not pair.pictures > FAR * pair.pictures_floor or not pair.colours > 0.2:
        return []
    words = (
        f"They look different (colour histograms differ by {pair.colours:.0%}): augment colours, "
        "and expect less transfer of what is seen."
    )
    return [Finding("pictures", "share", words)]


def _common(pair: GroupComparison) -> str:
    same = "Same end-effector"
    if pair.probes >= FEWEST and pair.of_kind("same"):
        return f"{same} and workspace, and agreeing actions in similar states: share."
    if pair.overlap >= LITTLE:
        return f"{same} and workspace: share."
    return f"{same} and conventions; nothing speaks against sharing."
