"""Attention maps and denoising paths equal the computation of the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_fakes import NAMES, batch, model, parameters, spec

from octolike.model import introspect
from octolike.model.network import build_network


@pytest.fixture(scope="module")
def trained():
    """Return (network, its parameters, a batch) with a window and a register."""
    shapes = spec()
    settings = model(registers=("other",))
    settings["heads"] = {
        "action": settings["heads"]["action"] | {"steps": 4},
        "other": {"kind": "l1", "readout": "readout_other"},
        "flow": {"kind": "flow", "steps": 3, "network": settings["heads"]["action"]["network"]},
    }
    network = build_network(settings, shapes, NAMES)
    inputs = batch(shapes, 2)
    inputs["observation"]["timestep_mask"][1, 0] = False
    params = parameters(network.init, inputs, train=True)["params"]
    return network, params, inputs


def test_attention_weights_reproduce_the_output_of_every_block(trained):
    network, params, inputs = trained
    parts = inputs["observation"], inputs["task"]
    attention = introspect.attention(network, params, *parts)
    _, blocks = introspect._captured(network, params, *parts, ("value", "out"))
    for i, (weights, block) in enumerate(zip(attention.weights, blocks, strict=True)):
        value = introspect._by_head(block["value"], 2)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        out = params["transformer"][f"block_{i}"]["attention"]["out"]
        output = jnp.einsum("bqhd,hdw->bqw", mixed, out["kernel"]) + out["bias"]
        attends = attention.allowed.any(axis=-1)  # a padded token attends to nothing: not compared
        np.testing.assert_allclose(output[attends], block["out"][attends], atol=2e-4)


def test_attention_obeys_the_mask_and_every_token_has_a_span(trained):
    network, params, inputs = trained
    attention = introspect.attention(network, params, inputs["observation"], inputs["task"])
    n = attention.allowed.shape[-1]
    assert attention.weights.shape == (2, 2, 2, n, n)
    np.testing.assert_allclose(attention.weights.sum(axis=-1), 1, atol=1e-5)
    attends = attention.allowed.any(axis=-1)[:, None, :, None]
    hidden = ~attention.allowed[:, None] & attends
    assert (np.where(hidden, attention.weights, 0) == 0).all()
    assert attention.spans[0][:2] == ("task_language", None)
    assert [s.start for s in attention.spans] == [0, *(s.stop for s in attention.spans[:-1])]
    assert attention.spans[-1].stop == n
    (readout,) = attention.spans_of("readout_action")
    assert readout.time == 1
    columns = [s for s in attention.spans if s.group == "readout_action"]
    other_rows = np.delete(
        attention.allowed, np.r_[*(range(s.start, s.stop) for s in columns)], axis=1
    )
    assert not other_rows[..., readout.start].any()  # no other group attends to readouts
    (register,) = attention.spans_of("readout_other", time=0)
    assert attention.allowed[0, readout.start, register.start]  # but to registers


@pytest.mark.parametrize(("head", "steps"), [("action", 4), ("flow", 3)])
def test_denoising_starts_with_noise_and_ends_with_the_actions_of_the_head(trained, head, steps):
    network, params, inputs = trained
    parts, key = (inputs["observation"], inputs["task"]), jax.random.key(3)
    path = introspect.denoising(network, params, *parts, key, head)
    assert path.shape == (1 + steps, 2, 2, 3)
    key_x, key_z = jax.random.split(key)
    x = jax.random.normal(key_x, (2, 6))
    np.testing.assert_array_equal(path[0].reshape(2, 6), x)
    group = network.apply({"params": params}, *parts, train=False, method="encode")
    draws = (x, jax.random.normal(key_z, (steps, 2, 6))) if head == "action" else (x,)
    variables = {"params": params[f"heads_{head}"]}
    end = network.heads[head].apply(variables, group["readout_action"], *draws, method="denoise")
    np.testing.assert_allclose(path[-1], end, atol=1e-5)


def test_denoising_with_another_head_is_an_error(trained):
    network, params, inputs = trained
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"head 'other' is a L1; only 'diffusion' and 'flow'"):
        introspect.denoising(network, params, inputs["observation"], inputs["task"], key, "other")
