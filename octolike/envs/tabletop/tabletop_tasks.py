"""Tasks on the table: skills, wordings, success, and the split of tasks.

Splits (fixed; a change makes old datasets and results incomparable):

    train                 all skills; no target in HELD_OUT_PAIRS, no lifted balls, PHRASINGS.train
    held_out_combination  the target is in HELD_OUT_PAIRS; wordings as in `train`
    held_out_phrasing     tasks of `train` in the wordings of PHRASINGS.held_out
    held_out_family       lifting balls, which training touches, pushes and puts but never lifts
    counterfactual        a scene drawn for one task of `train`, with the instruction of another
                          task of the same skill, its target also in the scene: shows whether the
                          policy follows the instruction
    distractors           tasks of `train` with MORE_DISTRACTORS additional objects on the table

In `train`, a held-out pair is never the target or the object to stack on, but it may be a
distractor. Every colour and every shape occurs in `train`.

Directions are those of the primary image: left +y, right -y, front -x (towards the viewer),
back +x.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from octolike.config import ConfigError
from octolike.envs.task_tables import Phrasings, check_choice

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("cube", "cylinder", "ball")
FLAT_SHAPES = ("cube", "cylinder")  # an object can be stacked on these
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
# Step limits at 5 Hz: about twice the expert's episode length.
STEP_LIMITS = {"touch": 12, "push": 20, "lift": 20, "put": 36, "stack": 36}

# Thresholds of success, metres.
LIFT_HEIGHT = 0.06
PUSH_DISTANCE = 0.06
RELEASE_CLEARANCE = 0.05  # of the fingertips above the centre of a released object

# {target} and {reference} are filled in by `make_task`.
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
    """An object or bowl by its appearance; `shape` is one of SHAPES or "bowl"."""

    colour: str
    shape: str

    @property
    def key(self) -> str:
        """Name within a task name: red_cube."""
        return f"{self.colour}_{self.shape}"

    @property
    def words(self) -> str:
        """Name within an instruction: red cube."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class TabletopTask:
    """A skill, its target and reference, and one wording of the instruction.

    `reference` is "" for touch and lift, a key of DIRECTIONS for push, and the key of a TableObject
    ("blue_bowl", "green_cube") for put and stack.
    """

    skill: str
    target: TableObject
    reference: str
    instruction: str

    def __post_init__(self) -> None:
        check_choice("skill", self.skill, SKILLS)
        object.__setattr__(self, "target", TableObject(*self.target))
        check_choice("colour", self.target.colour, COLOURS)
        shapes = FLAT_SHAPES if self.skill == "stack" else SHAPES
        check_choice(f"shape for {self.skill}", self.target.shape, shapes)
        choices = references(self.skill, self.target)
        check_choice(f"reference of {self.skill}", self.reference, choices)

    @property
    def name(self) -> str:
        """Name of the task without its wording: touch/red_cube, push/red_cube/left."""
        parts = (self.skill, self.target.key, self.reference)
        return "/".join(part for part in parts if part)

    @property
    def reference_object(self) -> TableObject | None:
        """The bowl of put or the lower object of stack; None for the other skills."""
        return TableObject(*self.reference.split("_")) if "_" in self.reference else None


def references(skill: str, target: TableObject) -> tuple[str, ...]:
    """List the values of `TabletopTask.reference` for a skill and target."""
    if skill == "push":
        return tuple(DIRECTIONS)
    if skill == "put":
        return tuple(TableObject(c, "bowl").key for c in COLOURS)
    if skill == "stack":
        objects = (TableObject(c, s) for c in COLOURS for s in FLAT_SHAPES)
        return tuple(o.key for o in objects if o != target)
    return ("",)


def targets(skill: str, split: str) -> tuple[TableObject, ...]:
    """List the targets of a skill in a split; empty if the split has no such task."""
    check_choice("skill", skill, SKILLS)
    check_choice("split", split, SPLITS)
    shapes: tuple[str, ...]
    if split == "held_out_family":
        shapes = ("ball",) if skill == "lift" else ()
    else:
        shapes = FLAT_SHAPES if skill in ("lift", "stack") else SHAPES
    held_out = split == "held_out_combination"
    objects = (TableObject(c, s) for c in COLOURS for s in shapes)
    return tuple(o for o in objects if (o in HELD_OUT_PAIRS) == held_out)


