"""Regression and discrete heads against the values of Octo in shared/golden/octo_parts."""

import re
from pathlib import Path

import numpy as np
import pytest

from octolike.model import bins, heads
from octolike.types import TokenGroup, unflatten

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "octo_parts"
pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason="golden data are not next to this checkout"
)

PATHS = (
    (r"map_head/MultiHeadDotProductAttention_0/", "pool/"),
    (r"map_head/LayerNorm_0/", "pool/norm/"),
    (r"map_head/MlpBlock_0/Dense_0/", "pool/mlp_in/"),
    (r"map_head/MlpBlock_0/Dense_1/", "pool/mlp_out/"),
    (r"map_head/", "pool/"),
    (r"(mean|vocab)_proj/", "out/"),
)
LAYOUTS = {"single": "chunk", "action_horizon": "step", "action_dim_and_action_horizon": "value"}


@pytest.fixture(scope="module")
def parts():
    return {name: np.load(GOLDEN / f"{name}.npz") for name in ("heads", "batch", "outputs")}


def case(parts, name, head):
    """Return (the head with Octo's parameters, its readout, actions, mask, Octo's figures)."""
    leaves, figures = {}, {}
    for key, leaf in parts["heads"].items():
        if key.startswith(f"{name}/params/"):
            path = key.removeprefix(f"{name}/params/")
            for pattern, target in PATHS:
                path = re.sub("^" + pattern, target, path)
            leaves[path.replace("/", ".")] = leaf
        elif key.startswith(f"{name}/"):
            figures[key.removeprefix(f"{name}/")] = leaf
    # The heads with attention read every observation token; some of them are masked.
    group_name = "readout_action" if name == "continuous_mean" else "obs"
    tokens, mask_of_tokens = (
        parts["outputs"][f"transformer/{group_name}/{n}"] for n in ("tokens", "mask")
    )
    group = TokenGroup(tokens, mask_of_tokens.astype(bool))
    batch = parts["batch"]
    mask = batch["action_pad_mask"] & batch["observation/timestep_pad_mask"][..., None, None]
    return head.bind({"params": unflatten(leaves)}), group, batch["action"], mask, figures


def mean(values, mask) -> float:
    return float(heads.masked_losses(values, mask)[0])


@pytest.mark.parametrize("name", ["continuous_mean", "mse_map", "l1_map"])
def test_regression_heads_equal_those_of_octo(parts, name):
    kind = heads.L1 if name == "l1_map" else heads.MSE
    pooling = "attention" if "map" in name else "mean"
    module = kind(horizon=4, action_dim=7, pooling=pooling)
    head, group, action, mask, figures = case(parts, name, module)
    chunk = head.predict(head.embed(group))
    assert set(figures) == {"call", "loss", "metric_loss", "metric_mse", "predict_argmax"}
    np.testing.assert_allclose(chunk, figures["call"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(head.sample(group), figures["predict_argmax"], atol=1e-5, rtol=0)
    loss = mean(head(group, action), mask)
    np.testing.assert_allclose(loss, figures["loss"], rtol=1e-5)
    np.testing.assert_allclose(loss, figures["metric_loss"], rtol=1e-5)
    squares = mean((chunk - action) ** 2, mask) * 7
    np.testing.assert_allclose(squares, figures["metric_mse"], rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", bins.KINDS)
def test_discrete_heads_equal_those_of_octo(parts, kind, layout):
    module = heads.Bins(
        horizon=4,
        action_dim=7,
        pooling="attention",
        layout=LAYOUTS[layout],
        bins=32,
        bin_kind=kind,
        low=0.0,
        high=1.0,
        outside="first" if kind == "normal" else "nearest",  # Octo clips into uniform bins only
    )
    head, group, action, mask, figures = case(parts, f"discrete_{kind}_{layout}", module)
    logits = head.logits(group)
    assert set(figures) == {
        "call",
        "loss",
        "metric_loss",
        "metric_mse",
        "metric_accuracy",
        "predict_argmax",
    }
    np.testing.assert_allclose(logits, figures["call"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(head.sample(group), figures["predict_argmax"], atol=1e-5, rtol=0)
    loss = mean(head(group, action), mask)
    np.testing.assert_allclose(loss, figures["loss"], rtol=1e-5)
    np.testing.assert_allclose(loss, figures["metric_loss"], rtol=1e-5)
    chosen = logits.argmax(axis=-1)
    right = mean(chosen == bins.encode(action, head.edges, head.outside), mask)
    np.testing.assert_allclose(right, figures["metric_accuracy"], rtol=1e-5)
    squares = mean((bins.decode(chosen, head.edges) - action) ** 2, mask) * 7
    np.testing.assert_allclose(squares, figures["metric_mse"], rtol=1e-5)
