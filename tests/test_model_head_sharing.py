"""All heads and wrappers: masks, retracing, noise, groups, hypernetworks, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import model_fakes as fakes
import numpy as np
import pytest

from octolike.config import ConfigError
from octolike.model import groups, heads
from octolike.types import Names, TokenGroup

B, W, N, D, H, A = 4, 2, 2, 16, 3, 3
SPEC = fakes.spec(window=W, horizon=H, action_dim=A)
NAMES = Names(("x",), ("bridge_1", "bridge_2", "base"), ("lift", "push"))
SMALL = {
    "mlp": {"kind": "mlp", "hidden": 8, "blocks": 1},
    "unet": {"kind": "unet", "features": (4, 8, 8), "groups": 2},
    "transformer": {
        "kind": "transformer",
        "width": 8,
        "layers": 1,
        "attention_heads": 2,
        "mlp_width": 8,
    },
}
L1 = {"kind": "l1", "pooling": "attention"}
FLOW = {"kind": "flow", "steps": 3, "network": SMALL["mlp"]}
KINDS = {
    "diffusion mlp": {"kind": "diffusion", "steps": 3, "network": SMALL["mlp"]},
    **{f"flow {n}": {"kind": "flow", "steps": 3, "network": SMALL[n]} for n in SMALL},
    "mse": {"kind": "mse"},
    "l1": L1,
    "bins": {"kind": "bins", "bins": 8},
    "bins per step": {"kind": "bins", "bins": 8, "layout": "step", "pooling": "attention"},
    "bins by chance": {"kind": "bins", "bins": 8, "temperature": 1.0},
    "per robot": {"kind": "per_group", "head": FLOW},
    "per task": {"kind": "per_group", "by": "task", "head": L1},
    "hypernet": {"kind": "hypernet", "head": FLOW, "rank": 2, "hidden": 8},
    "hypernet, whole": {"kind": "hypernet", "head": {"kind": "l1"}, "rank": 0, "hidden": 8},
    "adapter": {"kind": "hypernet", "head": FLOW, "target": "adapter", "hidden": 8},
}


def build(component, spec=SPEC, names=NAMES):
    return heads.build(component, "model.heads.action", spec, names=names, dtype=jnp.float32)


def inputs(size: int = B, seed: int = 0):
    """Return (readout, actions, context) of a batch in which every group occurs."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    group = TokenGroup(normal(size, W, N, D), jnp.ones((size, W, N), bool))
    robot = jnp.arange(size) * 2 % 3
    return group, normal(size, W, H, A), heads.Context(normal(size, 5), robot, robot % 2)


@functools.cache
def made(kind):
    """Return (head, random parameters, jitted loss gradient, jitted sample, traces)."""
    head, traces = build(KINDS[kind]), []
    variables = fakes.parameters(head.init, *inputs())

    @jax.jit
    def errors(variables, group_, action, context, mask):
        traces.append(1)

        def loss(variables, tokens):
            group = group_._replace(tokens=tokens)
            out = head.apply(variables, group, action, context, rngs={"noise": jax.random.key(1)})
            return heads.masked_losses(out, mask)[0], out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, group_.tokens)

    @jax.jit
    def sample(variables, group, dims, context, key):
        return head.apply(variables, group, dims, context, rngs={"noise": key}, method="sample")

    return head, variables, errors, sample, traces


@pytest.mark.parametrize("kind", KINDS)
def test_heads_ignore_masked_actions_and_are_traced_once(kind):
    """Masked actions have no influence; one trace serves all; equal noise gives equal actions."""
    _, variables, errors, sample, traces = made(kind)
    group, action, context = inputs()
    mask = np.ones(action.shape, bool)
    mask[1, ..., 2] = mask[2, :, 1:] = mask[3] = False
    zeroed = np.where(mask, action, 0)  # as the network does
    (_, out), gradient = errors(variables, group, zeroed, context, mask)
    assert out.shape == action.shape
    assert out.dtype == jnp.float32
    assert not np.abs(gradient[1][3]).any(), "an example without actions teaches nothing"
    assert np.abs(gradient[1][:3]).max(axis=(1, 2, 3)).all()
    chex.assert_tree_all_finite(gradient[0])
    dims = np.ones((B, A), bool)
    dims[1, 2] = False
    key = jax.random.key(2)
    sampled = sample(variables, group, dims, context, key)
    assert sampled.shape == (B, H, A)
    assert np.isfinite(sampled).all()
    np.testing.assert_array_equal(sampled, sample(variables, group, dims, context, key))
    if any(word in kind for word in ("diffusion", "flow", "chance", "robot", "adapter")):
        assert (
            np.abs(sampled - sample(variables, group, dims, context, jax.random.key(3))).max() > 0
        )
    # other robots and tasks in the batch need no new trace
    permuted = context._replace(embodiment=context.embodiment[::-1], task_id=1 - context.task_id)
    errors(variables, group, zeroed, permuted, mask)
    assert len(traces) == 1


