"""Infer the spec of a surveyed dataset, and write a spec file.

Everything is inferred from names, shapes and numbers. The spec file marks the uncertain values, for
the user to verify.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from octolike import files
from octolike.data.onboarding import spec_fields
from octolike.data.onboarding.infer_layout import InferredLayout, infer_layout
from octolike.data.onboarding.infer_representation import Recommendation, recommend
from octolike.data.onboarding.survey import Survey
from octolike.data.rlds.fields import ACTION
from octolike.embodiment import Layout
from octolike.tables import text_table

WRIST = ("wrist", "hand", "gripper", "eye_in_hand")
DEFAULT_HZ = 10.0
SECOND = ("secondary", "side", "low", "left", "right", "image_1", "2", "back", "overhead")


@dataclass(frozen=True)
class InferredSpec:
    """The inferred fields of a dataset spec.

    Attributes:
        cameras: {camera: key under steps.observation}.
        language: key under steps or "episode.<path>", several keys, or "".
        depth: {camera: key of its depth under steps.observation}.
        depth_unit: metres per stored unit.
        unused: {field under steps: why the spec does not read it}.
        recommendation: the representation of the actions, with the reason.
        action, proprio: dotted fields under steps, to be concatenated; proprio may be empty.
        action_names, proprio_names: names of the dimensions.
        absolute: per action dimension.
        grippers: indices of the gripper's action dimensions.
        control_hz: 0 if unknown.
        action_layout, proprio_layout: names, units and more of the dimensions.
        evidence: {"action.names", "control_hz", …: the reason for the inference}.
    """

    cameras: dict[str, str]
    language: str | tuple[str, ...]
    action: tuple[str, ...]
    proprio: tuple[str, ...]
    action_names: tuple[str, ...]
    proprio_names: tuple[str, ...]
    absolute: tuple[bool, ...]
    grippers: tuple[int, ...]
    control_hz: float
    action_layout: InferredLayout
    proprio_layout: InferredLayout
    evidence: Mapping[str, str]
    depth: Mapping[str, str]
    depth_unit: float
    unused: Mapping[str, str]
    recommendation: Recommendation

    @property
    def instructions(self) -> tuple[str, ...]:
        """The fields of the instruction; () for none."""
        if isinstance(self.language, tuple):
            return self.language
        return (self.language,) if self.language else ()


def infer(survey: Survey) -> InferredSpec:
    """Return the most likely keys; missing ones stay empty."""
    # Sorted: the order of a dict's fields on disk differs between processes.
    language = spec_fields.instruction_fields(survey)
    cameras = _cameras(list(survey.images))
    depth = spec_fields.depth_fields(survey, cameras)
    actions = sorted(k for k in survey.numbers if k == ACTION or k.startswith(f"{ACTION}."))
    actions = actions or sorted(k for k in survey.numbers if _is_action(k))[:1]
    proprio = sorted(spec_fields.proprio_fields(survey))
    state = join_fields(survey, tuple(proprio))
    state_layout = _layout(survey, "proprio", proprio)
    layouts = {
        "action": _layout(survey, "action", actions, state, state_layout.layout),
        "proprio": state_layout,
    }
    evidence = {
        f"{part}.{name}" if name != "gripper" else name: text
        for part, layout in layouts.items()
        for name, text in layout.evidence.items()
    }
    if not survey.control_hz:
        evidence["control_hz"] = f"not in the data as a rate above 0: {DEFAULT_HZ:g} is a default"
    if depth:
        evidence["depth_unit"] = "by the type of the pixels: uint16 millimetres, float32 metres"
    action_layout, proprio_layout = layouts["action"], layouts["proprio"]
    return InferredSpec(
        cameras=cameras,
        language=language if len(language) > 1 else "".join(language),
        action=tuple(actions),
        proprio=tuple(proprio),
        action_names=action_layout.layout.names,
        proprio_names=proprio_layout.layout.names,
        absolute=action_layout.layout.absolute,
        grippers=action_layout.grippers,
        control_hz=survey.control_hz,
        action_layout=action_layout,
        proprio_layout=proprio_layout,
        evidence=evidence,
        depth=depth,
        depth_unit=spec_fields.depth_unit(survey, depth),
        unused=spec_fields.unused_fields(survey, (*actions, *proprio, *language), cameras, depth),
        recommendation=recommend(
            action_layout.layout,
            proprio_layout.layout,
            join_fields(survey, tuple(actions)),
            state,
            action_layout.matches,
        ),
    )


def _is_action(field: str) -> bool:
    return field.rpartition(".")[2].startswith(ACTION)


def _layout(
    survey: Survey,
    part: str,
    fields: list[str],
    state: Sequence[np.ndarray] = (),
    state_layout: Layout | None = None,
) -> InferredLayout:
    """Return the inferred layout of concatenated fields; state: of an action (`infer_layout`)."""
    if not fields:
        return InferredLayout(Layout(names=(), units=(), absolute=(), normalized=()))
    widths = {f: survey.numbers[f][0].shape[1] for f in fields}
    stored = survey.about.get("names", {})
    names = [n for f in fields for n in stored.get(f.removeprefix("observation."), [])]
    columns = join_fields(survey, tuple(fields))
    return infer_layout(part, widths, columns, names, state, state_layout)


def join_fields(survey: Survey, fields: tuple[str, ...]) -> list[np.ndarray]:
    """Return the concatenated columns of the fields, one float64 [T, dims] per episode."""
    return [
        np.concatenate(parts, axis=1)
        for parts in zip(*(survey.numbers[f] for f in fields), strict=True)
    ]


def describe_spec(spec: InferredSpec) -> str:
    """Return the inferred fields, a row per dimension, and the evidence."""
    lines = [
        f"  {name}: {getattr(spec, name)}"
        for name in ("cameras", "depth", "language", "action", "proprio", "grippers", "control_hz")
    ]
    parts = ("action", spec.action_layout, "target"), ("proprio", spec.proprio_layout, "state")
    for part, inferred, absolute in parts:
        layout = inferred.layout
        rows = [
            (n, u or "-", absolute if a else "change", kind or ("normalised" if z else "as it is"))
            for n, u, a, z, kind in zip(
                layout.names,
                layout.units,
                layout.absolute,
                layout.normalized,
                layout.normalization or ("",) * len(layout),
                strict=True,
            )
        ]
        if rows:
            lines.append(text_table(rows, (part, "unit", "", ""), indent=2))
    lines += [f"  inferred {name}: {text}" for name, text in spec.evidence.items()]
    if spec.recommendation.reason:
        title = " ".join(("recommended", *representation_options(spec)))
        lines.append(f"  {title}: {spec.recommendation.reason}")
    return "\n".join(lines)


def representation_options(spec: InferredSpec) -> tuple[str, ...]:
    """Return the options of a training command for the recommended representation."""
    text = spec.recommendation.representation
    return (f"--config.data.representation={text}",) if text else ()


def write_spec(path: Path, survey: Survey, spec: InferredSpec) -> Path:
    """Write a Python file with the spec in DATASETS; return its path.

    Raises ValueError if the dataset has no action field.
    """
    if not spec.action:
        raise ValueError(f"{survey.directory} has no action field, so no spec can be written")
    files.write_text(path, spec_text(survey, spec))
    return path


def spec_text(survey: Survey, spec: InferredSpec) -> str:
    """Return the source of the spec file."""
    action, proprio = (_join_expression(x, survey) for x in (spec.action, spec.proprio))
    standard = (
        f"StandardSteps(np.float32({action}), {f'np.float32({proprio})' if proprio else None})"
    )
    gripper = "unverified: state whether 1 is open" if spec.grippers else "none"
    hz = spec.control_hz or DEFAULT_HZ
    rate_note = "" if spec.control_hz else "  # a default: the data do not contain the rate"
    state = (
        _layout_code("proprio", spec.proprio_layout.layout) if spec.proprio else "    proprio=None,"
    )
    inferred = "".join(f"        {k!r}: {v!r},\n" for k, v in spec.evidence.items())
    depth = f"    depth={dict(spec.depth)!r},\n    depth_unit={spec.depth_unit:g},\n"
    depth = depth if spec.depth else ""
    options = "".join(f"    {text}\n" for text in representation_options(spec))
    # Everything of the dataset is a literal here: its names must not become code.
    title = re.sub(r"[^\w.+-]", "_", survey.name)
    return f'''"""Spec of {title}, inferred by octolike inspect_data: verify and correct it.

    --config.data.specs=my_robot.py --config.data.mix={title}     (the path of this file)
{options}"""

import numpy as np

from octolike.data.specs.catalog import DatasetSpec
from octolike.data.specs.standardize import StandardSteps
from octolike.embodiment import Layout


def standardize(steps):
    """Return actions and proprio, float32 [T, dims], of the raw steps of an episode."""
    return {standard}


SPEC = DatasetSpec(
    name={survey.name!r},
    version={survey.version!r},
    cameras={spec.cameras!r},
{depth}    language={spec.language!r},
{_layout_code("action", spec.action_layout.layout)}
{state}
    gripper={gripper!r},
    control_hz={hz:g},{rate_note}
    robot={survey.name!r},
    standardize=standardize,
    # Inferred, with the evidence. Delete an entry when you have verified it: the remaining ones are
    # printed at the start of each run.
    inferred={{
{inferred}    }},
)

DATASETS = [SPEC]
'''


def _cameras(keys: list[str]) -> dict[str, str]:
    """Return up to four cameras: those of the wrists by their names, then the others in order.

    Of two wrists, the left one's camera is `left_wrist`, as in the specs of ALOHA's datasets.
    """
    names = sorted(spec_fields.camera_key(k) for k in keys)
    names = [n for n in names if "depth" not in n.lower()]
    wrist = [n for n in names if any(w in n.lower() for w in WRIST)]
    cameras = [n for n in names if n not in wrist]
    cameras.sort(key=lambda n: (any(s in n.lower() for s in SECOND), n))
    if not cameras and len(wrist) > 1:
        cameras, wrist = wrist[:1], wrist[1:]
    result = dict(zip(("primary", "secondary"), cameras, strict=False))
    left = [n for n in wrist if "left" in n.lower()]
    right = [n for n in wrist if n not in left]
    if left and right:
        return result | {"wrist": right[0], "left_wrist": left[0]}
    return result | ({"wrist": wrist[0]} if wrist else {})


def _layout_code(part: str, layout: Layout) -> str:
    kinds = f"\n        normalization={layout.normalization!r}," if layout.normalization else ""
    return f"""    {part}=Layout(
        names={layout.names!r},
        units={layout.units!r},
        absolute={layout.absolute!r},
        normalized={layout.normalized!r},{kinds}
    ),"""


def _join_expression(fields: tuple[str, ...], survey: Survey) -> str:
    """Return the Python expression that concatenates fields of `steps`, each [T, ...]."""
    parts = ["steps" + "".join(f"[{k!r}]" for k in f.split(".")) for f in fields]
    if not parts or (len(parts) == 1 and re.search(r"\(\d+,\)$", survey.features[fields[0]])):
        return "".join(parts)
    if len(parts) == 1:
        return f"{parts[0]}.reshape(len({parts[0]}), -1)"
    flat = ", ".join(f"{p}.reshape(len({p}), -1)" for p in parts)
    return f"np.concatenate([{flat}], axis=1)"
