"""The executor and the control loop: asynchronous inference, delays, rate, stop conditions."""

import threading

import numpy as np
import pytest

from octolike.policy.execution import ExecutionSettings, PolicyBusyError
from octolike.policy.executor import ControlLoop, Executor

H = 6


class Counting:
    """A policy with chunks that continue the observed number; inference waits for `release`."""

    def __init__(self, blocking=False):
        action = {"names": ["x"], "absolute": [True], "not_averaged": [False]}
        self.metadata = {"horizon": H, "window": 2, "real_time": "guided", "action": action}
        self.calls, self.blocking, self.error = [], blocking, None
        self.release, self.entered = threading.Semaphore(0), threading.Semaphore(0)

    def sample_actions(self, observation, task, seed=0, prefix=None):
        self.calls.append((observation, task, seed, prefix))
        self.entered.release()
        if self.blocking:
            assert self.release.acquire(timeout=20)
        if self.error:
            raise self.error
        now = observation["proprio"][-1, 0]
        return (now + np.arange(H, dtype=np.float32))[:, None]


def observation(number):
    return {"proprio": np.array([number], np.float32)}


def let_infer(policy, executor):
    """Let the pending inference finish, and wait for it."""
    policy.release.release()
    executor._pending.exception(timeout=20)


def test_without_a_thread_every_step_has_its_action():
    policy = Counting()
    with Executor(policy, "go", ExecutionSettings(execute=2), asynchronous=False) as executor:
        actions = [executor.step(observation(t)) for t in range(6)]
    assert [a.item() for a in actions] == [0, 1, 2, 3, 4, 5]
    assert len(policy.calls) == 3
    assert policy.calls[0][0]["timestep_mask"].tolist() == [False, True]
    assert len({seed for _, _, seed, _ in policy.calls}) == 3


