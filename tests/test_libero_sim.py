"""The draws of the benchmark's episodes, without LIBERO: its environment is a fake."""

import contextlib
import types

import numpy as np
import pytest

from octolike.envs.libero import libero_sim

EPISODES = 5


class RandomizationError(Exception):
    """As robosuite's: objects found no place."""


class FakeTask:
    """Draws as LIBERO does: a number per drawer or knob of a list, then the places.

    A third of the attempts finds no place. `compile` is what a hard reset does to the list.
    """

    def __init__(self):
        self.object_property_initializers, self.robots = [], []
        self.sim = types.SimpleNamespace(reset=lambda: None)
        self.resets = 0
        self.compile()

    def compile(self):
        self.object_property_initializers += ["drawer", "knob"]

    def _reset_internal(self):
        self.resets += 1
        for _ in self.object_property_initializers:
            np.random.uniform()
        self.place = np.random.uniform(size=3)
        if self.place[0] < 0.33:
            raise RandomizationError

    reset = _reset_internal


@pytest.fixture
def expected():
    """The places in the episodes of the benchmark's loop."""
    task, places, attempts = FakeTask(), [], 0
    with libero_sim._own_generator(0):
        while len(places) < EPISODES:
            task.compile()
            attempts += 1
            with contextlib.suppress(RandomizationError):
                task.reset()
                places.append(task.place)
    assert attempts > EPISODES  # an episode was drawn again
    return places


@pytest.fixture
def sim(monkeypatch):
    errors = types.SimpleNamespace(RandomizationError=RandomizationError)
    monkeypatch.setattr(libero_sim.importlib, "import_module", lambda name: errors)
    monkeypatch.setattr(libero_sim, "_KNOWN", {})
    sim = object.__new__(libero_sim.LiberoSim)
    sim.env, sim._compiled = FakeTask(), {}
    sim._properties = list(sim.env.object_property_initializers)
    sim.task = types.SimpleNamespace(bddl="fake.bddl", states=np.zeros((EPISODES, 1)))
    sim._cameras = types.SimpleNamespace(still=contextlib.nullcontext)
    sim._control = types.SimpleNamespace(set_init_state=lambda state: {})
    return sim


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 2, 0, 4, 1, 3)])
def test_places_are_those_of_the_benchmarks_loop_in_any_order(sim, expected, order):
    """Also where objects found no place at first, which compiles once more."""
    for index in order:
        sim.start(index)
        np.testing.assert_array_equal(sim.env.place, expected[index])


def test_consecutive_episodes_do_not_repeat_the_draws_before_them(sim):
    sim.start(3)
    sim.env.resets = 0
    sim.start(4)
    sim.start(1)
    drawn = sim.env.resets
    libero_sim._KNOWN.clear()
    sim.start(4)
    assert drawn < sim.env.resets - drawn


def test_demonstrations_draw_from_the_list_of_one_compilation(sim):
    sim.start(2)
    sim._control.step = lambda action: None
    sim._control.get_sim_state = sim._control.regenerate_obs_from_state = lambda *_: {}
    sim.env.sim.data = types.SimpleNamespace(qvel=np.zeros(1))
    sim.sample(7)
    assert sim.env.object_property_initializers == ["drawer", "knob"]


def test_a_task_without_room_ends(sim):
    def never():
        raise RandomizationError

    sim.env.reset = never
    with pytest.raises(RuntimeError, match=r"^LIBERO placed the objects of fake.bddl in none of "):
        sim.start(0)
