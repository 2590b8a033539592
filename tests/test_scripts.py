"""Scripts: arguments of the commands that they start, and errors for missing parts."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import data_fakes
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from octolike.config import Component, load_module
from octolike.config.python_files import shipped_config
from octolike.evaluation import comparison
from octolike.evaluation.contrasts import Question

SCRIPTS = Path(__file__).parents[1] / "scripts"
CONFIGS = sorted((SCRIPTS.parent / "configs").rglob("*.py"))


@pytest.fixture(scope="module")
def load():
    """Return a function that imports a script by name, once: absl's flags are defined only once."""
    loaded = {}
    sys.path.append(str(SCRIPTS))

    def script(name):
        if name not in loaded:
            spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
            loaded[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    yield script
    sys.path.remove(str(SCRIPTS))


def started(script, monkeypatch, code=0):
    """Return a list of the commands that a script starts: [script, argument, …]; none is run."""
    commands = []

    def note(command, check):
        commands.append([Path(command[1]).name, *map(str, command[2:])])
        if code:
            raise subprocess.CalledProcessError(code, command)

    fake = types.SimpleNamespace(run=note, CalledProcessError=subprocess.CalledProcessError)
    monkeypatch.setattr(sys.modules["_children"], "subprocess", fake)
    return commands


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


def test_a_transfer_study_hands_its_root_and_plug_ins_on(load, monkeypatch, tmp_path):
    from octolike.data.pipeline import decoded_episodes
    from octolike.evaluation.transfer import group_sample, study, transfer_effects

    roots = []
    monkeypatch.setattr(decoded_episodes, "decode_mix", lambda data, **_: roots.append(data.root))
    for module, name in (
        (group_sample, "group_samples"),
        (study, "write_comparison"),
        (transfer_effects, "demonstrated_episodes"),
    ):
        monkeypatch.setattr(module, name, lambda *_: None)
    measured = []
    monkeypatch.setattr(transfer_effects, "measure_errors", lambda *values: measured.append(values))
    monkeypatch.setattr(study, "write_report", lambda *_: None)
    monkeypatch.setattr(study.transfer_report, "summary", lambda _: [])
    script = load("transfer")
    commands = started(script, monkeypatch)
    arguments = ("--config", "configs/experiments/transfer.py:debug", "--seeds", "1")
    run(script, monkeypatch, *arguments, "--root", "elsewhere")
    assert roots == ["elsewhere", "elsewhere"]
    assert {c[0] for c in commands} == {"collect.py", "train.py", "evaluate.py"}
    for name, *extra in commands:
        assert (extra[1:] == ["--config.data.root=elsewhere"]) == (name != "evaluate.py")
    commands.clear()
    run(script, monkeypatch, *arguments)
    assert roots[2] != "elsewhere"
    assert all(len(command) == 2 for command in commands)
    commands.clear()
    file = tmp_path / "my_head.py"
    file.write_text(HEAD)
    run(script, monkeypatch, *arguments, "--plugins", file)
    for name, *further in commands:
        flag = "--plugins" if name == "evaluate.py" else "--config.plugins"
        assert further[1:] == [f"{flag}={file}"]
    assert {plugins for *_, plugins in measured[-2:]} == {(str(file),)}


@pytest.mark.parametrize(
    ("config", "argument", "runs"),
    [
        ("mixing", "debug", "runs/mixing-debug/"),
        ("heldout", "debug", "runs/heldout-debug/"),
        ("conflict", "debug,conflict=rescaled", "runs/conflict-rescaled-debug/"),
        ("compare", "", "runs/compare/"),
    ],
)
def test_a_comparison_hands_arguments_on(load, monkeypatch, config, argument, runs):
    script, path = load("compare"), f"configs/experiments/{config}.py"
    commands, written = started(script, monkeypatch), []
    monkeypatch.setattr(comparison, "write", lambda directory, *_: written.append(f"{directory}/"))
    config_text = f"{path}:{argument}" if argument else path
    run(script, monkeypatch, "--config", config_text, "--variants", "default", "--seeds", 2)
    config_arguments = [
        ",".join(filter(None, (argument, f"variant=default,seed={s}"))) for s in range(2)
    ]
    assert commands == [
        command
        for s in range(2)
        for command in (
            ["train.py", f"--config={path}:{config_arguments[s]}"],
            ["evaluate.py", f"--run={runs}default-{s}"],
        )
    ]
    assert written == [runs]


def test_a_comparison_hands_its_block_of_scenes_on(load, monkeypatch):
    script = load("compare")
    commands, written = started(script, monkeypatch), []
    monkeypatch.setattr(comparison, "write", lambda *arguments: written.append(arguments[1:]))
    arguments = ("--config", "configs/experiments/compare.py", "--variants", "vit", "--seeds", 1)
    run(script, monkeypatch, *arguments, "--block", "test", "--episodes", 200)
    options = ["--block=test", "--episodes=200"]
    assert commands[1] == ["evaluate.py", "--run=runs/compare/vit-0", *options]
    assert written == [(Question("default"), "test", (), 200, "")]
    commands.clear()
    with pytest.raises(SystemExit, match="error: unknown block of scenes: 'tset'"):
        run(script, monkeypatch, *arguments, "--block", "tset")
    assert not commands


def test_a_transfer_study_hands_its_block_of_scenes_on(load, monkeypatch):
    from octolike.data.pipeline import decoded_episodes
    from octolike.evaluation.transfer import study, transfer_effects

    written = []
    monkeypatch.setattr(decoded_episodes, "decode_mix", lambda data, **_: [])
    monkeypatch.setattr(transfer_effects, "measure_errors", lambda *_: None)
    monkeypatch.setattr(study, "write_report", lambda *arguments: written.append(arguments[1:]))
    monkeypatch.setattr(study.transfer_report, "summary", lambda _: [])
    script = load("transfer")
    commands = started(script, monkeypatch)
    arguments = ("--config", "configs/experiments/transfer.py:debug", "--seeds", "1")
    run(script, monkeypatch, *arguments, "--stage", "after", "--block", "test")
    evaluations = [command for command in commands if command[0] == "evaluate.py"]
    assert len(evaluations) == 8
    assert all(command[2:] == ["--block=test"] for command in evaluations)
    assert written == [("test",)]
    commands.clear()
    with pytest.raises(SystemExit, match="error: unknown block of scenes: 'tset'"):
        run(script, monkeypatch, *arguments, "--block", "tset")
    assert not commands


class NoPool:
    """Stands in for a pool of environments: none is stepped."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_late_chunks_are_measured_in_the_chosen_block_of_scenes(load, monkeypatch, tmp_path):
    """Test scenes are won, the others lost; episodes of another block do not count."""
    from octolike.envs import pool
    from octolike.evaluation import rollouts, suites
    from octolike.policy import Policy

    config = load_module(shipped_config("real_time")).get_config("debug")
    policy = types.SimpleNamespace(
        config=config, step=20, embodiment=types.SimpleNamespace(name="tabletop_belt")
    )
    monkeypatch.setattr(Policy, "load", lambda *_, **__: policy)
    monkeypatch.setattr(pool, "EnvPool", NoPool)
    monkeypatch.setattr(rollouts, "env_maker", lambda *_: None)

    def run_episodes(policy, label, plan, pool, results, on_episode, settings):
        for e in plan:
            success = e.seed % suites.OTHER_SCENES >= suites.BLOCKS["test"]
            row = {"policy": label, "split": e.split, "skill": e.skill, "seed": e.seed}
            results.add(row | {"success": success, "failure": ""}, [np.zeros((3, 7))])

    monkeypatch.setattr(rollouts, "run_episodes", run_episodes)
    script, rates = load("benchmark"), []
    monkeypatch.setattr(script, "table", lambda rows: rates.append([r["success"] for r in rows]))
    arguments = ("delay", "--runs", tmp_path, "--methods", "continue", "--delays", "0,2")
    for options in ((), ("--block", "test"), ("--block=development",)):
        run(script, monkeypatch, *arguments, "--episodes", 3, *options)
    assert rates == [[0] * 4, [1] * 4, [0] * 4]


def test_late_chunks_need_a_known_block_of_scenes(load, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(load("benchmark"), monkeypatch, "delay", "--runs", "x", "--block", "tset")
    assert "unknown block of scenes: 'tset'" in capsys.readouterr().err


HEAD = """
from octolike.model.heads import L1

class Mine(L1): ...

PLUGINS = {"heads": {"mine": Mine}}
"""


def test_a_comparison_allows_the_plug_ins_that_its_user_or_its_config_names(
    load, monkeypatch, tmp_path
):
    script = load("compare")
    commands = started(script, monkeypatch)
    monkeypatch.setattr(comparison, "write", lambda directory, *_: None)
    config = tmp_path / "config.py"
    config.write_text(
        "from octolike.config import Config\nVARIANTS = ('default',)\n"
        "def get_config(arg):\n    return Config(workdir='runs/x/y', plugins=('of_config.py',))\n"
    )
    run(script, monkeypatch, "--config", config, "--seeds", 1)
    assert len(commands[0]) == 2
    assert commands[1][2:] == ["--plugins=of_config.py"]
    commands.clear()
    run(
        script, monkeypatch, "--config", config, "--seeds", 1, "--plugins", "a.py", "--plugins=b.py"
    )
    assert commands[0][2:] == ["--config.plugins=a.py", "--config.plugins=b.py"]
    assert commands[1][2:] == ["--plugins=a.py", "--plugins=b.py"]


def test_a_comparison_that_cannot_be_made_is_one_line(load, monkeypatch):
    script = load("compare")
    commands = started(script, monkeypatch, code=3)
    with pytest.raises(SystemExit, match=r"error: configs/quickstart\.py defines no VARIANTS"):
        run(script, monkeypatch, "--config", "configs/quickstart.py")
    assert not commands
    failed = r"error: .*train\.py --config=.*compare\.py:variant=default,seed=0 .* code 3;"
    with pytest.raises(SystemExit, match=failed):
        run(script, monkeypatch, "--config", "configs/experiments/compare.py")
    assert len(commands) == 1


@pytest.mark.parametrize("name", ["compare", "transfer"])
@pytest.mark.parametrize("seeds", ["0", "-1", "1.5", "x"])
def test_a_study_needs_a_seed(load, monkeypatch, capsys, name, seeds):
    with pytest.raises(SystemExit):
        run(load(name), monkeypatch, "--config", "x", f"--seeds={seeds}")
    assert f"{seeds} is not a number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("path", [SCRIPTS / "compare.py", *CONFIGS], ids=lambda p: p.stem)
def test_variants_in_a_command_exist(path):
    """A command at the head of a file names the variants that its config has."""
    for command in ast.get_docstring(ast.parse(path.read_text())).splitlines():
        config = re.search(r"--config (\w+)", command)
        named = re.search(r"(?:--variants |:(?:.*,)?variant=)([\w,]+?)(?:,seed|\s|$)", command)
        if config and named:
            variants = load_module(shipped_config(config[1])).VARIANTS
            assert set(named[1].split(",")) <= set(variants), command


@pytest.mark.parametrize("name", ["aloha", "metaworld"])
def test_a_config_lists_the_install_commands_of_its_simulator(name):
    env = (SCRIPTS.parent / "octolike" / "envs" / name / f"{name}_env.py").read_text()
    docstring = ast.get_docstring(ast.parse((SCRIPTS.parent / f"configs/{name}.py").read_text()))
    commands = re.findall(r"pip install [^&\"]*[^&\" ]", env)
    assert commands
    assert [command for command in commands if command not in docstring] == []


def evaluation(root, predict_chunks=list):
    """Return the parts of an evaluation that scripts/evaluate.py uses, for the dataset `fake`."""
    policy = types.SimpleNamespace(
        embodiment=types.SimpleNamespace(datasets=("fake",)),
        observation_keys=("image_primary", "proprio"),
        image_shapes={"image_primary": (4, 4, 3)},
    )
    config = data_fakes.config(root)
    return types.SimpleNamespace(config=config, policy=policy, predict_chunks=predict_chunks)


def test_demonstrations_are_shown_to_the_policy_as_stored(load, tmp_path):
    data_fakes.write_numbered(tmp_path, "fake", [3, 5])
    demonstrations = load("evaluate").predict_chunks(evaluation(tmp_path))
    assert [d.instruction for d in demonstrations] == ["do 0", "do 1"]
    assert demonstrations[1].observation["image_primary"].shape == (
        5,
        data_fakes.SIDE,
        data_fakes.SIDE,
        3,
    )
    assert demonstrations[1].observation["proprio"][:, 1].tolist() == [0, 1, 2, 3, 4]


def test_held_out_data_without_an_episode_are_no_comparison(load, tmp_path, capsys):
    data_fakes.write_numbered(tmp_path, "fake", [3, 5])
    path = tmp_path / "fake" / "1.0.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    next(x for x in info["splits"] if x["name"] == "val")["shardLengths"] = ["0"]
    path.write_text(json.dumps(info))
    next(path.parent.glob("*-val.*")).write_bytes(b"")
    assert load("evaluate").predict_chunks(evaluation(tmp_path)) is None
    assert "no comparison with demonstrations: 'val' of fake contains no" in capsys.readouterr().out


WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None
sys.path[:0] = ["scripts", "tests"]
import evaluate, types
from octolike.config import Config
robot = types.SimpleNamespace(datasets=("fake",))
policy = types.SimpleNamespace(embodiment=robot, image_shapes={})
config = types.SimpleNamespace(data=Config(workdir="unused").data)
print(evaluate.predict_chunks(types.SimpleNamespace(config=config, policy=policy)))
"""


def test_without_tensorflow_there_is_a_report_but_no_comparison():
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW]
    done = subprocess.run(command, cwd=SCRIPTS.parent, capture_output=True, text=True, check=True)
    line, returned = done.stdout.splitlines()
    assert line == "no comparison with demonstrations: tensorflow is not installed"
    assert returned == "None"


