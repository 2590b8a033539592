"""What can be asked for on the table: skills, their wording, success, and what training never sees.

Splits (fixed; a change makes old datasets and results incomparable):

    train                 every skill, no target in HELD_OUT_PAIRS, no lifted balls, PHRASINGS.train
    held_out_combination  the target is one of HELD_OUT_PAIRS; wording as in training
    held_out_phrasing     tasks of `train` in words of PHRASINGS.held_out
    held_out_family       lifting balls, which training touches, pushes and puts but never lifts
    counterfactual        a table laid for one task of `train`, and another of the same skill asked
                          for: its target lies there too. What is done says whether words decide
    distractors           tasks of `train` on a table with MORE_DISTRACTORS more things on it

A held-out pair is never asked for in `train`, neither as the target nor as the object to stack on,
but it may lie on the table as a distractor. Every colour and every shape occurs in `train`.

Directions are those of the primary picture: left +y, right -y, front -x (towards the viewer),
back +x.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("cube", "cylinder", "ball")
FLAT_SHAPES = ("cube", "cylinder")  # something can be stacked on these
DIRECTIONS = {"left": (0.0, 1.0), "right": (0.0, -1.0), "front": (-1.0, 0.0), "back": (1.0, 0.0)}
SKILLS = ("touch", "push", "lift", "put", "stack")
SPLITS = (
    "train",
    "held_out_combination",
    "held_out_phrasing",
    "held_out_family",
    "counterfactual",
    "distractors",
)
MORE_DISTRACTORS = 2
HELD_OUT_PAIRS = (
    ("red", "cylinder"),
    ("green", "cube"),
    ("blue", "ball"),
    ("yellow", "cylinder"),
)
# The largest number of steps of an episode at 5 Hz: about twice what the expert needs.
STEP_LIMITS = {"touch": 12, "push": 20, "lift": 20, "put": 36, "stack": 36}

LIFT_HEIGHT = 0.06  # metres, as are the two below
PUSH_DISTANCE = 0.06
RELEASE_CLEARANCE = 0.05  # the fingertips are this far above the centre of a released object


class Phrasings(NamedTuple):
    """The wordings of one skill; {target} and {reference} are filled in."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


PHRASINGS = {
    "touch": Phrasings(
        (
            "touch the {target}",
            "tap the {target}",
            "move to the {target} and touch it",
            "put a finger on the {target}",
            "reach for the {target}",
        ),
        ("make contact with the {target}", "poke the {target}"),
    ),
    "push": Phrasings(
        (
            "push the {target} to the {reference}",
            "move the {target} to the {reference}",
            "slide the {target} to the {reference}",
            "push the {target} a little to the {reference}",
        ),
        ("shove the {target} to the {reference}", "nudge the {target} towards the {reference}"),
    ),
    "lift": Phrasings(
        (
            "lift the {target}",
            "pick up the {target}",
            "lift the {target} off the table",
            "grasp the {target} and lift it",
            "take the {target}",
        ),
        ("raise the {target}", "hold the {target} up in the air"),
    ),
    "put": Phrasings(
        (
            "put the {target} into the {reference}",
            "put the {target} in the {reference}",
            "place the {target} in the {reference}",
            "drop the {target} into the {reference}",
            "move the {target} into the {reference}",
        ),
        ("deposit the {target} in the {reference}", "the {target} belongs in the {reference}"),
    ),
    "stack": Phrasings(
        (
            "stack the {target} on the {reference}",
            "put the {target} on top of the {reference}",
            "place the {target} on the {reference}",
            "stack the {target} on top of the {reference}",
        ),
        (
            "set the {target} down on the {reference}",
            "build a tower with the {target} on the {reference}",
        ),
    ),
}


