"""Instruction to token ids; the data pipeline and the policy use the same.

`TOKENIZERS` is looked up by config.data.text. A tokenizer has `length` (L) and `vocabulary` (number
of ids, 0 is padding) and encodes each distinct instruction once.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from octolike.config import ConfigError


@dataclass
class TextTokenizer:
    """What every text tokenizer does; a subclass says how one instruction becomes ids."""

    length: int = 16
    _known: dict[str, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"data.text.length is {self.length}; it must be at least 1")

    def encode(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32 [B, L], mask bool [B, L]) of B instructions; mask False is padding.

        An instruction of more than L tokens is cut at the end, with a warning that names it.
        """
        rows = [self._row(text) for text in instructions]
        return np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])

    def _row(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        if text not in self._known:
            tokens = self._ids(text)
            if len(tokens) > self.length:
                warnings.warn(
                    f"the instruction {text!r} has {len(tokens)} tokens and is cut at "
                    f"{self.length}; raise data.text.length",
                    stacklevel=3,
                )
            tokens = tokens[: self.length]
            ids = np.zeros(self.length, np.int32)
            ids[: len(tokens)] = tokens
            self._known[text] = ids, np.arange(self.length) < len(tokens)
        return self._known[text]

    def _ids(self, text: str) -> list[int]:
        raise NotImplementedError


@dataclass
class HashTokenizer(TextTokenizer):
    """Words to ids by a hash: nothing to download, nothing to fit, any language.

    Case and punctuation are ignored. Two words share an id with probability 1 / vocabulary.
    """

    vocabulary: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary < 2:
            raise ConfigError(
                f"data.text.vocabulary is {self.vocabulary}; it must be at least 2: id 0 is padding"
            )

    def _ids(self, text: str) -> list[int]:
        words = re.findall(r"\w+", text.lower())
        return [zlib.crc32(w.encode()) % (self.vocabulary - 1) + 1 for w in words]


@dataclass
class HuggingFaceTokenizer(TextTokenizer):
    """A tokenizer of the transformers library, from a local directory or a hub id.

    Raises ConfigError, naming `path`, where there is none.
    """

    path: str = ""

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # seconds to import, so only when asked for

        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"data.text.path {self.path!r} is neither a directory with a tokenizer "
                f"(tokenizer.json, tokenizer_config.json) nor a hub id that can be reached: {error}"
            ) from error

    @property
    def vocabulary(self) -> int:
        return len(self._tokenizer)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])


TOKENIZERS = {"hash": HashTokenizer, "huggingface": HuggingFaceTokenizer}
