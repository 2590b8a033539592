"""The transformer: working span by span is working on the whole mask."""

import jax.numpy as jnp
import model_fakes as fakes
import numpy as np

from octolike.model import tokens
from octolike.model.tokens import Groups
from octolike.model.transformer import Transformer
from octolike.types import TokenGroup

D, WINDOW = 8, 3
RNG = np.random.default_rng(0)


def group(*shape) -> TokenGroup:
    mask = np.ones(shape, bool)
    mask[0, 0] = False
    return TokenGroup(jnp.asarray(RNG.normal(size=(*shape, D)).astype(np.float32)), mask)


def test_spans_leave_out_only_what_the_mask_forbids():
    groups = Groups(
        {"task_a": group(2, 3)},
        {"obs_b": group(2, WINDOW, 4), "obs_c": group(2, WINDOW, 1)},
        {"readout_d": group(2, WINDOW, 2)},
    )
    x, mask, ends = tokens.join(groups), tokens.attention_mask(groups), tokens.ends(groups)
    assert ends == (10, 17, 24)
    assert ends[-1] == x.shape[1]
    starts = (0, *ends)
    assert not any(mask[:, :, a:b, b:].any() for a, b in zip(starts, ends))
    model = Transformer(layers=2, attention_heads=2, mlp_width=16)
    variables = fakes.parameters(model.init, x, mask, None, train=False)
    by_span, _ = model.apply(variables, x, mask, None, ends=ends, train=False)
    at_once, _ = model.apply(variables, x, mask, None, train=False)
    # a token that may look at nothing gets some average: of what, nobody cares
    seen = np.broadcast_to(mask.any(-1)[:, 0, :, None], x.shape)
    np.testing.assert_allclose(np.where(seen, by_span, 0), np.where(seen, at_once, 0), atol=2e-6)
