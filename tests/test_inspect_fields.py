"""Inspecting a dataset: every field is in the inferred spec, or listed with the reason."""

import dataclasses
import runpy

import numpy as np
import pytest
import tensorflow_datasets as tfds

from octolike.config import Config
from octolike.data import open_data
from octolike.data.onboarding import infer_spec, survey_figures
from octolike.data.onboarding.spec_fields import describe_unused
from octolike.data.onboarding.survey import describe_survey, survey_dataset
from octolike.data.rlds.reader import Reader
from octolike.errors import DataError
from octolike.types import flatten

TEXT = tfds.features.Text()
TEXTS = tfds.features.Sequence(TEXT)
CAMERA = tfds.features.Image(shape=(16, 16, 3))


def vector(size):
    return tfds.features.Tensor(shape=(size,), dtype=np.float32)


def build(root, name, step, lengths, episode=None, **values):
    """Write a dataset with TFDS' own builder; values: of a field, else zeros or grey pictures."""
    episode = episode or {}

    def value(feature, key):
        if isinstance(feature, dict):
            return {k: value(f, k) for k, f in feature.items()}
        if isinstance(feature, tfds.features.Text) or feature is TEXTS:
            return values.get(key, f"the {key}")
        return np.full(feature.shape, 40, feature.np_dtype)

    def _info(self):
        features = {"steps": tfds.features.Dataset(step), **episode}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, length in enumerate(lengths):
            yield i, {"steps": [value(step, "")] * length, **value(episode, "")}

    members = {
        "name": name,
        "VERSION": tfds.core.Version("1.0.0"),
        "pkg_dir_path": root,
        "_info": _info,
        "_split_generators": _split_generators,
        "_generate_examples": _generate_examples,
    }
    with tfds.core.registered.skip_registration():
        builder_class = type(name, (tfds.core.GeneratorBasedBuilder,), members)
    builder = builder_class(data_dir=str(root))
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
    return builder.data_path


STEP = {
    "action": vector(3),
    "base_action": vector(2),
    "language_instruction": TEXT,
    "language_instruction_2": TEXT,
    "is_first": tfds.features.Scalar(dtype=np.bool_),
    "observation": {
        "images": {"front_rgb": CAMERA, "wrist_rgb": CAMERA},
        "front_depth": tfds.features.Image(shape=(16, 16, 1), dtype=np.uint16),
        "far_depth": tfds.features.Tensor(shape=(16, 16, 1), dtype=np.float32),
        "robot": {"joints": vector(3)},
        "object": vector(10),
        "embedding": vector(512),
    },
}


def fields(root, lengths=(4, 4)):
    return build(root, "mine", STEP, lengths)


def test_every_field_is_used_or_named_with_the_reason(tmp_path):
    survey = survey_dataset(fields(tmp_path))
    spec = infer_spec.infer(survey)
    assert spec.cameras == {"primary": "images.front_rgb", "wrist": "images.wrist_rgb"}
    assert spec.depth == {"primary": "front_depth"}
    assert spec.depth_unit == 0.001
    assert spec.language == ("language_instruction", "language_instruction_2")
    assert spec.proprio == ("observation.robot.joints",)  # not the state of objects
    assert {k.removeprefix("observation.") for k in spec.unused} == {
        "base_action",
        "far_depth",
        "object",
        "embedding",
    }
    text = describe_unused(spec.unused, {"left_out": {"states": "the simulator's"}})
    assert "steps.base_action: another action" in text
    assert "steps.observation.object: the state of objects" in text
    assert "left out by convert: states: the simulator's" in text


def test_the_spec_file_reads_nested_cameras_depth_and_several_instructions(tmp_path):
    survey = survey_dataset(fields(tmp_path))
    path = infer_spec.write_spec(tmp_path / "mine.py", survey, infer_spec.infer(survey))
    (spec,) = runpy.run_path(str(path))["DATASETS"]
    reader = Reader(spec, str(tmp_path), "train")
    episode = reader.parse_episode(next(reader.read_records(0)), "here", depth=["primary"])
    assert set(episode.images) == {"primary", "wrist"}
    assert len(episode.depth["primary"]) == 4
    assert set(episode.instructions) == {("the language_instruction", "the language_instruction_2")}


