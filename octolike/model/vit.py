"""Vision transformers (Dosovitskiy et al. 2020): images to one token per patch."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, unknown
from octolike.model.attention import attend
from octolike.model.convolution import embed_patches, tokens
from octolike.model.film import film


class Size(NamedTuple):
    """Of a vision transformer."""

    width: int
    layers: int
    mlp_width: int
    attention_heads: int


SIZES = {
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
}


class ViT(nn.Module):
    """Patches, learned positions, pre-norm blocks and a last norm; FiLM after every attention.

    size: Ti, S, B or L; a width, layers, mlp_width or attention_heads other than 0 replaces the
    size's. class_token: a learned token more, which patches attend to, left out of the result (many
    published weights have one). gelu: "tanh" (big_vision) or "erf" (PyTorch). weights: an npz file
    in big_vision's or a safetensors file in timm's layout, read when training starts.

    Positions are laid out for the size of the first image that the module sees when its parameters
    are made, and interpolated for others: cameras that share an encoder may differ in size.
    """

    patch: int = 16
    size: str = "S"
    width: int = 0
    layers: int = 0
    mlp_width: int = 0
    attention_heads: int = 0
    class_token: bool = False
    gelu: str = "tanh"
    weights: str = ""
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError(unknown("size of a vit", self.size, SIZES))
        if self.gelu not in ("tanh", "erf"):
            raise ConfigError(unknown("gelu of a vit", self.gelu, ("tanh", "erf")))
        if self.numbers.width % self.numbers.attention_heads:
            raise ConfigError(
                f"vit: width {self.numbers.width} is no multiple of attention_heads "
                f"{self.numbers.attention_heads}"
            )
        super().__post_init__()

    @property
    def numbers(self) -> Size:
        """The sizes in use."""
        return Size(*(getattr(self, k) or v for k, v in SIZES[self.size]._asdict().items()))

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        numbers = self.numbers
        x = embed_patches(x, numbers.width, self.patch, self.dtype)
        x = tokens(x + self._positions(x.shape[1:]))
        if self.class_token:
            init = nn.initializers.normal(0.02)
            first = self.param("class_token", init, (1, 1, numbers.width), jnp.float32)
            first = jnp.broadcast_to(first.astype(self.dtype), (len(x), 1, numbers.width))
            x = jnp.concatenate([first, x], axis=1)
        for i in range(numbers.layers):
            block = ViTBlock(
                numbers.mlp_width, numbers.attention_heads, self.gelu, self.dtype, name=f"block_{i}"
            )
            x = block(x, condition)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        return x[:, 1:] if self.class_token else x

    def _positions(self, shape: tuple[int, int, int]) -> jax.Array:
        known = self.has_variable("params", "pos_embedding")
        own = self.get_variable("params", "pos_embedding").shape if known else (1, *shape)
        x = self.param("pos_embedding", nn.initializers.normal(0.02), own, jnp.float32)
        return resample(x, shape[:2]).astype(self.dtype)


class ViTBlock(nn.Module):
    """x + attention(norm(x)), FiLM, x + mlp(norm(x)) on [B, N, D]."""

    mlp_width: int
    attention_heads: int
    gelu: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None) -> jax.Array:
        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)

        def dense(width: int, name: str) -> nn.Dense:
            init = nn.initializers.xavier_uniform()
            return nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)

        attention = ViTAttention(self.attention_heads, self.dtype, name="attention")
        x = x + attention(norm("attention_norm")(x))
        x = film(x, condition, self.dtype, "film")
        h = dense(self.mlp_width, "mlp_in")(norm("mlp_norm")(x))
        return x + dense(x.shape[-1], "mlp_out")(nn.gelu(h, approximate=self.gelu == "tanh"))


class ViTAttention(nn.Module):
    """Multi-head attention of all tokens [B, N, D] to all."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return attend(x, x, None, heads=self.heads, dtype=self.dtype)


def resample(positions: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Return position embeddings [1, h, w, D] interpolated to another grid; the same if it fits."""
    if positions.shape[1:3] == tuple(grid):
        return positions
    shape = (1, *grid, positions.shape[-1])
    return jax.image.resize(positions, shape, "bicubic", antialias=True)
