"""The errors that end a command with one line, without a traceback. No framework is imported."""


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, or at odds with another one."""


class DataError(ValueError):
    """Unusable data; the message names the dataset, file or episode and the remedy."""


class RunError(ValueError):
    """An unreadable file of a run; the message names the file and the remedy."""
