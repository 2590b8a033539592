"""SimplerEnv's tasks and robots. Needs no simulator."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from octolike.envs.task_tables import choose_tasks

WIDOWX = (
    "widowx_spoon_on_towel",
    "widowx_carrot_on_plate",
    "widowx_stack_cube",
    "widowx_put_eggplant_in_basket",
)
GOOGLE = (
    "google_robot_pick_coke_can",
    "google_robot_pick_object",
    "google_robot_move_near",
    "google_robot_open_drawer",
    "google_robot_close_drawer",
    "google_robot_place_apple_in_closed_top_drawer",
)
SKILLS = WIDOWX + GOOGLE
SPLITS = ("train",)
ROBOTS: Mapping[str, Mapping[str, str]] = {
    "bridge_dataset": {},
    "bridge_orig": {},
    "bridge_oxe": {},
    "fractal20220817_data": {},
}

tasks_of = functools.partial(choose_tasks, "SimplerEnv", choices=SKILLS)