def test_a_chunk_is_computed_while_the_present_one_runs():
    """The next chunk arrives four steps late and is entered at its fifth action."""
    policy = Counting(blocking=True)
    with Executor(policy, "go", ExecutionSettings(execute=2, real_time="guided")) as executor:
        assert executor.step(observation(0)) is None, "no chunk yet: the robot is not commanded"
        let_infer(policy, executor)
        executed = [executor.step(observation(t)).item() for t in (0, 11, 12, 13, 14)]
        assert executed == [0, 1, 2, 3, 4], "the old chunk goes on during inference"
        let_infer(policy, executor)
        assert executor.step(observation(99)).item() == 11 + 4
        assert (executor.expected_delay, executor.held, executor.inferences) == (4, 0, 2)
        for _ in range(3):  # that step requested the third inference
            assert policy.entered.acquire(timeout=20)
        policy.release.release()
    assert policy.calls[1][3].actions[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert (policy.calls[1][3].delay, policy.calls[2][3].delay) == (0, 2)


def test_the_expected_delay_enters_the_prefix():
    policy = Counting()
    settings = ExecutionSettings(execute=2, real_time="guided")
    with Executor(policy, "go", settings, asynchronous=False) as executor:
        for t in range(3):
            executor.step(observation(t))
        executor.delays.extend([1, 3, 2])
        for t in range(3, 5):
            executor.step(observation(t))
    prefix = policy.calls[2][3]
    assert prefix.delay == 3
    assert prefix.actions[:, 0].tolist() == [4, 5, 6, 7]


def test_a_robot_without_a_planned_action_holds_and_waits():
    policy = Counting(blocking=True)
    with Executor(policy, "go", ExecutionSettings(execute=6)) as executor:
        executor.step(observation(0))
        let_infer(policy, executor)
        for t in range(6):
            executor.step(observation(t))
        actions = [executor.step(observation(50)).item() for _ in range(3)]
        assert actions == [5, 5, 5]
        assert executor.held == 3
        let_infer(policy, executor)
        # requested at the observation 5, executed for one step, then held: its second action
        assert executor.step(observation(51)).item() == 6


def test_an_error_of_the_policy_reaches_the_caller():
    policy = Counting()
    policy.error = FloatingPointError("not finite")
    with (
        Executor(policy, "go", asynchronous=False) as executor,
        pytest.raises(FloatingPointError, match="not finite"),
    ):
        executor.step(observation(0))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_busy_server_is_asked_again_while_the_plan_lasts(asynchronous):
    policy = Counting()
    settings = ExecutionSettings(execute=2)
    with Executor(policy, "go", settings, asynchronous=asynchronous) as executor:

        def step(number):
            action = executor.step(observation(number))
            if executor._pending is not None:  # else it has been received already
                executor._pending.exception(timeout=20)
            return action

        step(0)
        assert step(0) is not None
        policy.error = PolicyBusyError("2 requests are waiting already")
        for t in range(1, 4):
            assert step(t) is not None
        step(4)
        assert executor.refused > 1
        assert executor.inferences == 1
        policy.error = None
        step(10)
        step(10)
        assert executor.inferences == 2


def test_an_episode_starts_without_the_previous_one():
    policy = Counting()
    with Executor(policy, "go", ExecutionSettings(execute=3), asynchronous=False) as executor:
        executor.step(observation(5))
        executor.reset("stop")
        assert executor.step(observation(8)).item() == 8
    assert policy.calls[-1][1] == "stop"
    assert policy.calls[-1][0]["timestep_mask"].tolist() == [False, True]


class Clock:
    """Time that passes only by sleeping and by a robot's delays."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds


class Arm:
    """A robot that takes `slow[n]` seconds for its n-th observation."""

    def __init__(self, clock, slow=()):
        self.clock, self.slow, self.seen, self.times = clock, dict(slow), 0, []

    def observe(self):
        self.clock.now += self.slow.get(self.seen, 0.0)
        self.seen += 1
        return observation(self.seen)

    def act(self, action):
        self.times.append(self.clock.now)


def loop(slow=(), policy=None, **options):
    clock = Clock()
    arm = Arm(clock, slow)
    executor = Executor(policy or Counting(), "go", asynchronous=False)
    return arm, ControlLoop(arm, executor, 10, clock=clock, sleep=clock.sleep, **options)


def test_the_rate_is_kept():
    arm, control = loop(max_steps=20)
    report = control.run()
    np.testing.assert_allclose(np.diff(arm.times), 0.1, atol=1e-9)
    assert (report.reason, report.steps, report.overruns) == ("step limit", 20, 0)
    assert report.jitter["max"] < 1e-6
    assert "step limit: 20 steps in 2.0 s (10.0 Hz)" in report.sentence()


def test_a_slow_step_is_counted_and_not_caught_up_in_a_burst():
    arm, control = loop(slow=[(5, 0.25)], max_steps=12)
    report = control.run()
    assert report.overruns == 2
    gaps = np.diff(arm.times)
    assert gaps.min() > 0.04
    assert (arm.times[-1] - arm.times[0]) / 0.1 == pytest.approx(13, abs=1e-6)
    # later steps are on the grid again
    np.testing.assert_allclose(np.array(arm.times[6:]) % 0.1, arm.times[0] % 0.1, atol=1e-6)


def test_a_reason_stops_the_robot():
    arm, control = loop(stop=lambda: "emergency stop" if len(arm.times) == 3 else "")
    assert control.run().reason == "emergency stop"
    assert len(arm.times) == 3


def test_a_robot_without_actions_is_stopped():
    """A policy that stays away after its first chunk: the loop ends after `patience`."""
    policy, clock = Counting(blocking=True), Clock()
    executor = Executor(policy, "go", ExecutionSettings(execute=6))
    executor.step(observation(0))
    let_infer(policy, executor)
    executor.reset = lambda: None  # keeps the chunk that has arrived
    control = ControlLoop(Arm(clock), executor, 10, clock=clock, sleep=clock.sleep, patience=0.5)
    report = control.run()
    assert report.reason == "no planned action for 0.5 s"
    assert report.held == 6
    policy.release.release(9)
    executor.close()