@pytest.mark.parametrize(
    ("step", "episode", "expected"),
    [
        ({}, {"episode_metadata": {"language_instruction": TEXT}}, "episode_metadata"),
        ({}, {"instruction": TEXT}, "episode.instruction"),
        ({"task": {"text": TEXT}}, {}, "observation.task.text"),
        ({"goal": {"language": {"instruction": TEXT}}}, {}, "goal.language.instruction"),
    ],
)
def test_instructions_of_the_episode_and_of_groups_are_found(tmp_path, step, episode, expected):
    observation = {"image": CAMERA, **step}
    path = build(
        tmp_path, "mine", {"action": vector(3), "observation": observation}, (3, 3), episode
    )
    survey = survey_dataset(path)
    spec = infer_spec.infer(survey)
    assert expected in spec.language
    assert not any("no instruction" in x for x in infer_spec.find_problems(survey, spec))
    file = infer_spec.write_spec(tmp_path / "mine.py", survey, spec)
    (read,) = runpy.run_path(str(file))["DATASETS"]
    reader = Reader(read, str(tmp_path), "train")
    episode = reader.parse_episode(next(reader.read_records(0)), "here")
    assert len(episode.instructions) == 3
    assert episode.instructions[0].startswith("the ")


@pytest.mark.parametrize(
    ("step", "episode", "field"),
    [
        ({"language_instruction": TEXTS}, {}, "language_instruction"),
        ({"goal": {"texts": {"instruction": TEXTS}}}, {}, "goal.texts.instruction"),
        ({}, {"episode_metadata": {"language": {"instruction": TEXTS}}}, "instruction"),
    ],
    ids=["steps", "two groups deep", "episode"],
)
def test_every_text_of_a_list_is_an_instruction(tmp_path, step, episode, field):
    texts = ["take it", "grab it", "lift it"]
    fields = {"action": vector(3), "observation": {"image": CAMERA}, **step}
    path = build(
        tmp_path, "mine", fields, (4, 6), episode, instruction=texts, language_instruction=texts
    )
    survey = survey_dataset(path)
    spec = infer_spec.infer(survey)
    assert [x.endswith(f"{field}.{i}") for i, x in enumerate(spec.language)] == [True] * 3
    file = infer_spec.write_spec(tmp_path / "mine.py", survey, spec)
    (read,) = runpy.run_path(str(file))["DATASETS"]
    reader = Reader(read, str(tmp_path), "train")
    episode = reader.parse_episode(next(reader.read_records(0)), "here")
    assert set(episode.instructions) == {tuple(texts)}
    data = tiny(tmp_path, "mine", str(file))
    assert set(drawn_texts(data)) == set(texts)
    whole = dataclasses.replace(read, language=spec.language[0].removesuffix(".0"))
    with pytest.raises(DataError, match=r"list of texts: name each of them, language=\("):
        Reader(whole, str(tmp_path), "train")


def test_lists_of_texts_may_differ_in_length(tmp_path):
    fields = {"action": vector(3), "observation": {"image": CAMERA}, "instruction": TEXTS}
    path = build(tmp_path, "mine", fields, (3,), instruction=["only one"])
    spec = infer_spec.infer(survey_dataset(path))
    assert spec.language == "instruction.0"
    file = infer_spec.write_spec(tmp_path / "mine.py", survey_dataset(path), spec)
    (read,) = runpy.run_path(str(file))["DATASETS"]
    two = dataclasses.replace(read, language=("instruction.0", "instruction.1"))
    reader = Reader(two, str(tmp_path), "train")
    episode = reader.parse_episode(next(reader.read_records(0)), "here")
    assert set(episode.instructions) == {("only one", "")}
    (tmp_path / "two.py").write_text(
        file.read_text().replace("'instruction.0'", "('instruction.0', 'instruction.1')")
    )
    assert set(drawn_texts(tiny(tmp_path, "mine", str(tmp_path / "two.py")))) == {"only one"}


def tiny(root, name, spec_file):
    """Return the opened data of one dataset, without a network."""
    config = Config(workdir=str(root / "run"))
    config.data.root, config.data.mix, config.data.specs = str(root), name, (spec_file,)
    config.data.cameras, config.data.use_proprio, config.data.batch_size = {"primary": 16}, False, 8
    config.data.held_out = 0.0
    return open_data(config)


def drawn_texts(data):
    """Return the instructions of the first batches."""
    batches = data.dataset().take(4).as_numpy_iterator()
    return [x.decode() for batch in batches for x in texts_of(batch)]


def texts_of(batch):
    return next(v for k, v in flatten(batch) if k.endswith("text"))


def test_episodes_of_no_and_of_one_step_are_surveyed(tmp_path):
    survey = survey_dataset(fields(tmp_path, (1, 0, 1)))
    spec = infer_spec.infer(survey)
    assert "0 to 1 steps" in describe_survey(survey)
    problems = "\n".join(infer_spec.find_problems(survey, spec))
    assert "3 of 3 episodes have fewer than 3 steps" in problems
    survey_figures.save(survey_figures.histograms(survey, spec), tmp_path / "a.png")
    for key in survey.images:
        survey_figures.save(survey_figures.contact_sheet(survey, key), tmp_path / "b.png")
