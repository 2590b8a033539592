"""Accelerators without one: every shipped config lowers for CUDA and is traced for a TPU."""

import re
from pathlib import Path

import data_fakes
import jax
import jax.numpy as jnp
import pytest

from octolike.config import Component, Config, load_module
from octolike.data import open_data
from octolike.data.specs.planned import plan_data
from octolike.model import attention, tokens
from octolike.model.target import compile_for, fast_key
from octolike.train import flops, gradients, lowering

CONFIGS = Path(__file__).parents[1] / "configs"
SHORT = ("quickstart", "tabletop", "aloha", "cotrain", "finetune")  # sequences
LONG = ("bridge", "pretrain:size=small", "pretrain:size=base")
LONG += ("metaworld:size=27m", "libero:size=27m")
FLASH = {"__cudnn$fmhaSoftmax"}
PLATFORMS = (("cuda", lowering.HOPPER), ("tpu", 0.0), ("cpu", 0.0))


def shipped(text: str, layers: int = 1) -> lowering.Workload:
    """Return a shipped config in bfloat16 with a small batch and fewer layers, else as it is."""
    name, _, arguments = text.partition(":")
    config = load_module(CONFIGS / f"{name}.py").get_config(arguments)
    config.model.layers, config.model.dtype, config.data.batch_size = layers, "bfloat16", 2
    planned = plan_data(config)
    return lowering.workload(config, planned.spec, planned.names)


def custom_calls(text: str) -> set[str]:
    return set(re.findall(r"custom_call @([\w$]+)", text))


def cudnn_calls(text: str) -> set[str]:
    return {call for call in custom_calls(text) if call.startswith("__cudnn")}


@pytest.mark.parametrize("name", SHORT + LONG)
def test_step_and_policy_of_every_config_lower_for_cuda(name):
    """A kernel with "Bias" in its name would read a dense mask.

    The last block computes few rows, without a kernel; so long sequences need a second block.
    """
    flash, backward = (FLASH, {"__cudnn$fmhaSoftmaxBackward"}) if name in LONG else (set(), set())
    work = shipped(name, layers=1 + (name in LONG))
    text = lowering.lower_for_cuda(work.step(), work.state, work.batch)
    assert cudnn_calls(text) == flash | backward
    for act, args in map(work.policy, (1, 3)):
        assert cudnn_calls(lowering.lower_for_cuda(act, *args)) == flash


def test_only_training_on_a_tpu_draws_from_its_own_generator():
    work = shipped("quickstart")
    for platform, capability in PLATFORMS:
        with compile_for(platform, capability):
            traced = str(jax.make_jaxpr(work.step())(work.state, work.batch))
            assert ("impl=rbg" in traced) == (platform == "tpu")
            act, inputs = work.policy(1)
            assert "impl=rbg" not in str(jax.make_jaxpr(act)(*inputs))
    chosen = jax.random.key(0, impl="rbg")  # as by JAX_DEFAULT_PRNG_IMPL
    with compile_for("tpu"):
        assert fast_key(chosen) is chosen


@pytest.mark.parametrize("length", [64, 65, 197, 353])
@pytest.mark.parametrize("masked", [True, False])
def test_flash_attention_takes_any_length(length, masked):
    layout = tokens.Layout((3,), (length - 4,), (1,), 1)
    x = jax.ShapeDtypeStruct((2, length, 2, 64), jnp.bfloat16)

    def loss(q, k, v, visible):
        mask = tokens.AttentionMask(visible, layout) if masked else None
        return attention.masked_attention(q, k, v, mask).astype(jnp.float32).sum()

    visible = jax.ShapeDtypeStruct((2, length), bool)
    text = lowering.lower_for_cuda(jax.grad(loss, argnums=(0, 1, 2)), x, x, x, visible)
    assert custom_calls(text) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}


def test_a_long_sequence_gets_a_kernel_and_no_tensor_of_all_pairs():
    work = shipped("bridge", layers=2)
    pairs = (8 + 2 * 257) ** 2  # half of the words; cameras and readout of two timesteps
    facts = {
        platform: lowering.attention_facts(
            work.step(), work.state, work.batch, platform=platform, capability=capability
        )
        for platform, capability in PLATFORMS
    }
    # one block is read completely, on CUDA in two spans; the last one for the readouts alone
    assert facts["cuda"].kernels == {"dot_product_attention": 2}
    assert facts["tpu"].kernels == {"pallas_call": 3}  # forward, and two backward
    assert facts["cpu"].kernels == {}
    assert {f.mask_bytes for f in facts.values()} == {0}
    batch, heads = 2, work.config.model.attention_heads
    assert facts["cpu"].logit_bytes > batch * heads * pairs
    for platform in ("cuda", "tpu"):
        assert facts[platform].logit_bytes < 0.15 * facts["cpu"].logit_bytes


