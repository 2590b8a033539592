"""What is shown of a network is what it does: attention, and the way from noise to actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_fakes import NAMES, batch, model, parameters, spec

from octolike.model import introspect
from octolike.model.network import build_network


@pytest.fixture(scope="module")
def made():
    """Return (network, its parameters, a batch) with a window and a register."""
    shapes = spec()
    settings = model(registers=("other",))
    settings["heads"] = {
        "action": settings["heads"]["action"] | {"steps": 4},
        "other": {"kind": "l1", "readout": "readout_other"},
        "flow": {"kind": "flow", "steps": 3, "network": settings["heads"]["action"]["network"]},
    }
    network = build_network(settings, shapes, NAMES)
    given = batch(shapes, 2)
    given["observation"]["timestep_mask"][1, 0] = False
    params = parameters(network.init, given, train=True)["params"]
    return network, params, given


def test_attention_is_what_the_network_computes(made):
    network, params, given = made
    parts = given["observation"], given["task"]
    shown = introspect.attention(network, params, *parts)
    _, blocks = introspect._captured(network, params, *parts, ("value", "out"))
    for i, (weights, block) in enumerate(zip(shown.weights, blocks, strict=True)):
        value = introspect._by_head(block["value"], 2)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        out = params["transformer"][f"block_{i}"]["attention"]["out"]
        found = jnp.einsum("bqhd,hdw->bqw", mixed, out["kernel"]) + out["bias"]
        seen = shown.allowed.any(axis=-1)  # a masked token of the past sees nothing: not compared
        np.testing.assert_allclose(found[seen], block["out"][seen], atol=2e-4)


def test_attention_keeps_to_the_mask_and_names_every_token(made):
    network, params, given = made
    shown = introspect.attention(network, params, given["observation"], given["task"])
    n = shown.allowed.shape[-1]
    assert shown.weights.shape == (2, 2, 2, n, n)
    np.testing.assert_allclose(shown.weights.sum(axis=-1), 1, atol=1e-5)
    seen = shown.allowed.any(axis=-1)[:, None, :, None]
    hidden = ~shown.allowed[:, None] & seen
    assert (np.where(hidden, shown.weights, 0) == 0).all()
    assert shown.spans[0][:2] == ("task_language", None)
    assert [s.start for s in shown.spans] == [0, *(s.stop for s in shown.spans[:-1])]
    assert shown.spans[-1].stop == n
    (readout,) = shown.of("readout_action")
    assert readout.time == 1
    columns = [s for s in shown.spans if s.group == "readout_action"]
    others = np.delete(shown.allowed, np.r_[*(range(s.start, s.stop) for s in columns)], axis=1)
    assert not others[..., readout.start].any()  # readouts are never read
    (register,) = shown.of("readout_other", time=0)
    assert shown.allowed[0, readout.start, register.start]  # registers are


@pytest.mark.parametrize(("head", "steps"), [("action", 4), ("flow", 3)])
def test_denoising_starts_with_noise_and_ends_where_the_head_does(made, head, steps):
    network, params, given = made
    parts, key = (given["observation"], given["task"]), jax.random.key(3)
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


def test_other_heads_do_not_denoise(made):
    network, params, given = made
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"head 'other' is a L1; only 'diffusion' and 'flow'"):
        introspect.denoising(network, params, given["observation"], given["task"], key, "other")