@pytest.mark.parametrize("kind", ["diffusion mlp", "flow unet", "flow transformer", "bins", "l1"])
def test_outputs_for_missing_dimensions_do_not_matter(kind):
    _, variables, _, sample, _ = made(kind)
    group, _, context = inputs()
    dims = np.zeros((B, A), bool)
    dims[:, :2] = True

    def shift(path, x):
        """Shift the output in the third dimension: the last layer's bias, [..., A (, bins)]."""
        names = [p.key for p in path]
        if names[-2:] != ["out", "bias"] or {"pool", "attention"} & set(names):
            return x
        per = 8 if kind == "bins" else 1
        shaped = x.reshape(-1, A, per).copy()
        shaped[:, 2, 0] += 3
        return shaped.reshape(x.shape)

    changed = jax.tree_util.tree_map_with_path(shift, variables)
    plain, shifted = (
        sample(v, group, dims, context, jax.random.key(0)) for v in (variables, changed)
    )
    np.testing.assert_array_equal(plain[..., :2], shifted[..., :2])
    full = sample(changed, group, np.ones_like(dims), context, jax.random.key(0))
    assert np.abs(full[..., 2] - shifted[..., 2]).max() > 1e-3 or kind in ("bins", "l1")


@pytest.mark.parametrize("horizon", [1, 5])
@pytest.mark.parametrize("network", SMALL)
def test_networks_take_any_chunk_and_window(network, horizon):
    spec = fakes.spec(window=3, horizon=horizon, action_dim=2)
    head = build({"kind": "diffusion", "network": SMALL[network]}, spec)
    group = TokenGroup(jnp.zeros((2, 3, 1, D)), jnp.ones((2, 3, 1), bool))
    rngs = {"params": jax.random.key(0), "noise": jax.random.key(0)}
    out = jax.eval_shape(
        lambda: head.init_with_output(rngs, group, jnp.zeros((2, 3, horizon, 2)))[0]
    )
    assert out.shape == (2, 3, horizon, 2)


def test_dropout_is_for_training_only():
    component = {"kind": "flow", "network": SMALL["mlp"] | {"dropout": 0.5}}
    head = build(component)
    group, action, context = inputs()
    variables = fakes.parameters(head.init, group, action, context)

    def run(**seeds):
        rngs = {name: jax.random.key(seed) for name, seed in seeds.items()}
        return head.apply(variables, group, action, context, rngs=rngs)

    np.testing.assert_array_equal(run(noise=1), run(noise=1))
    assert np.abs(run(noise=1, dropout=1) - run(noise=1, dropout=2)).max() > 0


# Groups