def tasks_of(
    split: str, skills: Sequence[str] = SKILLS
) -> tuple[tuple[str, TableObject, str], ...]:
    """List every (skill, target, reference) of a split."""
    return tuple(
        (skill, target, reference)
        for skill in skills
        for target in targets(skill, split)
        for reference in references(skill, target)
        if skill != "stack" or TableObject(*reference.split("_")) not in HELD_OUT_PAIRS
    )


def names_in_turn(skills: Sequence[str], seed: int) -> list[str]:
    """Return the names of all tasks of `train` in the order of a seed; the skills take turns."""
    rng = np.random.default_rng(seed)
    tasks = [tasks_of("train", (skill,)) for skill in skills]
    orders = [
        [make_task(*of_skill[i]).name for i in rng.permutation(len(of_skill))] for of_skill in tasks
    ]
    turns = itertools.zip_longest(*orders)
    return [name for turn in turns for name in turn if name]


def counterfactuals(
    task: TabletopTask, objects: Sequence[TableObject], split: str = "train"
) -> tuple[tuple[str, TableObject, str], ...]:
    """List other tasks (skill, target, reference) of the same skill that these objects allow.

    Tasks with another target; if there are none, those with the same target and another reference;
    () if there are none either.
    """
    keys = {o.key for o in objects} | {"", *DIRECTIONS}
    possible = [
        (skill, target, reference)
        for skill, target, reference in tasks_of(split, (task.skill,))
        if target in objects and reference in keys
    ]
    other_targets = [t for t in possible if t[1] != task.target]
    return tuple(other_targets or [t for t in possible if t[2] != task.reference])


def phrasings(skill: str, split: str) -> tuple[str, ...]:
    """List the wordings of a skill in a split, as templates with {target} and {reference}."""
    check_choice("split", split, SPLITS)
    return PHRASINGS[check_choice("skill", skill, SKILLS)].for_split(split)


def make_task(
    skill: str, target: TableObject, reference: str = "", phrasing: str = ""
) -> TabletopTask:
    """Return a task; `phrasing` is a template, by default the skill's first."""
    template = phrasing or PHRASINGS[check_choice("skill", skill, SKILLS)].train[0]
    words = {"target": TableObject(*target).words, "reference": reference.replace("_", " ")}
    return TabletopTask(skill, TableObject(*target), reference, template.format(**words))


def sample_task(
    rng: np.random.Generator, split: str = "train", skills: Sequence[str] | None = None
) -> TabletopTask:
    """Draw a task: the skill uniformly, then target, reference and wording uniformly.

    Args:
        rng: the only source of randomness.
        split: one of SPLITS.
        skills: the skills to draw from; default: all skills of the split.

    Raises:
        ConfigError: an unknown split or skill, or a skill without a task in the split.
    """
    check_choice("split", split, SPLITS)
    split_skills = tuple(s for s in SKILLS if targets(s, split))
    for skill in skills if skills is not None else ():
        check_choice("skill", skill, SKILLS)
        check_choice(f"skill in split {split!r}", skill, split_skills)
    pool = tuple(skills) if skills is not None else split_skills
    if not pool:
        raise ConfigError(f"no skills to draw from: name some of {', '.join(split_skills)}")
    skill = pool[rng.integers(len(pool))]
    choices = targets(skill, split)
    target = choices[rng.integers(len(choices))]
    options = [r for s, t, r in tasks_of(split, (skill,)) if t == target]
    reference = options[rng.integers(len(options))]
    templates = phrasings(skill, split)
    return make_task(skill, target, reference, templates[rng.integers(len(templates))])


