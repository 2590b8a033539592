"""Octo checkpoints with FiLM on embedded instructions, against octo_numpy.py (none is recorded)."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import octo_fakes as fakes
import octo_numpy
import pytest

from octolike.config import ConfigError
from octolike.model import language
from octolike.model.network import build_network
from octolike.octo_import import golden, importer, octo_config
from octolike.policy import Policy
from octolike.text import TableTokenizer
from octolike.types import Names, batch_spec

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.exists(), reason="golden data are not next to this checkout"
)
WORDS = "language_instruction"
TEXTS = ["", "lift the cube", "open the drawer"]
WIDTH = 6
TWO = {"kernel_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1], "features": [32, 32]}
ENCODERS = {
    "stem": fakes.spec("SmallStem16", use_film=True, patch_size=32, num_features=8, **TWO),
    "patches": fakes.spec("PatchEncoder", use_film=True, patch_size=4, num_features=8),
    "resnet": fakes.spec("ViTResnet", use_film=True, width=0.5, num_layers=[1, 2, 1]),
    "resnet, root only": fakes.spec("ViTResnet", use_film=True, width=0.5, num_layers=[]),
}


def vectors(*shape: int) -> np.ndarray:
    """Return an embedding of every text."""
    return np.random.default_rng(5).normal(size=(len(TEXTS), *shape)).astype(np.float32)


def checkpoint(tmp_path, encoder="stem", tokens=False, shape=(WIDTH,), **model):
    """Write a checkpoint and its table; return (config, parameters, directory, table)."""
    image = fakes.image("image_primary", encoder=ENCODERS[encoder], task_film_keys=[WORDS])
    stored = fakes.config(
        observation_tokenizers={"primary": image},
        task_tokenizers={"language": fakes.spec("LanguageTokenizer")} if tokens else {},
        **model,
    )
    stored["text_processor"] = fakes.spec("MuseEmbedding")
    example = fakes.batch()
    example["task"][WORDS] = np.zeros((1, *shape), np.float32)
    leaves = parameters(stored, example)
    source = fakes.write(tmp_path / "octo", stored, example, None, leaves)
    table = tmp_path / "instructions.npz"
    np.savez(table, texts=TEXTS, vectors=vectors(*shape))
    return stored, leaves, source, str(table)


def parameters(stored, example):
    """Return random parameters of Octo; those of FiLM come from the instruction's states."""
    translation = octo_config.translate(stored, example)
    config, names = translation.config, Names(("one",), ("one",))
    for tokenizer in config.model.tokenizers.values():
        if tokenizer["kind"] in language.READERS:
            tokenizer["encoder"] = {"kind": "table"}  # the network does not contain it
    spec = batch_spec(importer.to_batch(example, translation))
    (length,), _ = spec["task.language.ids"]
    spec[language.STATES] = ((length, example["task"][WORDS].shape[-1]), "float32")
    model = build_network(dataclasses.asdict(config.model), spec, names)
    shapes = jax.eval_shape(lambda: importer.state.init_params(model, spec, jax.random.key(0)))
    return fakes.leaves_of(stored, shapes)


def given(tokens, shape, size=3):
    """Return an Octo batch with a padded step and an absent instruction, and its vectors."""
    batch = fakes.batch(size=size)
    embedded = vectors(*shape)[[1, 0, 2]]  # Octo embeds an absent instruction as the empty text
    batch["task"][WORDS] = embedded
    batch["task"]["pad_mask_dict"][WORDS] = np.array([True, False, True])
    batch["observation"]["timestep_pad_mask"][2, 0] = False
    return batch, embedded


def flattened(tree, prefix=""):
    for key, value in tree.items():
        yield from (
            flattened(value, f"{prefix}{key}/")
            if isinstance(value, dict)
            else [(prefix + key, value)]
        )


