"""Instruction to token ids; the data pipeline and the policy use the same.

`TOKENIZERS` is looked up by config.data.text. A tokenizer has `length` (L) and `vocabulary` (number
of ids) and encodes each distinct instruction once. `load_paraphrases` reads other
wordings of the same instructions.
"""

from __future__ import annotations

import json
import re
import threading
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.config import ConfigError

# Several streams share a tokenizer, and those of transformers refuse a second thread.
_ENCODING = threading.Lock()


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
        with _ENCODING:
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
                tokens = self._cut(text, tokens)
            ids = np.full(self.length, self.padding, np.int32)
            ids[: len(tokens)] = tokens
            self._known[text] = ids, np.arange(self.length) < len(tokens)
        return self._known[text]

    @property
    def padding(self) -> int:
        """The id after the last token; its mask is False."""
        return 0

    def _ids(self, text: str) -> list[int]:
        raise NotImplementedError

    def _cut(self, text: str, tokens: list[int]) -> list[int]:
        """Return the first `length` tokens of a longer text."""
        return tokens[: self.length]


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

    @property
    def padding(self) -> int:
        """The tokenizer's own: 0 for T5, the end of the sentence for CLIP."""
        own = self._tokenizer.pad_token_id
        return 0 if own is None else own

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files, so that `directory` can be a `path`: all or nothing."""
        with files.replacing(directory) as part:
            self._tokenizer.save_pretrained(part)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def _cut(self, text: str, tokens: list[int]) -> list[int]:
        # The tokenizer keeps its end mark, which encoders were trained to see.
        cut = self._tokenizer(text, truncation=True, max_length=self.length)
        return list(cut["input_ids"])


TOKENIZERS = {"hash": HashTokenizer, "huggingface": HuggingFaceTokenizer}


def load_paraphrases(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Return {instruction: other wordings} of a JSON file {instruction: [wording, ...]}.

    Wordings are stripped of surrounding blanks. Raises ConfigError that names the file and the
    entry for what is not there, no JSON, twice there, empty, or not text.
    """
    path = Path(path)
    where = f"data.paraphrases {str(path)!r}"
    try:
        # pairs, not a dict: JSON lets a key be there twice, and the first would be lost silently
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    if not isinstance(pairs, _Pairs):
        raise ConfigError(f"{where} is a {type(pairs).__name__}; expected {_FORM}")
    found: dict[str, tuple[str, ...]] = {}
    for instruction, wordings in pairs:
        if not isinstance(wordings, list) or isinstance(wordings, _Pairs) or not wordings:
            raise ConfigError(f"{where}[{instruction!r}] is {wordings!r}; expected {_FORM}")
        for wording in (instruction, *wordings):
            if not isinstance(wording, str) or not wording.strip():
                raise ConfigError(
                    f"{where}[{instruction!r}] has {wording!r}; expected a sentence: {_FORM}"
                )
        if instruction.strip() in found:
            raise ConfigError(f"{where} has {instruction!r} twice; put its wordings in one list")
        found[instruction.strip()] = tuple(w.strip() for w in wordings)
    return found


_FORM = '{"instruction": ["another wording", ...], ...}'


class _Pairs(list):
    """A JSON object as (key, value) pairs."""
