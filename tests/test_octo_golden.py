"""Imported checkpoints of Octo compute Octo's own outputs (shared/golden/README.md)."""

import copy
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import octo_fakes as fakes
import octo_numpy
import pytest

from octolike import types
from octolike.model import heads, language, language_weights, tokens
from octolike.octo_import import golden, importer, octo_config, octo_text
from octolike.types import Names, TokenGroup, batch_spec, unflatten

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.exists(), reason="golden data are not next to this checkout"
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Return a function that imports a golden checkpoint, once each."""
    done = {}

    def get(name):
        if name not in done:
            source = GOLDEN / name / "octo_ckpt"
            target = tmp_path_factory.mktemp(name)
            encoder = str(GOLDEN / "tiny-t5")
            done[name] = importer.import_checkpoint(source, target, text_encoder=encoder)
        return done[name]

    return get


@needs_golden
@pytest.mark.parametrize("name", ["octo_small_shape", "octo_l1_map"])
def test_outputs_equal_those_of_octo(imported, name):
    rows = golden.compare(imported(name), GOLDEN / name)
    table = golden.table(rows)
    # a whole sampling run amplifies rounding: a few values may differ more, and the table shows it
    assert all(row.good for row in rows), table
    assert "float32 products" in table
    assert max(row.difference for row in rows) < 5e-4, table
    outputs = set(np.load(GOLDEN / name / "outputs.npz").files)
    inputs = {"eps/time", "eps/noisy_actions", "loss/time", "loss/noise", "ddpm/init", "ddpm/z"}
    assert {row.output for row in rows} == outputs - inputs - set(golden.IGNORED)
    exact = [r for r in rows if r.output.startswith(("tokens", "mask", "eps", "betas", "sample"))]
    assert max(row.difference for row in exact) < 1e-5, table


def test_a_chain_is_judged_by_its_sensitivity_if_single_passes_agree():
    row = golden.OutputComparison
    chain = row(golden.CHAIN, 3e-4, False, sensitivity=5e-4)

    def verdict(*rows):
        return golden._judge_chain(list(rows))[-1].good

    assert verdict(row("eps/pred", 1e-6, True), chain)
    assert not verdict(row("eps/pred", 5e-5, True), chain)  # a pass that differs explains nothing
    assert not verdict(row("eps/pred", 1e-6, True), chain._replace(sensitivity=2e-4))
    assert not verdict(chain)  # alone


@needs_golden
def test_recorded_steps_judge_a_chain(imported, tmp_path):
    """A chain of numpy in float64 with the golden noise; then one with a wrong step."""
    run, folder = imported("octo_small_shape"), GOLDEN / "octo_small_shape"
    inputs, outputs = (dict(np.load(folder / f"{name}.npz")) for name in ("inputs", "outputs"))
    leaves = importer.read(folder / "octo_ckpt").params
    betas = outputs["betas"].astype(np.float64)
    embedding = outputs["tokens/readout_action"].astype(np.float64).mean(axis=-2)
    steps = [
        octo_numpy.ddpm(leaves, embedding[:, w], outputs["ddpm/init"][:, w], z, betas)
        for w, z in enumerate(np.moveaxis(outputs["ddpm/z"], 2, 0).astype(np.float64))
    ]
    outputs["ddpm/x"] = x = np.stack(steps, axis=2)
    actions = x[-1, :, -1].reshape(outputs["ddpm/actions"].shape)
    np.testing.assert_allclose(actions, outputs["ddpm/actions"], atol=2e-4)
    outputs["ddpm/actions"] = actions

    def judged():
        np.savez(tmp_path / "inputs.npz", **inputs)
        np.savez(tmp_path / "outputs.npz", **outputs)
        return {row.output: row for row in golden.compare(run, tmp_path)}

    rows = judged()
    differences = [rows[f"ddpm/x[{i}]"].difference for i in range(len(x))]
    assert max(differences) < golden.LIMIT, differences
    chain = rows["ddpm/actions"]
    assert chain.good, chain
    if chain.difference > golden.LIMIT:
        assert "judged by its steps" in chain.remark
    outputs["ddpm/actions"] = actions + 1e-3
    assert {key for key, row in judged().items() if not row.good} == {"ddpm/x[-1]", "ddpm/actions"}
    x[7, 1, -1, 3] += 1e-3
    rows = judged()
    assert {key for key, row in rows.items() if not row.good} >= {"ddpm/x[7]", "ddpm/actions"}
    assert rows["ddpm/x[6]"].good
    assert rows["ddpm/x[9]"].good
    outputs["ddpm/x"] = x[:, :, -1]
    row = judged()["ddpm/x"]
    assert (row.good, row.remark) == (False, "[20, 3, 28], expected [20, 3, 2, 28], as ddpm/z")


@needs_golden
def test_golden_comparison_sees_a_changed_parameter(imported):
    """Break it on purpose: one parameter off by a thousandth."""
    good = imported("octo_l1_map")
    params = jax.tree.map(np.copy, good.run.params)
    params["transformer"]["block_0"]["mlp_in"]["bias"] += 1e-3
    bad = good._replace(run=dataclasses.replace(good.run, params=params))
    rows = golden.compare(bad, GOLDEN / "octo_l1_map")
    assert not all(row.good for row in rows)
    assert "NO" in golden.table(rows)


@needs_golden
@pytest.mark.parametrize("repeat", [False, True])
def test_attention_of_first_releases(repeat):
    """The first releases treat a readout as a register, as the recorded masks show."""
    parts = np.load(GOLDEN / "octo_parts" / "outputs.npz")
    expected = np.load(GOLDEN / "octo_parts" / "variants.npz")[
        f"repeat{repeat:d}_correct0/attention_mask"
    ]
    names = ["obs_primary", "obs_wrist", *(["obs_task_language"] if repeat else [])]

    def group(name):
        mask = parts[f"transformer/{name}/mask"].astype(bool)
        return TokenGroup(np.zeros((*mask.shape, 1)), mask)

    seen = {name: group(name) for name in [*names, "readout_action"]}
    groups = tokens.TokenSequence({"task_language": group("task_language")}, seen, {})
    np.testing.assert_array_equal(tokens.attention_mask(groups).dense(), expected)


def test_first_releases_make_a_register_of_the_readout(tmp_path):
    run = fakes.import_run(tmp_path, fakes.config(use_correct_attention=False)).run
    assert run.config.model.registers == ("action",)
    batch = types.zeros(run.spec, 1)
    batch["observation"]["present"]["image_primary"][:] = True
    other = jax.tree.map(np.copy, run.params)
    other["readout_action_pos_embedding"] *= -1
    seen = [
        golden.encode(dataclasses.replace(run, params=p), batch)["obs_primary"].tokens
        for p in (run.params, other)
    ]
    assert np.abs(seen[0] - seen[1]).max() > 1e-3  # observations look at it


HEADS = {
    "continuous_mean": fakes.spec("ContinuousActionHead"),
    "mse_map": fakes.spec("MSEActionHead"),
    "l1_map": fakes.spec("L1ActionHead"),
    "discrete_uniform_single": fakes.spec("DiscreteActionHead", token_per=""),
    "discrete_normal_action_horizon": fakes.spec(
        "DiscreteActionHead", token_per="action_horizon", normalization_type="normal"
    ),
    "discrete_uniform_action_dim_and_action_horizon": fakes.spec("DiscreteActionHead"),
}


@needs_golden
@pytest.mark.parametrize("name", HEADS)
def test_other_heads(name):
    """Put each recorded head in place of the checkpoint's, with its parameters."""
    stored = importer.read(GOLDEN / "octo_small_shape" / "octo_ckpt")
    head = copy.deepcopy(HEADS[name])
    head["kwargs"] |= {"readout_key": "readout_action", "action_horizon": 4, "action_dim": 7}
    if head["name"] == "DiscreteActionHead":
        head["kwargs"] |= {"vocab_size": 32, "use_map": True}
    stored.config["model"]["heads"]["action"] = head
    parts = np.load(GOLDEN / "octo_parts" / "heads.npz")
    prefix = f"{name}/params/"
    own = {f"heads_action/{k[len(prefix) :]}": v for k, v in parts.items() if k.startswith(prefix)}
    component = octo_config.translate(stored.config, stored.batch).config.model.heads["action"]
    params = unflatten({importer.target_path(k).replace("/", "."): v for k, v in own.items()})
    spec = {"action": ((2, 4, 7), "float32")}
    made = heads.build(component, "head", spec, names=Names((), ()), dtype=np.float32)
    bound = made.bind({"params": params["heads_action"]})
    # The recorded heads with attention pooling read all observations.
    prefix = "readout_action" if name == "continuous_mean" else "obs"
    outputs = np.load(GOLDEN / "octo_parts" / "outputs.npz")
    x, mask = (outputs[f"transformer/{prefix}/{part}"] for part in ("tokens", "mask"))
    group = TokenGroup(x, mask.astype(bool))
    got = bound.sample(group)
    np.testing.assert_allclose(got, parts[f"{name}/predict_argmax"], atol=1e-5, rtol=0)


