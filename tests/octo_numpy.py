"""Octo in numpy and float64, written from its description: the reference where none is recorded.

Image tokenizers with FiLM, the transformer, a regression head and the sampling of a diffusion head.
`leaves` are Octo's parameters {slash path: array}; nothing of octolike is imported.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

BLOCK = "octo_transformer/BlockTransformer_0/Transformer_0"


def part(leaves: dict, prefix: str) -> dict:
    """Return the parameters under a path."""
    found = {k[len(prefix) + 1 :]: np.float64(v) for k, v in leaves.items()}
    return {k: v for k, v in found.items() if f"{prefix}/{k}" in leaves}


def dense(x, p, name):
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def swish(x):
    return x / (1 + np.exp(-x))


def layer_norm(x, p, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]


# Images


def padded(x, size, stride, padding, fill=0.0):
    """Pad [B, h, w, C] like XLA: by a number on all sides, or "SAME", the odd one behind."""
    sides = []
    for n in x.shape[1:3]:
        total = max((-(-n // stride) - 1) * stride + size - n, 0)
        sides.append((padding,) * 2 if padding != "SAME" else (total // 2, total - total // 2))
    return np.pad(x, ((0, 0), *sides, (0, 0)), constant_values=fill)


def conv(x, kernel, stride, padding, bias=0.0):
    size = kernel.shape[0]
    x = sliding_window_view(padded(x, size, stride, padding), (size, size), axis=(1, 2))
    return np.einsum("bhwcij,ijcf->bhwf", x[:, ::stride, ::stride], kernel) + bias


def standardised(kernel):
    kernel = kernel - kernel.mean((0, 1, 2))
    return kernel / (kernel.std((0, 1, 2)) + 1e-5)


def group_norm(x, p, name, groups=32):
    y = x.reshape(*x.shape[:3], groups, -1)
    y = (y - y.mean((1, 2, 4), keepdims=True)) / np.sqrt(y.var((1, 2, 4), keepdims=True) + 1e-6)
    return y.reshape(x.shape) * p[f"{name}/scale"] + p[f"{name}/bias"]


def film(x, p, vector, i=0):
    """Return x · (1 + first Dense of the vector) + second Dense; vector [B, E]."""
    if f"FilmConditioning_{i}/Dense_0/kernel" not in p:
        return x
    add, mult = (dense(vector, p, f"FilmConditioning_{i}/Dense_{n}") for n in (0, 1))
    return x * (1 + add[:, None, None]) + mult[:, None, None]


def small_stem(x, p, settings, vector):
    for i, (stride, padding) in enumerate(zip(settings["strides"], settings["padding"])):
        kernel, bias = (p[f"StdConv_{i}/{leaf}"] for leaf in ("kernel", "bias"))
        x = conv(x, standardised(kernel), stride, padding, bias)
        x = np.maximum(group_norm(x, p, f"GroupNorm_{i}"), 0)
    x = conv(x, p["embedding/kernel"], len(p["embedding/kernel"]), 0, p["embedding/bias"])
    return film(x, p, vector)


def patch_encoder(x, p, settings, vector):
    x = conv(x, p["embedding/kernel"], settings["patch_size"], 0, p["embedding/bias"])
    return film(x, p, vector)


def vit_resnet(x, p, settings, vector):
    def layer(x, name, stride=1):
        x = conv(x, standardised(p[f"{name}/kernel"]), stride, "SAME")
        return group_norm(x, p, name.replace("conv", "gn"))

    x = padded(np.maximum(layer(x, "conv_root", 2), 0), 3, 2, "SAME", -np.inf)
    x = sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-2, -1))
    for block, units in enumerate(settings["num_layers"]):
        for unit in range(units):
            name, stride = f"block{block + 1}/unit{unit + 1}", 1 + (block > 0 and unit == 0)
            y = np.maximum(layer(x, f"{name}/conv1"), 0)
            y = np.maximum(layer(y, f"{name}/conv2", stride), 0)
            has_projection = f"{name}/conv_proj/kernel" in p
            skip = layer(x, f"{name}/conv_proj", stride) if has_projection else x
            x = np.maximum(skip + layer(y, f"{name}/conv3"), 0)
        x = film(x, p, vector, block - 1) if block else x
    return x if settings["num_layers"] else film(x, p, vector)


ENCODERS = {"SmallStem16": small_stem, "PatchEncoder": patch_encoder, "ViTResnet": vit_resnet}


# The network


def attention(x, p, name, mask, heads):
    q, k, v = (
        np.einsum("bnd,dhe->bnhe", x, p[f"{name}/{part}/kernel"]) + p[f"{name}/{part}/bias"]
        for part in ("query", "key", "value")
    )
    logits = np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(mask[:, None], logits, -1e30)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out = np.einsum("bhqk,bkhe->bqhe", weights / weights.sum(-1, keepdims=True), v)
    return np.einsum("bqhe,hed->bqd", out, p[f"{name}/out/kernel"]) + p[f"{name}/out/bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def transformer(x, mask, leaves, layers, heads):
    p = part(leaves, BLOCK)
    for i in range(layers):
        block = f"encoderblock_{i}"
        y = layer_norm(x, p, f"{block}/LayerNorm_0")
        x = x + attention(y, p, f"{block}/MultiHeadDotProductAttention_0", mask, heads)
        y = layer_norm(x, p, f"{block}/LayerNorm_1")
        y = gelu(dense(y, p, f"{block}/MlpBlock_0/Dense_0"))
        x = x + dense(y, p, f"{block}/MlpBlock_0/Dense_1")
    return layer_norm(x, p, "encoder_norm")


def outputs(stored: dict, leaves: dict, batch: dict, vectors: np.ndarray) -> dict:
    """Return tokens of a network of the camera "primary", a readout "action" and an MSE head.

    With a task tokenizer "language", the vectors [B, (L,) E] are its tokens too, visible where the
    instruction is present. FiLM reads them regardless of that.
    """
    model, root = stored["model"], "octo_transformer"
    images = batch["observation"]["image_primary"]
    steps = batch["observation"]["timestep_pad_mask"]
    size, window = images.shape[:2]
    encoder = model["observation_tokenizers"]["primary"]["kwargs"]["encoder"]
    name, p = encoder["name"], part(leaves, f"{root}/observation_tokenizers_primary")
    pixels = np.float64(images).reshape(-1, *images.shape[2:]) / 127.5 - 1
    flat = np.repeat(np.float64(vectors).reshape(size, -1), window, axis=0)
    look = ENCODERS[name](pixels, part(p, f"{name}_0"), encoder["kwargs"], flat)
    top = {k: np.float64(v) for k, v in leaves.items()}
    look = dense(
        look.reshape(size, window, -1, look.shape[-1]), top, f"{root}/obs_primary_projection"
    )
    look = look + top[f"{root}/obs_primary_pos_embedding"][:, :window]
    readout = top[f"{root}/readout_action_pos_embedding"][:, :window]
    readout = np.broadcast_to(readout, (size, *readout.shape[1:]))
    # (group, timestep, visible) of every token: tasks are at −1
    parts, tags = [], []
    if "language" in model["task_tokenizers"]:
        words = np.float64(vectors).reshape(size, -1, vectors.shape[-1])
        words = dense(words, top, f"{root}/task_language_projection")
        parts.append(words + top[f"{root}/task_language_pos_embedding"])
        present = batch["task"]["pad_mask_dict"]["language_instruction"]
        tags += [("task", -1, present)] * words.shape[1]
    for t in range(window):
        parts += [look[:, t], readout[:, t]]
        tags += [("obs", t, steps[:, t])] * look.shape[2]
        tags += [("readout", t, np.ones(size, bool))] * readout.shape[2]
    mask = np.zeros((size, len(tags), len(tags)), bool)
    for i, (reader, now, _) in enumerate(tags):
        for j, (group, then, visible) in enumerate(tags):
            sees = group in {"task": ("task",), "obs": ("task", "obs")}.get(reader, (group,))
            mask[:, i, j] = visible if sees and then <= now else False
    sizes = model["transformer_kwargs"]
    layers, heads = sizes["num_layers"], sizes["num_attention_heads"]
    x = transformer(np.concatenate(parts, axis=1), mask, leaves, layers, heads)
    found = {
        f"{kind}": x[:, [i for i, tag in enumerate(tags) if tag[0] == kind]].reshape(
            size, *((window, -1) if kind != "task" else (-1,)), x.shape[-1]
        )
        for kind in ("task", "obs", "readout")
    }
    actions = dense(found["readout"].mean(-2)[:, -1], top, "heads_action/mean_proj")
    kwargs = model["heads"]["action"]["kwargs"]
    actions = 5 * np.tanh(actions.reshape(size, kwargs["action_horizon"], -1) / 5)
    named = {"tokens/obs_primary": found["obs"], "tokens/readout_action": found["readout"]}
    if "language" in model["task_tokenizers"]:
        named["tokens/task_language"] = found["task"]
    return {**named, "sample_actions": actions}


# Diffusion


def score(leaves: dict, embedding: np.ndarray, x: np.ndarray, time: int) -> np.ndarray:
    """Return the noise that the head "action" predicts for embeddings [B, D] and x [B, F]."""
    p = part(leaves, "heads_action/diffusion_model")
    angles = 2 * np.pi * time * p["time_preprocess/kernel"][:, 0]
    features = np.concatenate([np.cos(angles), np.sin(angles)])
    features = dense(swish(dense(features, p, "cond_encoder/Dense_0")), p, "cond_encoder/Dense_1")
    features = np.broadcast_to(features, (len(x), len(features)))
    h = dense(np.concatenate([features, embedding, x], -1), p, "reverse_network/Dense_0")
    for i in range(3):
        block = f"reverse_network/MLPResNetBlock_{i}"
        y = layer_norm(h, p, f"{block}/LayerNorm_0")
        h = h + dense(swish(dense(y, p, f"{block}/Dense_0")), p, f"{block}/Dense_1")
    return dense(swish(h), p, "reverse_network/Dense_1")


def ddpm(leaves, embedding, x, z, betas, clip=5.0) -> np.ndarray:
    """Return x after each step [steps, B, F], from noise x [B, F] and z [steps, B, F]."""
    alphas, bars, path = 1 - betas, np.cumprod(1 - betas), []
    for t, added in zip(range(len(betas))[::-1], z):
        noise = score(leaves, embedding, x, t)
        x = (x - betas[t] / np.sqrt(1 - bars[t]) * noise) / np.sqrt(alphas[t])
        x = np.clip(x + (t > 0) * np.sqrt(betas[t]) * added, -clip, clip)
        path.append(x)
    return np.stack(path)
