"""Parts and the whole against arrays that the original Octo computed: see shared/golden/README.md.

The checkpoint's language encoder is not part of this model yet, so the whole is compared on the
example whose instruction is missing: there, language tokens are masked and the rest must agree.
"""

import functools
import re
from pathlib import Path

import flax
import flax.serialization
import jax
import model_fakes as fakes
import numpy as np
import pytest

from octolike.model import diffusion, heads, octo
from octolike.types import TokenGroup, batch_spec, unflatten

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason="golden data are not beside this checkout"
)

NO_LANGUAGE = 2  # the example of octo_small_shape whose instruction is missing

# Octo's parameter path → ours; a path that matches nothing is left out.
PATHS = (
    (r"heads_action/diffusion_model/time_preprocess/kernel", r"heads_action/score/fourier"),
    (r"heads_action/diffusion_model/cond_encoder/Dense_0", r"heads_action/score/time_in"),
    (r"heads_action/diffusion_model/cond_encoder/Dense_1", r"heads_action/score/time_out"),
    (r"heads_action/diffusion_model/reverse_network/Dense_0", r"heads_action/score/in"),
    (r"heads_action/diffusion_model/reverse_network/Dense_1", r"heads_action/score/out"),
    (r".*/MLPResNetBlock_(\d+)/LayerNorm_0", r"heads_action/score/norm_\1"),
    (r".*/MLPResNetBlock_(\d+)/Dense_0", r"heads_action/score/up_\1"),
    (r".*/MLPResNetBlock_(\d+)/Dense_1", r"heads_action/score/down_\1"),
    (r".*/encoder_norm", r"transformer/norm"),
    (r".*/encoderblock_(\d+)/LayerNorm_0", r"transformer/block_\1/attention_norm"),
    (r".*/encoderblock_(\d+)/LayerNorm_1", r"transformer/block_\1/mlp_norm"),
    (r".*/encoderblock_(\d+)/MlpBlock_0/Dense_0", r"transformer/block_\1/mlp_in"),
    (r".*/encoderblock_(\d+)/MlpBlock_0/Dense_1", r"transformer/block_\1/mlp_out"),
    (
        r".*/encoderblock_(\d+)/MultiHeadDotProductAttention_0",
        r"transformer/block_\1/attention",
    ),
    (
        r"octo_transformer/observation_tokenizers_(\w+)/SmallStem16_0/StdConv_(\d)",
        r"tokenizers_\1/encoder/conv_\2",
    ),
    (
        r"octo_transformer/observation_tokenizers_(\w+)/SmallStem16_0/GroupNorm_(\d)",
        r"tokenizers_\1/encoder/norm_\2",
    ),
    (
        r"octo_transformer/observation_tokenizers_(\w+)/SmallStem16_0/embedding",
        r"tokenizers_\1/encoder/embedding",
    ),
    (r"octo_transformer/((?:obs|readout)_\w+_(?:projection|pos_embedding))", r"\1"),
)


def ours(path: str, leaf: np.ndarray, window: int) -> dict[str, np.ndarray]:
    """Return {our dotted path: leaf}, or nothing for a parameter that this model does not have."""
    for pattern, target in PATHS:
        match = re.match(pattern + r"(?=/|$)", path)
        if match:
            path = match.expand(target) + path[match.end() :]
            cut = leaf[:, :window] if path.endswith("pos_embedding") else leaf
            return {path.replace("/", "."): cut}
    return {}


@pytest.fixture(scope="module")
def small():
    """Return (model, its variables with Octo's parameters, inputs, outputs) of octo_small_shape."""
    folder = GOLDEN / "octo_small_shape"
    inputs, outputs = (dict(np.load(folder / f"{n}.npz")) for n in ("inputs", "outputs"))
    stem = {"kind": "small_stem", "features": (32, 32, 64, 64), "width": 64}
    model = octo.build(
        fakes.model(
            width=64,
            attention_heads=4,
            mlp_width=128,
            tokenizers={
                camera: {"kind": "image", "cameras": (camera,), "goal": True, "encoder": stem}
                for camera in ("primary", "wrist")
            },
            readouts={"action": 1},
            heads={"action": {"kind": "diffusion"}},
        ),
        batch_spec(batch(inputs)),
        fakes.NAMES,
    )
    stored = (folder / "octo_ckpt" / "0" / "default" / "checkpoint").read_bytes()
    params = flax.traverse_util.flatten_dict(flax.serialization.msgpack_restore(stored), sep="/")
    window = inputs["action"].shape[1]
    leaves = {k: v for path, leaf in params.items() for k, v in ours(path, leaf, window).items()}
    variables = {"params": unflatten(leaves)}
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch(inputs), train=False))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda x: x.shape, shapes)
    return model, variables, inputs, outputs


def batch(inputs: dict) -> dict:
    """Return Octo's batch in this project's contract, reduced to the example without language."""
    cut = {k: v[NO_LANGUAGE : NO_LANGUAGE + 1] for k, v in inputs.items()}
    there = np.ones_like(cut["task/pad_mask_dict/image_wrist"])
    observation, task = {"present": {}}, {"present": {}}
    for key in ("image_primary", "image_wrist"):
        observation[key] = cut[f"observation/{key}"]
        observation["present"][key] = cut[f"observation/pad_mask_dict/{key}"]
        # Octo looks at the goal's pixels whether the goal is present or not.
        task[key], task["present"][key] = cut[f"task/{key}"], there
    observation["timestep_mask"] = cut["observation/timestep_pad_mask"]
    return {
        "observation": observation,
        "task": task,
        "action": cut["action"],
        "action_mask": cut["action_pad_mask"],
    }


