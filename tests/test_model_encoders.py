"""Image encoders: shapes, sizes, FiLM, published weights in both layouts, errors."""

import chex
import jax
import jax.numpy as jnp
import model_fakes as fakes
import numpy as np
import pytest
import safetensors.numpy

from octolike.config import ConfigError, build_component
from octolike.model import encoder_weights, encoders, film, vit
from octolike.types import flatten

SMALL = {
    "small_stem": {"features": (4, 8), "patch": 4, "width": 6, "groups": 2},
    "patch": {"patch": 4, "width": 6},
    "keypoints": {
        "features": (4, 8),
        "kernels": (4, 3),
        "strides": (2, 1),
        "keypoints": 3,
        "width": 6,
        "groups": 0,
    },
    "resnet": {"width": 4, "groups": 2},
    "hybrid_resnet": {"blocks": (1, 1), "width": 4, "groups": 2},
    "vit": {"patch": 4, "width": 6, "layers": 2, "mlp_width": 8, "attention_heads": 2},
}
SHAPES = {
    "small_stem": (16, 6),
    "patch": (16, 6),
    "keypoints": (1, 6),
    "resnet": (1, 32),
    "hybrid_resnet": (4, 32),
    "vit": (16, 6),
}


def small(kind: str, **changes):
    return encoders.ENCODERS[kind](**{**SMALL[kind], **changes})


def images(size: int = 2, side: int = 16, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, size=(size, side, side, channels)).astype(np.float32)


@pytest.mark.parametrize("kind", encoders.ENCODERS)
def test_film_modulates_the_tokens_of_each_example(kind):
    encoder, x = small(kind), images()
    condition = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    params = fakes.parameters(encoder.init, x, condition)
    apply = jax.jit(encoder.apply)
    got = apply(params, x, condition)
    assert got.shape == (2, *SHAPES[kind])
    shifted = condition + np.float32([[0], [1]])  # a new array: `got` may still be computed
    changed = np.abs(apply(params, x, shifted) - got).max(axis=(1, 2))
    assert changed[0] == 0
    assert changed[1] > 1e-3
    plain = jax.eval_shape(encoder.init, jax.random.key(0), x)["params"]
    modulating = {k for k, _ in flatten(params["params"]) if "film" in k}
    assert modulating
    assert {k for k, _ in flatten(plain)} == {k for k, _ in flatten(params["params"])} - modulating


@pytest.mark.parametrize("kind", encoders.ENCODERS)
def test_encoders_compute_in_bfloat16_with_float32_parameters(kind):
    encoder = small(kind, dtype=jnp.bfloat16)
    make = jax.eval_shape(encoder.init_with_output, jax.random.key(0), images(), jnp.ones((2, 5)))
    assert make[0].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(make[1])} == {jnp.dtype("float32")}


def test_film_starts_as_the_identity():
    module, x, condition = film.Film(), jnp.ones((2, 3, 3, 4)), jnp.ones((2, 5))
    params = module.init(jax.random.key(0), x, condition)
    np.testing.assert_array_equal(module.apply(params, x, condition), x)


def test_keypoints_locate_a_bright_pixel():
    encoder = encoders.Keypoints(
        features=(2,), kernels=(5,), strides=(1,), keypoints=1, width=4, groups=0, merge=False
    )
    x = jnp.full((1, 9, 9, 3), -1.0).at[0, 2, 6].set(1.0)
    params = fakes.parameters(encoder.init, x)["params"]
    kernel = jnp.zeros_like(params["conv_0"]["kernel"]).at[2, 2].set(10.0)
    params["conv_0"] = {"kernel": kernel, "bias": jnp.zeros(2)}
    params["attention"] = {"kernel": jnp.full((2, 1), 10.0), "bias": jnp.zeros(1)}
    # the token: (x, y) of the keypoint, then the features found there
    params["out"] = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    token = encoder.apply({"params": params}, x)[0, 0]
    np.testing.assert_allclose(token, [0.5, -0.5, 30.0, 30.0], atol=1e-4)