@needs_golden
@pytest.mark.parametrize("size", ["small", "base"])
def test_published_sizes(tmp_path, size):
    """Octo 1.5 as published: every path has a place, every parameter of ours is filled."""
    file = GOLDEN / "octo_parts" / f"octo_{size}_1_5_param_shapes.json"
    leaves = {k: jax.ShapeDtypeStruct(*v) for k, v in json.loads(file.read_text()).items()}
    stored, example = published(size)
    translation = octo_config.translate(stored, example)
    spec = batch_spec(importer.to_batch(example, translation))
    parts = octo_text.split_text_encoders(leaves)
    sizes = octo_text.t5_config(parts.encoders["language"])
    language_weights.save(tmp_path / "t5", sizes, {})
    encoder = {"kind": "t5", "path": str(tmp_path / "t5")}
    translation.config.model.tokenizers["language"]["encoder"] = encoder
    shapes = importer.shapes_of(translation.config, spec, Names((), ()))
    assert sorted(importer.fit(parts.others, shapes).values()) == sorted(parts.others)
    states = language.extend_spec(dataclasses.asdict(translation.config.model), spec)
    assert states[language.STATES] == ((16, 768), "float32")
    counts = {k: int(np.prod(x.shape)) for k, x in leaves.items() if "hf_model" not in k}
    assert round(sum(counts.values()) / 1e6) == {"small": 27, "base": 93}[size]


