"""An imported checkpoint against arrays that Octo itself computed: `import_octo.py --golden DIR`.

    DIR/inputs.npz     a batch of Octo, keys as slash paths
    DIR/outputs.npz    tokens/<group>, mask/<group>      what the transformer gives
                       betas; eps/{time, noisy_actions, pred}; loss/{time, noise, value}
                       ddpm/{init, z, actions}           a whole sampling run, its noise given
                       sample_actions[_unnormalized]     of a head without noise

Everything is computed from the batch's pixels and words with the run's own parameters; what the
directory lacks is skipped. Keys that hang on the random stream of an old jax are ignored.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from octolike import types
from octolike.config import ConfigError
from octolike.model import heads, language
from octolike.model.network import build_network
from octolike.octo_import import importer, translate
from octolike.train import checkpoint
from octolike.types import TokenGroup

LIMIT = 1e-4  # largest absolute difference that is put down to float32
SCORE_ERROR = 1e-6  # how far two float32 versions of the score network are apart: 8e-7 was measured
IGNORED = ("loss_rngkey3", "sample_actions_key5_jax0420")


class Row(NamedTuple):
    """One output: its largest absolute difference, whether that will do, and what to know."""

    output: str
    difference: float
    good: bool
    remark: str = ""


def compare(imported: importer.Imported, folder: str | Path) -> list[Row]:
    """Return a row per output in the folder.

    Raises FileNotFoundError for a folder without the two files, ConfigError for one that holds
    nothing to compare.
    """
    inputs, outputs = (_load(Path(folder), name) for name in ("inputs.npz", "outputs.npz"))
    run = imported.run
    batch = batch_of(inputs, imported.translation)
    groups = encode(run, batch)
    settings = dataclasses.asdict(run.config.model)
    model = build_network(settings, language.extend_spec(settings, run.spec), run.names)
    bound = model.bind({"params": run.params}, rngs={"noise": jax.random.key(0)})
    rows = list(_tokens(groups, outputs))
    name = "action" if "action" in model.heads else next(iter(model.heads))
    head = bound.heads[name]
    group = groups[head.readout]
    if isinstance(head, heads.Diffusion):
        for part in (_betas, _score, _loss, _sampling):
            rows += part(head, group, batch, outputs)
    else:
        rows += _deterministic(head, group, run, outputs)
    if not rows:
        raise ConfigError(f"{folder}/outputs.npz has nothing that can be compared: {list(outputs)}")
    return rows


def encode(run: checkpoint.Run, batch: types.Batch) -> dict[str, TokenGroup]:
    """Return every token group by name, as the run's transformer leaves it."""
    settings = dataclasses.asdict(run.config.model)
    frozen = language.frozen_encoder(settings)
    batch = frozen(batch) if frozen else batch
    model = build_network(settings, language.extend_spec(settings, run.spec), run.names)
    apply = jax.jit(functools.partial(model.apply, train=False, method="encode"))
    return apply({"params": run.params}, batch["observation"], batch["task"])


def table(rows: list[Row]) -> str:
    """Return the rows as text, the verdict in the last line."""
    wide = max(len(row.output) for row in rows)
    lines = [
        f"{row.output:<{wide}}  {row.difference:8.1e}  {'ok' if row.good else 'NO'}  {row.remark}"
        for row in rows
    ]
    bad = sum(not row.good for row in rows)
    verdict = f"{bad} of {len(rows)} outputs differ by more than {LIMIT:g}"
    head = f"{'output':<{wide}}  largest absolute difference"
    return "\n".join([head, *(line.rstrip() for line in lines), verdict])


# Reading


def _load(folder: Path, name: str) -> dict[str, np.ndarray]:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}; see octolike/octo_import/golden.py")
    with np.load(folder / name) as arrays:
        return dict(arrays)


def batch_of(inputs: Mapping[str, np.ndarray], translation: translate.Translation) -> types.Batch:
    """Return a batch of Octo, given by slash paths, in this project's contract."""
    nested = types.unflatten({path.replace("/", "."): x for path, x in inputs.items()})
    batch = importer.to_batch(translate.modernize(nested), translation)
    # Octo looks at a goal's pixels whether its flag says present or not; octolike makes it black.
    for key in translation.config.data.cameras if translation.config.data.goal != "none" else ():
        flag = batch["task"]["present"][f"image_{key}"]
        batch["task"]["present"][f"image_{key}"] = np.ones_like(flag)
    return batch


# Comparing


