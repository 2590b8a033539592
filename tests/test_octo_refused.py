"""Unsupported parts of Octo's checkpoints are refused by name, before a run is written."""

from pathlib import Path

import numpy as np
import octo_fakes as fakes
import pytest

from octolike.config import ConfigError
from octolike.octo_import import importer, octo_config

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.exists(), reason="golden data are not next to this checkout"
)


ERRORS = {
    "more than one token per readout": (
        fakes.config(use_correct_attention=False, readouts={"action": 2}),
        "use_correct_attention is false",
    ),
    "position embedding over the sequence": (
        fakes.config(
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
        fakes.config(
            observation_tokenizers={"p": fakes.image("image_.*", encoder=fakes.spec("ResNet34"))}
        ),
        "encoder: 'ResNet34'.*choices: PatchEncoder, ResNet26FILM, SmallStem",
    ),
    "unknown head": (
        fakes.config(heads={"action": fakes.head("UNetDDPMActionHead")}),
        "class at model.heads.action: 'UNetDDPMActionHead'.*DiffusionActionHead",
    ),
    "unknown setting": (
        fakes.config(heads={"action": fakes.head("MSEActionHead", max_actoin=3)}),
        "'max_actoin'; did you mean 'max_action'",
    ),
    "unknown model setting": (fakes.config(token_dropout=0.1), "setting of model: 'token_dropout'"),
    "padding that is seen": (
        fakes.config(observation_tokenizers={"p": fakes.image("image_.*", proper_pad_mask=False)}),
        "proper_pad_mask is False",
    ),
    "other goals than cameras": (
        fakes.config(
            observation_tokenizers={"p": fakes.image("image_pri", task_stack_keys=["image_wr"])}
        ),
        r"goals \['image_wrist'\]",
    ),
    "two chunk sizes": (
        fakes.config(
            heads={
                "action": fakes.head("MSEActionHead"),
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
    language = fakes.spec("LanguageTokenizer", encoder="openai/clip-vit-base-patch32")
    stored = fakes.config(task_tokenizers={"language": language})
    stored["text_processor"] = fakes.spec("CLIPTextProcessor")
    example, ids = fakes.batch(), np.ones((1, 64), np.int64)
    example["task"]["language_instruction"] = {"input_ids": ids, "attention_mask": ids}
    with pytest.raises(ConfigError, match=r"class at text_processor: 'CLIPTextProcessor'"):
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
