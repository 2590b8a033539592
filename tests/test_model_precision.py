"""Precision: products that an accelerator would round are float32, or not matrix products."""

import jax
import jax.numpy as jnp
import model_fakes as fakes
import numpy as np
import pytest

from octolike.model import denoisers
from octolike.model.language import FrozenEncoder
from octolike.model.network import build_network
from octolike.model.text_encoders import ENCODERS
from octolike.train import flops, lora

BATCH = fakes.batch(fakes.spec(), 2)
RNGS = {"noise": jax.random.key(0)}


def products(function, *args) -> list:
    """Return the equations of all matrix products in a trace."""
    jaxpr = jax.make_jaxpr(function)(*args)
    return [eqn for eqn, _ in flops.equations(jaxpr) if eqn.primitive.name == "dot_general"]


def is_exact(eqn) -> bool:
    return eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def network(dtype: str):
    heads = {
        "action": {"kind": "diffusion", "network": {"kind": "mlp", "hidden": 16, "blocks": 1}},
        "other": {"kind": "l1", "readout": "readout_other"},
    }
    settings = fakes.model(dtype=dtype, heads=heads)
    model = build_network(settings, fakes.spec(), fakes.NAMES)
    return model, fakes.parameters(model.init, BATCH, train=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_are_exact_and_bfloat16_ones_are_not(dtype):
    model, variables = network(dtype)

    def loss(variables):
        return model.apply(variables, BATCH, train=False, rngs=RNGS)[0]

    def act(variables):
        inputs = variables, BATCH["observation"], BATCH["task"]
        return model.apply(*inputs, method="sample_actions", rngs=RNGS)

    for function in (jax.grad(loss), act):
        single = [e for e in products(function, variables) if e.invars[0].aval.dtype == jnp.float32]
        half = [e for e in products(function, variables) if e.invars[0].aval.dtype == jnp.bfloat16]
        assert bool(half) == (dtype == "bfloat16")
        assert not any(map(is_exact, half))  # Pallas would refuse them
        if dtype == "float32":
            assert all(map(is_exact, single))
        else:  # the denoiser's layers and the last layer of the other head, at least
            assert sum(map(is_exact, single)) >= 4


def test_a_frozen_encoder_and_merged_lora_are_exact():
    """Their results are compared with, or used on, another device."""
    shape = {"vocabulary": 50, "width": 16, "layers": 1, "attention_heads": 2}
    text = ENCODERS["t5"](**shape, mlp_width=32, head_width=8)
    ids, mask = np.ones((2, 4), np.int32), np.ones((2, 4), bool)
    frozen = FrozenEncoder(text, fakes.parameters(text.init, ids, mask)["params"])
    kernel = {"dense": {"kernel": jnp.ones((4, 3))}}
    params = kernel | lora.init(kernel, ["dense/kernel"], 2, jax.random.key(0))
    for function, args in (
        (frozen._encode, (frozen._params, ids, mask)),
        (lambda p: lora.merge(p, 1.0), (params,)),
    ):
        found = products(function, *args)
        assert found
        assert all(map(is_exact, found))


def test_the_time_of_diffusion_enters_no_matrix_product():
    network = denoisers.build({"kind": "mlp", "blocks": 0}, "here", horizon=1, dtype=jnp.float32)
    x, time, embedding = jnp.ones((2, 3)), jnp.full((2, 1), 19.0), jnp.ones((2, 4))
    variables = fakes.parameters(network.init, embedding, x, time)
    waves = np.asarray(variables["params"]["fourier"])[:, 0]

    def run(embedding):
        return network.apply(variables, embedding, x, time)

    assert not any(e.invars[1].aval.shape[0] == 1 for e in products(run, embedding))
    _, captured = network.apply(variables, embedding, x, time, capture_intermediates=True)
    features = captured["intermediates"]["time_out"]["__call__"][0]
    angle = 2 * np.pi * 19.0 * waves
    hidden = np.concatenate([np.cos(angle), np.sin(angle)])
    dense = variables["params"]["time_in"]
    hidden = hidden @ dense["kernel"] + dense["bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    dense = variables["params"]["time_out"]
    expected = hidden @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(features[0], expected, rtol=2e-4, atol=2e-4)
