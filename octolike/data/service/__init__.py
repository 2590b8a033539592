"""Batches from worker processes on other machines."""
