"""The token sequence: joining, splitting, and the attention mask against its definition."""

import time
from pathlib import Path

import numpy as np
import pytest

from octolike.model import tokens
from octolike.types import TokenGroup

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "octo_parts"


def may_attend(query: tuple, key: tuple) -> bool:
    """State the rule for two tokens (kind, group, timestep)."""
    kind_q, group_q, time_q = query
    kind_k, group_k, time_k = key
    if kind_k == "task":
        return True
    if kind_q == "task" or time_k > time_q:
        return False
    if kind_k == "observation":
        return True
    return kind_q == "readout" and group_q == group_k


@pytest.mark.parametrize(
    ("task", "observation", "readout", "window"),
    [
        ([3], [2, 1], [1, 2], 3),
        ([], [2], [1], 2),
        ([1, 4], [1, 3, 2], [2], 1),
        ([2], [1], [1, 1, 3], 4),
    ],
)
def test_pattern_equals_its_definition_per_token(task, observation, readout, window):
    layout = [("task", f"t{i}", 0) for i, n in enumerate(task) for _ in range(n)]
    for t in range(window):
        layout += [("observation", f"o{i}", t) for i, n in enumerate(observation) for _ in range(n)]
        layout += [("readout", f"r{i}", t) for i, n in enumerate(readout) for _ in range(n)]
    expected = np.array([[may_attend(q, k) for k in layout] for q in layout])
    np.testing.assert_array_equal(tokens.pattern(task, observation, readout, window), expected)


def test_pattern_is_cheap():
    tokens.pattern([16], [256, 64], [1], 2)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        tokens.pattern([16], [256, 64, 16], [1], 2)
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-3


def groups(rng: np.random.Generator, batch: int = 2, window: int = 3) -> tokens.TokenSequence:
    def group(*shape: int) -> TokenGroup:
        return TokenGroup(rng.normal(size=(*shape, 4)), rng.random(shape) < 0.7)

    return tokens.TokenSequence(
        task={"a": group(batch, 2), "b": group(batch, 1)},
        observation={"c": group(batch, window, 3), "d": group(batch, window, 1)},
        readout={"e": group(batch, window, 2)},
    )


def test_split_inverts_join_and_the_order_is_as_documented():
    sequence = groups(np.random.default_rng(0))
    x = tokens.join(sequence)
    assert x.shape == (2, 2 + 1 + 3 * (3 + 1 + 2), 4)
    np.testing.assert_array_equal(x[:, 2], sequence.task["b"].tokens[:, 0].astype(np.float32))
    np.testing.assert_array_equal(
        x[:, 3 + 6 + 3], sequence.observation["d"].tokens[:, 1, 0].astype(np.float32)
    )
    for kind, back in zip(sequence, tokens.split(x, sequence), strict=True):
        assert list(kind) == list(back)
        for name in kind:
            np.testing.assert_array_equal(back[name].tokens, kind[name].tokens.astype(np.float32))
            np.testing.assert_array_equal(back[name].mask, kind[name].mask)


def test_no_query_attends_to_a_masked_key():
    sequence = groups(np.random.default_rng(1))
    mask = np.asarray(tokens.attention_mask(sequence).dense())[:, 0]
    visible = np.concatenate(
        [sequence.task["a"].mask, sequence.task["b"].mask]
        + [
            sequence[kind][name].mask[:, t]
            for t in range(3)
            for kind, name in ((1, "c"), (1, "d"), (2, "e"))
        ],
        axis=-1,
    )
    expected = tokens.pattern([2, 1], [3, 1], [2], 3)[None] & visible[:, None, :]
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.skipif(not GOLDEN.exists(), reason="golden data are not next to this checkout")
@pytest.mark.parametrize("repeat", [False, True])
def test_the_mask_equals_that_of_octo(repeat):
    inputs = np.load(GOLDEN / "batch.npz")
    present = {k: inputs[f"observation/pad_mask_dict/image_{k}"] for k in ("primary", "wrist")}
    step = inputs["observation/timestep_pad_mask"]
    has_language = inputs["task/pad_mask_dict/language_instruction"]

    def group(mask: np.ndarray, n: int) -> TokenGroup:
        mask = np.repeat(mask[..., None], n, -1)
        return TokenGroup(np.zeros((*mask.shape, 1)), mask)

    sequence = tokens.TokenSequence(
        task={"task_language": group(has_language, 16)},
        observation={
            "obs_primary": group(present["primary"] & step, 16),
            "obs_wrist": group(present["wrist"] & step, 4),
        },
        readout={"readout_action": group(np.ones_like(step), 1)},
    )
    if repeat:  # Octo repeats the task tokens in every timestep; here they are one more group
        sequence.observation["obs_task_language"] = group(
            np.repeat(has_language[:, None], 2, 1), 16
        )
    expected = np.load(GOLDEN / "variants.npz")[f"repeat{int(repeat)}_correct1/attention_mask"]
    np.testing.assert_array_equal(tokens.attention_mask(sequence).dense(), expected)
