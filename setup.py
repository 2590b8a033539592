"""Packaging of octolike. `requirements.lock` pins the versions that the tests passed with."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "sim": ["mujoco>=3.3,<4", "gymnasium>=1.1,<2"],
    "metaworld": ["metaworld>=3.1,<4", "packaging"],
    "aloha": ["gym-aloha>=0.1.3"],
    "convert": ["h5py>=3.11", "pyarrow>=17"],
    "torch": ["torch==2.13.0"],
    "cuda": ["jax[cuda13]>=0.10,<0.12"],
    "tpu": ["jax[tpu]>=0.10,<0.12"],
    "dev": ["pytest>=8.3", "pytest-xdist>=3.6", "ruff>=0.12", "nbclient>=0.10", "ipykernel>=6.29"],
}

setup(
    name="octolike",
    version="0.1.0",
    description="One robot policy for many tasks, datasets and robots, in JAX and Flax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["octolike", "octolike.*"]),
    install_requires=[
        "numpy>=2.0",
        "jax>=0.10,<0.12",
        "flax>=0.12,<0.13",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12,<0.13",
        "chex>=0.1.90",
        "etils[epath]>=1.12",
        "ml_collections>=1.1",
        "tensorflow-cpu>=2.21,<2.22; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "tensorflow>=2.21,<2.22; sys_platform != 'linux' or platform_machine != 'x86_64'",
        "tensorflow-datasets>=4.9.10,<4.10",
        "rlds>=0.1.8",
        "grpcio>=1.67",
        "transformers>=5,<6",
        "safetensors>=0.5",
        "scipy>=1.13",
        "matplotlib>=3.9",
        "imageio[ffmpeg]>=2.36",
        "tabulate>=0.9",
        "tqdm>=4.66",
        "tensorboardX>=2.6",
    ],
    extras_require=EXTRAS,
)
