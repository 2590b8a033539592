"""A trained run as a policy: raw observation and task in, robot actions out; no tensorflow."""

from octolike.policy.policy import Policy
from octolike.policy.tasks import Task

__all__ = ["Policy", "Task"]
