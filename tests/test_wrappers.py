"""Sequences of actions, environment pools, plans of demonstrations."""

import dataclasses
import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from octolike.config import CollectConfig, Component, ConfigError
from octolike.envs import demonstrations
from octolike.envs.pool import CallCommand, EnvCrash, EnvPool, ResetCommand, StepCommand
from octolike.envs.registry import kind_of, make_env
from octolike.envs.replays import render_replay
from octolike.envs.simulators import TabletopSettings
from octolike.envs.tabletop.conventions import CONVENTIONS
from octolike.envs.wrappers import ActionSequence
from octolike.train.interrupt import Interrupt

H, A = 4, 3


class Counter:
    """An environment that observes the number of steps so far; ends after `limit` steps."""

    def __init__(self, limit=100):
        self.limit, self.closed = limit, False

    def reset(self, *, seed=None, options=None):
        self.seed, self.actions = seed, []
        return self._see(), {"options": options}

    def step(self, action):
        if action[0] == 13:
            raise ArithmeticError("thirteen")
        if action[0] == 14:
            os._exit(3)
        self.actions.append(np.array(action))
        n = len(self.actions)
        return self._see(), 1.0, n >= self.limit, False, {"seed": self.seed, "n": n}

    def _see(self):
        n = len(self.actions)
        return {
            "image_primary": np.full((2, 2, 3), n, np.uint8),
            "proprio": np.array([n], np.float32),
        }

    def close(self):
        self.closed = True


def test_a_sequence_ends_with_the_episode_and_gives_the_last_observations():
    inner = Counter(limit=5)
    env = ActionSequence(inner, 2)
    frames, _ = env.reset(seed=0)
    assert [f["proprio"].tolist() for f in frames] == [[0]]
    actions = np.random.default_rng(0).normal(size=(6, A)).astype(np.float32)
    frames, reward, terminated, _, info = env.step(actions[:3])
    assert (reward, terminated) == (3.0, False)
    assert [f["proprio"].tolist() for f in frames] == [[2], [3]]
    frames, reward, terminated, _, info = env.step(actions[3:])
    assert (reward, terminated, info["n"]) == (2.0, True, 5)
    np.testing.assert_array_equal(info["actions"], actions[3:5])
    np.testing.assert_array_equal(inner.actions, actions[:5])


class LazyCounter(Counter):
    """A Counter with a step in two halves; counts its observations."""

    observed = 0

    def act(self, action):
        return super().step(action)[1:]

    def observe(self):
        self.observed += 1
        return self._see()


@pytest.mark.parametrize(("limit", "expected"), [(100, [5, 6]), (3, [3])])
def test_only_the_last_observations_of_a_lazy_environment_are_made(limit, expected):
    inner = LazyCounter(limit)
    env = ActionSequence(inner, 2)
    env.reset(seed=0)
    frames, reward, terminated, *_ = env.step(np.zeros((6, A), np.float32))
    assert [f["proprio"].tolist() for f in frames] == [[n] for n in expected]
    assert (reward, terminated, inner.observed) == (expected[-1], limit == 3, len(expected))


@pytest.mark.parametrize(
    ("actions", "match"),
    [
        (np.zeros((0, A)), r"shape \[0, 3\]; expected \[n, A\] with n at least 1"),
        (np.zeros(A), "expected"),
        (np.full((H, A), np.nan), "not finite"),
    ],
)
def test_bad_actions_are_rejected(actions, match):
    env = ActionSequence(Counter(), 1)
    env.reset()
    with pytest.raises(ValueError, match=match):
        env.step(actions)
    with pytest.raises(ValueError, match="window is 0"):
        ActionSequence(Counter(), 0)


def play(pool):
    """Return the replies of every slot of a pool in a few rounds."""
    replies = [pool.run({s: ResetCommand(s, {"slot": s}) for s in range(3)})]
    replies += [pool.run({s: StepCommand(np.full(A, s)) for s in range(3)}) for _ in range(2)]
    replies.append(pool.run({1: StepCommand(np.zeros(A))}))
    return [{s: (r[-1], r[0]["proprio"].tolist()) for s, r in round_.items()} for round_ in replies]


