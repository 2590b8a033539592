"""List everything that a config can hold: options, and the kinds of components with their fields.

    octolike config                 as text
    octolike config --markdown      as the page of the docs
    octolike config --plugins my_head.py      with the kinds of your own files

Expect type, default, range or choices, and meaning of each.
"""

import sys

from absl import app, flags

MARKDOWN = flags.DEFINE_bool("markdown", False, "print Markdown")
PLUGINS = flags.DEFINE_multi_string("plugins", [], "a Python file that adds kinds")


def main(_: list[str]) -> None:
    """Print the list."""
    from octolike.config import ConfigError, describe, plugins

    try:
        plugins.load(PLUGINS.value)
        print(describe(markdown=MARKDOWN.value), end="")
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
