"""One robot policy for many tasks, datasets and robots. Nothing heavy is imported here."""

__version__ = "0.2.0"
