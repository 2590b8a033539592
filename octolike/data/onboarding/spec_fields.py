"""The fields that a spec reads of a surveyed dataset: instructions, depth, proprio; and the others.

Fields are chosen by their names. Every field that the inferred spec does not read is listed with
the reason (`unused_fields`), for the user to add it by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from octolike.data.onboarding.survey import BOOKKEEPING, MOST_TEXTS, Survey, is_state
from octolike.data.rlds.fields import OBSERVATION, STEPS

LANGUAGE = ("language_instruction", "natural_language_instruction", "instruction", "language")
TASK_GROUPS = ("task", "instruction", "language", *LANGUAGE)
TASK_LEAVES = ("text", "task", "description", "instruction")
PROPRIO = ("state", "proprio", "qpos", "joint_positions", "robot_state", "eef_state", "cartesian")
# Known to a simulator only: the poses of objects.
PRIVILEGED = re.compile(
    r"(^|[._])(objects?|object_states?|privileged|sim_states?|env_states?|environment_states?)($|_)"
)
UNIT_OF_DEPTH = {"uint16": 0.001, "float32": 1.0}


def instruction_fields(survey: Survey) -> tuple[str, ...]:
    """Return the fields of the instruction: of the steps or the episode; () for none.

    Several of one name, language_instruction_2 next to language_instruction, are all instructions.
    """
    texts = sorted(survey.texts)
    for name in LANGUAGE:
        numbered = re.compile(rf"{name}(_\d+)?")
        fields = [k for k in texts if numbered.fullmatch(_list_of(k, survey).rpartition(".")[2])]
        if fields:
            of_steps = [k for k in fields if not k.startswith("episode.")] or fields
            parents = {k: _list_of(k, survey).rpartition(".")[0] for k in of_steps}
            shortest = min(parents.values(), key=len)
            return tuple(sorted((k for k in of_steps if parents[k] == shortest), key=_natural))
    for key in texts:
        *groups, leaf = _list_of(key, survey).split(".")
        if leaf in TASK_LEAVES and (set(groups) & set(TASK_GROUPS) or leaf != "text"):
            same = [k for k in texts if _list_of(k, survey) == _list_of(key, survey)]
            return tuple(sorted(same, key=_natural))
    return ()


def _list_of(key: str, survey: Survey) -> str:
    """Return the field of a text: without the number of a text in a list."""
    field = key.rpartition(".")[0]
    return field if field in survey.longest else key


def _natural(key: str) -> list[tuple[int, str]]:
    """Return a key that sorts text.2 before text.10."""
    return [(int(x) if x.isdecimal() else 0, x) for x in re.split(r"(\d+)", key)]


def proprio_fields(survey: Survey) -> list[str]:
    """Return the state field by its name, or all float fields that a robot can measure."""
    fields = [k for k in survey.numbers if k.startswith("observation.")]
    fields = [k for k in fields if not PRIVILEGED.search(k) and is_state(k)]
    for name in PROPRIO:
        named = [k for k in fields if k.rpartition(".")[2] == name]
        if named:
            return [min(named, key=lambda k: (len(k), k))]
    return [k for k in fields if survey.features[k].startswith("float")]


def camera_key(field: str) -> str:
    """Return the key of a camera in a spec: under observation, or steps.NAME for another one."""
    prefix = f"{OBSERVATION}."
    return field.removeprefix(prefix) if field.startswith(prefix) else f"{STEPS}.{field}"


def depth_fields(survey: Survey, cameras: Mapping[str, str]) -> dict[str, str]:
    """Return {camera: key of its depth under steps.observation}, matched by their names."""
    stems = {_stem(key): camera for camera, key in cameras.items()}
    keys = [k.removeprefix("observation.") for k in sorted(survey.depth)]
    result = {stems[_stem(key)]: key for key in keys if _stem(key) in stems}
    if not result and len(keys) == len(cameras) == 1:
        return {next(iter(cameras)): keys[0]}
    return result


def unused_fields(
    survey: Survey,
    used: Iterable[str],
    cameras: Mapping[str, str],
    depth: Mapping[str, str],
) -> dict[str, str]:
    """Return {field: why the spec does not read it}.

    used: fields under steps of the action, the proprio and the instruction.
    """
    keys = {
        k.removeprefix("steps.") if k.startswith("steps.") else f"observation.{k}"
        for k in (*cameras.values(), *depth.values())
    }
    result = {}
    listed = {_list_of(k, survey) for k in used}  # lists with a text that is used
    fields = {*survey.features, *survey.texts} - {*used} - listed - keys - BOOKKEEPING
    for field in sorted(fields):
        if not field.startswith("episode."):
            result[field] = _reason(field, survey)
        elif any(word in field for word in (*TASK_GROUPS, *TASK_LEAVES)):
            result[field] = "a further text of the episode: name it in language"
    for field, longest in survey.longest.items():
        if longest > MOST_TEXTS:
            result[f"{field}.{MOST_TEXTS}"] = f"lists of up to {longest} texts: the first are read"
    return result


def depth_unit(survey: Survey, depth: Mapping[str, str]) -> float:
    """Return metres per stored unit: of uint16 millimetres, of float32 metres."""
    types = {survey.depth[f"observation.{key}"] for key in depth.values()}
    return UNIT_OF_DEPTH.get(next(iter(types), ""), 0.001)


def _reason(field: str, survey: Survey) -> str:
    if field in survey.depth:
        return "depth without a camera of its name: name it in depth"
    if field in survey.images:
        return "a further camera: name it in cameras"
    if field in survey.texts:
        return "a text that is not named as the instruction: name it in language"
    if PRIVILEGED.search(field):
        return "the state of objects or the simulator, which no robot measures"
    _, _, problem = survey.features.get(field, "").partition(": not read, ")
    if problem:
        return f"it {problem}"
    if not is_state(field):
        return "a time or a calibration, which is no state of the robot"
    if re.match(r"float\d+ \(\d+, \d+, [134]\)", survey.features.get(field, "")):
        return "an image of floats: a camera needs images or uint8; convert it to uint8"
    if "action" in field:
        return "another action: add it in standardize, or use it in place of the action"
    if field in survey.numbers:
        return "numbers that are not part of the proprio: add them in standardize"
    return (
        f"{survey.features.get(field, 'a field')} is not a measurement that a spec reads by default"
    )


def _stem(key: str) -> str:
    """Return the name of a camera without the words for its kind of image."""
    words = re.split(r"[._]", key.lower())
    kinds = {"image", "images", "rgb", "color", "depth", "img", "observation"}
    return "_".join(w for w in words if w not in kinds)


def describe_unused(unused: Mapping[str, str], about: Mapping[str, object]) -> str:
    """Return a line per field that the spec or the conversion left out; "" for none."""
    lines = [
        f"  not in the spec: {'' if k.startswith('episode.') else 'steps.'}{k}: {reason}"
        for k, reason in unused.items()
    ]
    for title, part in (("left out by convert", "left_out"), ("stored otherwise", "changed")):
        columns = about.get(part, {})
        if isinstance(columns, Mapping):
            lines += [f"  {title}: {k}: {reason}" for k, reason in sorted(columns.items())]
    return "\n".join(lines)