@pytest.mark.parametrize(
    ("encoder", "tokens", "shape"),
    [
        ("stem", True, (WIDTH,)),
        ("patches", False, (2, WIDTH)),
        ("resnet", False, (WIDTH,)),
        ("resnet, root only", True, (2, WIDTH)),
    ],
)
def test_tokens_and_actions_equal_the_reference(tmp_path, encoder, tokens, shape):
    stored, leaves, source, table = checkpoint(tmp_path, encoder, tokens, shape)
    imported = importer.import_checkpoint(source, tmp_path / "run", text_encoder=table)
    assert any("MuseEmbedding is not run" in note for note in imported.notes)
    batch, embedded = given(tokens, shape)
    expected = octo_numpy.outputs(stored, leaves, batch, embedded)
    visible = {"obs_primary": batch["observation"]["timestep_pad_mask"]}
    visible |= {"task_language": batch["task"]["pad_mask_dict"][WORDS]} if tokens else {}
    for group, mask in visible.items():
        shape = expected[f"tokens/{group}"].shape[:-1]
        expected[f"mask/{group}"] = np.broadcast_to(mask[..., None], shape)
    np.savez(tmp_path / "inputs.npz", **dict(flattened(batch)))
    np.savez(tmp_path / "outputs.npz", **expected)
    rows = golden.compare(imported, tmp_path)
    assert {row.output for row in rows} == set(expected)
    # the group norms of a ResNet over very few pixels amplify rounding
    assert max(row.difference for row in rows) < 2e-5, golden.table(rows)


@needs_golden
def test_film_on_the_states_of_a_pretrained_encoder(tmp_path):
    """Octo's HFTokenizer with encode_with_model: all states of an instruction are one vector."""
    t5 = str(GOLDEN / "tiny-t5")
    whole = GOLDEN / "octo_small_shape" / "octo_ckpt"
    importer.import_checkpoint(whole, tmp_path / "t5_run", text_encoder=t5)
    encoder = tmp_path / "encoder"  # with the weights, which tiny-t5 lacks
    shutil.copytree(tmp_path / "t5_run" / "tokenizer", encoder)
    shutil.copytree(tmp_path / "t5_run" / "text_encoder", encoder, dirs_exist_ok=True)
    image = fakes.image("image_primary", encoder=ENCODERS["stem"], task_film_keys=[WORDS])
    stored = fakes.config(observation_tokenizers={"primary": image})
    options = {"tokenizer_name": str(encoder), "tokenizer_kwargs": {}, "encode_with_model": True}
    stored["text_processor"] = fakes.spec("HFTokenizer", **options)
    example = fakes.batch()
    example["task"][WORDS] = np.zeros((1, 16, 48), np.float32)
    leaves = parameters(stored, example)
    source = fakes.write(tmp_path / "octo", stored, example, None, leaves)
    run = importer.import_checkpoint(source, tmp_path / "run").run
    assert run.config.data.text["length"] == 16
    policy = Policy.load(tmp_path / "run", embodiment="one")
    task = policy.create_task("put it on the plate")
    states = task.inputs["language"]["states"]
    assert states.shape == (16, 48)
    assert np.abs(states).min() > 0
    seen = {"image_primary": example["observation"]["image_primary"][0]}
    reference = octo_numpy.outputs(stored, leaves, example, states[None])["sample_actions"]
    actions = policy.sample_actions(seen, task)
    np.testing.assert_allclose(actions, policy.unnormalize(reference)[0], atol=1e-5)


def test_policy_acts_on_instructions_of_the_table(tmp_path):
    stored, leaves, source, table = checkpoint(tmp_path)
    importer.import_checkpoint(source, tmp_path / "run", text_encoder=table)
    (tmp_path / "run").rename(tmp_path / "moved")
    policy = Policy.load(tmp_path / "moved", embodiment="one", batch_size=2)
    assert policy.metadata["conditioning"] == ["language"]
    batch, _ = given(False, (WIDTH,), size=3)
    batch = {**batch, "observation": {**batch["observation"]}}
    seen = [{"image_primary": x} for x in batch["observation"]["image_primary"]]
    batch["observation"]["timestep_pad_mask"][:] = True
    tasks = [policy.create_task(text) for text in ("lift the cube", " open the drawer ")]
    tasks += [policy.create_task(vector=vectors(WIDTH)[2])]
    actions = policy.sample_batch(seen, tasks, [0, 0, 0])
    chosen = vectors(WIDTH)[[1, 2, 2]]
    reference = octo_numpy.outputs(stored, leaves, batch, chosen)["sample_actions"]
    np.testing.assert_allclose(actions, policy.unnormalize(reference), atol=1e-5)
    np.testing.assert_array_equal(tasks[1].inputs["language"]["states"], vectors(WIDTH)[2:])
    other = octo_numpy.outputs(stored, leaves, batch, vectors(WIDTH)[[2, 1, 1]])
    assert np.abs(other["sample_actions"] - reference).max(axis=(1, 2)).min() > 1e-2
    with pytest.raises(ConfigError, match="'open a drawer'; did you mean 'open the drawer'"):
        policy.create_task("open a drawer")
    with pytest.raises(ValueError, match="lacks an instruction"):
        policy.create_task()
    with pytest.raises(ValueError, match=r"has shape \(5,\); expected \(1, 6\)"):
        policy.create_task(vector=np.zeros(5))
    with pytest.raises(ValueError, match="expected finite"):
        policy.create_task(vector=np.full(WIDTH, np.nan))


