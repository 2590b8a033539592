"""The fields of a record, and the graph that parses only those that are needed.

A record is a tf.train.Example. TensorFlow copies the fields that its parser is asked for and skips
all others, so an unused camera costs nothing but its bytes on disk. Images come out as
encoded strings, however the dataset stores them: as images, as plain uint8 arrays, or as a sequence
of images per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.data.rlds.fields import IS_FIRST, OBSERVATION, STEPS
from octolike.data.rlds.record_files import one_line
from octolike.errors import DataError

EPISODE = "episode"  # key of the fields of the episode, in parsed steps and in paths
CHANNELS = (1, 3, 4)
_STACKS = (tfds.features.Sequence, tfds.features.Video)

Path = tuple[str, ...]


class ParsedEpisode(NamedTuple):
    """One parsed record, over T steps: every k-th one if the dataset spec has `every`.

    Attributes:
        steps: nested dict of tensors [T, ...] without images; `is_first` is always there. The
            fields of the episode are under "episode". With `every` > 1, "unthinned" holds the
            first two steps before thinning.
        images: camera: encoded images, string [T]; empty for none.
        depth: camera: depth, string [T] (encoded) or an array [T, h, w] or [T, h, w, 1].
    """

    steps: dict[str, Any]
    images: dict[str, Any]
    depth: dict[str, Any]


def field_tree(features: tfds.features.FeaturesDict) -> dict[str, Any]:
    """Return the features under steps as a nested dict; those of the episode are under "episode".

    An observation that is a single image is `observation.observation`.
    """
    steps = _as_tree(features[STEPS].feature)
    if not isinstance(steps.get(OBSERVATION, {}), dict):
        steps[OBSERVATION] = {OBSERVATION: steps[OBSERVATION]}
    steps.setdefault(OBSERVATION, {})
    return steps | {EPISODE: {k: _as_tree(f) for k, f in features.items() if k != STEPS}}


def find_path(tree: Mapping[str, Any], name: str) -> Path | None:
    """Return the path of a field: a key, or keys joined by dots; None if the tree lacks it."""
    if name in tree:
        return (name,)
    parts = name.split(".")
    for i in range(1, len(parts)):
        child = tree.get(".".join(parts[:i]))
        if isinstance(child, Mapping):
            remainder = find_path(child, ".".join(parts[i:]))
            if remainder is not None:
                return (".".join(parts[:i]), *remainder)
    return None


def get_path(tree: Mapping[str, Any], path: Path) -> Any:
    """Return the value at a path."""
    value: Any = tree
    for key in path:
        value = value[key]
    return value


def is_picture(feature: Any) -> bool:
    """Return whether a feature holds images, one or several per step."""
    if isinstance(feature, tfds.features.Image):
        return True
    return isinstance(feature, _STACKS) and is_picture(getattr(feature, "feature", None))


def is_image_array(feature: Any) -> bool:
    """Return whether a feature is an image stored as a plain array: uint8 [h, w, channels]."""
    shape = tuple(getattr(feature, "shape", None) or ())
    return len(shape) == 3 and shape[-1] in CHANNELS and feature.np_dtype == np.uint8


def image_problem(feature: Any) -> str:
    """Return "" if a feature can be read as a camera; else a description of its type.

    Images, arrays of images, and strings that hold encoded images can be read.
    """
    if isinstance(feature, Mapping):
        return f"a group with {', '.join(sorted(feature)) or 'nothing'}"
    if problem := parse_problem(feature):
        return f"a field that {problem}"
    if is_picture(feature) or is_image_array(feature):
        return ""
    shape, dtype = tuple(feature.shape or ()), tf.as_dtype(feature.np_dtype)
    return "" if (dtype, shape) == (tf.string, ()) else f"{dtype.name} {list(shape)}"


def graph_parser(
    features: tfds.features.FeaturesDict,
    selects: Callable[[Path, Any], bool],
    cameras: Mapping[str, Path],
    depth: Mapping[str, Path],
    every: int,
) -> Callable[[tf.Tensor], ParsedEpisode]:
    """Return a function of a serialized record (scalar string), to be used inside Dataset.map.

    selects: function of a path under steps and its feature: whether to parse the field.
    cameras, depth: paths under steps, parsed in any case.
    """
    whole_picture = not isinstance(
        dict(features[STEPS].feature).get(OBSERVATION, {}), (dict, tfds.features.FeaturesDict)
    )
    extra = {*cameras.values(), *depth.values()}

    def select(path: Path, feature: Any) -> bool:
        logical = (OBSERVATION, OBSERVATION) if whole_picture and path == (OBSERVATION,) else path
        return logical in extra or (not is_picture(feature) and selects(logical, feature))

    reduced = _reduce(features, select)
    stored = field_tree(features)
    skip = {STEPS: tfds.decode.SkipDecoding()}

    @tf.autograph.experimental.do_not_convert  # converting Python takes seconds
    def parse(record: tf.Tensor) -> ParsedEpisode:
        example = reduced.deserialize_example(record, decoders=skip)
        steps = _copy(example[STEPS])
        if OBSERVATION in steps and not isinstance(steps[OBSERVATION], dict):
            steps[OBSERVATION] = {OBSERVATION: steps[OBSERVATION]}
        steps.setdefault(OBSERVATION, {})
        images = {c: _encoded(_value(steps, p), get_path(stored, p)) for c, p in cameras.items()}
        depths = {c: _value(steps, path) for c, path in depth.items()}
        for path in {*cameras.values(), *depth.values()}:
            _drop(steps, path)
        # TensorFlow splits a field that has another shape than in features.json.
        lengths = list(map(_length, [*tf.nest.flatten(steps), *images.values(), *depths.values()]))
        tf.debugging.assert_equal(
            lengths, lengths[0], message="the fields of the steps have different lengths"
        )
        if IS_FIRST not in steps:
            steps[IS_FIRST] = tf.range(lengths[0]) == 0
        if every > 1:
            images, depths = tf.nest.map_structure(lambda x: x[::every], (images, depths))
        steps = thin_steps(steps, every)
        steps[EPISODE] = {k: v for k, v in example.items() if k != STEPS}
        return ParsedEpisode(steps, images, depths)

    return parse


def traced(parser: Callable[[tf.Tensor], ParsedEpisode], title: str) -> Any:
    """Return a parser traced for eager use; DataError if its features cannot be parsed at all.

    title: the dataset, for the message.
    """
    function = tf.function(parser, input_signature=[tf.TensorSpec((), tf.string)], autograph=False)
    try:
        return function.get_concrete_function()
    except DataError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:  # of tensorflow_datasets
        raise DataError(
            f"{title}: features.json describes a field that cannot be parsed: {one_line(error)}; "
            "write the dataset again"
        ) from error


def thin_steps(steps: Mapping[str, Any], every: int) -> dict[str, Any]:
    """Return every k-th step of nested arrays or tensors [T, ...].

    With every > 1, "unthinned" holds the first two steps before thinning.
    """
    if every == 1:
        return dict(steps)
    first = tf.nest.map_structure(lambda x: x[:2], steps)
    return tf.nest.map_structure(lambda x: x[::every], steps) | {"unthinned": first}


def under(paths: Iterable[Path]) -> Callable[[Path, Any], bool]:
    """Return a function for `selects`: whether a field is one of the paths, or inside of one."""
    groups = set(paths)
    return lambda path, feature: any(path[:i] in groups for i in range(1, len(path) + 1))


def not_image_array(path: Path, feature: Any) -> bool:
    """Return whether a field can be parsed and is not an image in an array; for `selects`."""
    return not is_image_array(feature) and not parse_problem(feature)


def parse_problem(feature: Any) -> str:
    """Return why a feature is never parsed; "" for an ordinary one."""
    shape = getattr(feature, "shape", None)
    if isinstance(shape, tuple) and 0 in shape:
        return f"has the shape {list(shape)}"  # TensorFlow would divide by 0: the process ends
    if getattr(feature, "_encoded_to_bytes", False):  # a few bytes can decompress to gigabytes
        return "is stored as bytes or zlib; write it with encoding='none'"
    return ""


def _as_tree(feature: Any) -> Any:
    if isinstance(feature, tfds.features.FeaturesDict):
        return {k: _as_tree(f) for k, f in feature.items()}
    return feature


def _reduce(
    features: tfds.features.FeaturesDict, select: Callable[[Path, Any], bool]
) -> tfds.features.FeaturesDict:
    """Return the selected features, as types that TFDS can parse without decoding them."""
    groups = {}
    for key, feature in features.items():
        if key == STEPS:
            # Steps stored as a sequence have the same bytes as steps stored as a dataset.
            steps = _selected(feature.feature, (), select)
            groups[key] = tfds.features.Dataset(steps or _smallest(feature.feature))
        elif (chosen := _selected(feature, (EPISODE, key), select)) is not None:
            groups[key] = chosen
    return tfds.features.FeaturesDict(groups)


def _selected(feature: Any, path: Path, select: Callable[[Path, Any], bool]) -> Any:
    if isinstance(feature, tfds.features.FeaturesDict):
        fields = {k: _selected(f, (*path, k), select) for k, f in feature.items()}
        fields = {k: f for k, f in fields.items() if f is not None}
        return tfds.features.FeaturesDict(fields) if fields else None
    if not select(path, feature):
        return None
    if problem := parse_problem(feature):
        raise DataError(f"the field {'.'.join(path)!r:.200} {problem}")
    if isinstance(feature, _STACKS) and is_picture(feature):
        # TFDS fails to parse sequences of images with a fixed length; the bytes are the same.
        return tfds.features.Sequence(tfds.features.Image(shape=(None, None, None)))
    return feature


def _smallest(steps: tfds.features.FeaturesDict) -> tfds.features.FeaturesDict:
    """Return any one field of the steps that can be parsed, to count them."""
    key, feature = next((k, f) for k, f in steps.items() if _is_parsed(f))
    if isinstance(feature, tfds.features.FeaturesDict):
        feature = _smallest(feature)
    return tfds.features.FeaturesDict({key: feature})


def _is_parsed(feature: Any) -> bool:
    if isinstance(feature, tfds.features.FeaturesDict):
        return any(map(_is_parsed, feature.values()))
    return not parse_problem(feature)


def _encoded(x: Any, feature: Any) -> tf.Tensor:
    """Return the images of a camera as encoded strings [T]."""
    if isinstance(x, tf.RaggedTensor):  # several images per step: the last one, the newest
        return x[:, -1:].to_tensor(b"", shape=[None, 1])[:, 0]
    if x.dtype == tf.string:
        return x
    return tf.map_fn(tf.io.encode_png, x, fn_output_signature=tf.TensorSpec((), tf.string))


def _value(steps: Mapping[str, Any], path: Path) -> Any:
    return get_path(steps, path)


def _length(x: Any) -> tf.Tensor:
    if isinstance(x, tf.RaggedTensor):
        return x.nrows(tf.int32)
    # tf.shape(x)[0] takes ten times as long to trace, and there is one per field.
    return tf.size(x) if x.shape.rank == 1 else tf.gather(tf.shape(x), 0)


def _copy(tree: Any) -> Any:
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _drop(tree: dict[str, Any], path: Path) -> None:
    parent = get_path(tree, path[:-1])
    parent.pop(path[-1], None)
