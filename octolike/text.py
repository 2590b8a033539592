"""Text tokenizers: instruction to token ids, the same in the data pipeline and the policy.

`config.data.text` is a component of `TOKENIZERS`. A tokenizer has a `length` (L) and a `vocabulary`
(number of ids), and encodes each distinct instruction once. `load_paraphrases` reads alternative
wordings of instructions.
"""

from __future__ import annotations

import json
import re
import threading
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.config import ConfigError, option, unknown
from octolike.config.components import check_fields

# Several streams share a tokenizer, and tokenizers of transformers fail in a second thread.
_LOCK = threading.Lock()
TABLE = "instructions.json"  # {"length": vectors per instruction, "texts": [instruction, …]}


@dataclass
class TextTokenizer:
    """Base class: caches, truncates and pads; a subclass defines the ids of one instruction."""

    length: int = option(16, "L: tokens per instruction; longer ones are truncated", low=1)
    _cache: dict[str, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_fields(self, "data.text.")

    def encode(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32 [B, L], mask bool [B, L]) of B instructions; mask is False for padding.

        An instruction of more than L tokens is truncated, with a warning that names it.
        """
        with _LOCK:
            rows = [self._row(text) for text in instructions]
        return np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])

    def decode(self, ids: Sequence[int], texts: Iterable[str]) -> str:
        """Return the words of ids, which must be words of the texts; others are shown as "?"."""
        words = {self._ids(w)[0]: w for text in texts for w in text.split() if self._ids(w)}
        return " ".join(words.get(i, "?") for i in ids)

    def _row(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        if text not in self._cache:
            tokens = self._ids(text)
            if not tokens and text.strip():
                warnings.warn(
                    f"the instruction {text!r:.200} has no token: the policy does not see it",
                    stacklevel=3,
                )
            if len(tokens) > self.length:
                warnings.warn(
                    f"the instruction {text!r:.200} has {len(tokens)} tokens and is truncated to "
                    f"{self.length}; raise data.text.length",
                    stacklevel=3,
                )
                tokens = self._truncate(text, tokens)
            ids = np.full(self.length, self.padding, np.int32)
            ids[: len(tokens)] = tokens
            self._cache[text] = ids, np.arange(self.length) < len(tokens)
        return self._cache[text]

    @property
    def padding(self) -> int:
        """The padding id; its mask is False."""
        return 0

    def _ids(self, text: str) -> list[int]:
        raise NotImplementedError

    def _truncate(self, text: str, tokens: list[int]) -> list[int]:
        """Return a longer text's tokens, truncated to `length`."""
        return tokens[: self.length]


# Chinese, Japanese and Thai write no spaces between words.
_SPACELESS = "\u0e01-\u0e4e\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORDS = {
    "words": re.compile(r"\w+"),
    "characters": re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+"),
}


@dataclass
class HashTokenizer(TextTokenizer):
    """Hashes words to ids: needs no download and no fitting, and works for any language.

    Case and punctuation are ignored; a text of nothing else has one token per sign. Two words
    collide with probability 1 / vocabulary.
    """

    vocabulary: int = option(4096, "number of ids; id 0 is padding", low=2)
    segmentation: str = option(
        "characters",
        "characters: one token per character of a script without spaces, and per sign of a text "
        "without words; words: as runs before format 3",
        choices=tuple(_WORDS),
    )

    def _ids(self, text: str) -> list[int]:
        words = _WORDS[self.segmentation].findall(text.lower())
        if not words and self.segmentation == "characters":
            words = re.findall(r"\S", text)
        return [zlib.crc32(w.encode()) % (self.vocabulary - 1) + 1 for w in words]


@dataclass
class HuggingFaceTokenizer(TextTokenizer):
    """A tokenizer of the transformers library: a directory, a hub id, or package:NAME/FOLDER.

    Raises ConfigError that names `path` if it has no tokenizer.
    """

    path: str = option("", "directory, hub id or package:NAME/FOLDER of the tokenizer")

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # takes seconds to import

        try:
            # Without the argument transformers asks whether it may execute the tokenizer's code.
            return AutoTokenizer.from_pretrained(
                files.package_path(self.path), trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"data.text.path {self.path!r} is neither a directory with a tokenizer "
                f"(tokenizer.json, tokenizer_config.json) nor a reachable hub id: "
                f"{files.cause(error)}"
            ) from error

    @property
    def vocabulary(self) -> int:
        return len(self._tokenizer)

    @property
    def padding(self) -> int:
        """The tokenizer's padding id: 0 for T5, the end-of-text id for CLIP."""
        padding = self._tokenizer.pad_token_id
        return 0 if padding is None else padding

    def decode(self, ids: Sequence[int], texts: Iterable[str] = ()) -> str:
        """Return the text of ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files atomically; `directory` can then be a `path`."""
        with files.replacing(directory) as part:
            self._tokenizer.save_pretrained(part)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def _truncate(self, text: str, tokens: list[int]) -> list[int]:
        # The tokenizer keeps its end token, which encoders were trained with.
        encoding = self._tokenizer(text, truncation=True, max_length=self.length)
        return list(encoding["input_ids"])