def test_a_task_without_instruction_has_the_vector_of_the_empty_text(tmp_path):
    """Octo's FiLM reads it, although its tokens are masked."""
    stored, _, source, table = checkpoint(tmp_path)
    goals = stored["model"]["observation_tokenizers"]["primary"]["kwargs"]
    goals["task_stack_keys"] = ["image_primary"]
    example = fakes.batch()
    example["task"][WORDS] = np.zeros((1, WIDTH), np.float32)
    leaves = parameters(stored, example)
    source = fakes.write(tmp_path / "goals", stored, example, None, leaves)
    importer.import_checkpoint(source, tmp_path / "run", text_encoder=table)
    policy = Policy.load(tmp_path / "run", embodiment="one")
    picture = example["observation"]["image_primary"][0, 0]
    task = policy.create_task(goal_images={"primary": picture})
    np.testing.assert_array_equal(task.inputs["language"]["states"], vectors(WIDTH)[:1])
    assert not task.inputs["present"]["language"]


def test_the_table_moves_to_a_finetuned_run(tmp_path):
    _, _, source, table = checkpoint(tmp_path)
    run = importer.import_checkpoint(source, tmp_path / "run", text_encoder=table).run
    config = dataclasses.replace(run.config, workdir=str(tmp_path / "tuned"))
    importer.checkpoint.write_run_files(config, run.embodiments, run.spec, run.names)
    for name in ("tokenizer/instructions.json", "text_encoder/model.safetensors"):
        assert (tmp_path / "tuned" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


TABLES = {
    "no table": (None, r"name a table: --text_encoder FILE, .*\[N, 6\]"),
    "no file": ({}, "No such file"),
    "no vectors": ({"texts": TEXTS}, "KeyError.*vectors"),
    "objects": ({"texts": np.array(TEXTS, object), "vectors": vectors(6)}, "as str, not objects"),
    "another width": ({"texts": TEXTS, "vectors": vectors(5)}, r"vectors \[3, 5\]; expected .*6\]"),
    "not finite": ({"texts": TEXTS, "vectors": vectors(6) * np.nan}, "all finite"),
    "twice": ({"texts": ["", "a", "a "], "vectors": vectors(6)}, "'a' twice"),
    "no empty text": ({"texts": ["a", "b", "c"], "vectors": vectors(6)}, "no vector for the empty"),
}


@pytest.mark.parametrize("name", TABLES)
def test_bad_tables(tmp_path, name):
    arrays, match = TABLES[name]
    _, _, source, _ = checkpoint(tmp_path)
    table = tmp_path / "table.npz"
    if arrays:
        np.savez(table, **arrays)
    path = "" if arrays is None else str(table)
    with pytest.raises(ConfigError, match=match) as caught:
        importer.import_checkpoint(source, tmp_path / "run", text_encoder=path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_film_on_anything_else_is_refused():
    image = fakes.image("image_primary", encoder=ENCODERS["stem"], task_film_keys=["task_id"])
    stored = fakes.config(observation_tokenizers={"primary": image})
    example = fakes.batch()
    with pytest.raises(ConfigError, match=r"\['task_id'\], and the example batch has nothing at"):
        octo_config.translate(stored, example)
    image["kwargs"]["task_film_keys"] = [WORDS]
    ids = np.ones((1, 4), np.int64)
    example["task"][WORDS] = {"input_ids": ids, "attention_mask": ids}
    with pytest.raises(ConfigError, match="has token ids at 'language_instruction'"):
        octo_config.translate(stored, example)


def test_the_run_names_a_table_that_does_not_fit(tmp_path):
    _, _, source, table = checkpoint(tmp_path)
    run = importer.import_checkpoint(source, tmp_path / "run", text_encoder=table).run
    file = tmp_path / "run" / "tokenizer" / "instructions.json"
    stored = json.loads(file.read_text())
    assert stored == {"length": 1, "texts": TEXTS}
    for content, match in (
        ('{"length": 2, "texts": []}', "data.text.length is 1; the table .* has 2"),
        ("{", "has no table of instructions"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=match):
            TableTokenizer(length=1, path=run.config.data.text["path"]).encode([""])
