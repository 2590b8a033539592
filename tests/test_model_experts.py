"""Mixture of experts: routing, capacity, balance; both code paths give the same result."""

import jax
import jax.numpy as jnp
import model_fakes as fakes
import numpy as np
import pytest

from octolike.config import ConfigError
from octolike.model import experts
from octolike.model.experts import Experts, TopK
from octolike.model.network import build_network

B, N, D, E = 3, 6, 8, 4
X = np.random.default_rng(0).normal(size=(B, N, D)).astype(np.float32)
VISIBLE = np.ones((B, N), bool)
VISIBLE[1, 4:] = False
TASK = np.random.default_rng(1).normal(size=(B, 5)).astype(np.float32)


def make(**fields):
    module = Experts(TopK(**{"count": E, "capacity": float(E), **fields}), mlp_width=16)
    variables = fakes.parameters(module.init, X, VISIBLE, TASK, train=True)
    return module, variables


def by_hand(params, x, expert):
    h = x @ params["in_kernel"][expert] + params["in_bias"][expert]
    h = jax.nn.gelu(h, approximate=True)
    return h @ params["out_kernel"][expert] + params["out_bias"][expert]


@pytest.mark.parametrize(("gate", "k"), [("token", 1), ("token", 2), ("task", 2)])
@pytest.mark.parametrize("train", [True, False])
def test_each_unit_gets_its_best_experts(gate, k, train):
    module, variables = make(gate=gate, k=k)
    y, metrics = module.apply(variables, X, VISIBLE, TASK, train=train)
    p = variables["params"]
    for b in range(B):
        for n in range(N):
            unit = TASK[b] if gate == "task" else X[b, n]
            share = jax.nn.softmax(unit @ p["gate"]["kernel"] + p["gate"]["bias"])
            best = np.argsort(-share)[:k]
            weight = share[best] / (share[best].sum() if k > 1 else 1)
            want = sum(w * by_hand(p, X[b, n], e) for w, e in zip(weight, best, strict=True))
            served = gate == "task" or VISIBLE[b, n]
            np.testing.assert_allclose(y[b, n], want if served else 0, atol=1e-5)
    assert metrics["experts_per_example"].shape == (B, E)
    np.testing.assert_allclose(metrics["experts_per_example"].sum(-1), 1, rtol=1e-6)
    assert metrics["experts_full"] == 0


@pytest.mark.parametrize("gate", ["token", "task"])
def test_inference_on_single_examples_equals_inference_on_a_batch(gate):
    module, variables = make(gate=gate, k=2)

    def act(*example):
        return module.apply(variables, *example, train=False)[0]

    one_by_one = jax.vmap(lambda *e: act(*(v[None] for v in e))[0])(X, VISIBLE, TASK)
    np.testing.assert_allclose(one_by_one, act(X, VISIBLE, TASK), atol=1e-5)


def test_a_full_expert_drops_the_last_units_in_training_only():
    module, variables = make(capacity=1.0)
    gate = variables["params"]["gate"]
    gate["kernel"], gate["bias"] = np.zeros_like(gate["kernel"]), np.float32([9, 0, 0, 0])
    y, metrics = module.apply(variables, X, VISIBLE, None, train=True)
    room = int(np.ceil(N / E))
    assert (np.abs(y[:, :room]).max(-1) > 0).all()
    assert not np.abs(y[:, room:]).any()
    np.testing.assert_allclose(metrics["experts_full"], 1 - B * room / VISIBLE.sum())
    y, metrics = module.apply(variables, X, VISIBLE, None, train=False)
    assert (np.abs(y[VISIBLE]).max(-1) > 0).all()
    assert metrics["experts_full"] == 0


def test_slots_hold_their_units_and_empty_ones_different_units():
    """One unit in all empty slots would be a row to which all their gradients are added."""
    logits = np.random.default_rng(2).normal(size=(2, 8, E)).astype(np.float32)
    logits[..., 0] += 3  # most slots of the others stay empty
    routing = experts.route(jnp.asarray(logits), np.ones((2, 8), bool), 2)
    expert, place = np.asarray(routing.expert), np.asarray(routing.place)
    for capacity in (8, 5):
        buffers = np.asarray(experts.buffer_units(routing, E, capacity))
        for g in range(2):
            for e in range(E):
                units, choices = np.nonzero(expert[g] == e)
                places = place[g, units, choices]
                kept = places < capacity
                np.testing.assert_array_equal(buffers[g, e, places[kept]], units[kept])
                empty = np.delete(buffers[g, e], places[kept])
                assert len(set(empty.tolist())) == len(empty)


def test_examples_do_not_influence_one_another_and_hidden_tokens_have_no_influence():
    module, variables = make(capacity=1.0, k=2)

    def run(x):
        return module.apply(variables, x, VISIBLE, None, train=True)[0]

    changed = X.copy()
    changed[0] += 1
    changed[1, 4:] = 7
    np.testing.assert_array_equal(run(X)[1, :4], run(changed)[1, :4])
    np.testing.assert_array_equal(run(X)[2], run(changed)[2])


def test_the_balance_loss_is_minimal_for_equal_use():
    active = np.ones((1, 8), bool)
    even = np.eye(E, dtype=np.float32)[np.arange(8) % E][None] * 9
    skewed = np.zeros((1, 8, E), np.float32) + np.float32([9, 0, 0, 0])
    losses = []
    for logits in (even, skewed):
        routing = experts.route(jnp.asarray(logits), active, 1)
        chosen = jax.nn.one_hot(routing.expert, E)
        losses.append(float(experts._balance(routing, chosen, active)))
    assert losses[0] == pytest.approx(1, abs=1e-3)
    assert losses[1] > 3.9


def test_the_gate_gets_a_gradient():
    module, variables = make()

    def loss(v):
        y, metrics = module.apply(v, X, VISIBLE, TASK, train=True)
        return jnp.square(y).sum() + metrics["balance_loss"]

    grads = jax.grad(loss)(variables)["params"]
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("gate", ["token", "task"])
def test_blocks_of_the_network_have_experts(gate):
    spec = fakes.spec()
    config = fakes.model(experts={"kind": "top_k", "count": 3, "gate": gate, "every": 2})
    model, batch = build_network(config, spec, fakes.NAMES), fakes.batch(spec, 2)
    variables = fakes.parameters(model.init, batch, train=False)
    blocks = variables["params"]["transformer"]
    assert "experts" in blocks["block_1"]
    assert "mlp_in" in blocks["block_0"]
    rngs = {"noise": jax.random.key(0), "dropout": jax.random.key(1)}
    loss, metrics = jax.eval_shape(lambda: model.apply(variables, batch, train=True, rngs=rngs))
    assert loss.shape == ()
    assert metrics["experts_per_example"].shape == (2, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "top"}, "unknown kind at model.experts: 'top'; did you mean 'top_k'"),
        ({"kind": "top_k", "gate": "tokens"}, "model.experts.gate"),
        ({"kind": "top_k", "k": 5}, "model.experts.k is 5; it must be 1 to"),
        (
            {"kind": "top_k", "capacity": 0.5},
            "model.experts.capacity is 0.5; it must be at least 1",
        ),
    ],
)
def test_invalid_fields_are_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        experts.build(fields)


def test_a_task_gate_without_a_task_is_an_error():
    module, variables = make(gate="task")
    with pytest.raises(ConfigError, match="needs a tokenizer of the task"):
        module.apply(variables, X, VISIBLE, None, train=False)
