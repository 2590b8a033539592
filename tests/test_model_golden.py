"""Noise schedules and samplers against arrays that Octo computed: see shared/golden/README.md.

Whole checkpoints are compared in test_octo_golden.py, heads in test_model_heads_golden.py.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from octolike.model import diffusion

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason="golden data are not next to this checkout"
)


@pytest.mark.parametrize("steps", [5, 10, 20, 50, 100])
def test_betas_equal_those_of_octo(steps):
    expected = np.load(GOLDEN / "octo_parts" / "schedules.npz")[f"cosine_{steps}"]
    np.testing.assert_allclose(diffusion.cosine_betas(steps), expected, atol=1e-6, rtol=1e-5)


def test_ddpm_follows_a_recorded_trajectory():
    parts = np.load(GOLDEN / "octo_parts" / "outputs.npz")
    eps = jax.numpy.asarray(parts["sample/eps_traj"])
    got = diffusion.ddpm(
        lambda x, t: eps[19 - t],
        diffusion.cosine_betas(20),
        parts["sample/x_traj"][0],
        parts["sample/z"],
        clip=5.0,
    )
    np.testing.assert_allclose(got, parts["sample/x_traj"][-1], atol=1e-4, rtol=0)


def test_ddpm_keeps_missing_dimensions_at_their_noise_level():
    parts = np.load(GOLDEN / "octo_parts" / "outputs.npz")
    valid = np.tile(np.arange(7) < 6, 4)
    got = diffusion.ddpm(
        lambda x, t: x,  # any output for missing dimensions will do
        diffusion.cosine_betas(20),
        parts["sample_adim6/x_traj"][0],
        parts["sample_adim6/z"],
        clip=5.0,
        valid=valid,
    )
    np.testing.assert_allclose(
        got[..., ~valid], parts["sample_adim6/x_traj"][-1][..., ~valid], atol=1e-6
    )