PUBLISHED = {  # parameters as published, less the 1000-class head, less the class token
    "ViT-S/16": (encoders.ViT(size="S"), 22_050_664 - 385 * 1000 - 2 * 384),
    "ViT-B/16": (encoders.ViT(size="B"), 86_567_656 - 769 * 1000 - 2 * 768),
    "ViT-B/32": (encoders.ViT(size="B", patch=32), 88_224_232 - 769 * 1000 - 2 * 768),
    # with a class token: its position is folded into it
    "ViT-B/16, class": (encoders.ViT(size="B", class_token=True), 86_567_656 - 769 * 1000 - 768),
    "ResNet-18": (encoders.ResNet(depth=18), 11_689_512 - 513 * 1000),
    "ResNet-34": (encoders.ResNet(depth=34), 21_797_672 - 513 * 1000),
    "ResNet-50": (encoders.ResNet(depth=50), 25_557_032 - 2049 * 1000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_equal_the_published_ones(name):
    encoder, count = PUBLISHED[name]
    image = jnp.zeros((1, 224, 224, 3))
    tokens, variables = jax.eval_shape(encoder.init_with_output, jax.random.key(0), image)
    assert sum(x.size for x in jax.tree.leaves(variables)) == count
    cells = 7 if "ResNet" in name else 224 // encoder.patch
    assert tokens.shape[1] == cells**2


@pytest.mark.parametrize(("patch", "side", "count"), [(16, 256, 256), (32, 256, 64), (16, 100, 49)])
def test_small_stems_have_the_shapes_of_octo(patch, side, count):
    stem = encoders.SmallStem(patch=patch)
    tokens, variables = jax.eval_shape(
        stem.init_with_output, jax.random.key(0), jnp.zeros((1, side, side, 6))
    )
    assert tokens.shape == (1, count, 512)
    assert variables["params"]["embedding"]["kernel"].shape == (patch // 16, patch // 16, 384, 512)


def test_a_stem_may_have_other_kernels_and_strides():
    stem = small("small_stem", kernels=(5, 3), strides=(4, 1), padding=(2, 1), patch=8)
    assert jax.eval_shape(stem.init_with_output, jax.random.key(0), images())[0].shape == (2, 4, 6)


def test_scale_and_mean_of_standardised_kernels_do_not_matter():
    for kind in ("small_stem", "resnet"):
        x = images(side=32)
        encoder = small(kind)
        params = fakes.parameters(encoder.init, x)
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, v: v * 7 + 1 if v.ndim == 4 and "conv" in str(path) else v, params
        )
        apply = jax.jit(encoder.apply)
        # not exact: 1e-5 is added to the deviation, and group norm divides by small numbers here
        np.testing.assert_allclose(apply(params, x), apply(scaled, x), atol=2e-2)


def test_a_vit_takes_images_of_several_sizes():
    encoder, x = small("vit"), images(side=16)
    params = fakes.parameters(encoder.init, x)
    assert params["params"]["pos_embedding"].shape == (1, 4, 4, 6)
    tokens = jax.eval_shape(encoder.apply, params, images(side=24))
    assert tokens.shape == (2, 36, 6)
    grid = np.arange(16.0, dtype=np.float32).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(vit.resample(grid, (4, 4)), grid)
    np.testing.assert_allclose(vit.resample(grid, (2, 2)).mean(), grid.mean(), rtol=1e-5)
    np.testing.assert_allclose(vit.resample(np.ones_like(grid), (7, 5)), 1, rtol=1e-6)


# Published weights: reference forward passes, in the layouts that the files have.


def layer_norm(x, leaves, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * leaves[f"{name}.weight"] + leaves[f"{name}.bias"]


def linear(x, leaves, name):
    return x @ leaves[f"{name}.weight"].T + leaves[f"{name}.bias"]


def timm_vit(x, leaves, heads=2, patch=4):
    """Return the normalised patch tokens of timm's VisionTransformer, by its formulas."""
    batch, h, w, c = x.shape
    x = x.reshape(batch, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 5, 2, 4)
    kernel = leaves["patch_embed.proj.weight"]
    x = x.reshape(batch, -1, c * patch**2) @ kernel.reshape(len(kernel), -1).T
    x = x + leaves["patch_embed.proj.bias"]
    first = np.broadcast_to(leaves["cls_token"], (batch, 1, x.shape[-1]))
    x = np.concatenate([first, x], axis=1) + leaves["pos_embed"]
    for i in range(2):
        qkv = linear(layer_norm(x, leaves, f"blocks.{i}.norm1"), leaves, f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(batch, -1, 3, heads, x.shape[-1] // heads).transpose(2, 0, 3, 1, 4)
        share = jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), axis=-1)
        attended = np.asarray(share @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + linear(attended, leaves, f"blocks.{i}.attn.proj")
        h = linear(layer_norm(x, leaves, f"blocks.{i}.norm2"), leaves, f"blocks.{i}.mlp.fc1")
        x = x + linear(np.asarray(jax.nn.gelu(h, approximate=False)), leaves, f"blocks.{i}.mlp.fc2")
    return layer_norm(x, leaves, "norm")[:, 1:]


def random_leaves(shapes: dict) -> dict:
    rng = np.random.default_rng(1)
    return {k: rng.normal(0, 0.3, size=s).astype(np.float32) for k, s in shapes.items()}


def timm_vit_leaves(d=6, mlp=8, tokens=17) -> dict:
    shapes = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, tokens, d),
        "patch_embed.proj.weight": (d, 3, 4, 4),
        "patch_embed.proj.bias": (d,),
        "head.weight": (10, d),
        "head.bias": (10,),
    }
    norms = [n for i in range(2) for n in (f"blocks.{i}.norm1", f"blocks.{i}.norm2")] + ["norm"]
    shapes |= {f"{n}.{x}": (d,) for n in norms for x in ("weight", "bias")}
    for i in range(2):
        for name, (out, into) in {
            "attn.qkv": (3 * d, d),
            "attn.proj": (d, d),
            "mlp.fc1": (mlp, d),
            "mlp.fc2": (d, mlp),
        }.items():
            shapes |= {f"blocks.{i}.{name}.weight": (out, into), f"blocks.{i}.{name}.bias": (out,)}
    return random_leaves(shapes)


def fresh(encoder, x, condition=None) -> dict:
    return jax.eval_shape(encoder.init, jax.random.key(0), x, condition)["params"]


def component(kind: str, **changes) -> dict:
    return {"kind": kind, **SMALL[kind], **changes}


def test_timm_vit_weights_give_the_tokens_of_timm(tmp_path):
    leaves, x, file = timm_vit_leaves(), images(), tmp_path / "vit.safetensors"
    safetensors.numpy.save_file(leaves, file)
    encoder = small("vit", class_token=True, gelu="erf")
    config = component("vit", class_token=True, gelu="erf", weights=str(file))
    # Published weights lack FiLM: its parameters are missing from the result.
    params = encoders.load_weights(config, fresh(encoder, x, jnp.ones((2, 5))))
    got = jax.jit(encoder.apply)({"params": params}, x)
    np.testing.assert_allclose(got, timm_vit(x, leaves), atol=2e-6)


def timm_resnet(x, leaves, width=4, groups=2):
    """Return the last feature map of timm's ResNet-18 with group norm, NCHW throughout."""

    def conv(x, name, stride, padding):
        pads = ((padding, padding),) * 2
        return jax.lax.conv_general_dilated(x, leaves[f"{name}.weight"], (stride, stride), pads)

    def norm(x, name):
        y = np.asarray(x).reshape(len(x), groups, -1)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        shape = (1, -1, 1, 1)
        scale, shift = leaves[f"{name}.weight"], leaves[f"{name}.bias"]
        return y.reshape(x.shape) * scale.reshape(shape) + shift.reshape(shape)

    x = np.maximum(norm(conv(x.transpose(0, 3, 1, 2), "conv1", 2, 3), "bn1"), 0)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    x = windows[:, :, ::2, ::2].max(axis=(-1, -2))
    for stage in range(1, 5):
        for i in range(2):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and not i else 1
            y = np.maximum(norm(conv(x, f"{name}.conv1", stride, 1), f"{name}.bn1"), 0)
            y = norm(conv(y, f"{name}.conv2", 1, 1), f"{name}.bn2")
            if stride == 2:
                x = norm(conv(x, f"{name}.downsample.0", 2, 0), f"{name}.downsample.1")
            x = np.maximum(x + y, 0)
    return x.transpose(0, 2, 3, 1).reshape(len(x), -1, 8 * width)


def timm_resnet_leaves(width=4) -> dict:
    shapes = {"conv1.weight": (width, 3, 7, 7), "fc.weight": (10, 8 * width), "fc.bias": (10,)}
    norms, before = {"bn1": width}, width
    for stage in range(1, 5):
        out = width * 2 ** (stage - 1)
        for i in range(2):
            name = f"layer{stage}.{i}"
            shapes[f"{name}.conv1.weight"] = (out, before, 3, 3)
            shapes[f"{name}.conv2.weight"] = (out, out, 3, 3)
            norms |= {f"{name}.bn1": out, f"{name}.bn2": out}
            if before != out:
                shapes[f"{name}.downsample.0.weight"] = (out, before, 1, 1)
                norms[f"{name}.downsample.1"] = out
            before = out
    shapes |= {f"{n}.{x}": (c,) for n, c in norms.items() for x in ("weight", "bias")}
    return random_leaves(shapes)


def test_timm_resnet_weights_give_the_features_of_timm(tmp_path):
    leaves, x, file = timm_resnet_leaves(), images(side=64), tmp_path / "r.safetensors"
    safetensors.numpy.save_file(leaves, file)
    encoder = small("resnet", standardised=False)
    config = component("resnet", standardised=False, weights=str(file))
    params = encoders.load_weights(config, fresh(encoder, x))
    got = jax.jit(encoder.apply)({"params": params}, x)
    np.testing.assert_allclose(got, timm_resnet(x, leaves), atol=1e-4)


def big_vision(params: dict, prefix="params/", style=(0, 1, 0, 0), stacked=False) -> dict:
    """Return a network's parameters under big_vision's names, position embeddings as one row."""
    norm_in, norm_out, attention, mlp = style
    names = {
        "attention_norm": f"LayerNorm_{norm_in}",
        "attention": f"MultiHeadDotProductAttention_{attention}",
        "mlp_norm": f"LayerNorm_{norm_out}",
        "mlp_in": f"MlpBlock_{mlp}/Dense_0",
        "mlp_out": f"MlpBlock_{mlp}/Dense_1",
    }
    leaves = {f"{prefix}head/kernel": np.zeros((6, 3)), f"{prefix}head/bias": np.zeros(3)}
    for path, leaf in flatten(params):
        top, *children = path.split(".")
        if top.startswith("block_"):
            top = f"Transformer/encoderblock_{top[6:]}/{names[children.pop(0)]}"
        elif top == "norm":
            top = "Transformer/encoder_norm"
        elif top == "pos_embedding":
            leaf = leaf.reshape(1, -1, leaf.shape[-1])
        leaves[prefix + "/".join([top, *children])] = leaf
    if stacked:
        first, second = (
            f"{prefix}Transformer/encoderblock_0/",
            f"{prefix}Transformer/encoderblock_1/",
        )
        for name in [n for n in leaves if n.startswith(first)]:
            both = [leaves.pop(name), leaves.pop(second + name[len(first) :])]
            leaves[name.replace("encoderblock_0", "encoderblock")] = np.stack(both)
    return leaves


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"stacked": True},
        {"prefix": "", "style": (0, 2, 1, 3)},
        {"prefix": "params/img/"},
    ],
    ids=["big_vision", "scanned", "vision_transformer", "siglip"],
)
def test_all_big_vision_layouts_are_read(layout, tmp_path):
    encoder, x, file = small("vit"), images(), tmp_path / "vit.npz"
    params = fakes.parameters(encoder.init, x)["params"]
    np.savez(file, **big_vision(params, **layout))
    got = encoders.load_weights(component("vit", weights=str(file)), fresh(encoder, x))
    chex.assert_trees_all_equal(got, params)


