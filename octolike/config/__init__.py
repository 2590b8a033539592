"""The schema of every run: each option once, with its type, default, unit and meaning.

A config file is `configs/x.py` with `get_config(arg) -> Config`; `cli` changes one at the command
line. Open sets (tokenizers, encoders, heads, text tokenizers, environments, ...) hold `Component`s:
{"kind": name, field: value, ...}, looked up in one table of the module that owns them. An unknown
name is an error everywhere: constructor, attribute, command line, config argument, stored JSON and
component field.
"""

from octolike.config.cli import parse_arg, run
from octolike.config.components import Component, build_component, option, unknown
from octolike.config.listing import describe
from octolike.config.open_sets import resolve
from octolike.config.python_files import base_config, load_module
from octolike.config.schema import (
    AugmentConfig,
    CollectConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from octolike.config.stored import from_json, stored_config, to_json
from octolike.errors import ConfigError

__all__ = [
    "AugmentConfig",
    "CollectConfig",
    "Component",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "base_config",
    "build_component",
    "describe",
    "from_json",
    "load_module",
    "option",
    "parse_arg",
    "resolve",
    "run",
    "stored_config",
    "to_json",
    "unknown",
]
