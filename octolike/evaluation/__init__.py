"""Closed-loop rollouts, statistics and reports."""