def readout(outputs: dict) -> TokenGroup:
    return TokenGroup(outputs["tokens/readout_action"], outputs["mask/readout_action"].astype(bool))


def encode(model, variables, b) -> dict[str, TokenGroup]:
    run = functools.partial(model.apply, train=False, method="encode")
    return jax.jit(run)(variables, b["observation"], b["task"])


def bound_head(small) -> heads.Diffusion:
    model, variables, *_ = small
    return model.bind(variables).heads["action"]


def assert_sampled(got: np.ndarray, expected: np.ndarray) -> None:
    """Agree to 1e-4, but for one or two values: rounding grows so much along this network that
    even the same formulas in float64 are 1.1e-4 away from one of the recorded float32 results.
    """
    off = np.sort(np.abs(got - expected).ravel())
    assert off[-3] < 1e-4
    assert off[-1] < 1e-3


def test_tokens_of_every_group(small):
    model, variables, inputs, outputs = small
    b = batch(inputs)
    groups = encode(model, variables, b)
    assert set(groups) == {"obs_primary", "obs_wrist", "readout_action"}
    for name, group in groups.items():
        np.testing.assert_array_equal(group.mask[0], outputs[f"mask/{name}"][NO_LANGUAGE])
        np.testing.assert_allclose(
            group.tokens[0], outputs[f"tokens/{name}"][NO_LANGUAGE], atol=1e-5, rtol=0, err_msg=name
        )


def test_score_network(small):
    outputs = small[3]
    head = bound_head(small)
    embedding = heads.pooled(readout(outputs))[None]
    got = head.score(embedding, outputs["eps/noisy_actions"], outputs["eps/time"])
    np.testing.assert_allclose(got, outputs["eps/pred"], atol=1e-5, rtol=0)


def test_training_loss(small):
    inputs, outputs = small[2:]
    errors = bound_head(small).errors(
        readout(outputs), inputs["action"], outputs["loss/time"], outputs["loss/noise"]
    )
    steps = inputs["observation/timestep_pad_mask"][..., None, None]
    loss, per_example = heads.masked_losses(errors, inputs["action_pad_mask"] & steps)
    np.testing.assert_allclose(loss, outputs["loss/value"], rtol=1e-5)
    assert per_example.shape == (3,)


def test_whole_sampling_run(small):
    outputs = small[3]
    last = outputs["ddpm/init"][:, -1], outputs["ddpm/z"][:, :, -1]
    got = bound_head(small).denoise(readout(outputs), *last)
    assert_sampled(got, outputs["ddpm/actions"])


def test_sampling_from_pixels(small):
    model, variables, inputs, outputs = small
    b = batch(inputs)
    groups = encode(model, variables, b)
    x = outputs["ddpm/init"][NO_LANGUAGE, -1][None]
    z = outputs["ddpm/z"][:, NO_LANGUAGE, -1][:, None]
    got = bound_head(small).denoise(groups["readout_action"], x, z)
    assert_sampled(got[0], outputs["ddpm/actions"][NO_LANGUAGE])


@pytest.mark.parametrize("steps", [5, 10, 20, 50, 100])
def test_betas(steps):
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


def test_ddpm_keeps_missing_dimensions_at_their_noise():
    parts = np.load(GOLDEN / "octo_parts" / "outputs.npz")
    valid = np.tile(np.arange(7) < 6, 4)
    got = diffusion.ddpm(
        lambda x, t: x,  # what the model says there does not matter
        diffusion.cosine_betas(20),
        parts["sample_adim6/x_traj"][0],
        parts["sample_adim6/z"],
        clip=5.0,
        valid=valid,
    )
    np.testing.assert_allclose(
        got[..., ~valid], parts["sample_adim6/x_traj"][-1][..., ~valid], atol=1e-6
    )


def test_regression_heads():
    parts = np.load(GOLDEN / "octo_parts" / "heads.npz")
    inputs = np.load(GOLDEN / "octo_parts" / "batch.npz")
    tokens = np.load(GOLDEN / "octo_parts" / "outputs.npz")["transformer/readout_action/tokens"]
    group = TokenGroup(tokens, np.ones(tokens.shape[:-1], bool))
    mask = inputs["action_pad_mask"] & inputs["observation/timestep_pad_mask"][..., None, None]
    params = {n: parts[f"continuous_mean/params/mean_proj/{n}"] for n in ("kernel", "bias")}
    mse = heads.MSE(horizon=4, action_dim=7).bind({"params": {"out": params}})
    chunk = mse.predict(heads.pooled(group))
    np.testing.assert_allclose(chunk, parts["continuous_mean/call"], atol=1e-5)
    np.testing.assert_allclose(
        mse.sample(group), parts["continuous_mean/predict_argmax"], atol=1e-5
    )
    loss, _ = heads.masked_losses(mse(group, inputs["action"]), mask)
    np.testing.assert_allclose(loss, parts["continuous_mean/loss"], rtol=1e-5)
    errors = heads.L1(horizon=4, action_dim=7).error(parts["l1_map/call"] - inputs["action"]) * 7
    np.testing.assert_allclose(
        heads.masked_losses(errors, mask)[0], parts["l1_map/loss"], rtol=1e-5
    )
