"""The transformer: the part that is read, rematerialisation, half precision."""

import chex
import jax
import jax.numpy as jnp
import model_fakes as fakes
import numpy as np
import pytest

from octolike.model import attention, tokens
from octolike.model.tokens import TokenSequence
from octolike.model.transformer import Transformer
from octolike.types import TokenGroup

D, WINDOW = 8, 3
RNG = np.random.default_rng(0)
RNGS = {"dropout": jax.random.key(1)}


def group(*shape) -> TokenGroup:
    mask = np.ones(shape, bool)
    mask[0, 0] = False
    return TokenGroup(jnp.asarray(RNG.normal(size=(*shape, D)).astype(np.float32)), mask)


def sequence(readouts: bool = True) -> TokenSequence:
    return TokenSequence(
        {"task_a": group(2, 3)},
        {"obs_b": group(2, WINDOW, 4), "obs_c": group(2, WINDOW, 1)},
        {"readout_d": group(2, WINDOW, 2)} if readouts else {},
    )


def small(**changes):
    """Return (x, mask, model) of a sequence that is split by timestep."""
    groups = sequence()
    model = Transformer(layers=1, attention_heads=2, mlp_width=16, **changes)
    return tokens.join(groups), tokens.attention_mask(groups), model


def test_the_last_block_computes_only_the_tokens_that_are_read():
    groups = sequence()
    x, mask = tokens.join(groups), tokens.attention_mask(groups)
    model = Transformer(layers=2, attention_heads=2, mlp_width=16)
    variables = fakes.parameters(model.init, x, mask, None, train=False)
    everything, _ = model.apply(variables, x, mask, None, train=False)
    read = tokens.positions(groups, ["readout_d"])
    assert read == (8, 9, 15, 16, 22, 23)
    selected, _ = model.apply(variables, x, mask, None, read=read, train=False)
    np.testing.assert_allclose(selected, everything[:, list(read)], atol=2e-6)
    expected = tokens.split(everything, groups).readout["readout_d"].tokens
    result = tokens.split_read(selected, groups, ["readout_d"])["readout_d"].tokens
    np.testing.assert_allclose(result, expected, atol=2e-6)
    assert tokens.positions(groups, ["obs_b"]) is None  # most of the sequence: no saving
    assert tokens.positions(groups, ["obs"]) is None

    def cost(**options):
        run = jax.jit(lambda v: model.apply(v, x, mask, None, train=False, **options)[0])
        return run.lower(variables).compile().cost_analysis()["flops"]

    assert cost(read=read) < 0.8 * cost()


def gradients(model, variables, x, mask):
    def loss(variables):
        y, _ = model.apply(variables, x, mask, None, train=True, rngs=RNGS)
        return jnp.square(y).mean()

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(variables))


def test_attention_in_the_layout_of_a_tpus_kernel_is_the_same(monkeypatch):
    x, mask, model = small()
    variables = fakes.parameters(model.init, x, mask, None, train=False)
    expected = gradients(model, variables, x, mask), gradients(model, variables, x, None)
    monkeypatch.setattr(attention, "FEW", 1)
    monkeypatch.setattr(attention, "implementation_for", lambda *_: "splash")
    shapes = jax.tree.map(np.shape, fakes.parameters(model.init, x, mask, None, train=False))
    chex.assert_trees_all_equal(shapes, jax.tree.map(np.shape, variables))
    actual = gradients(model, variables, x, mask), gradients(model, variables, x, None)
    chex.assert_trees_all_close(actual, expected, atol=2e-6)


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_remat_changes_neither_parameters_nor_gradients(policy):
    x, mask, plain = small(dropout=0.5)
    *_, remat = small(dropout=0.5, remat=policy)
    variables = fakes.parameters(plain.init, x, mask, None, train=False)
    shapes = [jax.tree.map(np.shape, fakes.parameters(remat.init, x, mask, None, train=False))]
    assert shapes == [jax.tree.map(np.shape, variables)]  # a checkpoint fits both
    expected = gradients(plain, variables, x, mask)
    result = gradients(remat, variables, x, mask)
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)

    def trace(model):
        def run(variables):
            return model.apply(variables, x, mask, None, train=True, rngs=RNGS)[0]

        return str(jax.make_jaxpr(run)(variables))

    assert "remat" in trace(remat)
    assert "remat" not in trace(plain)


def test_bfloat16_computes_nearly_the_same_with_float32_parameters():
    x, mask, full = small()
    *_, half = small(dtype=jnp.bfloat16)
    variables = fakes.parameters(full.init, x, mask, None, train=False)
    (loss, expected), (rough, result) = (gradients(m, variables, x, mask) for m in (full, half))
    out = jax.eval_shape(lambda v: half.apply(v, x, mask, None, train=False)[0], variables)
    assert out.dtype == jnp.bfloat16
    assert {g.dtype for g in jax.tree.leaves(result)} == {jnp.dtype("float32")}
    assert abs(float(rough - loss)) < 0.02 * float(loss)

    def norm(tree):
        return np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(tree)))

    off = jax.tree.map(lambda a, b: a - b, result, expected)
    assert norm(off) < 0.05 * norm(expected)
