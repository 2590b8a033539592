"""Every command of README and docs names a script, a config, arguments and options that exist.

The commands are extracted from the ```bash blocks. Those with --config are parsed as the command
line parses them, overrides included; the flags of the others must be defined by their script.
"""

import re
import shlex
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from octolike.config import cli
from octolike.config.python_files import shipped_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
# What stands for something of the reader's; a config that exists takes the place of C.
PLACEHOLDERS = {"C": "quickstart", "DIR": "data", "RUN": "runs/quickstart", "OXE": "data"}


def commands(page):
    """Return the octolike commands of a page's shell blocks, continued lines joined."""
    found, previous = [], ""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["..."]:  # the command before, with other arguments
                words = [*previous, *words[1:]]
            while words and ("=" in words[0] or words[0] == "srun"):  # environment, launcher
                words = words[1:]
            if words[:1] == ["octolike"]:
                previous = words
                found.append(words)
    return found


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
    for name in re.findall(r"(?<!\S)--([a-z_]+)", " ".join(arguments)):
        assert re.search(rf"[\"'](--)?{name}[\"']", source), f"{words[1]} has no --{name}"


def _parse(arguments, command):
    """Parse the config and its overrides; other flags must be named by the script."""
    name = arguments[arguments.index("--config") + 1]
    path = shipped_config(name)
    assert Path(path.partition(":")[0]).is_file(), f"there is no config {name}"
    if "checkpoint=" in name:
        pytest.skip("needs the run that the config names")
    own = [a for a in arguments if a.startswith("--config.")]
    argv, overrides = cli.split_overrides(["octolike", "--config", path, *own])
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
