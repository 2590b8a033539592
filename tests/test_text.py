"""Instructions to token ids."""

import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

from octolike.config import ConfigError, build_component
from octolike.text import TOKENIZERS, HashTokenizer, HuggingFaceTokenizer, load_paraphrases

TINY_T5 = Path(__file__).parents[2] / "shared" / "golden" / "tiny-t5"


def test_hashing_is_stable_and_ignores_case_and_punctuation():
    text = HashTokenizer(length=6, vocabulary=1024)
    ids, mask = text.encode(["Put the RED cube, please!", "put the red cube please", ""])
    assert ids.dtype == np.int32
    assert ids[0].tolist() == ids[1].tolist() == [227, 775, 913, 118, 729, 0]
    assert mask.sum(1).tolist() == [5, 5, 0]
    assert ids[2].tolist() == [0] * 6


def test_scripts_without_spaces_have_a_token_per_character():
    text = HashTokenizer()
    ids, mask = text.encode(["把红色的块放进碗", "把绿色的块放进碗", "カップを取る"])
    assert mask.sum(1).tolist() == [8, 8, 6]
    assert (ids[0] != ids[1]).sum() == 1
    assert len(text._ids("grip the 杯 now")) == 4


def test_a_text_without_words_still_has_tokens():
    text = HashTokenizer()
    mask = text.encode(["?!", "🤖", " "])[1]
    assert mask.sum(1).tolist() == [2, 1, 0]


@pytest.mark.parametrize("text", ["put it " * 50_000, "a" * 350_000, "把" * 100_000])
def test_a_giant_instruction_is_truncated_with_a_short_warning(text):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids, mask = HashTokenizer(length=8).encode([text])
    assert ids.shape == mask.shape == (1, 8)
    assert all(len(str(warning.message)) < 400 for warning in caught)


def test_runs_before_format_3_keep_their_ids():
    old = HashTokenizer(segmentation="words")
    assert old._ids("把红色的块放进碗") == [zlib.crc32("把红色的块放进碗".encode()) % 4095 + 1]
    for words in ("put the RED cube", "öffne die Tür", "открой ящик 3"):
        assert HashTokenizer()._ids(words) == old._ids(words)
    with pytest.warns(UserWarning, match=r"'\?!' has no token: the policy does not see it"):
        old.encode(["?!"])


def test_ids_are_in_range_and_zero_is_padding():
    words = [f"word{i}" for i in range(500)]
    text = HashTokenizer(length=500, vocabulary=50)
    ids, mask = text.encode([" ".join(words)])
    assert mask.all()
    assert ids.min() >= 1
    assert ids.max() <= 49


def test_a_long_instruction_is_truncated_with_one_warning():
    text = HashTokenizer(length=2)
    with pytest.warns(UserWarning, match=r"'one two three' has 3 tokens and is truncated to 2"):
        ids, mask = text.encode(["one two three"])
    assert mask.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(text.encode(["one two three"])[0], ids)


@pytest.mark.skipif(not TINY_T5.exists(), reason=f"no tokenizer in {TINY_T5}")
def test_a_hugging_face_tokenizer_from_a_directory():
    text = build_component(
        TOKENIZERS, {"kind": "huggingface", "path": str(TINY_T5), "length": 32}, "data.text"
    )
    ids, mask = text.encode(["put the cup into the sink"])
    assert mask[0].any()
    assert ids[0, mask[0]].tolist() == list(text._tokenizer("put the cup into the sink").input_ids)
    assert text.vocabulary > ids.max()


@pytest.mark.skipif(not TINY_T5.exists(), reason=f"no tokenizer in {TINY_T5}")
def test_a_truncated_instruction_keeps_its_end_token(tmp_path):
    text = HuggingFaceTokenizer(path=str(TINY_T5), length=4)
    with pytest.warns(UserWarning, match="is truncated to 4"):
        ids, mask = text.encode(["put the cup into the sink"])
    assert mask.all()
    assert ids[0, -1] == text._tokenizer.eos_token_id
    text.save(tmp_path / "own")
    again = HuggingFaceTokenizer(path=str(tmp_path / "own"), length=30)
    ids, mask = again.encode(["put it there"])
    assert ids[0, ~mask[0]].tolist() == [again.padding] * (~mask).sum()


def test_paraphrases(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"lift the cube": ["raise it ", "up with the cube"]}')
    assert load_paraphrases(path) == {"lift the cube": ("raise it", "up with the cube")}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not valid JSON"),
        ("[1]", "is a list; expected"),
        ('{"a": "b"}', r"\['a'\] is 'b'; expected"),
        ('{"a": []}', r"\['a'\] is \[\]; expected"),
        ('{"a": {"b": ["c"]}}', r"\['a'\] is .*; expected"),
        ('{"a": ["b", 3]}', r"\['a'\] has 3; expected a sentence"),
        ('{" ": ["b"]}', "has ' '; expected a sentence"),
        ('{"a": ["b"], "a": ["c"]}', "has 'a' twice"),
    ],
)
def test_invalid_paraphrases_are_refused(tmp_path, text, match):
    if text is not None:
        (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match=match):
        load_paraphrases(tmp_path / "p.json")


def test_an_error_names_a_wrong_tokenizer_path(tmp_path):
    text = build_component(
        TOKENIZERS, {"kind": "huggingface", "path": str(tmp_path / "none")}, "data.text"
    )
    with pytest.raises(ConfigError, match="neither a directory with a tokenizer"):
        text.encode(["x"])


def test_returned_arrays_may_be_modified():
    text = HashTokenizer(length=2)
    text.encode(["one"])[0][:] = 7
    assert text.encode(["one"])[0][0, 1] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 0}, r"data\.text\.length is 0; it must be at least 1"),
        ({"vocabulary": 1}, r"data\.text\.vocabulary is 1; .* id 0 is padding"),
        ({"lenght": 3}, "did you mean 'length'"),
        ({"kind": "hugingface"}, "did you mean 'huggingface'"),
    ],
)
def test_invalid_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_component(TOKENIZERS, {"kind": "hash"} | fields, "data.text")