@dataclass
class TableTokenizer(TextTokenizer):
    """The rows of a table of instructions with given vectors, such as sentence embeddings.

    The vectors are in the text encoder of the kind "table". Each instruction has L of them: that of
    row r has the ids r · L + 1 to (r + 1) · L. Raises ConfigError for an instruction that the table
    lacks; "" is in every table, for absent instructions.
    """

    path: str = option("", f"directory with the texts of the table, {TABLE}")

    @cached_property
    def rows(self) -> dict[str, int]:
        """Return {instruction: row}."""
        file = Path(files.package_path(self.path)) / TABLE
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            length, rows = stored["length"], {text: i for i, text in enumerate(stored["texts"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"data.text.path {self.path!r} has no table of instructions ({TABLE}, as "
                f"octolike import_octo writes it): {files.cause(error)}"
            ) from error
        if length != self.length:
            raise ConfigError(
                f"data.text.length is {self.length}; the table {file} has {length} vectors per "
                f"instruction, so set it to {length}"
            )
        return rows

    @property
    def vocabulary(self) -> int:
        return 1 + self.length * len(self.rows)

    def save(self, directory: str | Path) -> None:
        """Write the table's texts atomically; `directory` can then be a `path`."""
        write_table(directory, self.length, list(self.rows))

    def _ids(self, text: str) -> list[int]:
        if text.strip() not in self.rows:
            raise ConfigError(
                f"{unknown('instruction', text.strip(), self.rows)}: the table of vectors "
                f"{self.path!r} lacks it; word it like one of them, or add its vector to the table"
            )
        first = self.rows[text.strip()] * self.length + 1
        return list(range(first, first + self.length))


def write_table(directory: str | Path, length: int, texts: Sequence[str]) -> None:
    """Write the texts of a table with `length` vectors each, for `TableTokenizer`."""
    with files.replacing(directory) as part:
        part.mkdir()
        content = json.dumps({"length": length, "texts": list(texts)}, indent=2, ensure_ascii=False)
        (part / TABLE).write_text(content + "\n", encoding="utf-8")


TOKENIZERS = {"hash": HashTokenizer, "huggingface": HuggingFaceTokenizer, "table": TableTokenizer}


def load_paraphrases(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Return {instruction: paraphrases} of a JSON file {instruction: [paraphrase, …]}.

    Surrounding blanks are stripped.

    Raises:
        ConfigError: names the file and the entry, for a missing file, invalid JSON, a duplicate
            instruction, or an entry that is empty or not text.
    """
    path = Path(path)
    name = f"data.paraphrases {str(path)!r}"
    try:
        # As pairs: a dict would silently drop the first of two equal keys.
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(pairs, _Pairs):
        raise ConfigError(f"{name} is a {type(pairs).__name__}; expected {_FORM}")
    paraphrases: dict[str, tuple[str, ...]] = {}
    for instruction, wordings in pairs:
        if not isinstance(wordings, list) or isinstance(wordings, _Pairs) or not wordings:
            raise ConfigError(f"{name}[{instruction!r}] is {wordings!r}; expected {_FORM}")
        for wording in (instruction, *wordings):
            if not isinstance(wording, str) or not wording.strip():
                raise ConfigError(
                    f"{name}[{instruction!r}] has {wording!r}; expected a sentence: {_FORM}"
                )
        if instruction.strip() in paraphrases:
            raise ConfigError(f"{name} has {instruction!r} twice; merge the two lists")
        paraphrases[instruction.strip()] = tuple(w.strip() for w in wordings)
    return paraphrases


_FORM = '{"instruction": ["another wording", ...], ...}'


class _Pairs(list):
    """A JSON object as (key, value) pairs."""