class TableObject(NamedTuple):
    """An object or bowl by its looks; `shape` is one of SHAPES or "bowl"."""

    colour: str
    shape: str

    @property
    def key(self) -> str:
        """The thing as part of a task name: red_cube."""
        return f"{self.colour}_{self.shape}"

    @property
    def words(self) -> str:
        """The thing in an instruction: red cube."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class TabletopTask:
    """One thing to do, in one wording.

    `reference` is "" for touch and lift, a key of DIRECTIONS for push, and the key of a TableObject
    ("blue_bowl", "green_cube") for put and stack.
    """

    skill: str
    target: TableObject
    reference: str
    instruction: str

    def __post_init__(self) -> None:
        choose("skill", self.skill, SKILLS)
        object.__setattr__(self, "target", TableObject(*self.target))
        choose("colour", self.target.colour, COLOURS)
        choose("shape", self.target.shape, FLAT_SHAPES if self.skill == "stack" else SHAPES)
        choose(f"reference of {self.skill}", self.reference, references(self.skill, self.target))

    @property
    def name(self) -> str:
        """What is asked for whatever the wording: touch/red_cube, push/red_cube/left."""
        parts = (self.skill, self.target.key, self.reference)
        return "/".join(part for part in parts if part)

    @property
    def reference_object(self) -> TableObject | None:
        """The bowl of put or the lower object of stack; None for the other skills."""
        return TableObject(*self.reference.split("_")) if "_" in self.reference else None


def choose(what: str, value: str, choices: Sequence[str]) -> str:
    """Return `value` if it is a choice, else raise a ValueError with the list and the nearest."""
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(repr(c) for c in choices)
    raise ValueError(f"unknown {what} {value!r}: choose from {listed}.{hint}")


def references(skill: str, target: TableObject) -> tuple[str, ...]:
    """List what `TabletopTask.reference` may be for this skill and target."""
    if skill == "push":
        return tuple(DIRECTIONS)
    if skill == "put":
        return tuple(TableObject(c, "bowl").key for c in COLOURS)
    if skill == "stack":
        things = (TableObject(c, s) for c in COLOURS for s in FLAT_SHAPES)
        return tuple(t.key for t in things if t != target)
    return ("",)


def targets(skill: str, split: str) -> tuple[TableObject, ...]:
    """List the things that `skill` acts upon in `split`; empty where the split has no such task."""
    choose("skill", skill, SKILLS)
    choose("split", split, SPLITS)
    balls_lifted = split == "held_out_family"
    if balls_lifted:
        shapes = ("ball",) if skill == "lift" else ()
    else:
        shapes = FLAT_SHAPES if skill in ("lift", "stack") else SHAPES
    held_out = split == "held_out_combination"
    things = (TableObject(c, s) for c in COLOURS for s in shapes)
    return tuple(t for t in things if (t in HELD_OUT_PAIRS) == held_out)


def tasks_of(
    split: str, skills: Sequence[str] = SKILLS
) -> tuple[tuple[str, TableObject, str], ...]:
    """List every (skill, target, reference) of `split`, wording aside."""
    out = []
    for skill in skills:
        for target in targets(skill, split):
            for reference in references(skill, target):
                if skill != "stack" or TableObject(*reference.split("_")) not in HELD_OUT_PAIRS:
                    out.append((skill, target, reference))
    return tuple(out)


def counterfactuals(
    task: TabletopTask, things: Sequence[TableObject], split: str = "train"
) -> tuple[tuple[str, TableObject, str], ...]:
    """List what else of the same skill can be asked for on a table of these things.

    Of (skill, target, reference), those with another target; with the task's own target and another
    reference where there are none; () where there is nothing.
    """
    keys = {t.key for t in things} | {"", *DIRECTIONS}
    there = [
        (skill, target, reference)
        for skill, target, reference in tasks_of(split, (task.skill,))
        if target in things and reference in keys
    ]
    others = [t for t in there if t[1] != task.target]
    return tuple(others or [t for t in there if t[2] != task.reference])


def phrasings(skill: str, split: str) -> tuple[str, ...]:
    """List the wordings of `skill` in `split`, with {target} and {reference} still open."""
    choose("split", split, SPLITS)
    wording = PHRASINGS[choose("skill", skill, SKILLS)]
    return wording.held_out if split == "held_out_phrasing" else wording.train


def make_task(
    skill: str, target: TableObject, reference: str = "", phrasing: str = ""
) -> TabletopTask:
    """Build a task from its parts; `phrasing` is a template, by default the skill's first."""
    template = phrasing or PHRASINGS[choose("skill", skill, SKILLS)].train[0]
    words = {"target": TableObject(*target).words, "reference": reference.replace("_", " ")}
    return TabletopTask(skill, TableObject(*target), reference, template.format(**words))


