"""The model card of a run: a README.md for users who did not train it.

Everything in it is read from the run's files; nothing is executed and no plug-in is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from octolike import files
from octolike.embodiment import Embodiment, Layout, embodiments_from_json
from octolike.errors import RunError
from octolike.files import Path
from octolike.remarks import ONE_RUN

REPORT = "evaluation/report.json"
TITLES = {"train": "seen tasks"}


def model_card(directory: Path, step: int, name: str, license: str = "") -> str:
    """Return the card of a checkpoint of a run.

    name: the repository or directory; license: an identifier such as "mit"; "": none is stated.
    Raises RunError, in one line, for a file that is malformed.
    """
    try:
        return _model_card(directory, step, name, license)
    except RunError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise RunError(
            f"a model card of {directory} cannot be written, since one of its JSON files is "
            f"malformed ({files.cause(error)}); see octolike verify {directory}"
        ) from error


def _model_card(directory: Path, step: int, name: str, license: str) -> str:
    config = read_json(directory / "config.json")
    records = embodiments_from_json(read_json(directory / "embodiments.json"))
    names = read_json(directory / "names.json")
    sections = [
        _front_matter(records, names["datasets"], license),
        f"# {name}\n\nA robot policy trained with octolike, checkpoint {step}.",
        _trained_on(directory, config, names, step),
        *(_robot(record) for record in records),
        _inputs(config, names),
        _success(directory, step),
        _use(name, records),
    ]
    return "\n\n".join(sections) + "\n"


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a run; RunError if it cannot be read."""
    try:
        return json.loads(files.read_text(path))
    except RunError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as JSON: {error}") from error


def _front_matter(records: Sequence[Embodiment], datasets: Sequence[str], license: str) -> str:
    tags = ["robotics", "octolike", "jax", *(f"robot:{r.name}" for r in records)]
    lines = ["---", "library_name: octolike", "pipeline_tag: robotics"]
    lines += [f"license: {license}"] if license else []
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    lines += ["datasets:", *(f"- {json.dumps(name)}" for name in datasets)] if datasets else []
    return "\n".join([*lines, "---"])


def _trained_on(directory: Path, config: Mapping[str, Any], names: Any, step: int) -> str:
    data, train = config["data"], config["train"]
    costs = directory / "costs.json"
    rows = [
        ("datasets", ", ".join(names["datasets"])),
        ("mix", data["mix"] or ", ".join(names["datasets"])),
        ("steps", f"{step:,} of {train['steps']:,}, batches of {data['batch_size']}"),
        ("initial parameters", train["init_from"] or "random"),
        ("heads", ", ".join(f"{k}: {v['kind']}" for k, v in config["model"]["heads"].items())),
    ]
    if costs.exists():
        rows.append(("parameters", f"{read_json(costs)['parameters']:,}"))
    versions = directory / "versions.json"
    if versions.exists():
        stated = {k: v for k, v in read_json(versions).items() if v}
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in stated.items())))
    if config["plugins"]:
        rows.append(("plug-ins (Python code)", ", ".join(config["plugins"])))
    return "## Trained on\n\n" + _markdown(("", ""), rows)


def _robot(record: Embodiment) -> str:
    doubts = ", ".join(record.inferred)
    lines = [
        f"## Robot {record.name}",
        "",
        f"{record.robot or 'unnamed robot'} at {record.control_hz:g} actions per second. Gripper: "
        f"{record.gripper or 'none'}. Learned as: {record.representation or 'stored'}.",
    ]
    if doubts:
        lines.append(f"\n**Inferred from the data and not verified:** {doubts}.")
    lines += ["", "Actions, in this order:", "", _layout(record, "action")]
    if record.proprio is not None:
        lines += ["", "Proprio, in this order:", "", _layout(record, "proprio")]
    return "\n".join(lines)


def _layout(record: Embodiment, part: str) -> str:
    layout: Layout = getattr(record, part)
    statistics = getattr(record, f"{part}_statistics")
    # those of actions with a representation are not in the robot's units
    has_range = statistics is not None and not (part == "action" and record.representation)
    rows = []
    for d, name in enumerate(layout.names):
        kind = "target" if layout.absolute[d] else "change"
        row = [name, layout.units[d] or "share", kind if part == "action" else "state"]
        if has_range:
            row.append(f"{statistics.min[d]:.4g} to {statistics.max[d]:.4g}")
        rows.append(row)
    return _markdown(
        ("dimension", "unit", "kind", *(["recorded range"] if has_range else [])), rows
    )


def _inputs(config: Mapping[str, Any], names: Any) -> str:
    data = config["data"]
    rows = [(f"image_{k}", f"RGB, {side} x {side} pixels") for k, side in data["cameras"].items()]
    readers = config["model"]["tokenizers"].values()
    kinds = {component["kind"] for component in readers}
    has_goal = "goal_image" in kinds or any(component.get("goal") for component in readers)
    read = {
        "instructions": bool(kinds & {"language", "subtask", "text_encoder", "instruction_vector"})
        and data["keep_language"],
        "goal images": has_goal and data["keep_goal"],
        "task ids": "task_id" in kinds and data["keep_task_id"],
    }
    conditions = [name for name, probability in read.items() if probability]
    rows += [
        ("frames of history", data["window"]),
        ("actions per chunk", data["horizon"]),
        ("the task is given by", ", ".join(conditions) or "nothing"),
    ]
    if names.get("tasks"):
        rows.append(("tasks", f"{len(names['tasks'])}: {', '.join(names['tasks'][:20])}"))
    return "## Inputs and outputs\n\n" + _markdown(("", ""), rows)


def _success(directory: Path, step: int) -> str:
    path = directory / REPORT
    title = "## Success\n\n"
    if not path.exists():
        return f"{title}Not evaluated in closed loop (no {REPORT} in the run)."
    report = read_json(path)
    rows = []
    for policy, splits in report["success"].items():
        for split, rates in splits.items():
            for skill, r in rates.items():
                if r["rate"] is None:
                    continue
                interval = f"{r['rate']:.0%} [{r['low']:.0%}, {r['high']:.0%}]"
                where = TITLES.get(split, split)
                rows.append((policy, where, skill, interval, f"{r['successes']}/{r['episodes']}"))
    header = ("policy", "tasks", "skill", "success [95 %]", "episodes")
    setup = report.get("setup", {})
    evaluated = setup.get("checkpoint", setup.get("step", step))
    warning = ""
    if isinstance(evaluated, int) and evaluated != step:
        warning = f"\n\n**These are of checkpoint {evaluated}, not of {step}.**"
    return f"{title}{report['headline']}\n\n{_markdown(header, rows)}\n\n{ONE_RUN}{warning}"


def _use(name: str, records: Sequence[Embodiment]) -> str:
    robot = f', embodiment="{records[0].name}"' if len(records) > 1 else ""
    return (
        "## Use\n\nPin the revision that the push printed:\n\n"
        f"```bash\noctolike pull {name}@REVISION runs/pulled\noctolike serve runs/pulled\n```\n\n"
        "```python\nfrom octolike.policy import Policy\n\n"
        f'policy = Policy.load("runs/pulled"{robot})\n```\n\n'
        "Actions are in the units above. Set limits before the first motion "
        "(`octolike serve --limit_range`), and keep a hand at the stop."
    )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    clean = lambda x: str(x).replace("|", "\\|").replace("\n", " ")
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(clean, line))} |" for line in lines)
