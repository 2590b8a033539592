"""The subtask level: the network predicts the words of the present subtask, and acts on them.

    instruction words ─┐
    proprio           ─┼─ reader ─ words of the present subtask ─ embeddings ─ tokens, FiLM
    places for words  ─┘

    "stack the red cube on the blue ball"    gripper open    →  "grasp the red cube"
                                             red cube held   →  "put it on the blue ball"

In training, the tokens are those of the subtask that labels the step (`task.subtask`), and the
reader learns to predict its words. Otherwise, in validation and on a robot, they are those of the
predicted words, so that nothing but the instruction and the robot's state is needed. All tasks that
share a subtask share its examples, and a subtask names fewer objects than an instruction.

A word is generated from the vocabulary or copied from the instruction (See et al. 2017), so that
pairs of words never seen together can be named. The reader should not depend on the wording: in
training, words are replaced by random ones, left out and added (`SubtaskReader._vary_wording`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import option
from octolike.model.tokens import AttentionMask, Layout
from octolike.model.transformer import Transformer
from octolike.types import TokenGroup

# How the wording varies in training, relative to `replaced`.
NAMED = 0.5  # instructions with one of the words of subtasks replaced
LEFT_OUT = 0.3  # other words, left out
ADDED = 0.15  # places with words added
MOST_ADDED = 4  # words at one place


class Subtask(nn.Module):
    """Tokens [B, W, N, C] of the present subtask, predicted from instruction and proprio.

    The tokens are word embeddings, learned from scratch. An id beyond the vocabulary gives NaN,
    which stops training.
    """

    vocabulary: int = option(meaning="number of ids of the text tokenizer", low=1)
    width: int = option(64, "width of the tokens and of the reader", low=1)
    pooled: bool = option(True, "one token from the mean word; False: one token per word")
    layers: int = option(2, "transformer blocks of the reader", low=1)
    attention_heads: int = option(4, "attention heads of the reader; they divide the width", low=1)
    replaced: float = option(
        0.8,
        "in training, the largest share of an instruction's words outside the subtask that are "
        "replaced by random ones; fewer are left out, added, or replaced inside the subtask",
        low=0,
        high=1,
    )
    proprio: bool = option(True, "read the robot's state too; False: the instruction alone")
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")
    place: ClassVar[str] = "subtask"

    def reads(self) -> tuple[str, ...]:
        instruction = ("task.language.ids", "task.language.mask", "task.present.language")
        label = ("task.subtask.ids", "task.subtask.mask")
        state = ("observation.proprio", "observation.present.proprio") if self.proprio else ()
        return *instruction, *label, *state

    @nn.compact
    def __call__(
        self, observation: Mapping[str, Any], task: Mapping[str, Any], *, train: bool
    ) -> tuple[TokenGroup, dict[str, jax.Array]]:
        """Return (tokens [B, W, N, C], metrics).

        Metrics: subtask_loss, the mean cross-entropy of the words of labelled steps; subtask_exact,
        the share of these steps with all words predicted; both are 0 without labels.
        """
        reader = SubtaskReader(
            self.vocabulary,
            self.width,
            self.layers,
            self.attention_heads,
            self.replaced,
            self.proprio,
            dtype=self.dtype,
            name="reader",
        )
        label, choice = task["subtask"], reader(observation, task, train=train)
        ids = choice.likeliest()
        exists = ids < self.vocabulary
        self.sow("intermediates", "ids", jnp.where(exists, ids, -1))
        metrics = reading_errors(choice, label["ids"], label["mask"])
        if train:
            ids, exists = label["ids"], label["mask"]
        exists &= task["present"]["language"][:, None, None]
        # Small embeddings scaled to unit variance, as in `tokenizers.Language`.
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="words")
        words = embed(jnp.where(exists, ids, 0)) * self.width**0.5
        if not self.pooled:
            return TokenGroup(words, exists), metrics
        weight = exists[..., None].astype(self.dtype)
        mean = (words * weight).sum(-2) / jnp.maximum(weight.sum(-2), 1)
        token = nn.swish(nn.Dense(self.width, dtype=self.dtype, name="pooled")(mean))
        return TokenGroup(token[..., None, :], exists.any(-1, keepdims=True)), metrics


class WordChoice(NamedTuple):
    """How each place of a subtask chooses its word: from the vocabulary or from the instruction.

    generated: logits [B, W, L, V + 1] of the vocabulary, the last one for no word;
    copied: probabilities [B, W, L, n] of the words of the instruction; ids: [B, n], these words;
    share: [B, W, L], the probability of copying.

    The mixture over the vocabulary is never computed: both methods need it for few words only.
    """

    generated: jax.Array
    copied: jax.Array
    ids: jax.Array
    share: jax.Array

    def log_probability(self, word: jax.Array) -> jax.Array:
        """Return the log-probability [B, W, L] of one word [B, W, L] per place; V: no word."""
        logit = jnp.take_along_axis(self.generated, word[..., None], axis=-1)[..., 0]
        generated = jnp.exp(logit - jax.nn.logsumexp(self.generated, axis=-1))
        is_copy = self.ids[:, None, None] == word[..., None]
        copied = jnp.where(is_copy, self.copied, 0).sum(-1)
        return jnp.log(self.share * copied + (1 - self.share) * generated + 1e-9)

    def likeliest(self) -> jax.Array:
        """Return the likeliest word [B, W, L] of each place; V: no word."""
        # No other word can be: one that is not copied is at most as likely as the first generated.
        first = self.generated.argmax(-1)[..., None]
        ids = jnp.broadcast_to(self.ids[:, None, None], self.copied.shape)
        words = jnp.concatenate([first, ids], axis=-1)
        scores = jax.vmap(self.log_probability, in_axes=-1, out_axes=-1)(words)
        return jnp.take_along_axis(words, scores.argmax(-1)[..., None], axis=-1)[..., 0]


class SubtaskReader(nn.Module):
    """Reads the words of the present subtask in the instruction, given the robot's state."""

    vocabulary: int
    width: int
    layers: int
    attention_heads: int
    replaced: float
    proprio: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, observation: Mapping[str, Any], task: Mapping[str, Any], *, train: bool
    ) -> WordChoice:
        """Return the choice of each of the L words of the present subtask."""
        label, ids = task["subtask"], task["language"]["ids"]
        batch, window, length = label["ids"].shape
        visible = task["language"]["mask"] & task["present"]["language"][:, None]
        if train and self.replaced:
            ids, visible = self._vary_wording(ids, visible, label)
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="words")
        words = embed(ids) * self.width**0.5 + self._positions("word_positions", ids.shape[1])
        words = jnp.where(visible[..., None], words, 0)
        n, rows = ids.shape[1], batch * window
        places = self._positions("places", length) * self.width**0.5
        places = jnp.broadcast_to(places, (rows, length, self.width))
        if self.proprio:  # one query per place, for its word in this state
            places += self._embed_state(observation).reshape(rows, 1, self.width)
        x = jnp.concatenate([jnp.repeat(words, window, axis=0), places], axis=1)
        visible = jnp.repeat(visible, window, axis=0)
        mask = jnp.concatenate([visible, jnp.ones((rows, length), bool)], axis=1)
        x, _ = Transformer(
            layers=self.layers,
            attention_heads=self.attention_heads,
            mlp_width=2 * self.width,
            dtype=self.dtype,
            name="transformer",
        )(x, AttentionMask(mask, Layout((n + length,), (), (), 0)), None, train=train)
        choice = self._choose(x[:, :n], x[:, n:], visible)
        generated, copied, share = (y.reshape(batch, window, *y.shape[1:]) for y in choice)
        return WordChoice(generated, copied, ids, share)

    def _embed_state(self, observation: Mapping[str, Any]) -> jax.Array:
        """Return the embedded state [B, W, C], 0 if it is absent."""
        state, present = observation["proprio"], observation["present"]["proprio"][..., None]
        hidden = nn.swish(self._dense(self.width, "hidden")(state.astype(self.dtype)))
        return jnp.where(present, self._dense(self.width, "state")(hidden), 0)

    def _choose(
        self, words: jax.Array, places: jax.Array, visible: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return `generated` [R, L, V + 1], `copied` [R, L, n] and `share` [R, L] of WordChoice."""
        queries = self._dense(self.width, "queries")(places).astype(jnp.float32)
        keys = self._dense(self.width, "keys")(words).astype(jnp.float32)
        scores = jnp.einsum("rld,rnd->rln", queries, keys) / self.width**0.5
        copied = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e9))
        generated = self._dense(self.vocabulary + 1, "generated")(places).astype(jnp.float32)
        share = self._dense(1, "copied")(places).astype(jnp.float32)
        return generated, copied, jax.nn.sigmoid(share)[..., 0]

    def _vary_wording(
        self, ids: jax.Array, visible: jax.Array, label: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Return (ids [B, n], visible): as if the instruction had other words.

        Each instruction draws how much it changes. Its words are replaced by random ones or left
        out, and random words are added in front and after words, as far as there is room. Words
        that some subtask of the batch contains are never left out, and at most one is replaced:
        whether an instruction names one thing or two must stay visible ("pick up", "put").
        """
        keys = jax.random.split(self.make_rng("dropout"), 8)
        rows, n = ids.shape
        is_named = jnp.zeros(self.vocabulary, bool).at[label["ids"]].max(label["mask"])[ids]
        change = self.replaced * jax.random.uniform(keys[0], (rows, 1))
        random = jax.random.randint(keys[1], (rows, n + 1, 1 + MOST_ADDED), 0, self.vocabulary)
        is_replaced = jax.random.bernoulli(keys[2], change, ids.shape) & ~is_named
        lot = jax.random.uniform(keys[3], ids.shape) * (is_named & visible)
        is_one = jnp.arange(n) == lot.argmax(1, keepdims=True)
        is_replaced |= is_one & jax.random.bernoulli(keys[4], NAMED * change)
        is_left_out = jax.random.bernoulli(keys[5], LEFT_OUT * change, ids.shape) & ~is_named
        words, is_kept = jnp.where(is_replaced, random[:, 1:, 0], ids), visible & ~is_left_out
        # n + 1 groups of a word and the random words after it; the first group has no word.
        is_gap = jnp.pad(visible, ((0, 0), (1, 0)), constant_values=True)
        is_gap &= jax.random.bernoulli(keys[6], ADDED * change, is_gap.shape)
        added = jax.random.randint(keys[7], is_gap.shape, 1, MOST_ADDED + 1) * is_gap
        is_added = jnp.arange(MOST_ADDED) < added[..., None]
        room = n - is_kept.sum(1)[:, None]
        is_added &= (is_added.reshape(rows, -1).cumsum(1) <= room).reshape(is_added.shape)
        words, is_kept = (jnp.pad(x, ((0, 0), (1, 0)))[..., None] for x in (words, is_kept))
        words = jnp.concatenate([words, random[..., 1:]], axis=-1).reshape(rows, -1)
        visible = jnp.concatenate([is_kept, is_added], axis=-1).reshape(rows, -1)
        first = jnp.argsort(~visible, axis=1, stable=True)[:, :n]
        return jnp.take_along_axis(words, first, 1), jnp.take_along_axis(visible, first, 1)

    def _positions(self, name: str, count: int) -> jax.Array:
        init, shape = nn.initializers.normal(self.width**-0.5), (count, self.width)
        return self.param(name, init, shape, jnp.float32).astype(self.dtype)

    def _dense(self, width: int, name: str) -> nn.Dense:
        return nn.Dense(width, dtype=self.dtype, name=name)


def reading_errors(choice: WordChoice, ids: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Return subtask_loss and subtask_exact of a reader's choice.

    ids, mask: [B, W, L] of the labels; the places after the last word are predicted to be empty.
    """
    target = jnp.where(mask, ids, choice.generated.shape[-1] - 1)
    is_labelled = mask.any(-1)
    errors = -choice.log_probability(target).mean(-1)
    exact = (choice.likeliest() == target).all(-1)
    count = jnp.maximum(is_labelled.sum(), 1)
    return {
        "subtask_loss": jnp.where(is_labelled, errors, 0).sum() / count,
        "subtask_exact": (exact & is_labelled).sum() / count,
    }
