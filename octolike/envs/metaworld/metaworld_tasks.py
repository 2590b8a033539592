"""Meta-World's fifty tasks: their wording, their difficulty, and the benchmarks made of them.

A task is a skill here, with its name in the benchmark, less the version. Splits:

    train              objects and goals where the seed puts them, as the benchmark draws them. An
                       evaluation's seeds are never those of demonstrations, so positions are new
    held_out_phrasing  the same in words that no demonstration has
    held_out_task      the same as `train`: what a suite asks for here, its run was not trained on
                       (the test tasks of ML10 and ML45)

ML25 is left out: one of its test tasks, basketball, is among its training tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from octolike.config import ConfigError, unknown

SPLITS = ("train", "held_out_phrasing", "held_out_task")
ROBOTS = {"metaworld": {}}


class Wording(NamedTuple):
    """How a task is put; the first of `train` is its plain name in a sentence."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def _say(*sentences: str) -> Wording:
    return Wording(sentences[:-1], sentences[-1:])


# The last wording of each task is the one that no demonstration has.
WORDING = {
    "assembly": _say(
        "put the ring onto the peg",
        "pick up the ring by its handle and place it on the peg",
        "assemble the ring and the peg",
        "slip the ring over the upright peg",
    ),
    "basketball": _say(
        "dunk the basketball into the hoop",
        "put the basketball into the basket",
        "pick up the ball and drop it through the hoop",
        "score with the basketball",
    ),
    "bin-picking": _say(
        "move the cube from one bin into the other bin",
        "pick the cube out of its bin and put it into the other bin",
        "put the cube into the empty bin",
        "bring the cube over to the other bin",
    ),
    "box-close": _say(
        "put the lid on the box",
        "close the box with its lid",
        "pick up the lid and cover the box",
        "cover the open box",
    ),
    "button-press-topdown": _say(
        "press the button from above",
        "push the button down",
        "press down the button on top of the box",
        "hit the button on the top",
    ),
    "button-press-topdown-wall": _say(
        "reach over the wall and press the button from above",
        "push the button down behind the wall",
        "press down the button on top of the box behind the wall",
        "hit the button on the top, past the wall",
    ),
    "button-press": _say(
        "press the button",
        "push the button on the front of the box",
        "push the button into the box",
        "hit the button on the front",
    ),
    "button-press-wall": _say(
        "reach over the wall and press the button",
        "push the button on the front of the box behind the wall",
        "go around the wall and push the button into the box",
        "hit the button on the front, past the wall",
    ),
    "coffee-button": _say(
        "press the button of the coffee machine",
        "push the button on the coffee machine",
        "start the coffee machine",
        "make the machine brew coffee",
    ),
    "coffee-pull": _say(
        "pull the mug away from the coffee machine",
        "move the mug from the coffee machine to the goal",
        "take the mug away from the coffee machine",
        "drag the mug out from under the coffee machine",
    ),
    "coffee-push": _say(
        "push the mug under the coffee machine",
        "move the mug to the coffee machine",
        "put the mug below the coffee machine",
        "shove the mug in under the coffee machine",
    ),
    "dial-turn": _say(
        "turn the dial",
        "rotate the dial half a turn",
        "turn the dial around",
        "twist the dial",
    ),
    "disassemble": _say(
        "take the ring off the peg",
        "pick up the ring and pull it off the peg",
        "disassemble the ring and the peg",
        "lift the ring from the upright peg",
    ),
    "door-close": _say(
        "close the door",
        "push the door shut",
        "swing the door closed",
        "shut the door of the safe",
    ),
    "door-lock": _say(
        "lock the door",
        "turn the lock of the door to lock it",
        "rotate the lock down",
        "bolt the door",
    ),
    "door-open": _say(
        "open the door",
        "pull the door open",
        "swing the door open by its handle",
        "get the door of the safe open",
    ),
    "door-unlock": _say(
        "unlock the door",
        "turn the lock of the door to unlock it",
        "rotate the lock to the side",
        "unbolt the door",
    ),
    "hand-insert": _say(
        "put the block into the hole with the gripper",
        "insert the gripper with the block into the hole",
        "carry the block into the hole",
        "lower the block into the opening of the table",
    ),
    "drawer-close": _say(
        "close the drawer",
        "push the drawer shut",
        "push the drawer in",
        "shut the drawer",
    ),
    "drawer-open": _say(
        "open the drawer",
        "pull the drawer open",
        "pull the drawer out by its handle",
        "get the drawer open",
    ),
    "faucet-open": _say(
        "open the faucet",
        "turn the faucet on",
        "rotate the faucet counter-clockwise",
        "let the water run from the tap",
    ),
    "faucet-close": _say(
        "close the faucet",
        "turn the faucet off",
        "rotate the faucet clockwise",
        "stop the water of the tap",
    ),
    "hammer": _say(
        "hammer the nail into the wall",
        "pick up the hammer and drive the nail in",
        "hit the nail with the hammer",
        "use the hammer on the nail",
    ),
    "handle-press-side": _say(
        "press the handle down from the side",
        "push down the handle at the side",
        "lower the handle that points sideways",
        "move the sideways handle downwards",
    ),
    "handle-press": _say(
        "press the handle down",
        "push down the handle",
        "lower the handle",
        "move the handle downwards",
    ),
    "handle-pull-side": _say(
        "pull the handle up from the side",
        "pull up the handle at the side",
        "raise the handle that points sideways",
        "move the sideways handle upwards",
    ),
    "handle-pull": _say(
        "pull the handle up",
        "pull up the handle",
        "raise the handle",
        "move the handle upwards",
    ),
    "lever-pull": _say(
        "pull the lever up",
        "rotate the lever upwards",
        "swing the lever up",
        "turn the lever until it points up",
    ),
    "pick-place-wall": _say(
        "pick up the puck, carry it over the wall and place it at the goal",
        "bring the puck over the wall to the goal",
        "lift the puck over the wall to the goal",
        "take the puck across the wall to the marked spot",
    ),
    "pick-out-of-hole": _say(
        "pick the puck out of the hole",
        "take the puck out of the hole and lift it to the goal",
        "lift the puck out of the hole",
        "get the puck up from inside the hole",
    ),
    "pick-place": _say(
        "pick up the puck and place it at the goal",
        "grasp the puck and carry it to the goal",
        "lift the puck to the goal",
        "take the puck to the marked spot",
    ),
    "plate-slide": _say(
        "slide the plate into the cabinet",
        "push the plate into the cabinet",
        "slide the plate forward into the cabinet",
        "get the plate into the goal net",
    ),
    "plate-slide-side": _say(
        "slide the plate sideways into the cabinet",
        "push the plate to the side into the cabinet",
        "move the plate sideways into the cabinet",
        "get the plate into the goal net at the side",
    ),
    "plate-slide-back": _say(
        "slide the plate out of the cabinet",
        "pull the plate back out of the cabinet",
        "bring the plate back from the cabinet",
        "get the plate out of the goal net",
    ),
    "plate-slide-back-side": _say(
        "slide the plate sideways out of the cabinet",
        "pull the plate to the side out of the cabinet",
        "bring the plate back sideways from the cabinet",
        "get the plate out of the goal net at the side",
    ),
    "peg-insert-side": _say(
        "insert the peg into the hole from the side",
        "pick up the peg and put it into the hole in the side of the box",
        "put the peg into the hole sideways",
        "stick the peg into the box",
    ),
    "peg-unplug-side": _say(
        "pull the peg out of the hole",
        "unplug the peg sideways",
        "grasp the peg and pull it out of the box",
        "remove the peg from its socket",
    ),
    "soccer": _say(
        "kick the ball into the goal",
        "push the soccer ball into the goal",
        "move the ball into the net",
        "score a goal with the ball",
    ),
    "stick-push": _say(
        "pick up the stick and push the box with it",
        "use the stick to push the thermos to the goal",
        "grasp the stick and push the container to the goal",
        "shove the container along with the stick",
    ),
    "stick-pull": _say(
        "pick up the stick and pull the box with it",
        "use the stick to pull the thermos to the goal",
        "put the stick through the handle and pull the container to the goal",
        "drag the container along with the stick",
    ),
    "push": _say(
        "push the puck to the goal",
        "slide the puck to the goal",
        "push the puck across the table to the goal",
        "shove the puck to the marked spot",
    ),
    "push-wall": _say(
        "push the puck around the wall to the goal",
        "slide the puck past the wall to the goal",
        "get the puck around the wall to the goal",
        "shove the puck to the marked spot behind the wall",
    ),
    "push-back": _say(
        "push the block back to the goal",
        "pull the block back to the goal",
        "slide the block backwards to the goal",
        "bring the block back to the marked spot",
    ),
    "reach": _say(
        "reach the goal",
        "move the hand to the goal",
        "move the gripper to the goal position",
        "go to the marked spot",
    ),
    "reach-wall": _say(
        "reach around the wall to the goal",
        "move the hand past the wall to the goal",
        "move the gripper around the wall to the goal position",
        "go to the marked spot by the wall",
    ),
    "shelf-place": _say(
        "put the block on the shelf",
        "pick up the block and place it on the shelf",
        "lift the block onto the shelf",
        "set the block down on the shelf",
    ),
    "sweep-into": _say(
        "sweep the block into the hole",
        "push the block into the hole in the table",
        "move the block into the hole",
        "make the block fall into the hole",
    ),
    "sweep": _say(
        "sweep the block off the table",
        "push the block off the table to the side",
        "move the block over the edge of the table",
        "clear the block from the table",
    ),
    "window-open": _say(
        "open the window",
        "slide the window open",
        "push the handle of the window to open it",
        "get the window open",
    ),
    "window-close": _say(
        "close the window",
        "slide the window shut",
        "push the handle of the window to close it",
        "shut the window",
    ),
}
SKILLS = tuple(WORDING)

