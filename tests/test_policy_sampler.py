"""One application for a whole batch: independence, batch sizes, copies, threads, CUDA lowering."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import pickle

import jax
import numpy as np
import pytest
from policy_fakes import RUN_NAMES, run_of
from test_policy import observation

from octolike import types
from octolike.config import Component
from octolike.model import attention, diffusion
from octolike.model.network import build_network
from octolike.policy import Policy
from octolike.policy.execution import ActionPrefix
from octolike.policy.sampler import ActionSampler
from octolike.train import lowering
from octolike.train.state import init_params

pytestmark = pytest.mark.filterwarnings("ignore:observation.*far outside the training data")


@pytest.fixture(scope="module")
def policy():
    return Policy(run_of(), batch_size=(1, 3))


def task_of(policy):
    return policy.create_task(instruction="lift the cube")


def test_a_chunk_does_not_depend_on_its_batch_mates(policy):
    """Bit for bit within a compiled batch size, whatever the other examples are."""
    task = task_of(policy)
    three = [observation(i) for i in range(3)]
    first = policy.sample_batch(three, [task] * 3, [5, 6, 7])
    mates = policy.sample_batch([three[0], three[0], observation(9)], [task] * 3, [5, 8, 9])
    np.testing.assert_array_equal(first[0], mates[0])
    np.testing.assert_allclose(policy.sample_actions(three[0], task, 5), first[0], atol=1e-5)


def test_a_call_takes_the_smallest_sufficient_batch_size(policy):
    assert (policy.batch_sizes, policy.batch_size) == ((1, 3), 3)
    sampler = policy._parts.sampler
    assert [len(rows) for rows in sampler._batches(1)] == [1]
    assert [rows.tolist() for rows in sampler._batches(5)] == [[0, 1, 2], [3, 4, 4]]
    assert [len(rows) for rows in sampler._batches(4)] == [3, 1]


def test_several_chunks_of_one_observation_share_its_readout(policy):
    task, raw = task_of(policy), observation(1)
    chunks = policy.sample_chunks(raw, task, range(4))
    expected = [policy.sample_actions(raw, task, seed) for seed in range(4)]
    np.testing.assert_allclose(chunks, np.stack(expected), atol=1e-4)
    calls = []
    sampler = policy._parts.sampler
    read_out = sampler._read_out
    sampler._read_out = lambda *inputs: (calls.append(1), read_out(*inputs))[1]
    try:
        policy.sample_chunks(raw, task, range(4))
    finally:
        sampler._read_out = read_out
    assert len(calls) == 1


def test_warmup_compiles_all_that_calls_need(policy):
    policy.warmup()
    sampler = policy._parts.sampler
    count = sampler.compilations, sampler._decode._cache_size()
    task = task_of(policy)
    prefix = ActionPrefix(np.zeros((2, 7), np.float32), 1)
    policy.sample_actions(observation(), task)
    policy.sample_batch([observation()] * 3, [task] * 3, [1, 2, 3], [None, prefix, None])
    assert (sampler.compilations, sampler._decode._cache_size()) == count


@contextlib.contextmanager
def compilations():
    """Yield the list of the compilations within the block."""
    durations = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield durations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def with_head(head):
    """Return a run of another head, with random parameters."""
    run = run_of()
    run.config.model.heads = {"action": Component(head)}
    network = build_network(dataclasses.asdict(run.config.model), run.spec, RUN_NAMES)
    shapes = jax.eval_shape(lambda: init_params(network, run.spec, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    return dataclasses.replace(run, params=params)


MLP = {"kind": "mlp", "hidden": 16, "blocks": 1}


@pytest.mark.parametrize(
    ("head", "methods"),
    [
        ({"kind": "diffusion", "network": MLP, "steps": 2}, ("", "guided")),
        ({"kind": "flow", "network": MLP, "steps": 2, "prefix": 2}, ("", "guided", "trained")),
        ({"kind": "l1"}, ()),
    ],
)
def test_nothing_compiles_after_the_warmup(head, methods):
    policy = Policy(with_head(head), batch_size=(1, 2))
    with compilations() as before:
        policy.warmup()
    assert before
    task, actions = task_of(policy), np.zeros((2, 7), np.float32)
    with compilations() as after:
        policy.sample_actions(observation(), task)
        policy.sample_batch([observation()] * 2, [task] * 2, [1, 2])
        for method in methods:
            prefix = ActionPrefix(actions, 1, method)
            policy.sample_actions(observation(), task, prefix=prefix)
            policy.sample_batch([observation()] * 2, [task] * 2, [1, 2], [None, prefix])
    assert after == []


def test_a_pickled_policy_acts_the_same(policy):
    task = task_of(policy)
    other = pickle.loads(pickle.dumps(policy))
    assert other.batch_sizes == policy.batch_sizes
    np.testing.assert_array_equal(
        other.sample_actions(observation(), task, 3), policy.sample_actions(observation(), task, 3)
    )


@pytest.mark.parametrize("seed", [1.5, -1, 2**32])
def test_an_untrained_policy_has_a_seed_of_32_bits(policy, seed):
    with pytest.raises(ValueError, match="expected an integer from 0"):
        policy.untrained(seed=seed)


def test_threads_get_their_own_actions(policy):
    """Two policies in one process, called from four threads at once."""
    other, task = policy.untrained(seed=4), task_of(policy)
    jobs = [(p, seed) for seed in range(8) for p in (policy, other)]

    def act(job):
        return job[0].sample_actions(observation(job[1]), task, job[1])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(act, jobs))
    for job, actions in zip(jobs, together, strict=True):
        np.testing.assert_array_equal(actions, act(job))


def test_weights_of_a_half_precision_policy_are_cast_once_and_change_nothing():
    run = run_of()
    run.config.model.dtype = "bfloat16"
    policy = Policy(run)
    task = task_of(policy)
    kernels = {
        jax.tree_util.keystr(path): x.dtype
        for path, x in jax.tree_util.tree_leaves_with_path(policy._params)
        if "kernel" in jax.tree_util.keystr(path)
    }
    # heads compute in float32 (octolike.model.precision)
    assert {str(d) for k, d in kernels.items() if "transformer" in k} == {"bfloat16"}
    assert {str(d) for k, d in kernels.items() if "heads_action" in k} == {"float32"}
    fast = policy.sample_actions(observation(), task, 2)
    policy._params = jax.device_put(run.params)  # float32: cast in the call
    np.testing.assert_array_equal(policy.sample_actions(observation(), task, 2), fast)


# as compiled for CUDA, without a GPU

POOLED = {"kind": "bins", "bins": 8, "layout": "step", "pooling": "attention", "pooling_heads": 2}
WRAPPED = {
    "plain": {"kind": "diffusion", "steps": 2},
    "pooled": {"kind": "flow", "steps": 2, "pooling": "attention", "pooling_heads": 2},
    "per group": {"kind": "per_group", "head": POOLED},
    "hypernet": {"kind": "hypernet", "head": POOLED, "rank": 1, "hidden": 4},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_half_precision_policy_lowers_for_cuda(name, monkeypatch):
    """It once failed at its first call: vmap over applications broke cuDNN's attention mask."""
    monkeypatch.setattr(attention, "FEW", 1)  # a kernel for short sequences, too
    run = run_of()
    run = dataclasses.replace(run, config=copy.deepcopy(run.config))
    run.config.model.dtype, run.config.model.layers = "bfloat16", 2  # the last reads few rows
    run.config.model.heads = {"action": Component(WRAPPED[name])}
    sampler = ActionSampler(run, "arm", 7, (2,))
    network = build_network(dataclasses.asdict(run.config.model), sampler.spec, RUN_NAMES)
    params = jax.eval_shape(lambda: init_params(network, sampler.spec, jax.random.key(0)))
    batch = types.zeros(sampler.spec, 2)
    inputs = params, batch["observation"], batch["task"]
    readout = jax.eval_shape(sampler._read_out, *inputs)
    assert "cudnn$fmha" in lowering.lower_for_cuda(sampler._read_out, *inputs)
    decode = params, readout, np.arange(2), np.zeros(2, np.uint32), None
    # few keys, with a mask: XLA, since a mask of one head breaks under vmap
    assert "cudnn$fmha" not in lowering.lower_for_cuda(sampler._decode, *decode)


