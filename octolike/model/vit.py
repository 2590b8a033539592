"""Vision transformers (Dosovitskiy et al. 2020): images to one token per patch."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, option
from octolike.model.attention import attend
from octolike.model.convolution import embed_patches, tokens
from octolike.model.film import film


class ViTSize(NamedTuple):
    """The sizes of a vision transformer."""

    width: int
    layers: int
    mlp_width: int
    attention_heads: int


SIZES = {
    "Ti": ViTSize(192, 12, 768, 3),
    "S": ViTSize(384, 12, 1536, 6),
    "B": ViTSize(768, 12, 3072, 12),
    "L": ViTSize(1024, 24, 4096, 16),
}
GELUS = ("tanh", "erf")


class ViT(nn.Module):
    """Patches, learned positions, pre-norm blocks and a last norm; FiLM after every attention.

    Position embeddings have the grid of the image that initialises the parameters, and are
    interpolated for other grids: cameras that share an encoder may differ in size.
    """

    patch: int = option(16, "pixels per side of the square that becomes one token", low=1)
    size: str = option("S", "named size: width, layers, mlp_width and heads", choices=tuple(SIZES))
    width: int = option(0, "F: width of the tokens; 0: that of the named size", low=0)
    layers: int = option(0, "transformer blocks; 0: those of the named size", low=0)
    mlp_width: int = option(0, "width of the feed-forward layer; 0: that of the named size", low=0)
    attention_heads: int = option(0, "attention heads; 0: those of the named size", low=0)
    class_token: bool = option(
        False, "one more learned token, absent from the output; many published weights have it"
    )
    gelu: str = option("tanh", "'tanh' as in big_vision, 'erf' as in PyTorch", choices=GELUS)
    weights: str = option(
        "", "file of published weights, read at the start: big_vision's .npz, timm's .safetensors"
    )
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")

    def __post_init__(self) -> None:
        sizes = self.sizes
        if sizes.width % sizes.attention_heads:
            raise ConfigError(
                f"vit: width {sizes.width} is not a multiple of attention_heads "
                f"{sizes.attention_heads}"
            )
        super().__post_init__()

    @property
    def sizes(self) -> ViTSize:
        """The sizes in use: those of `size`, replaced by every field other than 0."""
        return ViTSize(*(getattr(self, k) or v for k, v in SIZES[self.size]._asdict().items()))

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        sizes = self.sizes
        x = embed_patches(x, sizes.width, self.patch, self.dtype)
        x = tokens(x + self._positions(x.shape[1:]))
        if self.class_token:
            init = nn.initializers.normal(0.02)
            token = self.param("class_token", init, (1, 1, sizes.width), jnp.float32)
            token = jnp.broadcast_to(token.astype(self.dtype), (len(x), 1, sizes.width))
            x = jnp.concatenate([token, x], axis=1)
        for i in range(sizes.layers):
            block = ViTBlock(
                sizes.mlp_width, sizes.attention_heads, self.gelu, self.dtype, name=f"block_{i}"
            )
            x = block(x, condition)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        return x[:, 1:] if self.class_token else x

    def _positions(self, shape: tuple[int, ...]) -> jax.Array:
        initialised = self.has_variable("params", "pos_embedding")
        stored = self.get_variable("params", "pos_embedding").shape if initialised else (1, *shape)
        x = self.param("pos_embedding", nn.initializers.normal(0.02), stored, jnp.float32)
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
    """Multi-head self-attention of tokens [B, N, D], without a mask."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return attend(x, x, None, heads=self.heads, dtype=self.dtype)


def resample(positions: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    """Return position embeddings [1, h, w, D] resized to the grid (h, w); unchanged if it fits."""
    if positions.shape[1:3] == tuple(grid):
        return positions
    shape = (1, *grid, positions.shape[-1])
    return jax.image.resize(positions, shape, "bicubic", antialias=True)