def distractors(rng: np.random.Generator, task: TabletopTask, count: int) -> list[TableObject]:
    """Draw `count` objects that differ from the target, the reference and each other.

    For put, the first is a bowl of another colour, so that the bowl's colour has to be read.
    """
    used = {task.target, task.reference_object}
    bowls: list[TableObject] = []
    if task.skill == "put" and count:
        choices = [TableObject(c, "bowl") for c in COLOURS if TableObject(c, "bowl") not in used]
        bowls.append(choices[rng.integers(len(choices))])
    free = [TableObject(c, s) for c in COLOURS for s in SHAPES if TableObject(c, s) not in used]
    picks = rng.permutation(len(free))[: count - len(bowls)]
    return bowls + [free[i] for i in picks]


@dataclass(frozen=True)
class TaskState:
    """The part of the state that decides success; positions are float [3] in metres.

    The table top is at z = 0.

    Attributes:
        target: the target's centre.
        start: the target's centre at the start of the episode.
        size: half the target's height.
        speed: the target's linear speed in m/s.
        reference: centre of the bowl's floor or of the lower object; None for other skills.
        tip: the point between the fingertips.
        touched: the first object that the gripper touched, or None.
        grasped: the object between both fingers, or None.
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


# In the order in which a good episode passes them. "over": the held target is above the reference.
_GRASPING = ("reached", "grasped")
MILESTONES = {
    "touch": ("reached", "touched"),
    "push": ("touched", "moved"),
    "lift": _GRASPING,
    "put": (*_GRASPING, "over", "released", "placed"),
    "stack": (*_GRASPING, "over", "released", "placed"),
}
_REACHED = 0.03  # metres from the fingertips to the target, sideways


def new_milestones(task: TabletopTask, state: TaskState, passed: set[str]) -> set[str]:
    """Return the milestones of `MILESTONES` that the state passes; `passed`: the earlier ones."""
    sideways = float(np.linalg.norm((state.tip - state.target)[:2]))
    holds = state.grasped == task.target
    tests = {
        "reached": sideways <= _REACHED,
        "touched": state.touched == task.target,
        "moved": float(np.linalg.norm((state.target - state.start)[:2])) >= PUSH_DISTANCE / 2,
        "grasped": holds,
    }
    if state.reference is not None:
        offset = state.target - state.reference
        near = float(np.linalg.norm(offset[:2])) <= 0.03
        tests["over"] = holds and near and offset[2] > 0
        tests["released"] = "over" in passed and not state.in_contact
        tests["placed"] = "released" in passed | _true(tests) and placed(task, state)
    return {name for name in MILESTONES[task.skill] if tests[name]}


def _true(tests: dict[str, bool]) -> set[str]:
    return {name for name, passed in tests.items() if passed}


def succeeded(task: TabletopTask, state: TaskState) -> bool:
    """Return whether the task is done."""
    if task.skill == "touch":
        return state.touched == task.target
    if task.skill == "push":
        direction = np.array(DIRECTIONS[task.reference])
        moved = (state.target - state.start)[:2]
        along = float(moved @ direction)
        sideways = float(np.linalg.norm(moved - along * direction))
        return along >= PUSH_DISTANCE and sideways <= 0.5 * along
    if task.skill == "lift":
        return state.grasped == task.target and state.target[2] - state.size >= LIFT_HEIGHT
    return _released(state) and placed(task, state)


def placed(task: TabletopTask, state: TaskState) -> bool:
    """Return whether the target is in the bowl (put) or on the lower object (stack)."""
    offset = state.target - state.reference
    sideways = float(np.linalg.norm(offset[:2]))
    if task.skill == "put":
        return sideways <= 0.055 and offset[2] - state.size <= 0.03
    return sideways <= 0.03 and abs(offset[2] - 2 * state.size) <= 0.012


def _released(state: TaskState) -> bool:
    clear = state.tip[2] - state.target[2] >= RELEASE_CLEARANCE
    return clear and not state.in_contact and state.speed < 0.05


def failure_reason(task: TabletopTask, state: TaskState) -> str:
    """Return in a few words why the task cannot succeed any more; "" while it can."""
    if task.skill == "touch" and state.touched not in (None, task.target):
        return f"touched {state.touched.words}"
    if task.skill in ("lift", "put", "stack") and state.grasped not in (None, task.target):
        return f"grasped {state.grasped.words}"
    if np.abs(state.target[:2]).max() > 0.24:
        return "target out of reach"
    return ""
