"""Inspecting a dataset: every field is in the inferred spec, or listed with the reason."""

import dataclasses
import runpy

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.config import Config
from octolike.data import open_data
from octolike.data.onboarding import infer_spec, survey_figures
from octolike.data.onboarding.problems import find_problems
from octolike.data.onboarding.spec_fields import describe_unused
from octolike.data.onboarding.survey import describe_survey, survey_dataset
from octolike.data.rlds.reader import Reader
from octolike.errors import DataError
from octolike.types import flatten

TEXT = tfds.features.Text()
TEXTS = tfds.features.Sequence(TEXT)
CAMERA = tfds.features.Image(shape=(16, 16, 3))


def vector(*shape):
    return tfds.features.Tensor(shape=shape, dtype=np.float32)


def build(root, name, step, lengths, episode=None, edit=None, **values):
    """Write a dataset with TFDS' own builder; values: of a field, else zeros or grey pictures.

    edit: function of (step, number of the step) that changes a step.
    """
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
            steps = [value(step, "") for _ in range(length)]
            for t, one in enumerate(steps if edit else ()):
                edit(one, t)
            yield i, {"steps": steps, **value(episode, "")}

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
    assert not any("no instruction" in x for x in find_problems(survey, spec))
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
    problems = "\n".join(find_problems(survey, spec))
    assert "3 of 3 episodes have fewer than 3 steps" in problems
    survey_figures.save(survey_figures.histograms(survey, spec), tmp_path / "a.png")
    for key in survey.images:
        survey_figures.save(survey_figures.contact_sheet(survey, key), tmp_path / "b.png")


SMALL = {
    "action": vector(3),
    "is_first": tfds.features.Scalar(dtype=np.bool_),
    "observation": {"cam": CAMERA, "state": vector(3)},
    "language_instruction": TEXT,
}


def inspected(path):
    """Return (inferred spec, its problems, the text on unused fields)."""
    survey = survey_dataset(path)
    spec = infer_spec.infer(survey)
    unused = describe_unused(spec.unused, survey.about)
    return survey, spec, "\n".join(find_problems(survey, spec)), unused


def batch_of(root, path):
    """Return a batch of the dataset in `path`, trained with the spec that inspect_data writes."""
    survey = survey_dataset(path)
    spec_path = infer_spec.write_spec(root / "mine.py", survey, infer_spec.infer(survey))
    config = Config()
    config.data.root, config.data.mix, config.data.cache = str(root), "mine", str(root / "cache")
    config.data.specs, config.data.cameras = (str(spec_path),), {"primary": 16}
    config.data.batch_size, config.data.pool, config.data.range_check = 4, 8, "warn"
    config.data.validation_split = ""
    return next(open_data(config).train())


def test_a_field_without_values_ends_no_process(tmp_path):
    """TensorFlow's parser divides by the number of values of a step."""
    step = {"cloud": vector(0), **SMALL}
    path = build(tmp_path, "mine", step, (4, 4))
    _, _, _, unused = inspected(path)
    assert "steps.cloud: it has the shape [0]" in unused
    assert batch_of(tmp_path, path)["observation"]["present"]["image_primary"].all()


@pytest.mark.parametrize("feature", ["text", "image"])
def test_plain_strings_are_texts_or_encoded_images(tmp_path, feature):
    string = tfds.features.Tensor(shape=(), dtype=tf.string)
    image = tf.io.encode_jpeg(np.full((16, 16, 3), 90, np.uint8)).numpy()
    step = {**SMALL, "language_instruction": string} if feature == "text" else SMALL
    if feature == "image":
        step = {**SMALL, "observation": {"cam": string, "state": vector(3)}}

    def edit(one, t):
        if feature == "image":
            one["observation"]["cam"] = image
        else:
            one["language_instruction"] = "lift"

    path = build(tmp_path, "mine", step, (4, 4), edit=edit)
    _, spec, _, _ = inspected(path)
    assert spec.cameras == {"primary": "cam"}
    assert spec.language == "language_instruction"
    assert batch_of(tmp_path, path)["observation"]["present"]["image_primary"].all()


def test_an_image_next_to_the_observation_is_a_camera(tmp_path):
    step = {**SMALL, "observation": {"state": vector(3)}, "picture": CAMERA}
    path = build(tmp_path, "mine", step, (4, 4))
    _, spec, _, unused = inspected(path)
    assert spec.cameras == {"primary": "steps.picture"}
    assert "picture" not in unused
    assert batch_of(tmp_path, path)["observation"]["present"]["image_primary"].all()


@pytest.mark.parametrize("feature", [tfds.features.Scalar(np.int64), vector(1, 3)])
def test_the_spec_reads_actions_of_any_shape(tmp_path, feature):
    path = build(tmp_path, "mine", {**SMALL, "action": feature}, (4, 4))
    dims = 1 if feature.shape == () else 3
    assert batch_of(tmp_path, path)["action"].shape[-1] == dims


def test_times_and_calibrations_are_no_proprio(tmp_path):
    arm = {"arm": vector(3), "arm_time": vector(1), "cam_intrinsics": vector(9), "cam": CAMERA}
    _, spec, _, unused = inspected(build(tmp_path, "mine", {**SMALL, "observation": arm}, (4, 4)))
    assert spec.proprio == ("observation.arm",)
    assert unused.count("a time or a calibration, which is no state of the robot") == 2


def test_images_of_floats_are_named(tmp_path):
    floats = tfds.features.Tensor(shape=(16, 16, 3), dtype=np.float32)
    step = {**SMALL, "observation": {"cam": floats, "state": vector(3)}}
    assert "an image of floats: " in inspected(build(tmp_path, "mine", step, (4, 4)))[3]


def test_several_recordings_rates_and_repeated_images_are_named(tmp_path):
    def edit(one, t):
        one["observation"]["state"] = np.full(3, t, np.float32)
        one["observation"]["cam"] = np.full((16, 16, 3), 40 + t // 3, np.uint8)
        one["is_first"] = t in (0, 5)
        one["language_instruction"] = b"caf\xe9"

    rates = iter([5.0, 30.0])
    episode = {"episode_metadata": {"control_hz": tfds.features.Scalar(dtype=np.float32)}}
    path = build(tmp_path, "mine", SMALL, (9, 9), episode, edit)
    problems = inspected(path)[2]
    assert "2 of 2 episodes have is_first or is_last inside" in problems
    assert "observation.cam: 75% of the images equal the image before" in problems
    assert "bytes that are not UTF-8" in problems
    survey = dataclasses.replace(survey_dataset(path), rates=tuple(rates))
    text = "\n".join(find_problems(survey, infer_spec.infer(survey)))
    assert "different rates, 5, 30 steps per second" in text
