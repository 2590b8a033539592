"""Every command of README and docs names a script, a config, arguments and options that exist, and
every message of the troubleshooting page is one that the code prints.

The commands are extracted from the ```bash blocks. Those with --config are parsed as the command
line parses them, overrides included; the flags of the others must be defined by their script. The
commands that take seconds also run, on small recordings of this test.
"""

import ast
import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from octolike.config import cli
from octolike.config.python_files import shipped_config
from octolike.policy.serving.options import ServeOptions

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
# Placeholders for names of the reader's; an existing config takes the place of C.
PLACEHOLDERS = {"C": "quickstart", "DIR": "data", "RUN": "runs/quickstart", "OXE": "data"}


def commands(page):
    """Return the octolike commands of a page's shell blocks, continued lines joined."""
    commands_found, previous = [], ""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["..."]:  # the command before, with other arguments
                words = [*previous, *words[1:]]
            while words and ("=" in words[0] or words[0] == "srun"):  # environment, launcher
                words = words[1:]
            if words[:1] == ["octolike"]:
                previous = words
                commands_found.append(words)
    return commands_found


CASES = [
    pytest.param(page, words, id=f"{page.name}: {' '.join(words)}")
    for page in PAGES
    for words in commands(page)
]


@pytest.mark.parametrize(("page", "words"), CASES)
def test_a_command_exists_with_its_arguments(page, words):
    if len(words) == 1:
        return
    script = ROOT / "scripts" / f"{words[1]}.py"
    assert script.is_file(), f"{page.name} names an unknown command: {' '.join(words)}"
    arguments = [PLACEHOLDERS.get(word, word) for word in words[2:]]
    if "--config" in arguments:
        _parse(arguments, words[1])
        return
    source = script.read_text(encoding="utf-8")
    if words[1] == "serve":
        source += repr([f.name for f in dataclasses.fields(ServeOptions)])  # see add_arguments
    for name in re.findall(r"(?<!\S)--([a-z_]+)", " ".join(arguments)):
        assert re.search(rf"[\"'](--)?{name}[\"']", source), f"{words[1]} has no --{name}"


def _parse(arguments, command):
    """Parse the config and its overrides; other flags must be named by the script."""
    name = arguments[arguments.index("--config") + 1]
    path = shipped_config(name)
    assert Path(path.partition(":")[0]).is_file(), f"there is no config {name}"
    if "checkpoint=" in name:
        pytest.skip("needs the run that the config names")
    overrides_of_config = [a for a in arguments if a.startswith("--config.")]
    argv, overrides = cli.split_overrides(["octolike", "--config", path, *overrides_of_config])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    config = values["config"].value
    for option, text in overrides:
        cli.set_in_dict(config, option, text)
    config.check()
    source = (ROOT / "scripts" / f"{command}.py").read_text(encoding="utf-8")
    for argument in arguments:
        flag = re.match(r"--([a-z_]+)(=|$)", argument)
        if flag and flag.group(1) != "config":
            assert f'"--{flag.group(1)}"' in source or f'"{flag.group(1)}"' in source


def test_the_pages_have_commands():
    assert len(CASES) > 25


def test_the_messages_of_troubleshooting_are_printed():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition("## Messages")[2].partition("\n## ")[0]
    messages = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))
    assert len(messages) > 20
    sources = [*(ROOT / "octolike").rglob("*.py"), ROOT / ".ci" / "check_gl.py"]
    nodes = [n for path in sources for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for message in messages:  # "…" stands for a value: the words between are one literal each
        for words in filter(None, map(str.strip, message.split("…"))):
            assert any(words in text for text in texts), f"{message}: nothing prints {words!r}"


# Each command in a child of one process that has imported the modules they share.
HELP = """
import os, sys
from absl import app, flags
from ml_collections import config_flags
from octolike import commands

for arguments in eval(sys.argv[1]):
    sys.stdout.flush()
    if child := os.fork():
        print("CODE", *arguments, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    try:
        commands.main(arguments)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 1 if end.code else 0)
    os._exit(0)
"""


def run(*command, cwd=ROOT) -> tuple[int, str]:
    """Run Python in a fresh process; return (exit code, output)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_every_command_prints_its_help():
    names = sorted(path.stem for path in (ROOT / "scripts").glob("[a-z]*.py"))
    helps = [[name, "--helpshort" if _is_absl(name) else "--help"] for name in names]
    code, output = run("-c", HELP, [["--version"], [], *helps])
    assert code == 0, output
    codes = dict(line.rsplit(" ", 1) for line in output.splitlines() if line.startswith("CODE"))
    assert codes.pop("CODE") == "0"
    assert codes.pop("CODE --version") == "0"
    assert len(codes) == len(names)
    for name, flag in helps:  # absl ends with code 1 after it has printed its help
        assert codes[f"CODE {name} {flag}"] == ("1" if _is_absl(name) else "0"), output


def _is_absl(name):
    source = (ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8")
    return "argparse" not in source


SHORT = ("convert", "inspect_data", "statistics")
# One process imports tensorflow once; a command that ends the process must be the last one.
COMMANDS = """
import sys
from octolike import commands

for arguments in eval(sys.argv[1]):
    print("COMMAND", *arguments, flush=True)
    commands.main(arguments)
"""


def test_the_short_commands_run(tmp_path):
    """Recordings of a robot of one's own are converted, inspected and read."""
    h5py = pytest.importorskip("h5py", reason="converting needs the extra 'convert'")
    import recordings

    for file in recordings.aloha(tmp_path / "recordings").glob("*.hdf5"):
        with h5py.File(file, "r+") as content:  # grippers from 0 to 1
            content["action"][:] = content["action"][:] / 10
            content["observations/qpos"][:] = content["observations/qpos"][:] / 10
    lines = dict.fromkeys(" ".join(words[1:]) for page in PAGES for words in commands(page))
    short = {line.split()[0]: shlex.split(line) for line in reversed(lines) if line.strip()}
    convert, inspect, statistics = (short[name] for name in SHORT)  # the first of each
    convert = [{"DIR": "recordings"}.get(word, word) for word in [*convert, "--workers=1"]]
    statistics = [word for word in statistics if not word.startswith("--config.")]
    settings = ("root=data", "mix=my_robot", "specs=my_robot.py", "cache=cache", "cameras={}")
    statistics += [f"--config.data.{setting}" for setting in settings]
    code, output = run("-c", COMMANDS, [convert, inspect, statistics], cwd=tmp_path)
    assert code == 0, output
    assert "Traceback" not in output
    assert "my_robot.py: verify and correct it" in output
    assert "my_robot: 3 episodes, 18 steps" in output.partition("COMMAND statistics")[2]


def test_meta_world_has_one_command_of_installation():
    from octolike.envs.metaworld.metaworld_env import INSTALL

    places = ["docs/install.md", "configs/metaworld.py", "tests/simulator/test_metaworld.py"]
    for path in (ROOT / place for place in places):
        commands_found = re.findall(
            r"pip install [^\n#\"]*metaworld>=[^\n#\"]*", path.read_text(encoding="utf-8")
        )
        assert {command.strip() for command in commands_found} == {INSTALL}, path
    assert INSTALL.removeprefix("pip install ") in (ROOT / "Makefile").read_text(encoding="utf-8")