def test_positions_are_interpolated_and_additional_channels_start_at_zero(tmp_path):
    encoder, file = small("vit"), tmp_path / "vit.npz"
    params = fakes.parameters(encoder.init, images())["params"]
    np.savez(file, **big_vision(params))
    config, bigger = component("vit", weights=str(file)), images(side=24, channels=7)
    got = encoders.load_weights(config, fresh(encoder, bigger))
    expected = vit.resample(params["pos_embedding"], (6, 6))
    np.testing.assert_allclose(got["pos_embedding"], expected, atol=1e-6)
    extended = jax.jit(encoder.apply)({"params": got}, bigger)
    published = jax.jit(encoder.apply)({"params": params}, bigger[..., :3])
    np.testing.assert_allclose(extended, published, atol=1e-5)


def spoil(leaves: dict, case: str) -> dict:
    if case == "missing":
        del leaves["params/Transformer/encoderblock_1/MlpBlock_0/Dense_0/bias"]
    if case == "extra":
        leaves["params/Transformer/encoderblock_0/LayerScale_0/gamma"] = np.ones(6)
    if case == "shape":
        leaves["params/embedding/bias"] = np.ones(5)
    if case == "deeper":
        for k in [k for k in leaves if "encoderblock_1" in k]:
            leaves[k.replace("encoderblock_1", "encoderblock_2")] = leaves[k]
    if case == "class":
        leaves["params/cls"] = np.ones((1, 1, 6))
        leaves["params/pos_embedding"] = np.ones((1, 17, 6))
    if case == "no square":
        leaves["params/pos_embedding"] = np.ones((1, 15, 6))
    return leaves


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"block_1.mlp_in.bias: not in the file, expected \[8\]"),
        ("extra", "Transformer/encoderblock_0/LayerScale_0/gamma: in the file, but not used by"),
        ("shape", r"embedding.bias: \[5\] in the file, expected \[6\]"),
        ("deeper", "block_2.attention.key.bias: in the file, but this encoder has no such"),
        ("class", "set class_token=True"),
        ("no square", r"pos_embedding: \[1, 15, 6\] in the file, expected \[1, 4, 4, 6\]"),
    ],
)
def test_errors_name_weights_that_do_not_fit(case, message, tmp_path):
    encoder, file = small("vit"), tmp_path / "vit.npz"
    params = fakes.parameters(encoder.init, images())["params"]
    np.savez(file, **spoil(big_vision(params), case))
    with pytest.raises(ConfigError, match=message):
        encoders.load_weights(component("vit", weights=str(file)), fresh(encoder, images()))


