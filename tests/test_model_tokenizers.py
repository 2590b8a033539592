"""Tokenizers: shapes, presence, sharing, depth, bins, task ids, pooling, errors."""

import copy
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import model_fakes as fakes
import numpy as np
import pytest

from octolike.config import ConfigError
from octolike.model import bins, pooling, tokenizers
from octolike.types import flatten

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "octo_parts"
golden = pytest.mark.skipif(not GOLDEN.exists(), reason="golden data are not next to this checkout")

SPEC = fakes.spec(cameras={"primary": 16, "wrist": 8}) | {
    "observation.depth_primary": ((2, 8, 8, 1), "float32"),
    "observation.depth_wrist": ((2, 8, 8, 1), "float32"),
    "observation.present.depth_primary": ((2,), "bool"),
    "observation.present.depth_wrist": ((2,), "bool"),
    "observation.image_left": ((2, 16, 16, 3), "uint8"),
    "observation.present.image_left": ((2,), "bool"),
}
PATCH = {"kind": "patch", "patch": 4, "width": 8}
VIT = {
    "kind": "vit",
    "patch": 4,
    "width": 8,
    "layers": 1,
    "mlp_width": 8,
    "attention_heads": 2,
}
BOTH = ("primary", "wrist")

CASES = {  # name: (component, shape after the batch axis)
    "stacked": ({"kind": "image", "cameras": ("primary", "left"), "encoder": PATCH}, (2, 16, 8)),
    "goal": ({"kind": "image", "goal": True, "encoder": PATCH}, (2, 16, 8)),
    "depth": ({"kind": "image", "depth": True, "encoder": PATCH}, (2, 16, 8)),
    "film": ({"kind": "image", "film": True, "encoder": PATCH}, (2, 16, 8)),
    "imagenet": ({"kind": "image", "pixels": "imagenet", "encoder": PATCH}, (2, 16, 8)),
    "shared": (
        {
            "kind": "image",
            "cameras": BOTH,
            "shared": True,
            "goal": True,
            "depth": True,
            "film": True,
            "encoder": VIT,
        },
        (2, 20, 8),
    ),
    "learned": (
        {
            "kind": "image",
            "cameras": BOTH,
            "shared": True,
            "learned_tokens": 3,
            "encoder": PATCH,
        },
        (2, 3, 8),
    ),
    "goal image": ({"kind": "goal_image", "encoder": PATCH}, (16, 8)),
    "words": ({"kind": "language", "vocabulary": fakes.VOCABULARY}, (fakes.WORDS, 64)),
    "pooled words": (
        {"kind": "language", "vocabulary": fakes.VOCABULARY, "pooled": True},
        (1, 64),
    ),
    "task number": ({"kind": "task_id", "width": 8}, (1, 8)),
    "proprio": ({"kind": "proprio", "hidden": 8}, (2, 1, 8)),
    "each": ({"kind": "proprio", "each": True}, (2, 4, 1)),
    "bins": ({"kind": "proprio", "bins": 6}, (2, 4, 6)),
    "normal bins": ({"kind": "proprio", "bins": 6, "bin_kind": "normal"}, (2, 4, 6)),
}
CONDITION = np.random.default_rng(3).normal(size=(2, 2, 5)).astype(np.float32)  # of each step


def build(component, dtype=jnp.float32, spec=SPEC, names=fakes.NAMES):
    return tokenizers.build(component, "model.tokenizers.x", spec, names=names, dtype=dtype)


def arguments(tokenizer, b: dict) -> tuple:
    inputs = b["observation"], b["task"]
    return inputs if tokenizer.place == "task" else (*inputs, CONDITION)


def batch(seed: int = 0) -> dict:
    b = fakes.batch(SPEC, 2, seed)
    for camera in BOTH:
        b["observation"][f"depth_{camera}"] = np.abs(b["observation"][f"depth_{camera}"])
    return b


def made(component) -> tuple:
    """Return (the tokenizer, its variables, a jitted function of batches)."""
    tokenizer = build(component)
    variables = fakes.parameters(tokenizer.init, *arguments(tokenizer, batch()))
    run = jax.jit(lambda b: tokenizer.apply(variables, *arguments(tokenizer, b)))
    return tokenizer, variables, run


