"""Suspicious values of columns: each is stated in a sentence, and clean data in none."""

import numpy as np
import pytest

from octolike.data.onboarding.column_problems import action_problems, field_problems
from octolike.data.onboarding.infer_layout import infer_layout
from octolike.data.onboarding.infer_representation import recommend

T = 61


class Spec:
    """The inferred fields that `action_problems` reads."""

    def __init__(self, actions, states, fields=("action",), names=()):
        self.action = fields
        widths = {f: actions[0].shape[1] // len(fields) for f in fields}
        self.proprio_layout = infer_layout(
            "proprio", {"observation.state": states[0].shape[1]}, states
        )
        self.action_layout = infer_layout(
            "action", widths, actions, names, states, self.proprio_layout.layout
        )
        self.action_names = self.action_layout.layout.names
        self.absolute = self.action_layout.layout.absolute
        self.grippers = self.action_layout.grippers


def smooth(dims, seed, scale=0.5, center=0.0):
    """Return float [T, dims] that move smoothly, each column on its own."""
    x = np.cumsum(np.random.default_rng(seed).normal(size=(T, dims)), axis=0)
    return center + scale * (x - x.mean(0)) / np.abs(x).max(0)


def problems(actions, states, **options):
    return "\n".join(action_problems(Spec(actions, states, **options), actions, states))


def states_of(dims=6, count=4, **options):
    return [smooth(dims, seed, **options) for seed in range(count)]


def test_clean_actions_have_no_problem():
    s = states_of()
    assert problems([x[1:] for x in s], [x[:-1] for x in s]) == ""  # targets
    assert problems([np.diff(x, axis=0) for x in s], [x[:-1] for x in s]) == ""  # changes
    lagging = [np.vstack([x[:1], x[:1], x[:-2]]) for x in s]
    assert problems([np.diff(x, axis=0) for x in s], [x[:-1] for x in lagging]) == ""


@pytest.mark.parametrize(
    ("turn", "center", "expected"),
    [
        (2 * np.pi, 0, "jump by about 2π: angles"),
        (2 * np.pi, np.pi, "jump by about 2π: angles"),  # 0 to 2π
        (360, 0, "jump by about 360: degrees that wrap"),
        (4096, 2048, "jump by about 4096: steps of a motor"),
    ],
)
def test_angles_that_often_wrap_are_named(turn, center, expected):
    t = np.arange(T)
    angle = center + turn * ((1 + 0.1 * np.sin(t / 3)) % 1 - 0.5)
    state = np.stack([angle, center + 0.2 * turn * np.sin(t / 7)], axis=1)
    assert [x for x in field_problems("state", [state]) if "[0]" in x and expected in x]
    assert not any("1]" in x for x in field_problems("state", [state]))


def test_a_change_of_a_whole_turn_is_named():
    state = states_of()
    for x in state:
        x[:, 3] = (np.pi + 0.4 * np.sin(np.arange(T) / 6) + np.pi) % (2 * np.pi) - np.pi
    changes = [np.diff(x, axis=0) for x in state]
    assert "change by about 2π in" in problems(changes, [x[:-1] for x in state])
    right = [np.where(np.abs(x) > np.pi, x - np.sign(x) * 2 * np.pi, x) for x in changes]
    assert problems(right, [x[:-1] for x in state]) == ""


def test_observations_after_their_actions_are_named():
    s = states_of()
    changes = [np.diff(x, axis=0) for x in s]
    text = problems(changes, [x[1:] for x in s])
    assert "the states make these changes in the step before their action" in text
    rng = np.random.default_rng(0)
    after = [x[1:] for x in s]
    targets = [x + 1e-4 * rng.normal(size=x.shape) for x in after]
    assert "equal the states of the same step, or nearly" in problems(targets, after)
    layouts = Spec(targets, after)
    parts = layouts.action_layout.layout, layouts.proprio_layout.layout
    assert recommend(*parts, targets, after).representation == ""  # no changes of nothing


def test_columns_with_few_values_are_named():
    s = states_of()
    actions = [np.c_[np.diff(x, axis=0), np.where(np.arange(T - 1) // 9 % 2, 1, -1)] for x in s]
    assert problems(actions, [x[:-1] for x in s]) == ""  # a gripper, named so
    actions[0][20:24, 6] = 2
    text = problems(actions, [x[:-1] for x in s])
    assert "only the values -1, 1, 2 (2 in 4 of 240 steps) occur in action_6" in text
    inner = [np.insert(x[1:], 2, np.arange(T - 1) // 9 % 2, axis=1) for x in s]
    assert "only the values 0, 1 occur in action_2" in problems(inner, [x[:-1] for x in s])


def test_rows_of_zeros_at_the_end_are_named():
    s = states_of(center=1.0)
    targets, states = [x[1:].copy() for x in s], [x[:-1].copy() for x in s]
    targets[0][-1] = 0
    assert "1 of 4 episodes end with up to 1 steps of zeros" in problems(targets, states)
    changes = [np.diff(x, axis=0) for x in s]
    changes[1][-3:] = 0
    assert "zeros" not in problems(changes, states)  # the robot stands still
    states[1][-3:] = 0
    assert "up to 3 steps of zeros for actions and states" in problems(changes, states)


def test_positions_and_velocities_in_one_action_are_named():
    s = states_of(3)
    both = [np.c_[x[1:], np.diff(x, axis=0)] for x in s]
    fields = ("action.joint_position", "action.joint_velocity")
    text = problems(both, [x[:-1] for x in s], fields=fields)
    assert "action.joint_position, action.joint_velocity are positions and velocities" in text


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("a", "b"), "the file has 2 names for 3 columns"), (("a", "b", "a"), "the file repeats a")],
)
def test_names_that_do_not_fit_are_named(names, expected):
    layout = infer_layout("action", {"action": 3}, states_of(3), names)
    assert expected in "\n".join(layout.doubts)
