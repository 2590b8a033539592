"""Pages of the site that are generated: results, configuration, commands, contributing."""

from __future__ import annotations

import ast
import contextlib
import io
import runpy
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


def on_files(files, config):
    """Add the generated pages to the site."""
    pages = {
        "results.md": _from_root("RESULTS.md"),
        "contributing.md": _from_root("CONTRIBUTING.md"),
        "reference/commands.md": _commands(),
        "reference/configuration.md": _configuration(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def _from_root(name: str) -> str:
    """Return a page of the repository's root, its links into docs/ made relative to docs/."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")


def _commands() -> str:
    """Return the docstrings of the scripts, one section each."""
    lines = [
        "# Commands",
        "",
        "`octolike NAME …` runs `scripts/NAME.py`; in a clone both forms work. "
        "`--config NAME` takes a file or the name of a shipped config.",
        "",
    ]
    for path in sorted((ROOT / "scripts").glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines += [f"## {path.stem}", "", "```text", text, "```", ""]
    return "\n".join(lines)


def _configuration() -> str:
    """Return what `octolike config --markdown` prints."""
    text = io.StringIO()
    arguments, sys.argv = sys.argv, ["config", "--markdown"]
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(str(ROOT / "scripts" / "config.py"), run_name="__main__")
    finally:
        sys.argv = arguments
    return text.getvalue()
