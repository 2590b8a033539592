"""Traces and lowerings of a config for an accelerator, on a machine that has none.

A `Workload` holds a config's functions and their abstract arguments. It is traced for any platform,
and lowered for CUDA with jax's questions about the installed cuDNN answered in advance; nothing is
compiled. Compiling for a TPU needs libtpu: scripts/benchmarks/lower.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from octolike import types
from octolike.config import Config, resolve
from octolike.model import language
from octolike.model.network import PolicyNetwork, build_network
from octolike.model.target import compile_for
from octolike.train import augment, flops, gradients, initial_state, optimizer
from octolike.train import state as states
from octolike.train import step as steps

AMPERE, HOPPER = 8.0, 9.0  # compute capabilities
KERNELS = ("dot_product_attention_fwd_wrapper", "pallas_call")
CUDNN = 91500  # the version that is reported to jax


class Workload(NamedTuple):
    """A config's network with its abstract state and batch."""

    config: Config
    model: PolicyNetwork
    spec: types.BatchSpec
    state: states.TrainState

    @property
    def batch(self) -> types.Batch:
        """The abstract batch of a step."""
        return steps.abstract_batch(self.spec, self.config.data.batch_size)

    def step(self, gradient_fn: gradients.GradientFn = gradients.whole_batch) -> steps.Step:
        """Return the training step."""
        tx = optimizer.make_optimizer(self.config.optim, self.config.train.steps)
        return steps.make_step(self.model, tx, self.config, _key(), gradient_fn)

    def policy(self, batch_size: int = 1) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
        """Return the policy's function and its abstract arguments."""
        batch = steps.abstract_batch(self.spec, batch_size)

        def act(params: Any, observation: Any, task: Any) -> Any:
            rngs = {"noise": _key()}
            apply = functools.partial(self.model.apply, method="sample_actions")
            return apply({"params": params}, observation, task, rngs=rngs)

        params = jax.eval_shape(lambda state: state.policy_params(), self.state)
        return act, (params, batch["observation"], batch["task"])

    def loss(self, params: states.Params, frozen: states.Params) -> jax.Array:
        """Return the loss of the abstract batch, for traces alone."""
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.batch)
        state = dataclasses.replace(self.state, frozen=frozen)
        augmentation = self.config.train.augment
        loss, _ = steps.training_loss(self.model, augmentation, state, params, batch, _key())
        return loss


def workload(config: Config, spec: types.BatchSpec, names: types.Names) -> Workload:
    """Return the workload of a config for batches of this spec.

    Prints the matches of the patterns in optim.frozen and optim.lora.
    """
    config = resolve(config)
    settings = dataclasses.asdict(config.model)
    spec = language.extend_spec(settings, spec)
    model = build_network(settings, spec, names)
    init, frozen = initial_state.make_init(model, spec, config.optim)
    tx = optimizer.make_optimizer(config.optim, config.train.steps)
    create = initial_state.make_create(tx, frozen, config.optim)
    return Workload(config, model, spec, jax.eval_shape(lambda: create(init(_key()))))


def with_batch_size(config: Config, size: int) -> Config:
    """Return the config with another batch size."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))


def lower_for_cuda(function: Callable[..., Any], *args: Any, capability: float = HOPPER) -> str:
    """Return the StableHLO of a function for an NVIDIA GPU, of abstract arguments."""
    with compile_for("cuda", capability), _cudnn(capability):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


class AttentionFacts(NamedTuple):
    """The attention of a trace: {kernel: calls}, bytes of dense masks, bytes of dense logits.

    logits: results of all products with batch axes, which are attention without a kernel. The
    augmentation's crop, on a TPU a product as well, is left out.
    """

    kernels: dict[str, int]
    mask_bytes: int
    logit_bytes: int


def attention_facts(
    function: Callable[..., Any], *args: Any, platform: str, capability: float = 0.0
) -> AttentionFacts:
    """Return how the attention of a function is computed on a platform."""
    with compile_for(platform, capability), _cudnn(capability):
        jaxpr = jax.make_jaxpr(function)(*args)
    kernels: Counter[str] = Counter()
    masks = logits = 0
    for eqn, repeats in flops.equations(jaxpr):
        name = eqn.primitive.name
        if name in KERNELS:
            kernels[name.removesuffix("_fwd_wrapper")] += repeats
            if name == KERNELS[0]:  # query, key, value, bias, …
                bias = eqn.invars[3].aval
                masks += repeats * nbytes(bias) if math.prod(bias.shape) > 1 else 0
        elif name == "dot_general" and eqn.params["dimension_numbers"][1][0]:
            if augment.CROP in str(eqn.source_info.name_stack):
                continue
            logits += repeats * nbytes(eqn.outvars[0].aval)
    return AttentionFacts(dict(kernels), masks, logits)


def residual_bytes(work: Workload, policy: str, platform: str, capability: float = 0.0) -> int:
    """Return the bytes stored for the backward pass of a step, under a remat policy.

    The parameters, which it reads as well, are not counted; their casts are, and the sums of
    kernels and their LoRA.
    """
    network = work.model
    model = network.clone(
        remat=policy, transformer=network.transformer.clone(remat=policy, parent=None)
    )
    work = work._replace(model=model)

    def residuals(params: Any, frozen: Any) -> list[jax.Array]:
        return jax.tree.leaves(jax.vjp(lambda p: work.loss(p, frozen), params)[1])

    with compile_for(platform, capability), _cudnn(capability):
        jaxpr = jax.make_jaxpr(residuals)(work.state.params, work.state.frozen).jaxpr
    stored = {v for v in jaxpr.outvars if not isinstance(v, jax.extend.core.Literal)}
    return sum(nbytes(v.aval) for v in stored - {*jaxpr.invars})


def nbytes(x: Any) -> int:
    """Return the bytes of an abstract array."""
    return int(
        math.prod(x.shape)
        * (1 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.dtype(x.dtype).itemsize)
    )


def _key() -> jax.Array:
    return jax.random.key(0)


@contextlib.contextmanager
def _cudnn(capability: float) -> Iterator[None]:
    """Answer jax's questions about cuDNN and the GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    answers = {
        "check_cudnn_version": lambda: CUDNN,
        "check_compute_capability": lambda needed: capability >= float(needed),
        "is_cuda_compute_capability_equal": lambda other: capability == float(other),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items() if capability else ():
            stack.enter_context(mock.patch.object(fused, name, answer))
        yield