# Four groups by difficulty (Seo et al., "Masked World Models for Visual Control", 2022), as results
# on MT50 are usually given.
_MEDIUM = (
    "basketball",
    "bin-picking",
    "box-close",
    "coffee-pull",
    "coffee-push",
    "hammer",
    "peg-insert-side",
    "push-wall",
    "soccer",
    "sweep",
    "sweep-into",
)
_HARD = ("assembly", "hand-insert", "pick-out-of-hole", "pick-place", "push", "push-back")
_VERY_HARD = ("disassemble", "pick-place-wall", "shelf-place", "stick-pull", "stick-push")
_EASY = tuple(s for s in SKILLS if s not in (*_MEDIUM, *_HARD, *_VERY_HARD))
GROUPS = {
    **dict.fromkeys(_EASY, "easy"),
    **dict.fromkeys(_MEDIUM, "medium"),
    **dict.fromkeys(_HARD, "hard"),
    **dict.fromkeys(_VERY_HARD, "very hard"),
}


class Benchmark(NamedTuple):
    """Tasks to train on, and tasks to be tested on beside those."""

    train: tuple[str, ...]
    test: tuple[str, ...] = ()


_ML45_TEST = ("bin-picking", "box-close", "hand-insert", "door-lock", "door-unlock")
BENCHMARKS = {
    "mt10": Benchmark(
        (
            "reach",
            "push",
            "pick-place",
            "door-open",
            "drawer-open",
            "drawer-close",
            "button-press-topdown",
            "peg-insert-side",
            "window-open",
            "window-close",
        )
    ),
    "mt50": Benchmark(SKILLS),
    "ml10": Benchmark(
        (
            "reach",
            "push",
            "pick-place",
            "door-open",
            "drawer-close",
            "button-press-topdown",
            "peg-insert-side",
            "window-open",
            "sweep",
            "basketball",
        ),
        ("drawer-open", "door-close", "shelf-place", "sweep-into", "lever-pull"),
    ),
    "ml45": Benchmark(tuple(s for s in SKILLS if s not in _ML45_TEST), _ML45_TEST),
}


def benchmark(name: str) -> Benchmark:
    """Return a benchmark by name; ConfigError for one that is not there, ML25 among them."""
    if name not in BENCHMARKS:
        raise ConfigError(unknown("Meta-World benchmark", name, BENCHMARKS))
    return BENCHMARKS[name]


def tasks_of(split: str, skills: Sequence[str] | None = None) -> tuple[str, ...]:
    """List the tasks of a split; every split has all of them. ConfigError for unknown names."""
    if split not in SPLITS:
        raise ConfigError(unknown("split", split, SPLITS))
    for skill in skills or ():
        if skill not in WORDING:
            raise ConfigError(unknown("Meta-World task", skill, SKILLS))
    return tuple(skills or SKILLS)


def phrasings(skill: str, split: str) -> tuple[str, ...]:
    """List the wordings of a task in a split."""
    wording = WORDING[skill]
    return wording.held_out if split == "held_out_phrasing" else wording.train