def published(size: str) -> tuple[dict, dict]:
    """Return config.json and the example batch of Octo 1.5."""
    width, mlp, heads = {"small": (384, 1536, 6), "base": (768, 3072, 12)}[size]
    sizes = {"num_layers": 12, "mlp_dim": mlp, "num_attention_heads": heads, "dropout_rate": 0.0}
    cameras = {"primary": 256, "wrist": 128}

    def look(camera: str) -> dict:
        key = f"image_{camera}"
        return fakes.image(key, task_stack_keys=[key], encoder=fakes.spec("SmallStem16"))

    chunk = {"action_horizon": 4, "action_dim": 7, "n_diffusion_samples": 1}
    head = fakes.spec("DiffusionActionHead", readout_key="readout_action", use_map=False, **chunk)
    stored = fakes.config(
        observation_tokenizers={camera: look(camera) for camera in cameras},
        task_tokenizers={"language": fakes.spec("LanguageTokenizer", encoder="t5-base")},
        heads={"action": head},
        token_embedding_size=width,
        transformer_kwargs={**sizes, "attention_dropout_rate": 0.0},
        max_horizon=10,
        repeat_task_tokens=True,
    )
    options = {"max_length": 16, "padding": "max_length", "truncation": True}
    stored["text_processor"] = fakes.spec(
        "HFTokenizer", tokenizer_name="t5-base", tokenizer_kwargs=options
    )
    images = {f"image_{c}": np.zeros((1, 2, n, n, 3), np.uint8) for c, n in cameras.items()}
    words = {k: np.ones((1, 16), np.int64) for k in ("input_ids", "attention_mask")}
    example = {
        "observation": {**images, "timestep_pad_mask": np.ones((1, 2), bool)},
        "task": {"language_instruction": words},
        "action": np.zeros((1, 2, 4, 7), np.float32),
    }
    return stored, example