def test_replies_do_not_depend_on_the_number_of_workers():
    with EnvPool(Counter, 3, workers=0) as alone:
        expected = play(alone)
    with EnvPool(Counter, 3, workers=2) as several:
        assert play(several) == expected
    assert expected[-1] == {1: ({"seed": 1, "n": 3}, [3.0])}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_in_one_slot_does_not_affect_the_others(workers):
    with EnvPool(Counter, 3, workers) as pool:
        pool.run({s: ResetCommand(s, {}) for s in range(3)})
        replies = pool.run({s: StepCommand(np.full(A, 13 if s == 0 else 0)) for s in range(3)})
        assert isinstance(replies[0], EnvCrash)
        assert "ArithmeticError: thirteen" in replies[0].text
        assert replies[2][-1]["n"] == 1
        pool.run({0: ResetCommand(7, {})})
        assert pool.run({0: StepCommand(np.zeros(A))})[0][-1] == {"seed": 7, "n": 1}


def test_a_dead_worker_is_reported_and_replaced():
    with EnvPool(Counter, 3, workers=2) as pool:
        pool.run({s: ResetCommand(s, {}) for s in range(3)})
        replies = pool.run({s: StepCommand(np.full(A, 14 if s == 0 else 0)) for s in range(3)})
        assert [isinstance(replies[s], EnvCrash) for s in range(3)] == [True, False, True]
        assert "exit code 3" in replies[0].text
        pool.run({0: ResetCommand(7, {})})
        assert pool.run({0: StepCommand(np.zeros(A))})[0][-1]["n"] == 1


def nap(env, seconds):
    time.sleep(seconds)
    return env.seed


def test_the_time_limit_applies_to_each_command(monkeypatch):
    with EnvPool(Counter, 3, workers=1) as pool:
        pool.run({s: ResetCommand(s, {}) for s in range(3)})
        monkeypatch.setattr("octolike.envs.pool.TIMEOUT", 2.0)
        slow = pool.run({s: CallCommand(nap, (1.2,)) for s in range(3)})
        assert slow == {0: 0, 1: 1, 2: 2}
        assert pool.run({0: CallCommand(nap, (2.5,), limit=60.0)}) == {0: 0}
        hung = pool.run({0: CallCommand(nap, (0.0,)), 1: CallCommand(nap, (60.0,))})
        # the environment of slot 0 was lost with the process
        assert [r.text for r in hung.values()] == [
            "the worker process did not answer within 2 s"
        ] * 2


def test_a_stopped_worker_is_named_and_replaced(monkeypatch, capsys):
    monkeypatch.setattr("octolike.envs.pool.TIMEOUT", 8.0)
    with EnvPool(Counter, 2, workers=1) as pool:
        pool.run({s: ResetCommand(s, {}) for s in range(2)})
        pid = pool._workers[0]._process.pid
        capsys.readouterr()  # a slow start has the line, too
        os.kill(pid, signal.SIGSTOP)
        lost = pool.run({s: ResetCommand(s, {}) for s in range(2)})
        assert {r.text for r in lost.values()} == {"the worker process did not answer within 8 s"}
        line = f"environments 0, 1 (process {pid}) have not answered for 1 s; waiting up to 8 s"
        assert capsys.readouterr().err.splitlines() == [line]
        pool.run({s: ResetCommand(s, {}) for s in range(2)})
        assert pool._workers[0]._process.pid != pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def interrupt(pool):
    for worker in pool._workers:
        os.kill(worker._process.pid, signal.SIGINT)


def test_workers_survive_ctrl_c_if_their_parent_does():
    commands = {s: CallCommand(nap, (0.5,)) for s in range(2)}
    with Interrupt(), EnvPool(Counter, 2, workers=2) as pool:
        interrupt(pool)  # while they start
        pool.run({s: ResetCommand(s, {}) for s in range(2)})
        threading.Timer(0.2, interrupt, (pool,)).start()  # in the middle of a command
        assert pool.run(commands) == {0: 0, 1: 1}
    with EnvPool(Counter, 2, workers=2) as pool:
        pool.run({s: ResetCommand(s, {}) for s in range(2)})
        interrupt(pool)
        assert all(isinstance(reply, EnvCrash) for reply in pool.run(commands).values())