def cannot_be_read(workdir):
    from octolike.train import retention

    workdir.mkdir(exist_ok=True)
    (workdir / retention.FILE).write_text("{")
    return retention.RetentionPolicy(workdir, newest=1)


def under_a_file(workdir):
    workdir.write_text("no directory")
    (workdir / "checkpoints").mkdir(parents=True)


def full_disk(_):
    from octolike.train.checkpoint_store import SaveError

    raise SaveError("checkpoint 2 could not be written")


def mistaken(kind):
    def fail(_):
        raise kind("of our own")

    return fail


def test_an_unknown_kind_is_refused_before_the_data_are_opened(load, tmp_path, monkeypatch):
    script, config = load("_launch"), data_fakes.config(tmp_path)
    config.workdir = str(tmp_path / "run")
    config.model.heads = {"action": Component(kind="diffusoin")}
    monkeypatch.setattr(script, "open_source", lambda config: pytest.fail("the data were opened"))
    with pytest.raises(SystemExit, match=r"unknown kind at .*: 'diffusoin'; did"):
        script.launch(config)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (cannot_be_read, r"^error: .*scores\.json is corrupted"),
        (under_a_file, r"^error: .*Not a directory: '.*/run/checkpoints'"),
        (full_disk, r"^error: checkpoint 2 could not be written$"),
    ],
)
def test_files_that_training_cannot_read_or_write_are_one_line(
    load, monkeypatch, tmp_path, fault, match
):
    script = load("_launch")
    config = data_fakes.config(tmp_path)
    monkeypatch.setattr(script, "open_source", lambda config: None)
    monkeypatch.setattr(script, "train", lambda config, data: fault(tmp_path / "run"))
    with pytest.raises(SystemExit, match=match):
        script.launch(config)
    for kind in (TypeError, KeyError, ValueError):  # of a mistake in the code, all is shown
        monkeypatch.setattr(script, "open_source", mistaken(kind))
        with pytest.raises(kind, match="of our own"):
            script.launch(config)


def test_a_policy_that_has_diverged_is_one_line(load, monkeypatch):
    from octolike.evaluation import evaluate

    def diverged(*_):
        raise FloatingPointError("the network returned actions that are not finite")

    monkeypatch.setattr(evaluate, "robots_to_evaluate", diverged)
    script = load("evaluate")
    with flagsaver.flagsaver():
        flags.FLAGS(["evaluate.py", "--run=runs/none"])
        with pytest.raises(SystemExit, match="error: the network returned"):
            script.main([])
