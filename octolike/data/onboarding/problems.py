"""List the suspicious findings of a survey, one sentence each, with the remedy.

Nothing here prevents training: the dataset may be meant to be so. The findings on values are those
of `column_problems`.
"""

from __future__ import annotations

from octolike.data.onboarding.column_problems import action_problems, field_problems
from octolike.data.onboarding.infer_spec import InferredSpec, join_fields
from octolike.data.onboarding.survey import Survey

OFTEN = 0.25  # of the steps with a motion: their image equals the one before


def find_problems(survey: Survey, spec: InferredSpec) -> list[str]:
    """Return suspicious findings, one sentence each; none of them prevents training."""
    problems = []
    if not spec.action:
        problems.append("no action field: there is nothing to predict")
    if not spec.cameras:
        problems.append("no camera")
    problems += _text_problems(survey, spec)
    problems += _episode_problems(survey)
    problems += _camera_problems(survey)
    for field in (*spec.action, *spec.proprio):
        problems += field_problems(field, survey.numbers[field])
    problems += [*spec.action_layout.doubts, *spec.proprio_layout.doubts]
    actions, states = (join_fields(survey, x) if x else [] for x in (spec.action, spec.proprio))
    return problems + action_problems(spec, actions, states)


def _text_problems(survey: Survey, spec: InferredSpec) -> list[str]:
    """Return the episodes without an instruction, texts that change, and undecodable bytes."""
    problems = []
    if not spec.language:
        problems.append("no instruction field: condition on goal images, or convert with one")
    else:
        texts = zip(*(survey.texts[k] for k in spec.instructions), strict=True)
        missing = sum(not any(t.strip() for t in set().union(*sets)) for sets in texts)
        if missing:
            problems.append(
                f"{missing} of {survey.count} episodes have no instruction (unlabelled); "
                "octolike convert --instruction gives them one"
            )
    for key in spec.instructions:
        changing = sum(len({t.strip() for t in texts} - {""}) > 1 for texts in survey.texts[key])
        if changing:
            problems.append(
                f"{key}: the text changes within {changing} of {survey.count} episodes: each frame "
                "is trained with its own, and chunks run on into the next"
            )
        foreign = {t for texts in survey.texts[key] for t in texts if "\ufffd" in t}
        if foreign:
            problems.append(
                f"{key}: bytes that are not UTF-8 are read as \ufffd, such as in "
                f"{min(foreign)[:60]!r}: encode the texts as UTF-8"
            )
    return problems


def _episode_problems(survey: Survey) -> list[str]:
    """Return short episodes, episodes that hold several, and rates that differ."""
    problems = []
    short = int((survey.lengths < 3).sum())
    if short:
        problems.append(f"{short} of {survey.count} episodes have fewer than 3 steps")
    if survey.restarts:
        problems.append(
            f"{survey.restarts} of {survey.count} episodes have is_first or is_last inside: they "
            "hold several recordings, and chunks run on from one into the next: split them"
        )
    if len(survey.rates) > 1:
        listed = ", ".join(f"{hz:g}" for hz in survey.rates)
        problems.append(
            f"the episodes have different rates, {listed} steps per second, and the spec states "
            "one: a chunk spans different times; make a dataset of each rate"
        )
    return problems


def _camera_problems(survey: Survey) -> list[str]:
    """Return the frozen, repeated, black and dark frames, and undecodable images, per camera."""
    problems = []
    for key, count in survey.frozen.items():
        if count:
            problems.append(
                f"{key}: the first and last images are identical in {count} of {survey.count} "
                "episodes (frozen camera, or nothing moves)"
            )
    for key, share in survey.repeated.items():
        if share > OFTEN:
            problems.append(
                f"{key}: {share:.0%} of the images equal the image before, although the robot "
                "moved: a camera slower than the steps, or lost frames; a policy sees old images"
            )
    for key, black in survey.black.items():
        if sum(black):
            total = int(survey.lengths.sum())
            problems.append(
                f"{key}: {sum(black)} of {total} frames are black or empty, in "
                f"{sum(n > 0 for n in black)} of {survey.count} episodes; where most are black, "
                "the camera counts as absent"
            )
        for count, kind in (
            (survey.dark[key], "nearly black"),
            (survey.uniform[key], "of nearly one colour"),
        ):
            if count:
                problems.append(
                    f"{key}: the middle frame is {kind} in {count} of {survey.count} episodes: a "
                    "camera that shows nothing still counts as present"
                )
        if survey.undecodable[key]:
            problems.append(
                f"{key}: images of {survey.undecodable[key]} of {survey.count} episodes cannot be "
                "decoded"
            )
    return problems
