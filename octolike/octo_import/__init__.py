"""Octo checkpoints to run directories of this project."""
