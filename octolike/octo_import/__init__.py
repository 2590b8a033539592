"""Imports checkpoints of Octo (Octo Model Team, 2024) as run directories of octolike.

importer: reads the checkpoint directory, writes the run; octo_config: config.json to a Config;
octo_components: tokenizers, encoders and heads; octo_text: text encoder and tokenizer; golden:
compares an imported run with arrays that Octo computed.
"""
