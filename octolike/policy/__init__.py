"""A trained run as a policy: raw observation and task in, robot actions out; no tensorflow."""

from octolike.policy.policy import Policy, Task

__all__ = ["Policy", "Task"]