def test_batch_norm_and_other_file_formats_are_errors(tmp_path):
    leaves, file = timm_resnet_leaves(), tmp_path / "r.safetensors"
    safetensors.numpy.save_file(leaves | {"bn1.running_mean": np.zeros(4, np.float32)}, file)
    expected = fresh(small("resnet"), images())
    with pytest.raises(ConfigError, match=r"have batch norm; use weights with group norm"):
        encoder_weights.load(str(file), "resnet", expected)
    with pytest.raises(ConfigError, match=r"'resnet' encoder reads \.safetensors files"):
        encoder_weights.load("r50.npz", "resnet", expected)
    with pytest.raises(ConfigError, match="the file does not exist"):
        encoder_weights.load(str(tmp_path / "gone.npz"), "vit", {})
    with pytest.raises(ConfigError, match="has no weights file"):
        encoders.load_weights(component("patch"), {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "small_stem", "features": (4, 8), "patch": 6}, "cells of 4 pixels; patch 6 must"),
        ({"kind": "small_stem", "features": (4,), "patch": 2, "groups": 3}, "4 features.*3 groups"),
        (
            {"kind": "small_stem", "features": (4, 8), "strides": (2,)},
            "small_stem.*differ in length",
        ),
        (
            {"kind": "keypoints", "features": (4, 8), "strides": (2, 2)},
            "kernels .5, 3, 3. .*differ",
        ),
        ({"kind": "patch", "patch": 32}, "16 × 16 is smaller than a patch of 32"),
        ({"kind": "vit", "size": "XL"}, "unknown value of e.size: 'XL'.*B, L, S, Ti"),
        ({"kind": "vit", "gelu": "exact"}, "unknown value of e.gelu: 'exact'"),
        ({"kind": "vit", "width": 10, "attention_heads": 4}, "width 10 is not a multiple of"),
        ({"kind": "resnet", "depth": 20}, "unknown value of e.depth: 20.*18, 34, 50"),
    ],
)
def test_invalid_encoder_fields_are_errors(fields, message):
    def init(image):
        return build_component(encoders.ENCODERS, fields, "e").init(jax.random.key(0), image)

    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(init, jnp.zeros((1, 16, 16, 3)))
