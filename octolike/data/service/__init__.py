"""Batches made by worker processes on other machines."""
