"""Open X-Embodiment: specs from TFRecords to batches, mixtures, expressions, users' specs."""

import re

import numpy as np
import pytest
from fake_oxe import write_fake_oxe

from octolike import ranges
from octolike.config import Component, Config, ConfigError
from octolike.data import open_data
from octolike.data.rlds.episode import ExcludedEpisodeError
from octolike.data.rlds.reader import Reader
from octolike.data.specs import mixes
from octolike.data.specs.catalog import DATASETS, describe_uncertain, find_spec, load_specs
from octolike.data.specs.expressions import evaluate, fields_read
from octolike.data.specs.oxe import OXE
from octolike.types import unflatten

SPECS = {spec.name: spec for spec in OXE}
SOUP = mixes.MIXES["magic_soup"]
# Octo's model card: % of the examples, largest first
CARD = {
    "bridge_dataset": 17.0,
    "fractal20220817_data": 17.0,
    "kuka": 17.0,
    "bc_z": 9.1,
    "stanford_hydra_dataset_converted_externally_to_rlds": 6.0,
    "language_table": 5.9,
    "taco_play": 3.6,
    "furniture_bench_dataset_converted_externally_to_rlds": 3.3,
    "utaustin_mutex": 3.0,
    "austin_sailor_dataset_converted_externally_to_rlds": 2.9,
    "roboturk": 2.8,
    "toto": 2.4,
    "austin_sirius_dataset_converted_externally_to_rlds": 2.3,
    "berkeley_autolab_ur5": 1.5,
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": 1.2,
    "viola": 1.2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("oxe")


def fake(root, name):
    if not (root / name).exists():
        write_fake_oxe(root, name, episodes=2, steps=6, side=16)


def settings(root, mix, **data) -> Config:
    config = Config(workdir="unused")
    d = config.data
    d.root, d.mix, d.cameras, d.validation_split = str(root), mix, {"primary": 16}, ""
    d.batch_size, d.window, d.horizon, d.goal, d.memory, d.threads = 8, 1, 2, "none", 0.25, 1
    d.text = Component(kind="hash", length=8, vocabulary=64)
    for name, value in data.items():
        setattr(d, name, value)
    return config


def test_every_dataset_of_the_field_has_a_spec():
    assert len(SPECS) == 75
    arms = [spec for spec in OXE if len(spec.action) == 7]
    assert len(arms) > 60
    assert {len(spec.action) for spec in OXE} == {2, 7, 8, 14, 16}
    for spec in OXE:
        grippers = [i for i, n in enumerate(spec.action.names) if "gripper" in n]
        assert all(spec.action.absolute[i] for i in grippers)


# Expressions with values that are always a share, and stored values that are one.
BOUNDED = ("clip", "binarize", "rel2abs", "zeros", "ones", "/ 255")
STATED = ("boolean", "binary", "1 = closed", "1 = close", "1 = open", "closedness, 1 = closed")


def test_a_gripper_of_unknown_range_is_normalised_to_a_share():
    shares, unknown = set(), set()
    for spec in OXE:
        for i in (i for i, n in enumerate(spec.action.names) if "gripper" in n):
            text, stored = spec.action_from[-1], spec.gripper.partition("stored:")[2]
            is_share = any(x in text for x in BOUNDED) or any(x in stored for x in STATED)
            assert spec.action.normalized[i] != is_share, spec.name
            assert spec.action.normalization[i : i + 1] == (() if is_share else ("share",))
            (shares if is_share else unknown).add(spec.name)
    assert len(shares) > 45
    assert len(unknown) == 21


# Meanings of the stored gripper, in the words of the specs.
CLOSED = re.compile(r"(positive|1|255) = clos(ed|e|ing)|closedness|\+1 closed")
OPEN = re.compile(r"(positive|(?<!-)1|true) = open(ing)?|\+1 open")


def test_every_gripper_is_open_at_one_whatever_is_stored():
    """The sign: each spec's gripper expression at a small and at a large stored value."""
    signs = {"closed": [], "open": []}
    for spec in OXE:
        stored = spec.gripper.partition("stored:")[2]
        stored = stored.partition("; the TFDS field text says the reverse")[0]
        is_closed, is_open = bool(CLOSED.search(stored)), bool(OPEN.search(stored))
        if "1 = open" not in spec.gripper.partition(";")[0] or not is_closed ^ is_open:
            continue
        signs["closed" if is_closed else "open"].append(spec.name)
        texts = spec.action_from[-1:]
        values = (-0.97, 0.97) if "relative" in stored else (0.01, 0.97)
        low, high = (evaluate(texts, filled(texts, x))[0, -1] for x in values)
        assert (low > high) == is_closed, (spec.name, texts, stored)
        assert low != high, spec.name
    assert len(signs["closed"]) >= 29
    assert len(signs["open"]) >= 20


def filled(texts, value):
    """Return raw steps with this value in every field that the expressions read."""
    columns = {".".join(path): np.full((3, 20), value, np.float32) for path in fields_read(texts)}
    single = any(x in texts[0] for x in ("rel2abs", "binarize"))
    if single:
        columns = {path: x if ":" in texts[0] else x[:, :1] for path, x in columns.items()}
    return unflatten(columns) | {"is_first": np.zeros(3, bool)}


def test_every_dataset_goes_through_the_door_of_training(root):
    for name in sorted(SPECS):
        fake(root, name)
    mix = ",".join(sorted(SPECS))
    cameras = {"primary": 16, "wrist": 16}
    data = open_data(settings(root, mix, cameras=cameras, batch_size=150, pool=150))
    trained = {name for record in data.embodiments for name in record.datasets}
    assert trained == set(SPECS)
    for record in data.embodiments:
        assert np.isfinite(record.action_statistics.std).all()
        assert ranges.record_misfits(record) == []
    batch = next(data.train())
    assert np.isfinite(batch["action"]).all()


@pytest.mark.parametrize("name", sorted(SPECS))
def test_records_become_standard_episodes(root, name):
    fake(root, name)
    spec = find_spec(name)
    reader = Reader(spec, str(root), "train")
    episodes = []
    for raw in (raw for shard in range(len(reader.files)) for raw in reader.read_records(shard)):
        try:
            episodes.append(reader.parse_episode(raw, name, depth=tuple(spec.depth)))
        except ExcludedEpisodeError:
            assert spec.keep
    assert episodes
    for e in episodes:
        t = len(e)
        assert e.action.shape == (t, len(spec.action))
        assert e.action.dtype == np.float32
        assert (e.proprio is None) == (spec.proprio is None)
        if e.proprio is not None:
            assert e.proprio.shape == (t, len(spec.proprio))
        assert set(e.images) == set(spec.cameras)
        assert all(len(x) == t for x in (*e.images.values(), *e.depth.values(), e.instructions))
    moving = np.ptp(np.concatenate([e.action for e in episodes]), axis=0) > 0
    constant = [n for n, m in zip(spec.action.names, moving, strict=True) if not m]
    assert all("unused" in n or "gripper" in n for n in constant), constant


def test_the_soup_streams_as_one_mixture(root):
    for name in SOUP.weights:
        fake(root, name)
    data = open_data(settings(root, "magic_soup", cameras={"primary": 16, "wrist": 16}))
    stream = data.train()
    datasets = set()
    for _ in range(12):
        batch = next(stream)
        assert batch["observation"]["image_primary"].shape == (8, 1, 16, 16, 3)
        assert np.isfinite(batch["action"]).all()
        datasets |= set(batch["dataset"].tolist())
    stream.close()
    assert len(datasets) > 8
    assert len(data.names.embodiments) == 25
    description = data.describe()
    assert "uncertain: " in description
    assert all(name in description for name in SOUP.weights)


def test_one_arm_two_arms_and_a_vehicle_share_a_batch(root):
    names = ("bridge_dataset", "aloha_static_dataset", "gnm_dataset")
    for name in names:
        fake(root, name)
    mix = ",".join(f"{n}=1" for n in names)
    data = open_data(settings(root, mix, mix_weights="shares", batch_size=24))
    stream = data.train()
    batch = next(stream)
    stream.close()
    assert batch["action"].shape == (24, 1, 2, 14)
    for i, width in enumerate((7, 14, 2)):
        mask = batch["action_mask"][batch["dataset"] == i]
        assert len(mask)
        assert mask[:, 0, 0].sum(axis=-1).tolist() == [width] * len(mask)


def test_the_shares_of_the_soup_match_the_model_card():
    steps = {name: SPECS[name].steps for name in SOUP.weights if SPECS[name].steps}
    assert SOUP.kind == "multipliers"
    steps |= dict.fromkeys(SOUP.weights.keys() - steps.keys(), 20_000)  # small, size unknown
    shares = dict(zip(SOUP.weights, 100 * SOUP.shares(steps), strict=True))
    assert len(shares) == 25
    for name, share in CARD.items():
        assert shares[name] == pytest.approx(share, abs=1.5), name


def test_the_named_mixtures_have_their_datasets():
    assert len(mixes.MIXES["rtx"].weights) == 11
    assert set(mixes.MIXES["bridge_and_fractal"].weights) == {
        "bridge_dataset",
        "fractal20220817_data",
    }
    assert mixes.MIXES["rtx_remix"].kind == "shares"
    assert len(mixes.MIXES["all"].weights) > 60
    for name, mix in mixes.MIXES.items():
        assert set(mix.weights) <= set(DATASETS), name


USER_SPECS = """
from octolike.data.specs.catalog import DatasetSpec
from octolike.data.specs.spec import EEF_DELTA
DATASETS = [DatasetSpec(name="mine", version="1.0.0", cameras={"primary": "image"},
    language="language_instruction", action=EEF_DELTA, proprio=None, action_from=("action",),
    gripper="1 = open", robot="mine")]
"""


def test_a_users_file_adds_specs(tmp_path):
    path = tmp_path / "my_robot.py"
    path.write_text(USER_SPECS)
    specs = load_specs([str(path)])
    assert specs["mine"].robot == "mine"
    assert set(DATASETS) < set(specs)
    again = tmp_path / "again.py"
    again.write_text(USER_SPECS)
    with pytest.raises(ConfigError, match=r"'mine' is in .*my_robot.py and in .*again.py"):
        load_specs([str(path), str(again)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "does not define DATASETS"),
        ("DATASETS = [3]", "expected dataset specs"),
        ("1 / 0", "cannot be read: ZeroDivisionError"),
        (
            USER_SPECS.replace('("action",)', '("frobnicate(action)",)'),
            "unknown function 'frobnicate'",
        ),
        (USER_SPECS.replace('action_from=("action",),', ""), "either action_from"),
    ],
)
def test_invalid_spec_files_are_rejected(tmp_path, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_specs([str(path)])
    with pytest.raises(ConfigError, match="there is no file"):
        load_specs([str(tmp_path / "none.py")])


def test_uncertain_facts_are_reported():
    assert describe_uncertain([find_spec("tabletop")]) == ""
    assert "rh20t" in describe_uncertain([find_spec("rh20t")])
