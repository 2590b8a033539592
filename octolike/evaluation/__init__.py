"""Closed-loop rollouts and the reports that one can look at."""
