"""Octo's checkpoints become runs that act and finetune; unsupported parts are refused.

The golden checkpoints and arrays are Octo's own (shared/golden/README.md). The variants that they
lack are tiny checkpoints with random parameters: octo_fakes.py.
"""

import copy
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import octo_fakes as fakes
import pytest
from train_fakes import FakeSource

from octolike import types
from octolike.config import ConfigError
from octolike.model import heads, language, language_weights, tokens
from octolike.octo_import import golden, importer, octo_config, octo_text
from octolike.policy import Policy
from octolike.train import checkpoint, loop
from octolike.types import Names, TokenGroup, batch_spec, unflatten

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.exists(), reason="golden data are not next to this checkout"
)


def import_fake(tmp_path, *parts, **kwargs):
    fakes.write(tmp_path / "octo", *parts)
    return importer.import_checkpoint(tmp_path / "octo", tmp_path / "run", **kwargs)


# Octo's own arrays


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
    run = import_fake(tmp_path, fakes.config(use_correct_attention=False)).run
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


# Variants in Octo's layout


def lowdim(**kwargs):
    return fakes.spec("LowdimObsTokenizer", obs_keys=["proprio"], **kwargs)


def head(name, **kwargs):
    return fakes.sized(fakes.spec(name, readout_key="readout_action", **kwargs))


