"""The errors that end a command with one line, without a traceback. No framework is imported."""


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, or at odds with another one."""
