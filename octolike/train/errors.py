"""What can be wrong with what a run has left on disk; no jax."""


class RunError(ValueError):
    """A file of a run that cannot be read; the message names it and what to do."""