VARIANTS = {
    "cameras, stacked by pattern, with goals": (
        {
            "observation_tokenizers": {
                "all": fakes.image("image_(primary|wrist)", task_stack_keys=["image_.*"])
            }
        },
        ("wrist", "primary"),
        {"tokenizers": {"all": {"cameras": ("primary", "wrist"), "goal": True}}},
    ),
    "patches, imagenet pixels, few tokens": (
        {
            "observation_tokenizers": {
                "primary": fakes.image(
                    "image_primary",
                    encoder=fakes.spec("PatchEncoder", patch_size=8, img_norm_type="imagenet"),
                    use_token_learner=True,
                    num_tokens=3,
                )
            }
        },
        ("primary",),
        {"tokenizers": {"primary": {"pixels": "imagenet", "learned_tokens": 3}}},
    ),
    "proprio in normal bins, noise in 5 steps": (
        {
            "observation_tokenizers": {
                "primary": fakes.image("image_primary"),
                "state": lowdim(discretize=True, bin_type="normal", n_bins=8),
            },
            "heads": {"action": head("DiffusionActionHead", diffusion_steps=5, hidden_dim=32)},
        },
        ("primary",),
        {
            "tokenizers": {"state": {"bins": 8, "bin_kind": "normal", "outside": "first"}},
            "heads": {"action": {"steps": 5}},
        },
    ),
    "proprio as it is, all observations read": (
        {
            "observation_tokenizers": {"primary": fakes.image("image_primary"), "state": lowdim()},
            "heads": {"action": head("L1ActionHead") | {}},
            "readouts": {"action": 2, "spare": 1},
        },
        ("primary",),
        {"tokenizers": {"state": {"each": True}}, "heads": {"action": {"pooling": "attention"}}},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_fit(tmp_path, name):
    """Every parameter has its place, and the settings equal Octo's."""
    model, cameras, expected = VARIANTS[name]
    imported = import_fake(tmp_path, fakes.config(**model), fakes.batch(cameras))
    assert imported.run.step == fakes.STEP
    assert imported.run.config.data.resize == "lanczos3"  # as Octo's data pipeline
    assert imported.run.config.model.max_window == 4  # Octo's max_horizon, wider than the window
    for part, components in expected.items():
        for key, fields in components.items():
            found = getattr(imported.run.config.model, part)[key]
            assert {k: found[k] for k in fields} == fields


def test_observation_readout(tmp_path):
    stored = fakes.config(heads={"action": head("MSEActionHead", use_map=True)})
    stored["model"]["heads"]["action"]["kwargs"]["readout_key"] = "obs"
    run = import_fake(tmp_path, stored).run
    assert run.config.model.heads["action"]["readout"] == "obs"
    assert act(tmp_path / "run").shape == (fakes.HORIZON, fakes.ACTION)


def test_film_follows_the_embedded_instruction():
    encoder = fakes.stem(use_film=True)
    stored = fakes.config(
        observation_tokenizers={
            "primary": fakes.image(
                "image_primary", encoder=encoder, task_film_keys=["language_instruction"]
            )
        },
    )
    example = fakes.batch()
    example["task"]["language_instruction"] = np.ones((1, 6), np.float32)
    made = octo_config.translate(stored, example).config.model
    assert made.tokenizers["primary"]["film"]
    theirs = "octo_transformer/observation_tokenizers_primary/SmallStem16_0/FilmConditioning_0"
    ours = "tokenizers_primary/encoder/film"
    assert importer.target_path(f"{theirs}/Dense_0/kernel") == f"{ours}/scale/kernel"
    assert importer.target_path(f"{theirs}/Dense_1/bias") == f"{ours}/shift/bias"


def test_parts_that_the_data_lack_are_left_out(tmp_path):
    """Octo drops a tokenizer whose camera is not in the data; the import does, too."""
    both = {c: fakes.image(f"image_{c}") for c in ("primary", "wrist")}
    imported = import_fake(tmp_path, fakes.config(observation_tokenizers=both))
    assert set(imported.run.config.model.tokenizers) == {"primary"}
    assert any("observation_tokenizers.wrist is left out" in note for note in imported.notes)


def test_first_releases_have_other_names(tmp_path):
    stored, example = fakes.config(), fakes.batch()
    del stored["model"]["use_correct_attention"], stored["window_size"]
    kwargs = stored["model"]["heads"]["action"]["kwargs"]
    kwargs["pred_horizon"] = kwargs.pop("action_horizon")
    leaves = fakes.params(octo_config.modernize(stored), example)
    example["tasks"] = example.pop("task")
    example["observation"]["pad_mask"] = example["observation"].pop("timestep_pad_mask")
    example["action"] = example["action"][:, :, 0]  # chunked later, by the head
    run = import_fake(tmp_path, stored, example, None, leaves).run
    assert run.spec["action"] == ((fakes.WINDOW, fakes.HORIZON, fakes.ACTION), "float32")
    assert run.config.model.registers == ("action",)


def test_orbax_is_read_if_there_is_no_file_of_flax(tmp_path):
    stored, example = fakes.config(), fakes.batch()
    leaves = fakes.params(stored, example)
    kept = [
        importer.read(fakes.write(tmp_path / kind, stored, example, None, leaves, orbax=orbax))
        for kind, orbax in (("flax", False), ("orbax", True))
    ]
    assert kept[0].params.keys() == kept[1].params.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(kept[1].params[path], leaf)


# Robots


def test_records_follow_the_statistics(tmp_path):
    stored = fakes.config(
        observation_tokenizers={"primary": fakes.image("image_primary"), "state": lowdim()}
    )
    stored["dataset_kwargs"] = {"action_proprio_normalization_type": "bounds"}
    run = import_fake(tmp_path, stored).run
    assert run.names.embodiments == run.names.datasets == ("one", "two")
    robot, numbers = run.embodiments[1], fakes.statistics()["two"]
    assert robot.normalization == "bounds"
    x = np.linspace(-1, 1, fakes.ACTION).astype(np.float32)
    low, high = np.array(numbers["action"]["p01"]), np.array(numbers["action"]["p99"])
    expected = np.where(numbers["action"]["mask"], (x + 1) / 2 * (high - low) + low, x)
    np.testing.assert_allclose(robot.unnormalize_action(x), expected, rtol=1e-6)
    assert robot.proprio_statistics.mean.shape == (fakes.PROPRIO,)


def test_proprio_without_statistics_is_taken_as_it_is(tmp_path):
    numbers = fakes.statistics()["one"]
    del numbers["proprio"]
    stored = fakes.config(
        observation_tokenizers={"primary": fakes.image("image_primary"), "state": lowdim()}
    )
    imported = import_fake(tmp_path, stored, None, numbers)
    x = np.arange(fakes.PROPRIO, dtype=np.float32)
    np.testing.assert_array_equal(imported.run.embodiments[0].normalize_proprio(x), x)
    assert any("proprio is missing" in note for note in imported.notes)


# Acting and finetuning


def act(run_dir, **observation):
    """Return the actions of an imported policy for a black picture."""
    policy = Policy.load(run_dir, embodiment="one")
    picture = np.zeros((fakes.SIDE, fakes.SIDE, 3), np.uint8)
    seen = {"image_primary": picture, **observation}
    return policy.sample_actions(seen, policy.create_task(), seed=0)


def test_imported_policy_acts_and_finetunes(tmp_path, capsys):
    stored = fakes.config(
        observation_tokenizers={"primary": fakes.image("image_primary"), "state": lowdim()}
    )
    run = import_fake(tmp_path, stored).run
    actions = act(tmp_path / "run", proprio=np.zeros(fakes.PROPRIO, np.float32))
    assert actions.shape == (fakes.HORIZON, fakes.ACTION)
    assert np.isfinite(actions).all()

    config = copy.deepcopy(run.config)
    config.workdir = str(tmp_path / "finetuned")
    config.train.init_from, config.train.steps = str(tmp_path / "run"), 2
    config.data.batch_size, config.optim.warmup, config.train.validate_every = 2, 0, 0
    example = importer.to_batch(
        fakes.batch(size=2), octo_config.translate(octo_config.modernize(stored), fakes.batch())
    )

    class Stream:
        state = lambda self: {}
        memory = lambda self: 0
        close = lambda self: None
        __iter__ = lambda self: self
        __next__ = lambda self: example

    source = FakeSource(
        lambda position: Stream(), names=run.names, spec=run.spec, embodiments=run.embodiments
    )
    finished = loop.train(config, source)
    assert int(finished.step) == 2
    assert "starting from the parameters" in capsys.readouterr().out
    tuned = checkpoint.load_run(config.workdir).params
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), run.params, tuned)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-2