def _row(output: str, got: Any, expected: np.ndarray, where: np.ndarray | None = None) -> Row:
    got = np.asarray(got)
    if got.shape != expected.shape:
        return Row(output, np.inf, False, f"{list(got.shape)}, expected {list(expected.shape)}")
    difference = np.abs(got.astype(np.float64) - expected)
    if where is not None:
        difference = difference[where]
    largest = float(difference.max(initial=0.0))
    return Row(output, largest, bool(largest <= LIMIT))


def _tokens(groups: Mapping[str, TokenGroup], outputs: Mapping[str, np.ndarray]) -> Iterator[Row]:
    task = [group for name, group in groups.items() if name.startswith("task_")]
    if task:
        whole = TokenGroup(
            *(jnp.concatenate(x, axis=axis) for x, axis in zip(zip(*task), (-2, -1)))
        )
        groups = {**groups, "task": whole}
    for key in outputs:
        kind, _, name = key.partition("/")
        if kind not in ("tokens", "mask"):
            continue
        if name not in groups:
            yield Row(key, np.inf, False, f"the model has no such group: {', '.join(groups)}")
        elif kind == "mask":
            yield _row(key, groups[name].mask, outputs[key].astype(bool))
        else:
            # A token that nobody may look at holds what its sensor would have said.
            seen = outputs.get(f"mask/{name}", np.ones(outputs[key].shape[:-1])).astype(bool)
            yield _row(key, groups[name].tokens, outputs[key], where=seen)


def _betas(head: Any, group: TokenGroup, batch: types.Batch, outputs: Mapping) -> Iterator[Row]:
    if "betas" in outputs:
        yield _row("betas", head.betas, outputs["betas"])


def _score(head: Any, group: TokenGroup, batch: types.Batch, outputs: Mapping) -> Iterator[Row]:
    if "eps/pred" in outputs:
        embedding = head.embed(group)[None]
        got = head.score(embedding, outputs["eps/noisy_actions"], outputs["eps/time"])
        yield _row("eps/pred", got, outputs["eps/pred"])


def _loss(head: Any, group: TokenGroup, batch: types.Batch, outputs: Mapping) -> Iterator[Row]:
    if "loss/value" in outputs:
        mask = batch["action_mask"] & batch["observation"]["timestep_mask"][..., None, None]
        # With the masked actions as they are: Octo shows them to the network, octolike zeros.
        errors = head.errors(group, batch["action"], outputs["loss/time"], outputs["loss/noise"])
        yield _row("loss/value", heads.masked_losses(errors, mask)[0], outputs["loss/value"])


def _sampling(head: Any, group: TokenGroup, batch: types.Batch, outputs: Mapping) -> Iterator[Row]:
    """Compare a sampling run, and say how exactly float32 determines its result.

    The first step divides by √α = 0.03 and the later ones amplify further, so that a run has
    values which the last bits of the score network move by more than the limit. Which ones is
    found out by repeating the run with the initial noise moved by as much as the score network's
    own rounding; the remark tells how far that carries. The limit stays what it is.
    """
    if "ddpm/actions" not in outputs:
        return
    repeats, expected = 32, outputs["ddpm/actions"]
    x, z = outputs["ddpm/init"][:, -1], outputs["ddpm/z"][:, :, -1]
    moved = np.random.default_rng(0).normal(0, SCORE_ERROR, (repeats, *x.shape)).astype(np.float32)
    moved[0] = 0
    many = lambda a: np.concatenate([np.asarray(a)] * repeats)
    z = np.concatenate([z] * repeats, axis=1)
    got = head.denoise(TokenGroup(*map(many, group)), many(x) + moved.reshape(-1, x.shape[-1]), z)
    got = np.asarray(got).reshape(repeats, *expected.shape)
    row = _row("ddpm/actions", got[0], expected)
    moves_by = np.abs(got - got[0]).max(axis=0)
    over = np.abs(got[0] - expected) > LIMIT
    if over.any():
        remark = (
            f"{over.sum()} of {over.size} values are over {LIMIT:g}; an error of {SCORE_ERROR:g} "
            f"in the first score moves them by up to {moves_by[over].max():.1e}"
        )
        row = row._replace(remark=remark)
    yield row


def _deterministic(
    head: Any, group: TokenGroup, run: checkpoint.Run, outputs: Mapping[str, np.ndarray]
) -> Iterator[Row]:
    got = None
    if outputs.keys() & {"sample_actions", "sample_actions_unnormalized"}:
        got = np.asarray(head.sample(group))
    if "sample_actions" in outputs:
        yield _row("sample_actions", got, outputs["sample_actions"])
    if "sample_actions_unnormalized" in outputs:
        expected = outputs["sample_actions_unnormalized"]
        yield _row(
            "sample_actions_unnormalized", run.embodiments[0].unnormalize_action(got), expected
        )
