"""Other people's clients, unchanged: openpi-client, and vla-eval's harness without containers."""

import contextlib
import dataclasses

import anyio
import numpy as np
import pytest
from serving_fakes import SIDE, A, H, NumpyPolicy, P, observation, serving

from octolike.errors import ConfigError
from octolike.policy.serving.harness import HarnessProtocol
from octolike.policy.serving.options import ServeOptions

# openpi-client


@pytest.fixture
def openpi():
    pytest.importorskip(
        "openpi_client", reason="pip install --no-deps openpi-client==0.1.2 (it pins numpy < 2)"
    )
    from openpi_client import websocket_client_policy

    return websocket_client_policy.WebsocketClientPolicy


@contextlib.contextmanager
def quiet():
    """openpi-client 0.1.2 connects in a way that websockets 17 deprecates."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def test_openpis_client_gets_metadata_actions_and_timing(openpi):
    with quiet(), serving(NumpyPolicy()) as server:
        client = openpi(host="127.0.0.1", port=server.port)
        metadata = client.get_server_metadata()
        assert metadata["horizon"] == H
        assert metadata["control_hz"] == 5.0
        assert len(metadata["action"]["names"]) == A
        for value in (10, 20):
            reply = client.infer({**observation(value), "prompt": "lift", "seed": 3})
            assert reply["actions"].shape == (H, A)
            np.testing.assert_allclose(reply["actions"][0, :2], [3, value])
            assert reply["server_timing"]["infer_ms"] >= 0
        with pytest.raises(RuntimeError, match="invalid: proprio"):
            client.infer({**observation(), "proprio": np.zeros(3), "prompt": "lift"})
        client.reset()
        assert client.infer({**observation(), "prompt": "lift"})["actions"].shape == (H, A)
        client._ws.close()


def test_openpis_chunk_broker_and_key_work(openpi, monkeypatch):
    broker = pytest.importorskip("openpi_client.action_chunk_broker")
    monkeypatch.setenv("OCTOLIKE_KEY", "0123456789abcdef")
    policy = NumpyPolicy()
    with quiet(), serving(policy) as server:
        client = openpi("127.0.0.1", server.port, api_key="0123456789abcdef")
        robot = broker.ActionChunkBroker(client, action_horizon=2)
        steps = [robot.infer({**observation(), "prompt": "lift"})["actions"] for _ in range(4)]
        assert all(step.shape == (A,) for step in steps)
        assert len(policy.batches) == 2
        np.testing.assert_allclose((steps[1] - steps[0])[1:], 0.01, atol=1e-4)
        client._ws.close()


def test_a_robot_of_openpi_keeps_its_own_keys(openpi):
    keys = {"image_primary": "observation/image", "proprio": "observation/state"}
    with quiet(), serving(NumpyPolicy(), keys=keys) as server:
        client = openpi("127.0.0.1", server.port)
        image = np.full((SIDE, SIDE, 3), 40, np.uint8)
        sent = {"observation/image": image, "observation/state": np.zeros(P), "prompt": "lift"}
        np.testing.assert_allclose(client.infer(sent)["actions"][0, 1], 40)
        client._ws.close()


# vla-eval

vla_eval = pytest.importorskip("vla_eval", reason="pip install vla-eval")

from vla_eval.benchmarks.base import StepBenchmark, StepResult  # noqa: E402
from vla_eval.connection import Connection  # noqa: E402


class Table(StepBenchmark):
    """A benchmark with success if the gripper closes at the fourth step."""

    actions: list = []  # noqa: RUF012

    def __init__(self, seed=0, send_state=False, send_wrist_image=False, quat_no_antipodal=False):
        super().__init__()
        self.send_state, self.steps = send_state, 0

    def get_tasks(self):
        return [{"name": "lift"}, {"name": "push it"}]

    def reset(self, task):
        self.steps = 0
        return {"task": task["name"]}

    def step(self, action):
        self.steps += 1
        self.actions.append(np.asarray(action["actions"]))
        return StepResult(obs={"task": "x"}, reward=0.0, done=self.steps == 4, info={})

    def make_obs(self, raw_obs, task):
        image = np.full((SIDE, SIDE, 3), 10 * self.steps, np.uint8)
        observation = {"images": {"agentview": image}, "task_description": task["name"]}
        return {**observation, "states": np.zeros(P)} if self.send_state else observation

    def get_step_result(self, step_result):
        return {"success": bool(step_result.done)}

    def get_action_spec(self):
        return {}

    def get_observation_spec(self):
        return {}


def run_harness(server, tmp_path, **options):
    from vla_eval.api import run

    config = {
        "benchmarks": [
            {
                "benchmark": f"{__name__}:Table",
                "episodes_per_task": 2,
                "max_steps": 10,
                "params": {"send_state": True, "seed": 1},
                **options,
            }
        ],
        "server": {"url": f"ws://127.0.0.1:{server.port}/vla-eval"},
    }
    return run(config, output_dir=tmp_path, no_save=True, docker=False)


def test_the_harness_runs_its_episodes_against_the_server(tmp_path):
    policy = NumpyPolicy()
    Table.actions.clear()
    with serving(policy, cameras={"primary": "agentview"}) as server:
        (result,) = run_harness(server, tmp_path)
    tasks = {task["task"]: task for task in result["tasks"]}
    assert set(tasks) == {"lift", "push it"}
    assert all(task["mean_success"] == 1.0 for task in tasks.values())
    actions = np.stack(Table.actions)
    assert actions.shape == (16, A)  # 2 tasks, 2 episodes, 4 steps
    assert sum(policy.batches) == 8  # two actions of each chunk are executed
    # the second call sees the history: the images of steps 1 and 2
    np.testing.assert_allclose(actions[[0, 2], 1], [0, 15])
    np.testing.assert_allclose(actions[[0, 2], 2], [1, 2])
    np.testing.assert_allclose((actions[1] - actions[0])[1:6], 0.01, atol=1e-3)
    np.testing.assert_allclose(actions[[0, 8], 4], [4, 7])  # the instructions' lengths
    seeds = actions[::2, 0]
    assert len(set(seeds)) == 8  # every call has noise of its own


def test_the_noise_of_an_episode_repeats(tmp_path):
    runs = []
    for _ in range(2):
        Table.actions.clear()
        with serving(NumpyPolicy(), cameras={"primary": "agentview"}) as server:
            run_harness(server, tmp_path, max_tasks=1)
        runs.append(np.stack(Table.actions))
    np.testing.assert_array_equal(*runs)


class SuiteTable(Table):
    """A benchmark that states the seed of each task's first episode in octolike's suite."""

    def get_tasks(self):
        return [{"name": "lift", "octolike_seed": 1_000_000}]


@pytest.mark.parametrize("server_seed", [0, 5])
def test_the_noise_of_a_suite_is_that_of_octolikes_evaluation(tmp_path, server_seed):
    """Unless the server has a seed of its own."""
    Table.actions.clear()
    options = {"cameras": {"primary": "agentview"}, "seed": server_seed}
    with serving(NumpyPolicy(), **options) as server:
        run_harness(server, tmp_path, benchmark=f"{__name__}:SuiteTable")
    seeds = [
        np.random.SeedSequence([1_000_000 + episode, step]).generate_state(1)[0]
        for episode in (0, 1)
        for step in (0, 2)
    ]
    is_equal = np.stack(Table.actions)[::2, 0] == np.array(seeds, np.float32)
    assert is_equal.all() if server_seed == 0 else not is_equal.any()


def test_the_harness_is_told_conventions_and_errors():
    async def talk(port):
        url = f"ws://127.0.0.1:{port}/vla-eval"
        connection = Connection(url, timeout=10)
        await connection.connect(benchmark="vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark")
        info = connection.server_info
        await connection.start_episode({"task": {"name": "lift", "episode_idx": 3}})
        image = np.zeros((SIDE, SIDE, 3), np.uint8)
        good = {"images": {"agentview": image}, "states": np.zeros(P), "task_description": "lift"}
        errors = []
        for bad in (
            {**good, "images": {"sideview": image}},
            {k: v for k, v in good.items() if k != "states"},
            {**good, "task_description": ""},
            {**good, "images": {"agentview": image.astype(np.float32)}},
        ):
            try:
                await connection.act(bad)
            except RuntimeError as error:
                errors.append(str(error))
        action = (await connection.act(good))["actions"]
        for bad in ({**good, "states": np.full(P, np.nan)}, {**good, "task_description": ""}):
            with pytest.raises(RuntimeError, match="invalid: "):  # in the middle of a chunk, too
                await connection.act(bad)
        await connection.act(good)
        await connection.close()
        return info, errors, action

    with serving(NumpyPolicy()) as server:
        info, errors, action = anyio.run(talk, server.port)
    assert info["observation_params"] == {
        "send_wrist_image": False,
        "send_state": True,
        "quat_no_antipodal": True,
    }
    assert (info["checkpoint"], info["execute"]) == (7, 2)
    assert info["action_spec"]["gripper"]["format"] == "binary_close_positive"
    assert info["observation_spec"].keys() == {"agentview", "language"}
    for error, part in zip(
        errors,
        ("camera of the obs", "lacks 'states'", "lacks an instruction", "image"),
        strict=True,
    ):
        assert "invalid: " in error
        assert part in error
    assert action.shape == (A,)
    assert action[-1] == 1  # gripper 0, closed, is 1 in LIBERO


def test_conventions_that_cannot_be_translated_are_refused():
    policy = NumpyPolicy()
    policy.embodiment = dataclasses.replace(policy.embodiment, gripper="0 = open")
    protocol = HarnessProtocol(policy, ServeOptions())
    with pytest.raises(ValueError, match="'0 = open'; libero is translated from '1 = open' only"):
        protocol.benchmark("vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark")
    assert protocol.benchmark("my.own:Benchmark").cameras == {}
    with pytest.raises(ConfigError, match="unknown camera"), serving(policy, cameras={"x": "y"}):
        pass
    with pytest.raises(ConfigError, match="execute is 9"), serving(policy, execute=9):
        pass