def test_tiles_hold_every_example_with_its_group():
    rng = np.random.default_rng(0)
    for batch, count in [(1, 5), (7, 3), (16, 40)]:
        for size in {1, 2, 3, groups.tile_size(batch, count, tile_cost=8), batch}:
            for ids in (
                rng.integers(0, count, batch),
                np.zeros(batch, int),
                np.arange(batch) % count,
            ):
                tiles = groups.tiled(jnp.asarray(ids), count, size)
                place = np.asarray(tiles.place)
                assert len(set(place)) == batch
                assert place.max() < tiles.example.size
                np.testing.assert_array_equal(tiles.example.reshape(-1)[place], np.arange(batch))
                np.testing.assert_array_equal(np.asarray(tiles.group)[place // size], ids)
    size = groups.tile_size(1, 50, tile_cost=8)
    assert groups.tile_count(1, 50, size) == 1  # inference computes one head


@pytest.mark.parametrize("size", [1, 6])
def test_each_example_uses_the_head_of_its_group(size):
    head = build({"kind": "per_group", "head": L1})
    group, action, context = inputs(6)
    variables = fakes.parameters(head.init, group, action, context)
    stacked, plain = variables["params"]["stacked"], build(L1)
    first = jax.tree.map(lambda leaf: leaf[:size], (group, action, context))
    got = head.apply(variables, *first)
    for i in range(size):
        params = jax.tree.map(lambda x, i=i: x[context.embodiment[i]], stacked)
        expected = plain.apply({"params": params}, group, action)[i]
        np.testing.assert_allclose(got[i], expected, atol=1e-5)


def test_a_single_example_equals_the_plain_head_with_the_same_noise():
    head, variables, *_ = made("per robot")
    group, _, context = jax.tree.map(lambda x: x[:1], inputs())
    rngs = {"noise": jax.random.key(0)}
    got = head.apply(variables, group, None, context, rngs=rngs, method="sample")
    key = head.apply(variables, rngs=rngs, method=lambda m: m.make_rng("noise"))
    params = jax.tree.map(lambda x: x[0], variables["params"]["stacked"])
    rngs = {"noise": jax.random.split(key, 1)[0]}
    expected = build(FLOW).apply({"params": params}, group, rngs=rngs, method="sample")
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_each_group_gets_gradients_from_its_examples_only():
    _, variables, errors, _, _ = made("per robot")
    group, action, context = inputs()
    context = context._replace(embodiment=jnp.array([0, 2, 2, 0]))
    _, gradient = errors(variables, group, action, context, np.ones(action.shape, bool))
    for leaf in jax.tree.leaves(gradient[0]):
        assert not np.abs(leaf[1]).any()
    assert all(np.abs(leaf[::2]).max() > 0 for leaf in jax.tree.leaves(gradient[0]))


def test_patterns_assign_names_to_groups():
    patterns = {"arms": ("bridge*",), "wheels": ("base",)}
    grouped = groups.membership("embodiment", patterns, NAMES, "h")
    assert grouped == (("arms", "wheels"), (0, 0, 1))
    assert groups.membership("task", {}, NAMES, "h") == (("lift", "push"), (0, 1))


# Hypernetworks


@pytest.mark.parametrize("target", ["head", "adapter"])
def test_a_hypernetwork_starts_as_a_shared_head(target):
    component = {"kind": "hypernet", "head": L1, "target": target, "hidden": 8}
    head, (group, action, context) = build(component), inputs()
    variables = jax.jit(head.init)(jax.random.key(0), group, action, context)
    base = variables["params"]["base" if target == "head" else "head"]
    expected = build(L1).apply({"params": base}, group, action)
    np.testing.assert_allclose(head.apply(variables, group, action, context), expected, atol=1e-5)
    trained = fakes.parameters(head.init, group, action, context)
    before = head.apply(trained, group, action, context)
    task = np.asarray(context.task).copy()
    task[1] += np.arange(5)
    after = head.apply(trained, group, action, context._replace(task=task))
    assert np.abs(before[1] - after[1]).max() > 1e-3
    np.testing.assert_array_equal(before[0], after[0])


# Errors


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"kind": "difusion"}, "unknown kind at model.heads.action: 'difusion'; did you mean"),
        (
            {"kind": "flow", "network": {"kind": "mpl"}},
            "unknown kind at model.heads.action.network: 'mpl'; did you mean 'mlp'",
        ),
        (
            {"kind": "l1", "pooling": "men"},
            "unknown value of .*pooling: 'men'; did you mean 'mean'",
        ),
        (
            {"kind": "bins", "layout": "steps"},
            "unknown value of .*layout: 'steps'; did you mean 'step'",
        ),
        ({"kind": "bins", "bin_kind": "quantile"}, "unknown value of .*bin_kind: 'quantile'"),
        ({"kind": "per_group"}, "model.heads.action .'per_group'. lacks 'head'"),
        ({"kind": "per_group", "head": L1, "by": "robot"}, "unknown value of .*by: 'robot'"),
        (
            {"kind": "per_group", "head": L1, "groups": {"arms": ("bridge*",)}},
            "groups leave out base; each of the embodiments must be in one .arms",
        ),
        (
            {"kind": "per_group", "head": L1, "groups": {"all": ("*",), "arms": ("bridge*",)}},
            "more than one group for bridge_1 .all, arms., bridge_2",
        ),
        (
            {"kind": "per_group", "head": L1, "groups": {"arms": ("brige_1",)}},
            "matches none of the embodiments: 'brige_1'; did you mean 'bridge_1'",
        ),
        (
            {"kind": "per_group", "head": L1, "groups": {"arms": "bridge*"}},
            "groups.arms is 'bridge.'; expected a tuple",
        ),
        ({"kind": "per_group", "head": {"kind": "l2"}}, "kind at model.heads.action.head: 'l2'"),
        ({"kind": "hypernet", "head": L1, "target": "x"}, "unknown value of .*target: 'x'"),
        ({"kind": "hypernet", "head": L1, "rank": -1}, "rank is -1; it must be at least 0"),
        (
            {"kind": "hypernet", "head": L1, "target": "adapter", "rank": 0},
            "rank is 0; an adapter needs a rank of at least 1",
        ),
        ({"kind": "flow", "network": {"kind": "unet", "features": (6,)}}, "multiples of groups 8"),
    ],
)
def test_invalid_components_are_errors(component, message):
    with pytest.raises(ConfigError, match=message):
        build(component)


@pytest.mark.parametrize("kind", KINDS)
def test_another_action_size_is_an_error(kind):
    head = build(KINDS[kind])
    group, _, context = inputs()
    rngs = {"params": jax.random.key(0), "noise": jax.random.key(0)}
    with pytest.raises(ConfigError, match=r"chunks are 3 actions of 3 dimensions.*\(3, 7\)"):
        jax.eval_shape(lambda: head.init(rngs, group, np.zeros((B, W, H, 7)), context))


def test_inputs_that_do_not_fit_the_head_are_errors():
    group, action, context = inputs()
    rngs = {"params": jax.random.key(0), "noise": jax.random.key(0)}
    with pytest.raises(ConfigError, match="takes 3 tokens, but readout_action has 2; set its"):
        build({"kind": "bins", "layout": "step"}).init(rngs, group, action)
    with pytest.raises(ConfigError, match="no tokenizer of the task; add one"):
        build(KINDS["hypernet"]).init(rngs, group, action, context._replace(task=None))
    head, variables, *_ = made("mse")
    with pytest.raises(ConfigError, match="dims name 2 action dimensions; the head has 3"):
        head.apply(variables, group, np.ones((B, 2), bool), method="sample")