@functools.cache
def case_of(name: str) -> tuple:
    return made(CASES[name][0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_shapes_and_compute_type(case, dtype):
    component, shape = CASES[case]
    tokenizer = build(component, jnp.dtype(dtype))
    group, variables = jax.eval_shape(
        tokenizer.init_with_output, jax.random.key(0), *arguments(tokenizer, batch())
    )
    assert group.tokens.shape == (2, *shape)
    assert group.mask.shape == group.tokens.shape[:-1]
    assert group.tokens.dtype == dtype
    assert group.mask.dtype == bool
    assert {x.dtype for x in jax.tree.leaves(variables)} <= {jnp.dtype("float32")}
    assert variables.keys() <= {"params"}


@pytest.mark.parametrize("case", CASES)
def test_absent_inputs_do_not_matter(case):
    """For each key: an absent value changes no visible token, a present one does."""
    tokenizer, _, run = case_of(case)
    values = [k for k in tokenizer.reads() if ".present." not in k and not k.endswith(".mask")]
    for value in values:
        name = "language" if "language" in value else value.split(".")[1]
        flag = f"{value.split('.')[0]}.present.{name}"
        present, absent = batch(), batch()
        dict(flatten(absent))[flag][:] = False
        altered, changed = copy.deepcopy(absent), copy.deepcopy(present)
        for b in (altered, changed):
            leaf = dict(flatten(b))[value]
            if leaf.dtype == np.int32:
                leaf[:] = (leaf + 1) % (3 if "task_id" in value else fakes.VOCABULARY)
            else:
                leaf[:] = 255 - leaf if leaf.dtype == np.uint8 else leaf / 2 + 0.4
        reference, result = run(absent), run(altered)
        np.testing.assert_array_equal(reference.mask, result.mask)
        visible = [np.where(g.mask[..., None], g.tokens, 0) for g in (reference, result)]
        np.testing.assert_array_equal(*visible, err_msg=value)
        moved = np.abs(run(changed).tokens - run(present).tokens).max()
        assert moved > 1e-3, f"{value} should matter if it is present"


@pytest.mark.parametrize(
    ("case", "key", "masked"),
    [
        ("stacked", "image_primary", []),
        ("depth", "depth_primary", []),
        ("shared", "image_wrist", range(16, 20)),
        ("shared", "image_primary", range(16)),
        ("shared", "depth_wrist", []),
        ("learned", "image_wrist", []),
        ("bins", "proprio", range(4)),
    ],
)
def test_an_absent_sensor_masks_its_tokens(case, key, masked):
    b = batch()
    b["observation"]["present"][key][0, 1] = False
    mask = np.asarray(case_of(case)[2](b).mask)
    assert mask[1].all()
    assert mask[0, 0].all()
    assert [i for i, there in enumerate(mask[0, 1]) if not there] == list(masked)


def test_learned_tokens_are_masked_without_any_camera():
    b = batch()
    for camera in BOTH:
        b["observation"]["present"][f"image_{camera}"][0] = False
    np.testing.assert_array_equal(
        case_of("learned")[2](b).mask.all(-1), [[False, False], [True, True]]
    )


def test_learned_tokens_do_not_attend_to_an_absent_camera():
    tokenizer, variables, _ = case_of("learned")
    b = batch()
    b["observation"]["present"]["image_wrist"][0] = False
    changed = copy.deepcopy(variables)
    changed["params"]["learner"]["pos_embedding"][16:] *= -1  # of the wrist's tokens
    run = jax.jit(tokenizer.apply)
    before, after = (run(v, *arguments(tokenizer, b)).tokens for v in (variables, changed))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 1e-3


def test_a_shared_encoder_equals_one_tokenizer_per_camera():
    _, variables, run = made({"kind": "image", "cameras": BOTH, "shared": True, "encoder": PATCH})
    parts = []
    for camera in BOTH:
        alone = build({"kind": "image", "cameras": (camera,), "encoder": PATCH})
        parts.append(alone.apply(variables, *arguments(alone, batch())).tokens)
    np.testing.assert_allclose(run(batch()).tokens, np.concatenate(parts, axis=2), atol=1e-5)


def test_depth_is_scaled_to_a_channel_from_0_to_1():
    component = {
        "kind": "image",
        "depth": True,
        "depth_range": 4.0,
        "encoder": {**PATCH, "patch": 8},
    }
    tokenizer, variables, _ = made(component)
    kernel = np.zeros((8, 8, 4, 8), np.float32)
    kernel[0, 0, 3] = 1
    embedding = {"kernel": kernel, "bias": np.zeros(8, np.float32)}
    variables["params"]["encoder"]["embedding"] = embedding
    b = batch()
    depth = b["observation"]["depth_primary"]
    depth[0, 0, 4, 4], depth[0, 0, 0, 4], depth[1, 0, 4, 0] = 2.0, 9.0, 0.0
    got = tokenizer.apply(variables, *arguments(tokenizer, b)).tokens[..., 0]
    np.testing.assert_allclose(got[0, 0, 3], 0.5)  # 8 × 8 cells, enlarged to 16 × 16 pixels
    np.testing.assert_allclose(got[0, 0, 1], 1.0)
    np.testing.assert_allclose(got[1, 0, 2], 0.0)


def test_imagenet_scaling_is_per_colour():
    tokenizer, variables, run = made(
        {"kind": "image", "cameras": ("primary", "left"), "pixels": "imagenet", "encoder": PATCH}
    )
    b = batch()
    pixels = [b["observation"][f"image_{c}"] / 255 for c in ("primary", "left")]
    scaled = [(x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225] for x in pixels]
    encoder = tokenizer.encoder.clone(parent=None)
    x = np.concatenate(scaled, axis=-1).reshape(4, 16, 16, 6).astype(np.float32)
    expected = encoder.apply({"params": variables["params"]["encoder"]}, x)
    np.testing.assert_allclose(run(b).tokens.reshape(expected.shape), expected, atol=1e-4)


def test_a_task_id_beyond_the_tasks_gives_nan():
    *_, run = made({"kind": "task_id"})
    b = batch()
    b["task"]["task_id"][:] = 3, 2
    token = run(b).tokens
    assert np.isnan(token[0]).all()
    assert np.isfinite(token[1]).all()
    b["task"]["present"]["task_id"][:] = False
    assert np.isfinite(run(b).tokens).all()


@pytest.mark.parametrize("outside", bins.OUTSIDE)
@pytest.mark.parametrize("kind", bins.KINDS)
def test_bins_contain_their_centres_and_lower_edges(kind, outside):
    edges = bins.edges(kind, 16, -2.0, 3.0)
    assert (np.diff(edges) > 0).all()
    centres = bins.decode(jnp.arange(16), edges)
    np.testing.assert_array_equal(bins.encode(centres, edges, outside), np.arange(16))
    np.testing.assert_array_equal(bins.encode(edges[:-1], edges, outside), np.arange(16))
    beyond = np.float32([edges[0] - 1, edges[-1], edges[-1] + 9])
    expected = [0, 15, 15] if outside == "nearest" else [0, 0, 0]
    np.testing.assert_array_equal(bins.encode(beyond, edges, outside), expected)


def test_bins_may_differ_between_dimensions():
    edges = np.stack([bins.edges("uniform", 4, 0, 1), bins.edges("uniform", 4, 0, 8)])
    index = bins.encode(np.float32([[0.6, 0.6], [0.1, 7.0]]), edges)
    np.testing.assert_array_equal(index, [[2, 0], [0, 3]])
    np.testing.assert_allclose(bins.decode(index, edges), [[0.625, 1.0], [0.125, 7.0]])


@golden
@pytest.mark.parametrize("name", ["uniform_0.0_1.0", "uniform_-2.0_2.0", "normal_0.0_1.0"])
def test_bins_equal_those_of_octo(name):
    parts = np.load(GOLDEN / "bins.npz")
    kind, low, high = name.split("_")
    edges = bins.edges(kind, 64, float(low), float(high))
    np.testing.assert_allclose(edges, parts[f"{name}/thresholds"], atol=1e-6)
    outside = "first" if kind == "normal" else "nearest"
    index = bins.encode(parts["x"], edges, outside)
    np.testing.assert_array_equal(index, parts[f"{name}/encode"])
    np.testing.assert_allclose(bins.decode(index, edges), parts[f"{name}/decode"], atol=1e-6)


@golden
@pytest.mark.parametrize("discrete", [False, True])
def test_proprio_tokens_equal_those_of_octo(discrete):
    parts = np.load(GOLDEN / "bins.npz")
    sizes = {"bins": 64, "bin_kind": "normal", "outside": "first"} if discrete else {"each": True}
    x = parts["lowdim/proprio"]
    observation = {"proprio": x, "present": {"proprio": np.ones(x.shape[:2], bool)}}
    group = tokenizers.Proprio(**sizes).apply({}, observation, {})
    np.testing.assert_array_equal(group.tokens, parts[f"lowdim_disc{int(discrete)}/tokens"])


@golden
def test_attention_pooling_equals_that_of_octo():
    parts, outputs = (np.load(GOLDEN / f"{n}.npz") for n in ("heads", "outputs"))
    theirs = "l1_map/params/map_head/"

    def module(path: str, leaves=("kernel", "bias")) -> dict:
        return {x: parts[f"{theirs}{path}/{x}"] for x in leaves}

    params = {
        "probe": parts[f"{theirs}probe"],
        "norm": module("LayerNorm_0", ("scale", "bias")),
        "mlp_in": module("MlpBlock_0/Dense_0"),
        "mlp_out": module("MlpBlock_0/Dense_1"),
    }
    for x in ("query", "key", "value", "out"):
        params[x] = module(f"MultiHeadDotProductAttention_0/{x}")
    tokens = outputs["transformer/obs/tokens"]
    mask = outputs["transformer/obs/mask"].astype(bool)
    pool = pooling.AttentionPooling()
    shapes = jax.eval_shape(pool.init, jax.random.key(0), tokens, mask)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    pooled = pool.apply({"params": params}, tokens, mask)[..., 0, :]
    out = {x: parts[f"l1_map/params/mean_proj/{x}"] for x in ("kernel", "bias")}
    chunk = 5 * np.tanh((pooled @ out["kernel"] + out["bias"]) / 5)
    np.testing.assert_allclose(chunk.reshape(4, 2, 4, 7), parts["l1_map/call"], atol=1e-5)


def test_pooling_ignores_hidden_tokens_and_the_order():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)
    mask = np.array([True, True, False, True, False])
    pool = pooling.AttentionPooling(tokens=2, heads=2)
    variables = fakes.parameters(pool.init, x)
    run = jax.jit(pool.apply)
    pooled = run(variables, x, mask)
    assert pooled.shape == (2, 3, 2, 8)
    hidden = np.where(mask[:, None], x, np.nan)
    np.testing.assert_array_equal(run(variables, hidden, mask), pooled)
    np.testing.assert_allclose(run(variables, x[:, :, ::-1], mask[::-1]), pooled, atol=1e-5)
    assert np.abs(run(variables, x, np.ones(5, bool)) - pooled).max() > 1e-2
    nothing = run(variables, x, np.zeros(5, bool))
    np.testing.assert_array_equal(nothing, run(variables, x + 1, np.zeros(5, bool)))


NO_TASKS = fakes.NAMES._replace(tasks=())


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"kind": "task_id"}, "this run has none; set data.task_ids"),
        ({"kind": "task_id", "tasks": 5}, "model.tokenizers.x.tasks follows from the rest"),
        ({"kind": "proprio", "bins": 8, "bin_kind": "norm"}, "unknown value of .*bin_kind: 'norm'"),
        (
            {"kind": "proprio", "outside": "last"},
            "unknown value of .*outside: 'last'.*first, nearest",
        ),
        ({"kind": "proprio", "bins": 8, "low": 1.0, "high": 1.0}, "bins from 1.0 to 1.0"),
        (
            {"kind": "image", "encoder": PATCH, "pixels": "clip"},
            "unknown value of .*pixels: 'clip'.*imagenet, symmetric",
        ),
        ({"kind": "image", "encoder": PATCH, "depth_range": 0.0}, "depth_range is 0.0 metres"),
        (
            {"kind": "image", "encoder": PATCH, "cameras": ("left",), "depth": True},
            "reads 'observation.depth_left', which the data do not have",
        ),
        (
            {"kind": "image", "encoder": PATCH, "cameras": BOTH},
            "image_primary 16 × 16, observation.image_wrist 8 × 8.*set shared=True",
        ),
        (
            {"kind": "goal_image", "encoder": PATCH, "cameras": BOTH},
            "task.image_primary 16 × 16, task.image_wrist 8 × 8",
        ),
    ],
)
def test_invalid_components_are_errors(component, message):
    with pytest.raises(ConfigError, match=message):
        build(component, names=NO_TASKS)


def test_pooling_heads_that_do_not_divide_the_width_are_an_error():
    component = {"kind": "image", "learned_tokens": 2, "encoder": {**PATCH, "width": 6}}
    tokenizer = build(component)
    with pytest.raises(ConfigError, match="8 heads do not divide a token width of 6"):
        jax.eval_shape(tokenizer.init, jax.random.key(0), *arguments(tokenizer, batch()))
