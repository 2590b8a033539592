"""Meta-World's fifty tasks: wordings, difficulty groups and benchmarks.

A task is a skill, named as in the benchmark without the version. Splits:

    train              objects and goals at positions drawn from the seed, as in the benchmark.
                       Evaluation and demonstrations have different seeds, so positions are new
    held_out_phrasing  the same tasks in wordings that no demonstration has
    held_out_task      the same as `train`, for suites on tasks that the run was not trained on
                       (the test tasks of ML10 and ML45)

ML25 is omitted: its test task basketball is also one of its training tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

from octolike.envs.task_tables import Phrasings, check_choice, choose_tasks

SPLITS = ("train", "held_out_phrasing", "held_out_task")
ROBOTS: Mapping[str, Mapping[str, str]] = {"metaworld": {}}


def _phrasings(*sentences: str) -> Phrasings:
    return Phrasings(sentences[:-1], sentences[-1:])


# The last wording of each task is held out from demonstrations.
PHRASINGS = {
    "assembly": _phrasings(
        "put the ring onto the peg",
        "pick up the ring by its handle and place it on the peg",
        "assemble the ring and the peg",
        "slip the ring over the upright peg",
    ),
    "basketball": _phrasings(
        "dunk the basketball into the hoop",
        "put the basketball into the basket",
        "pick up the ball and drop it through the hoop",
        "score with the basketball",
    ),
    "bin-picking": _phrasings(
        "move the cube from one bin into the other bin",
        "pick the cube out of its bin and put it into the other bin",
        "put the cube into the empty bin",
        "bring the cube over to the other bin",
    ),
    "box-close": _phrasings(
        "put the lid on the box",
        "close the box with its lid",
        "pick up the lid and cover the box",
        "cover the open box",
    ),
    "button-press-topdown": _phrasings(
        "press the button from above",
        "push the button down",
        "press down the button on top of the box",
        "hit the button on the top",
    ),
    "button-press-topdown-wall": _phrasings(
        "reach over the wall and press the button from above",
        "push the button down behind the wall",
        "press down the button on top of the box behind the wall",
        "hit the button on the top, past the wall",
    ),
    "button-press": _phrasings(
        "press the button",
        "push the button on the front of the box",
        "push the button into the box",
        "hit the button on the front",
    ),
    "button-press-wall": _phrasings(
        "reach over the wall and press the button",
        "push the button on the front of the box behind the wall",
        "go around the wall and push the button into the box",
        "hit the button on the front, past the wall",
    ),
    "coffee-button": _phrasings(
        "press the button of the coffee machine",
        "push the button on the coffee machine",
        "start the coffee machine",
        "make the machine brew coffee",
    ),
    "coffee-pull": _phrasings(
        "pull the mug away from the coffee machine",
        "move the mug from the coffee machine to the goal",
        "take the mug away from the coffee machine",
        "drag the mug out from under the coffee machine",
    ),
    "coffee-push": _phrasings(
        "push the mug under the coffee machine",
        "move the mug to the coffee machine",
        "put the mug below the coffee machine",
        "shove the mug in under the coffee machine",
    ),
    "dial-turn": _phrasings(
        "turn the dial",
        "rotate the dial half a turn",
        "turn the dial around",
        "twist the dial",
    ),
    "disassemble": _phrasings(
        "take the ring off the peg",
        "pick up the ring and pull it off the peg",
        "disassemble the ring and the peg",
        "lift the ring from the upright peg",
    ),
    "door-close": _phrasings(
        "close the door",
        "push the door shut",
        "swing the door closed",
        "shut the door of the safe",
    ),
    "door-lock": _phrasings(
        "lock the door",
        "turn the lock of the door to lock it",
        "rotate the lock down",
        "bolt the door",
    ),
    "door-open": _phrasings(
        "open the door",
        "pull the door open",
        "swing the door open by its handle",
        "get the door of the safe open",
    ),
    "door-unlock": _phrasings(
        "unlock the door",
        "turn the lock of the door to unlock it",
        "rotate the lock to the side",
        "unbolt the door",
    ),
    "hand-insert": _phrasings(
        "put the block into the hole with the gripper",
        "insert the gripper with the block into the hole",
        "carry the block into the hole",
        "lower the block into the opening of the table",
    ),
    "drawer-close": _phrasings(
        "close the drawer",
        "push the drawer shut",
        "push the drawer in",
        "shut the drawer",
    ),
    "drawer-open": _phrasings(
        "open the drawer",
        "pull the drawer open",
        "pull the drawer out by its handle",
        "get the drawer open",
    ),
    "faucet-open": _phrasings(
        "open the faucet",
        "turn the faucet on",
        "rotate the faucet counter-clockwise",
        "let the water run from the tap",
    ),
    "faucet-close": _phrasings(
        "close the faucet",
        "turn the faucet off",
        "rotate the faucet clockwise",
        "stop the water of the tap",
    ),
    "hammer": _phrasings(
        "hammer the nail into the wall",
        "pick up the hammer and drive the nail in",
        "hit the nail with the hammer",
        "use the hammer on the nail",
    ),
    "handle-press-side": _phrasings(
        "press the handle down from the side",
        "push down the handle at the side",
        "lower the handle that points sideways",
        "move the sideways handle downwards",
    ),
    "handle-press": _phrasings(
        "press the handle down",
        "push down the handle",
        "lower the handle",
        "move the handle downwards",
    ),
    "handle-pull-side": _phrasings(
        "pull the handle up from the side",
        "pull up the handle at the side",
        "raise the handle that points sideways",
        "move the sideways handle upwards",
    ),
    "handle-pull": _phrasings(
        "pull the handle up",
        "pull up the handle",
        "raise the handle",
        "move the handle upwards",
    ),
    "lever-pull": _phrasings(
        "pull the lever up",
        "rotate the lever upwards",
        "swing the lever up",
        "turn the lever until it points up",
    ),
    "pick-place-wall": _phrasings(
        "pick up the puck, carry it over the wall and place it at the goal",
        "bring the puck over the wall to the goal",
        "lift the puck over the wall to the goal",
        "take the puck across the wall to the marked spot",
    ),
    "pick-out-of-hole": _phrasings(
        "pick the puck out of the hole",
        "take the puck out of the hole and lift it to the goal",
        "lift the puck out of the hole",
        "get the puck up from inside the hole",
    ),
    "pick-place": _phrasings(
        "pick up the puck and place it at the goal",
        "grasp the puck and carry it to the goal",
        "lift the puck to the goal",
        "take the puck to the marked spot",
    ),
    "plate-slide": _phrasings(
        "slide the plate into the cabinet",
        "push the plate into the cabinet",
        "slide the plate forward into the cabinet",
        "get the plate into the goal net",
    ),
    "plate-slide-side": _phrasings(
        "slide the plate sideways into the cabinet",
        "push the plate to the side into the cabinet",
        "move the plate sideways into the cabinet",
        "get the plate into the goal net at the side",
    ),
    "plate-slide-back": _phrasings(
        "slide the plate out of the cabinet",
        "pull the plate back out of the cabinet",
        "bring the plate back from the cabinet",
        "get the plate out of the goal net",
    ),
    "plate-slide-back-side": _phrasings(
        "slide the plate sideways out of the cabinet",
        "pull the plate to the side out of the cabinet",
        "bring the plate back sideways from the cabinet",
        "get the plate out of the goal net at the side",
    ),
    "peg-insert-side": _phrasings(
        "insert the peg into the hole from the side",
        "pick up the peg and put it into the hole in the side of the box",
        "put the peg into the hole sideways",
        "stick the peg into the box",
    ),
    "peg-unplug-side": _phrasings(
        "pull the peg out of the hole",
        "unplug the peg sideways",
        "grasp the peg and pull it out of the box",
        "remove the peg from its socket",
    ),
    "soccer": _phrasings(
        "kick the ball into the goal",
        "push the soccer ball into the goal",
        "move the ball into the net",
        "score a goal with the ball",
    ),
    "stick-push": _phrasings(
        "pick up the stick and push the box with it",
        "use the stick to push the thermos to the goal",
        "grasp the stick and push the container to the goal",
        "shove the container along with the stick",
    ),
    "stick-pull": _phrasings(
        "pick up the stick and pull the box with it",
        "use the stick to pull the thermos to the goal",
        "put the stick through the handle and pull the container to the goal",
        "drag the container along with the stick",
    ),
    "push": _phrasings(
        "push the puck to the goal",
        "slide the puck to the goal",
        "push the puck across the table to the goal",
        "shove the puck to the marked spot",
    ),
    "push-wall": _phrasings(
        "push the puck around the wall to the goal",
        "slide the puck past the wall to the goal",
        "get the puck around the wall to the goal",
        "shove the puck to the marked spot behind the wall",
    ),
    "push-back": _phrasings(
        "push the block back to the goal",
        "pull the block back to the goal",
        "slide the block backwards to the goal",
        "bring the block back to the marked spot",
    ),
    "reach": _phrasings(
        "reach the goal",
        "move the hand to the goal",
        "move the gripper to the goal position",
        "go to the marked spot",
    ),
    "reach-wall": _phrasings(
        "reach around the wall to the goal",
        "move the hand past the wall to the goal",
        "move the gripper around the wall to the goal position",
        "go to the marked spot by the wall",
    ),
    "shelf-place": _phrasings(
        "put the block on the shelf",
        "pick up the block and place it on the shelf",
        "lift the block onto the shelf",
        "set the block down on the shelf",
    ),
    "sweep-into": _phrasings(
        "sweep the block into the hole",
        "push the block into the hole in the table",
        "move the block into the hole",
        "make the block fall into the hole",
    ),
    "sweep": _phrasings(
        "sweep the block off the table",
        "push the block off the table to the side",
        "move the block over the edge of the table",
        "clear the block from the table",
    ),
    "window-open": _phrasings(
        "open the window",
        "slide the window open",
        "push the handle of the window to open it",
        "get the window open",
    ),
    "window-close": _phrasings(
        "close the window",
        "slide the window shut",
        "push the handle of the window to close it",
        "shut the window",
    ),
}
SKILLS = tuple(PHRASINGS)
tasks_of = functools.partial(choose_tasks, "Meta-World", choices=SKILLS, splits=SPLITS)

# Four groups by difficulty (Seo et al., "Masked World Models for Visual Control", 2022), by which
# results on MT50 are usually reported.
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


class MetaworldBenchmark(NamedTuple):
    """Training tasks, and test tasks that are not trained on."""

    train: tuple[str, ...]
    test: tuple[str, ...] = ()


_ML45_TEST = ("bin-picking", "box-close", "hand-insert", "door-lock", "door-unlock")
BENCHMARKS = {
    "mt10": MetaworldBenchmark(
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
    "mt50": MetaworldBenchmark(SKILLS),
    "ml10": MetaworldBenchmark(
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
    "ml45": MetaworldBenchmark(tuple(s for s in SKILLS if s not in _ML45_TEST), _ML45_TEST),
}


def benchmark(name: str) -> MetaworldBenchmark:
    """Return a benchmark by name; ConfigError for an unknown one, ML25 included."""
    return BENCHMARKS[check_choice("Meta-World benchmark", name, tuple(BENCHMARKS))]


def phrasings(skill: str, split: str) -> tuple[str, ...]:
    """List the wordings of a task in a split."""
    return PHRASINGS[skill].for_split(split)
