"""The modules of the client, from the package beside this folder; pyproject.toml has the rest."""

from setuptools import setup

setup(
    package_dir={"octolike": "../octolike", "octolike.policy": "../octolike/policy"},
    py_modules=[
        "octolike.__init__",
        "octolike.policy.__init__",
        "octolike.policy.client",
        "octolike.policy.execution",
        "octolike.policy.executor",
        "octolike.policy.send_guard",
        "octolike.policy.wire",
    ],
)
