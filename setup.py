"""The packages of the wheel, configs/ and scripts/ inside octolike; pyproject.toml has the rest."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["octolike", "octolike.*"]),
        "octolike.configs",
        "octolike.configs.experiments",
        "octolike.scripts",
        "octolike.scripts.benchmarks",
    ],
    package_dir={
        "octolike.configs": "configs",
        "octolike.configs.experiments": "configs/experiments",
        "octolike.scripts": "scripts",
        "octolike.scripts.benchmarks": "scripts/benchmarks",
    },
)