def test_remat_stores_less():
    work = shipped("bridge", layers=4)
    none, dots, full = (
        lowering.residual_bytes(work, policy, "cuda", lowering.HOPPER)
        for policy in ("none", "dots", "full")
    )
    assert full < 0.5 * dots < 0.25 * none
    auto = {p: lowering.residual_bytes(work, "auto", p, c) for p, c in PLATFORMS}
    assert auto["cuda"] == dots
    assert auto["cpu"] == lowering.residual_bytes(work, "none", "cpu")


@pytest.mark.parametrize(
    ("mix", "options"),
    [
        ("fake", {}),
        ("bridge_dataset", {"window": 2, "horizon": 3, "goal": "uniform"}),
        ("fake", {"use_proprio": False, "representation": "as_stored"}),
        ("fake", {"representation": "relative tool_frame rotation_6d"}),
    ],
)
def test_the_planned_batch_is_that_of_the_data(tmp_path, mix, options):
    data_fakes.write_numbered(tmp_path, mix, [6, 8, 7])
    config = data_fakes.config(tmp_path, mix, **options)
    data, planned = open_data(config), plan_data(config)
    assert planned.spec == data.spec
    assert planned.names == data.names._replace(tasks=())


def count_and_compiled(function, *args) -> tuple[float, float]:
    compiled = jax.jit(function).lower(*args).compile()
    return flops.count(function, *args), compiled.cost_analysis()["flops"]


def test_operations_equal_the_compilers_where_that_is_right():
    kernel, x = jnp.ones((64, 96)), jnp.ones((32, 64))
    assert flops.count(jnp.matmul, x, kernel) == 2 * 32 * 64 * 96
    counted, compiled = count_and_compiled(jnp.matmul, x, kernel)
    assert counted == compiled

    def loss(kernel, images):
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            images, kernel, (2, 2), "VALID", dimension_numbers=dimensions
        )
        return (y * y).sum()

    inputs = jnp.ones((3, 3, 16, 32)), jnp.ones((4, 33, 33, 16))
    for function in (loss, jax.grad(loss), jax.grad(loss, argnums=1)):
        counted, compiled = count_and_compiled(function, *inputs)
        assert counted == pytest.approx(compiled, rel=0.05)  # which counts element-wise work too


def test_a_scan_counts_as_often_as_it_runs():
    def run(x, steps):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=steps)[0]

    x = jnp.ones((8, 8))
    assert flops.count(lambda x: run(x, 7), x) == 7 * 2 * 8**3


def test_a_step_counts_the_same_with_accumulation_and_rematerialisation():
    work = shipped("bridge", layers=2)
    work.config.data.batch_size = 4
    step = flops.count(work.step(), work.state, work.batch)
    parts = work.step(gradients.accumulated(gradients.whole_batch, 2))
    assert flops.count(parts, work.state, work.batch) == pytest.approx(step, rel=1e-3)
    remat = work._replace(model=work.model.clone(remat="full"))
    assert flops.count(remat.step(), work.state, work.batch) == step


@pytest.mark.parametrize(
    ("frozen", "rank"), [((), 0), (("tokenizers_*",), 0), (("*", "!heads_*"), 4)]
)
def test_a_whole_step_counts_nearly_what_the_compiler_counts(frozen, rank):
    """Without the gradients of frozen parameters, and without a pass back to where all are."""
    config = Config(workdir="unused")
    config.data.mix, config.data.cameras = "tabletop", {"primary": 32}
    config.data.batch_size, config.model.width, config.model.mlp_width = 8, 128, 512
    encoder = Component(kind="small_stem", features=(32, 64), patch=8, width=128)
    config.model.tokenizers = {
        "language": Component(kind="language", vocabulary=4096, width=64),
        "primary": Component(kind="image", cameras=("primary",), encoder=encoder),
    }
    config.model.heads = {"action": Component(kind="mse")}
    config.data.goal = "none"
    config.optim.frozen = frozen
    if rank:
        config.optim.lora, config.optim.lora_rank = ("transformer/*kernel",), rank
    planned = plan_data(config)
    work = lowering.workload(config, planned.spec, planned.names)
    counted, compiled = count_and_compiled(work.step(), work.state, work.batch)
    assert counted == pytest.approx(compiled, rel=0.15)