# Bad input


def changed(**model):
    return fakes.config(**model)


ERRORS = {
    "more than one token per readout": (
        changed(use_correct_attention=False, readouts={"action": 2}),
        "use_correct_attention is false",
    ),
    "position embedding over the sequence": (
        changed(
            transformer_kwargs={
                "num_layers": 1,
                "mlp_dim": 8,
                "num_attention_heads": 2,
                "add_position_embedding": True,
            }
        ),
        "add_position_embedding is True",
    ),
    "unknown encoder": (
        changed(
            observation_tokenizers={"p": fakes.image("image_.*", encoder=fakes.spec("ViTResnet"))}
        ),
        "encoder: 'ViTResnet'.*choices: PatchEncoder, SmallStem",
    ),
    "unknown head": (
        changed(heads={"action": head("UNetDDPMActionHead")}),
        "class at model.heads.action: 'UNetDDPMActionHead'.*DiffusionActionHead",
    ),
    "unknown setting": (
        changed(heads={"action": head("MSEActionHead", max_actoin=3)}),
        "'max_actoin'; did you mean 'max_action'",
    ),
    "unknown model setting": (changed(token_dropout=0.1), "setting of model: 'token_dropout'"),
    "padding that is seen": (
        changed(observation_tokenizers={"p": fakes.image("image_.*", proper_pad_mask=False)}),
        "proper_pad_mask is False",
    ),
    "other goals than cameras": (
        changed(
            observation_tokenizers={"p": fakes.image("image_pri", task_stack_keys=["image_wr"])}
        ),
        r"goals \['image_wrist'\]",
    ),
    "two chunk sizes": (
        changed(
            heads={
                "action": head("MSEActionHead"),
                "long": fakes.spec("L1ActionHead", readout_key="readout_action", action_horizon=9),
            }
        ),
        "differ in .action_horizon, action_dim.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_parts_that_octolike_does_not_have_are_named(name):
    stored, match = ERRORS[name]
    with pytest.raises(ConfigError, match=match):
        octo_config.translate(stored, fakes.batch(("primary", "wrist")))


def test_unknown_text_processor():
    stored = fakes.config(task_tokenizers={"language": fakes.spec("LanguageTokenizer")})
    stored["text_processor"] = fakes.spec("MuseEmbedding")
    example = fakes.batch()
    example["task"]["language_instruction"] = np.ones((1, 512), np.float32)
    with pytest.raises(ConfigError, match=r"class at text_processor: 'MuseEmbedding'"):
        octo_config.translate(stored, example)


def test_every_leaf_must_fit(tmp_path):
    stored, example = fakes.config(), fakes.batch()
    leaves = fakes.params(stored, example)
    path = "octo_transformer/obs_primary_projection/kernel"
    spoiled = {
        "missing": ({k: v for k, v in leaves.items() if k != path}, f"nothing fills.*{path}"),
        "extra": ({**leaves, "heads_action/extra/kernel": leaves[path]}, "no place for heads_act"),
        "shape": ({**leaves, path: leaves[path][:-1]}, rf"{path} is \[7, 16\], expected \[8, 16\]"),
    }
    for name, (bad, match) in spoiled.items():
        fakes.write(tmp_path / name, stored, example, None, bad)
        with pytest.raises(ValueError, match=match):
            importer.import_checkpoint(tmp_path / name, tmp_path / f"{name}_run")
        assert not (tmp_path / f"{name}_run").exists()


def test_missing_files(tmp_path):
    source = fakes.write(tmp_path / "octo")
    with pytest.raises(FileNotFoundError, match=r"has no step 3; it has \[7\]"):
        importer.read(source, step=3)
    with pytest.raises(FileNotFoundError, match="holds no Octo checkpoint"):
        importer.read(tmp_path / "nowhere")
    (source / "dataset_statistics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no dataset_statistics\.json; it holds"):
        importer.read(source)
    with pytest.raises(ConfigError, match="not empty"):
        importer.import_checkpoint(source, source)


def test_script(tmp_path, monkeypatch, capsys):
    """The command prints the imported parts; an error is one line and exit code 1."""
    path = ROOT / "scripts" / "import_octo.py"
    script = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location("import_octo", path)
    )
    spec.loader.exec_module(script)
    fakes.write(tmp_path / "octo")
    command = ["import_octo.py", "--source", str(tmp_path / "octo"), "--target"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "run")])
    script.main()
    out = capsys.readouterr().out
    assert "total" in out
    assert "note: config.json has no action_proprio_normalization_type" in out
    with pytest.raises(SystemExit, match=r"error: .*is not empty"):
        script.main()
