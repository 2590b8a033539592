"""Tiny checkpoints in Octo's layout (octo_fakes.py) become runs that act and finetune."""

import copy
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import octo_fakes as fakes
import pytest
from train_fakes import FakeSource

from octolike.config import ConfigError
from octolike.octo_import import importer, octo_config
from octolike.policy import Policy
from octolike.train import checkpoint, loop

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.exists(), reason="golden data are not next to this checkout"
)


# Variants in Octo's layout


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
                "state": fakes.lowdim(discretize=True, bin_type="normal", n_bins=8),
            },
            "heads": {
                "action": fakes.head("DiffusionActionHead", diffusion_steps=5, hidden_dim=32)
            },
        },
        ("primary",),
        {
            "tokenizers": {"state": {"bins": 8, "bin_kind": "normal", "outside": "first"}},
            "heads": {"action": {"steps": 5}},
        },
    ),
    "proprio as it is, all observations read": (
        {
            "observation_tokenizers": {
                "primary": fakes.image("image_primary"),
                "state": fakes.lowdim(),
            },
            "heads": {"action": fakes.head("L1ActionHead") | {}},
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
    imported = fakes.import_run(tmp_path, fakes.config(**model), fakes.batch(cameras))
    assert imported.run.step == fakes.STEP
    assert imported.run.config.data.resize == "lanczos3"  # as Octo's data pipeline
    assert imported.run.config.model.max_window == 4  # Octo's max_horizon, wider than the window
    for part, components in expected.items():
        for key, fields in components.items():
            found = getattr(imported.run.config.model, part)[key]
            assert {k: found[k] for k in fields} == fields


def test_observation_readout(tmp_path):
    stored = fakes.config(heads={"action": fakes.head("MSEActionHead", use_map=True)})
    stored["model"]["heads"]["action"]["kwargs"]["readout_key"] = "obs"
    run = fakes.import_run(tmp_path, stored).run
    assert run.config.model.heads["action"]["readout"] == "obs"
    assert act(tmp_path / "run").shape == (fakes.HORIZON, fakes.ACTION)


def test_a_policy_without_readouts_pools_the_observations_of_one_frame(tmp_path, monkeypatch):
    monkeypatch.setattr(fakes, "WINDOW", 1)
    head = fakes.head("MSEActionHead", use_map=True)
    head["kwargs"]["readout_key"] = "obs"
    run = fakes.import_run(tmp_path, fakes.config(readouts={}, heads={"action": head})).run
    assert (run.config.model.readouts, run.config.data.window) == ({}, 1)
    assert run.config.model.heads["action"]["pooling"] == "attention"
    assert not [name for name in run.params if name.startswith("readout")]
    black = act(tmp_path / "run")
    assert black.shape == (fakes.HORIZON, fakes.ACTION)
    picture = np.random.default_rng(0).integers(0, 256, (fakes.SIDE, fakes.SIDE, 3), np.uint8)
    assert np.abs(act(tmp_path / "run", image_primary=picture) - black).max() > 1e-3


def test_parts_that_the_data_lack_are_left_out(tmp_path):
    """Octo drops a tokenizer if its camera is not in the data; the import does, too."""
    both = {c: fakes.image(f"image_{c}") for c in ("primary", "wrist")}
    imported = fakes.import_run(tmp_path, fakes.config(observation_tokenizers=both))
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
    run = fakes.import_run(tmp_path, stored, example, None, leaves).run
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
        observation_tokenizers={"primary": fakes.image("image_primary"), "state": fakes.lowdim()}
    )
    stored["dataset_kwargs"] = {"action_proprio_normalization_type": "bounds"}
    run = fakes.import_run(tmp_path, stored).run
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
        observation_tokenizers={"primary": fakes.image("image_primary"), "state": fakes.lowdim()}
    )
    imported = fakes.import_run(tmp_path, stored, None, numbers)
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
        observation_tokenizers={"primary": fakes.image("image_primary"), "state": fakes.lowdim()}
    )
    run = fakes.import_run(tmp_path, stored).run
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


# Files and the command


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
