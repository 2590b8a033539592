"""The device that a computation is traced for: it decides kernels, memory, precision and noise.

By default that is the first device of this process. `compile_for` names another one, to lower or
compile for an accelerator on a machine that has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

COUNT = "count"  # no device: a trace to count operations, without rematerialisation


class Target(NamedTuple):
    """A kind of device: "cpu", "cuda", "tpu" or another of jax's platforms.

    capability: NVIDIA's compute capability, 8.0 for Ampere; 0 for every other device.
    """

    platform: str
    capability: float = 0.0

    @property
    def is_accelerator(self) -> bool:
        """Whether memory is scarcer than arithmetic."""
        return self.platform not in ("cpu", COUNT)


# Part of the key of jit's caches: a function is traced again for another target.
_chosen = jax.make_user_context(default_value=None)


def target() -> Target:
    """Return the device that is traced for: that of `compile_for`, or this process's first one."""
    return _chosen.value or local_target()


def local_target() -> Target:
    """Return the kind of this process's first device."""
    device = jax.local_devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return Target(device.platform)
    capability = str(getattr(device, "compute_capability", ""))
    if not capability.replace(".", "").isdigit():  # AMD's are called gfx942
        return Target("rocm")
    return Target("cuda", float(capability))


@contextlib.contextmanager
def compile_for(platform: str, capability: float = 0.0) -> Iterator[Target]:
    """Trace for another kind of device within the block."""
    chosen = Target(platform, capability)
    with _chosen(chosen):
        yield chosen


def fast_key(key: jax.Array) -> jax.Array:
    """Return a key of training noise: on a TPU, of its own generator of random bits.

    The compiler of libtpu 0.0.42 ends with a stack overflow for a training step whose noise comes
    from jax's default generator, which is slow on a TPU, too. The noise is then another one. A
    policy keeps the default: its noise may not depend on the batch, as that of a TPU does.
    """
    if target().platform != "tpu":
        return key
    bits = jax.random.key_data(key)
    if bits.shape[-1] != 2:  # JAX_DEFAULT_PRNG_IMPL names another generator
        return key
    return jax.random.wrap_key_data(jnp.tile(bits, 2), impl="rbg")