PARENT = """
import os, signal, sys
from test_wrappers import Counter, EnvCrash, Interrupt, EnvPool, ResetCommand

with Interrupt() as interrupt:
    pool = EnvPool(Counter, 2, workers=2)
    pool.run({s: ResetCommand(s, {}) for s in range(2)})
    os.killpg(0, int(sys.argv[1]))
    replies = pool.run({s: ResetCommand(s, {}) for s in range(2)})
    print([isinstance(reply, EnvCrash) for reply in replies.values()], flush=True)
    if sys.argv[2] != "0":
        os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("group", "second"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGINT, signal.SIGKILL),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGTERM, 0),  # the program ends by itself, with the pool open
    ],
)
def test_workers_survive_a_signal_to_the_group_and_end_with_their_parent(group, second):
    run = [sys.executable, "-c", PARENT, str(int(group)), str(int(second))]
    places = os.pathsep.join(str(Path(__file__).parents[i]) for i in (0, 1))
    environment = {**os.environ, "PYTHONPATH": places}
    # `run` returns when the last process that could still write has ended
    done = subprocess.run(
        run,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        check=False,
    )
    assert done.stdout == "[False, False]\n", done.stderr
    assert done.returncode == -second


def test_a_rendered_replay_bypasses_the_wrappers():
    inner = Counter()
    inner.render = lambda: len(inner.actions)
    env = ActionSequence(inner, 2)
    film = render_replay(env, 5, {}, np.zeros((4, A)))
    assert film == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], {"seed": 5, "n": 4})


def test_a_film_has_five_images_per_second_and_the_last_and_needs_no_observations():
    inner = Counter()
    inner.metadata = {"control_hz": 20}
    inner.render = lambda: len(inner.actions)
    step = inner.step
    inner.act = lambda action: step(action)[1:]
    inner.step = None
    film = render_replay(inner, 5, {}, np.zeros((9, A)))
    assert film == ([0, 4, 8, 9], [0, 4, 8, 9], {"seed": 5, "n": 9})


def shout(env, word):
    return f"{word} {env.seed}"


@pytest.mark.parametrize("workers", [0, 1])
def test_functions_are_called_in_the_environments_process(workers):
    with EnvPool(Counter, 2, workers) as pool:
        pool.run({1: ResetCommand(9, {})})
        assert pool.run({1: CallCommand(shout, ("seed",))}) == {1: "seed 9"}


def unbuildable():
    raise ImportError("no GL library")


def test_an_environment_that_cannot_be_built_is_an_error():
    with (
        EnvPool(unbuildable, 2, workers=0) as pool,
        pytest.raises(RuntimeError, match="no GL library"),
    ):
        pool.run({0: ResetCommand(0, {})})


class Unstartable:
    """Cannot be unpickled, so no worker becomes ready."""

    def __reduce__(self):
        return (exec, ("raise SystemExit(4)",))

    def __call__(self):
        raise AssertionError


def test_a_worker_that_cannot_start_is_an_error():
    with EnvPool(Unstartable(), 2, workers=2) as pool:  # noqa: SIM117
        with pytest.raises(RuntimeError, match="exit code 4 before it was ready"):
            pool.run({0: ResetCommand(0, {})})


def test_unknown_simulators_and_fields_are_rejected():
    with pytest.raises(ConfigError, match="names no simulator"):
        kind_of({})
    with pytest.raises(ConfigError, match="'tabeltop'; did you mean 'tabletop'"):
        make_env({"kind": "tabeltop"})
    with pytest.raises(ConfigError, match="'primary_sise'; did you mean 'primary_size'"):
        make_env({"kind": "tabletop", "primary_sise": 64})


def test_settings_are_listed_without_importing_a_simulator():
    code = (
        "import dataclasses, sys; from octolike.envs.registry import ENVIRONMENTS\n"
        "for kind, settings in ENVIRONMENTS.items():\n"
        "    fields = dataclasses.fields(settings)\n"
        "    assert fields and all(f.metadata['meaning'] for f in fields), kind\n"
        "    settings()\n"
        "assert not {'mujoco', 'gymnasium', 'jax', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"primary_size": 4}, r"environment.primary_size is 4; it must lie in \[8, 640\]"),
        ({"primary_size": (96, 641)}, "is 641; it must lie in"),
        ({"primary_size": "96"}, "'96'; expected"),
        ({"num_distractors": 4}, r"lie in \[0, 3\]"),
        ({"action_convention": "mirored"}, "'mirored'; did you mean 'mirrored'"),
    ],
)
def test_settings_out_of_range_are_rejected(fields, message):
    with pytest.raises(ConfigError, match=message):
        TabletopSettings(**fields)
    with pytest.raises(ConfigError, match=message):
        make_env({"kind": "tabletop", **fields})


def test_the_choices_of_the_action_convention_are_the_conventions():
    fields = {f.name: f for f in dataclasses.fields(TabletopSettings)}
    assert fields["action_convention"].metadata["choices"] == tuple(CONVENTIONS)


TABLE = Component(kind="tabletop")


def test_the_plan_of_demonstrations():
    collect = CollectConfig(skills={"touch": 30, "push": 11}, episodes_per_shard=8)
    shards = demonstrations.plan(TABLE, collect)
    by_split = {
        s: [e for x in shards if x.split == s for e in x.episodes] for s in ("train", "val")
    }
    assert {s: len(e) for s, e in by_split.items()} == {"train": 41, "val": 3}
    assert [x.index for x in shards if x.split == "train"] == list(range(6))
    assert all(len(x.episodes) <= 8 for x in shards)
    # all tries have different seeds, below those of the evaluation
    seeds = [f + t for e in by_split.values() for _, f in e for t in range(demonstrations.TRIES)]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 1_000_000
    assert sum(skill == "push" for skill, _ in by_split["train"]) == 11
    assert len({skill for skill, _ in shards[0].episodes}) == 2
    assert shards == demonstrations.plan(TABLE, collect)


def test_two_draws_of_demonstrations_share_no_seed():
    skills = {"touch": 30, "push": 11}
    draws = []
    for draw in (0, 1, 9):
        shards = demonstrations.plan(TABLE, CollectConfig(skills=skills, draw=draw))
        firsts = [first for shard in shards for _, first in shard.episodes]
        draws.append({f + t for f in firsts for t in range(demonstrations.TRIES)})
    assert len(set.union(*draws)) == sum(map(len, draws)) == 3 * 44 * demonstrations.TRIES
    assert max(max(draw) for draw in draws) < demonstrations.LAST_SEED
    settings = [
        demonstrations.settings(TABLE, CollectConfig(skills=skills, draw=d)) for d in (0, 1)
    ]
    assert settings[1] == settings[0] | {"draw": 1}


def test_two_large_draws_share_no_seed():
    """8,000 demonstrations, as configs/tabletop.py has, need 64,000 seeds."""
    ranges = []
    for draw in range(5):
        collect = CollectConfig(skills={"touch": 8000}, draw=draw, validation_share=0.02)
        for split in ("train", "val"):
            shards = [s for s in demonstrations.plan(TABLE, collect) if s.split == split]
            firsts = [first for shard in shards for _, first in shard.episodes]
            ranges.append((min(firsts), max(firsts) + demonstrations.TRIES))
    ranges.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    assert ranges[-1][1] <= demonstrations.LAST_SEED


def test_bad_plans_are_rejected():
    with pytest.raises(ConfigError, match=r"collect.skills is \{\}"):
        demonstrations.plan(TABLE, CollectConfig())
    with pytest.raises(ConfigError, match="'tuch'; did you mean 'touch'"):
        demonstrations.plan(TABLE, CollectConfig(skills={"tuch": 1}))
    demonstrations.plan(TABLE, CollectConfig(skills={"touch": 6251}))
    with pytest.raises(ConfigError, match=r"6251 train episodes of collect.draw=5 .* most 6250"):
        demonstrations.plan(TABLE, CollectConfig(skills={"touch": 6251}, draw=5))
    with pytest.raises(ConfigError, match=r"62501 train episodes of collect.draw=0 .* most 62500"):
        demonstrations.plan(TABLE, CollectConfig(skills={"touch": 62501}))


CRASHES = []  # seeds that still crash; a seed is listed once per crash


def episode_that_fails(env, seed, split, skills, noise, failures):
    if seed in CRASHES:
        CRASHES.remove(seed)
        raise ArithmeticError("the physics exploded")
    metadata = {"success": seed % 8 >= failures, "seed": seed, "skill": skills[0]}
    return {"episode_metadata": metadata}


def make_recorder(failures):
    recorder = demonstrations.Recorder(TABLE, CollectConfig(noise=0.25))
    recorder._pool = EnvPool(Counter, 1, workers=0)
    recorder._collect_episode = functools.partial(episode_that_fails, failures=failures)
    return recorder


def test_failed_demonstrations_are_repeated_and_counted():
    shard = demonstrations.DemonstrationShard("train", 0, 1, (("touch", 0), ("push", 8)))
    got = [
        (skill, episode["episode_metadata"]["seed"], failed)
        for skill, episode, failed, _ in make_recorder(2).record(shard)
    ]
    assert got == [("touch", 2, 2), ("push", 10, 2)]


def test_a_demonstration_that_fails_with_all_seeds_is_left_out_and_printed(capsys):
    shard = demonstrations.DemonstrationShard("train", 0, 1, (("touch", 0), ("push", 8)))
    assert [*make_recorder(8).record(shard)] == [("touch", None, 8, 0), ("push", None, 8, 0)]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("the expert for 'touch' failed with seeds 0 to 7, noise 0.25; ")
    assert "'push' failed with seeds 8 to 15" in second


def test_an_episode_whose_simulator_crashes_is_recorded_again_once(capsys, monkeypatch):
    shard = demonstrations.DemonstrationShard("train", 0, 1, (("push", 8), ("touch", 16)))
    monkeypatch.setitem(globals(), "CRASHES", [14])
    counted = []
    recorders = demonstrations.RecorderPool(TABLE, CollectConfig(), workers=0)
    recorders._free.put(make_recorder(6))
    got = recorders.record(shard, lambda: counted.append(None))
    assert [r.episode["episode_metadata"]["seed"] for r in got] == [14, 22]
    assert len(counted) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the simulator crashed at 'push', seed 14: ArithmeticError: the physics")
    assert line.endswith("in episode_that_fails); recording this episode again")


def test_a_seed_whose_simulator_crashes_twice_is_skipped_and_counted(capsys, monkeypatch):
    shard = demonstrations.DemonstrationShard("train", 0, 1, (("push", 8), ("touch", 16)))
    monkeypatch.setitem(globals(), "CRASHES", [14, 14])
    push, touch = make_recorder(6).record(shard)
    assert push.episode["episode_metadata"]["seed"] == 15
    assert (push.failed, push.crashed, touch.crashed) == (6, 1, 0)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("the simulator crashed at 'push', seed 14: ArithmeticError: the physics")
    assert line.endswith("in 2 attempts; this seed is skipped")
    CRASHES[:] = [14, 14]
    push, _ = make_recorder(7).record(shard)
    assert push[2:] == (6, 1)
    CRASHES[:] = [14, 14]
    push, _ = make_recorder(8).record(shard)
    assert push == ("push", None, 7, 1)
    assert "seeds 8 to 15 (1 crashed the simulator), noise" in capsys.readouterr().err
    CRASHES[:] = [8, 8, 9, 9, 10, 10]
    with pytest.raises(RuntimeError, match=r"seed 10: .*; it crashed at 3 seeds of an episode"):
        list(make_recorder(8).record(shard))


def test_the_stored_settings_name_the_versions_of_scenes_and_experts():
    """Scenes of LIBERO with fixtures, and the expert who puts on the table, were others once."""

    def settings(kind, skill):
        return demonstrations.settings({"kind": kind}, CollectConfig(skills={skill: 1}))

    assert settings("libero", "spatial/0")["scene_version"] == 1
    assert "scene_version" not in settings("libero", "object/0")
    assert settings("tabletop", "put")["expert_version"] == 1
    assert not {"scene_version", "expert_version"} & settings("tabletop", "touch").keys()


class Misconfigured:
    def __init__(self):
        raise ConfigError("LIBERO is not installed: pip install …")


def test_an_environment_with_a_bad_setting_is_reported_by_its_message_alone():
    with (
        EnvPool(Misconfigured, 1, workers=0) as pool,
        pytest.raises(RuntimeError, match=r"cannot be built: LIBERO is not installed: .*…$"),
    ):
        pool.run({0: ResetCommand(0, {})})