@pytest.mark.parametrize(
    ("head", "loops"),
    [
        ({"kind": "diffusion", "steps": 20}, 0),
        ({"kind": "diffusion", "steps": 100, "sampler": "ddim", "inference_steps": 10}, 0),
        ({"kind": "flow", "steps": 10, "prefix": 2}, 0),
        ({"kind": "diffusion", "steps": 2 * diffusion.UNROLL}, 1),  # else compiling takes minutes
    ],
)
def test_denoising_is_unrolled(head, loops):
    """A loop costs an accelerator a launch per iteration."""
    run = run_of()
    run.config.model.heads = {"action": Component({**head, "network": MLP})}
    sampler = ActionSampler(run, "arm", 7, (1,))
    params = jax.eval_shape(lambda: init_params(sampler.network, sampler.spec, jax.random.key(0)))
    batch = types.zeros(sampler.spec, 1)
    readout = jax.eval_shape(sampler._read_out, params, batch["observation"], batch["task"])
    for prefix in (None, sampler.no_prefix(1, guided=True), sampler.no_prefix(1, guided=False)):
        inputs = params, readout, np.zeros(1, int), np.zeros(1, np.uint32), prefix
        text = lowering.lower_for_cuda(sampler._decode, *inputs)
        assert text.count("stablehlo.while") == loops