def sample_task(
    rng: np.random.Generator, split: str = "train", skills: Sequence[str] | None = None
) -> TabletopTask:
    """Draw a task: the skill uniformly, then target, reference and wording uniformly.

    Args:
        rng: the source of all randomness.
        split: one of SPLITS.
        skills: the skills to draw from; default all that the split has.

    Raises:
        ValueError: an unknown split or skill, or a skill that has no task in the split.
    """
    choose("split", split, SPLITS)
    having = tuple(s for s in SKILLS if targets(s, split))
    for skill in skills if skills is not None else ():
        choose("skill", skill, SKILLS)
        choose(f"skill in split {split!r}", skill, having)
    pool = tuple(skills) if skills is not None else having
    if not pool:
        raise ValueError(f"no skills to draw from: name some of {', '.join(having)}")
    skill = pool[rng.integers(len(pool))]
    parts = targets(skill, split)
    target = parts[rng.integers(len(parts))]
    options = [r for s, t, r in tasks_of(split, (skill,)) if t == target]
    reference = options[rng.integers(len(options))]
    wording = phrasings(skill, split)
    return make_task(skill, target, reference, wording[rng.integers(len(wording))])


def distractors(rng: np.random.Generator, task: TabletopTask, count: int) -> list[TableObject]:
    """Draw `count` other things for the table, none equal to the target or the reference.

    For put the first of them is a bowl of another colour, so that the bowl's colour has to be read.
    """
    taken = {task.target, task.reference_object}
    out: list[TableObject] = []
    if task.skill == "put" and count:
        bowls = [TableObject(c, "bowl") for c in COLOURS if TableObject(c, "bowl") not in taken]
        out.append(bowls[rng.integers(len(bowls))])
    free = [TableObject(c, s) for c in COLOURS for s in SHAPES if TableObject(c, s) not in taken]
    picks = rng.permutation(len(free))[: count - len(out)]
    return out + [free[i] for i in picks]


@dataclass(frozen=True)
class TaskState:
    """What success is judged by; positions are float [3] in metres, z of the table top is 0.

    Attributes:
        target: the target object's centre.
        start: its centre when the episode began.
        size: its half height.
        speed: its linear speed in m/s.
        reference: the centre of the bowl's floor or of the lower object, None where there is none.
        tip: the point between the fingertips.
        touched: the first thing that the gripper has touched, None so far.
        grasped: the object that both fingers hold, None if there is none.
        in_contact: whether any part of the gripper touches the target now.
    """

    target: np.ndarray
    start: np.ndarray
    size: float
    speed: float
    reference: np.ndarray | None
    tip: np.ndarray
    touched: TableObject | None
    grasped: TableObject | None
    in_contact: bool


def succeeded(task: TabletopTask, now: TaskState) -> bool:
    """Say whether the task is done."""
    if task.skill == "touch":
        return now.touched == task.target
    if task.skill == "push":
        direction = np.array(DIRECTIONS[task.reference])
        moved = (now.target - now.start)[:2]
        along = float(moved @ direction)
        aside = float(np.linalg.norm(moved - along * direction))
        return along >= PUSH_DISTANCE and aside <= 0.5 * along
    if task.skill == "lift":
        return now.grasped == task.target and now.target[2] - now.size >= LIFT_HEIGHT
    return _released(now) and placed(task, now)


def placed(task: TabletopTask, now: TaskState) -> bool:
    """Say whether the target lies in the bowl (put) or on the lower object (stack)."""
    offset = now.target - now.reference
    aside = float(np.linalg.norm(offset[:2]))
    if task.skill == "put":
        return aside <= 0.055 and offset[2] - now.size <= 0.03
    return aside <= 0.03 and abs(offset[2] - 2 * now.size) <= 0.012


def _released(now: TaskState) -> bool:
    clear = now.tip[2] - now.target[2] >= RELEASE_CLEARANCE
    return clear and not now.in_contact and now.speed < 0.05


def failed(task: TabletopTask, now: TaskState) -> str:
    """Say why the task cannot succeed any more, in a few words; "" while it can."""
    if task.skill == "touch" and now.touched not in (None, task.target):
        return f"touched {now.touched.words}"
    if task.skill in ("lift", "put", "stack") and now.grasped not in (None, task.target):
        return f"grasped {now.grasped.words}"
    if np.abs(now.target[:2]).max() > 0.24:
        return "target out of reach"
    return ""
