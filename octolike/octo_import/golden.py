"""Compares an imported checkpoint with arrays that Octo computed: `import_octo.py --golden DIR`.

    DIR/inputs.npz     a batch of Octo, keys as slash paths
    DIR/outputs.npz    tokens/<group>, mask/<group>      the outputs of the transformer
                       betas; eps/{time, noisy_actions, pred}; loss/{time, noise, value}
                       ddpm/{init, z, actions}           a complete sampling run with fixed noise:
                                                         init [B, W, F], z [steps, B, W, F]
                       ddpm/x [steps, B, W, F]           optional: x after each of its steps, in
                                                         their order, so x[-1] are the actions
                       sample_actions[_unnormalized]     of a head without noise

F is horizon · action dimensions, flattened. With ddpm/x every step is computed from the recorded x
before it and compared with the recorded x after it. A whole run amplifies rounding: it is then
judged by its steps, and without ddpm/x by its sensitivity (`_judge_chain`).

Everything is computed from the pixels and words of the batch with the run's parameters. Outputs
that the directory lacks are skipped; keys that depend on the random stream of an old jax too.
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
from octolike.model import diffusion, heads, language, precision
from octolike.model.network import build_network
from octolike.octo_import import importer, octo_config, octo_text
from octolike.octo_import.octo_components import WORDS
from octolike.train import checkpoint
from octolike.types import TokenGroup

LIMIT = 1e-4  # largest absolute difference that float32 explains
SCORE_ERROR = 1e-6  # difference of two float32 score networks: 8e-7 was measured
# If no single pass differs by more, a sampling chain is judged by its sensitivity.
SINGLE_PASS = 1e-5
CHAIN, STEPS = "ddpm/actions", "ddpm/x"
IGNORED = ("loss_rngkey3", "sample_actions_key5_jax0420")


class OutputComparison(NamedTuple):
    """One output: its largest absolute difference, whether it is within the limit, and a remark.

    sensitivity: for a sampling chain, the effect of rounding in its first score on the result.
    """

    output: str
    difference: float
    good: bool
    remark: str = ""
    sensitivity: float = 0.0


def compare(imported: importer.ImportedRun, folder: str | Path) -> list[OutputComparison]:
    """Return one comparison per output in the folder.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ConfigError: no output can be compared.
    """
    inputs, outputs = (_load(Path(folder), name) for name in ("inputs.npz", "outputs.npz"))
    with precision.products_of(imported.run.config.model.dtype):
        rows = _judge_chain(_compare_all(imported, inputs, outputs))
    if not rows:
        raise ConfigError(
            f"{folder}/outputs.npz holds no output that can be compared: {list(outputs)}"
        )
    return rows


def _compare_all(
    imported: importer.ImportedRun, inputs: Mapping, outputs: Mapping
) -> list[OutputComparison]:
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
        for part in (_betas, _score, _loss, _steps, _sampling):
            rows += part(head, group, batch, outputs)
    else:
        rows += _deterministic(head, group, run, outputs)
    return rows


def encode(run: checkpoint.Run, batch: types.Batch) -> dict[str, TokenGroup]:
    """Return every token group by name, after the run's transformer."""
    settings = dataclasses.asdict(run.config.model)
    frozen = language.frozen_encoder(settings)
    given = "states" in batch["task"].get("language", {})
    batch = frozen(batch) if frozen and not given else batch
    model = build_network(settings, language.extend_spec(settings, run.spec), run.names)
    apply = jax.jit(functools.partial(model.apply, train=False, method="encode"))
    return apply({"params": run.params}, batch["observation"], batch["task"])


def table(rows: list[OutputComparison]) -> str:
    """Return the comparisons as text, with the verdict in the last line."""
    wide = max(len(row.output) for row in rows)
    lines = [
        f"{row.output:<{wide}}  {row.difference:8.1e}  {'ok' if row.good else 'NO'}  {row.remark}"
        for row in rows
    ]
    bad = sum(not row.good for row in rows)
    verdict = f"{bad} of {len(rows)} outputs differ by more than {LIMIT:g} or their sensitivity"
    verdict += f"; computed with {precision.describe()}"
    head = f"{'output':<{wide}}  largest absolute difference"
    return "\n".join([head, *(line.rstrip() for line in lines), verdict])


# Reading


def _load(folder: Path, name: str) -> dict[str, np.ndarray]:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}; see octolike/octo_import/golden.py")
    with np.load(folder / name) as arrays:
        return dict(arrays)


def batch_of(
    inputs: Mapping[str, np.ndarray], translation: octo_config.ConfigTranslation
) -> types.Batch:
    """Return an Octo batch {slash path: array} in the batch contract (octolike.types)."""
    nested = types.unflatten({path.replace("/", "."): x for path, x in inputs.items()})
    nested = octo_config.modernize(nested)
    batch = importer.to_batch(nested, translation)
    # Octo reads goal images regardless of their flags; octolike blanks those marked absent.
    for key in translation.config.data.cameras if translation.config.data.goal != "none" else ():
        flag = batch["task"]["present"][f"image_{key}"]
        batch["task"]["present"][f"image_{key}"] = np.ones_like(flag)
    words = nested["task"].get(WORDS)
    if isinstance(words, np.ndarray):  # embedded
        batch["task"]["language"]["states"] = octo_text.states_of(words)
    return batch


# Comparing


def _compare(
    output: str, actual: Any, expected: np.ndarray, mask: np.ndarray | None = None
) -> OutputComparison:
    actual = np.asarray(actual)
    if actual.shape != expected.shape:
        return OutputComparison(
            output, np.inf, False, f"{list(actual.shape)}, expected {list(expected.shape)}"
        )
    difference = np.abs(actual.astype(np.float64) - expected)
    if mask is not None:
        difference = difference[mask]
    largest = float(difference.max(initial=0.0))
    return OutputComparison(output, largest, bool(largest <= LIMIT))


def _tokens(
    groups: Mapping[str, TokenGroup], outputs: Mapping[str, np.ndarray]
) -> Iterator[OutputComparison]:
    task = [group for name, group in groups.items() if name.startswith("task_")]
    if task:
        all_task_tokens = TokenGroup(
            *(jnp.concatenate(x, axis=axis) for x, axis in zip(zip(*task), (-2, -1)))
        )
        groups = {**groups, "task": all_task_tokens}
    for key in outputs:
        kind, _, name = key.partition("/")
        if kind not in ("tokens", "mask"):
            continue
        if name not in groups:
            yield OutputComparison(
                key, np.inf, False, f"the model has no such group; its groups: {', '.join(groups)}"
            )
        elif kind == "mask":
            yield _compare(key, groups[name].mask, outputs[key].astype(bool))
        else:
            # Masked tokens are not compared: no other token attends to them.
            mask = outputs.get(f"mask/{name}", np.ones(outputs[key].shape[:-1])).astype(bool)
            yield _compare(key, groups[name].tokens, outputs[key], mask=mask)


def _betas(
    head: Any, group: TokenGroup, batch: types.Batch, outputs: Mapping
) -> Iterator[OutputComparison]:
    if "betas" in outputs:
        yield _compare("betas", head.betas, outputs["betas"])


def _score(
    head: Any, group: TokenGroup, batch: types.Batch, outputs: Mapping
) -> Iterator[OutputComparison]:
    if "eps/pred" in outputs:
        embedding = head.embed(group)[None]
        scores = head.score(embedding, outputs["eps/noisy_actions"], outputs["eps/time"])
        yield _compare("eps/pred", scores, outputs["eps/pred"])


def _loss(
    head: Any, group: TokenGroup, batch: types.Batch, outputs: Mapping
) -> Iterator[OutputComparison]:
    if "loss/value" in outputs:
        mask = batch["action_mask"] & batch["observation"]["timestep_mask"][..., None, None]
        # Masked actions are not zeroed here, as in Octo; octolike's training zeroes them.
        errors = head.errors(group, batch["action"], outputs["loss/time"], outputs["loss/noise"])
        yield _compare("loss/value", heads.masked_losses(errors, mask)[0], outputs["loss/value"])


def _steps(
    head: Any, group: TokenGroup, batch: types.Batch, outputs: Mapping
) -> Iterator[OutputComparison]:
    """Compare each step of a sampling run, from the recorded x before it."""
    if STEPS not in outputs:
        return
    recorded, first, z = (outputs[key] for key in (STEPS, "ddpm/init", "ddpm/z"))
    if recorded.shape != z.shape:
        yield OutputComparison(
            STEPS, np.inf, False, f"{list(recorded.shape)}, expected {list(z.shape)}, as ddpm/z"
        )
        return
    before = jnp.asarray(np.concatenate([first[None], recorded[:-1]])[:, :, -1])
    network = head.bind_network(group)
    after = diffusion.ddpm_steps(network, head.betas, before, z[:, :, -1], clip=head.clip)
    for i, x in enumerate(np.asarray(after)):
        yield _compare(f"{STEPS}[{i}]", x, recorded[i, :, -1])
    if CHAIN in outputs:
        end = recorded[-1, :, -1].reshape(outputs[CHAIN].shape)
        row = _compare(f"{STEPS}[-1]", end, outputs[CHAIN])
        yield row._replace(remark=f"the recorded x and {CHAIN}")


def _sampling(
    head: Any, group: TokenGroup, batch: types.Batch, outputs: Mapping
) -> Iterator[OutputComparison]:
    """Compare a sampling run, and measure how sensitive its result is to float32 rounding.

    The first step divides by √α = 0.03, and later ones amplify further, so the last bits of the
    score network move some values by more than the limit: a chain in float64 differs from Octo's
    float32 by 1.1e-4. The run is repeated with the initial noise perturbed by the rounding error of
    the score network; `_judge_chain` uses the effect.
    """
    if "ddpm/actions" not in outputs:
        return
    repeats, expected = 32, outputs["ddpm/actions"]
    x, z = outputs["ddpm/init"][:, -1], outputs["ddpm/z"][:, :, -1]
    perturbation = (
        np.random.default_rng(0).normal(0, SCORE_ERROR, (repeats, *x.shape)).astype(np.float32)
    )
    perturbation[0] = 0
    repeated = [np.concatenate([np.asarray(a)] * repeats) for a in (*group, x)]
    z = np.concatenate([z] * repeats, axis=1)
    actions = head.denoise(
        TokenGroup(*repeated[:2]), repeated[2] + perturbation.reshape(-1, x.shape[-1]), z
    )
    actions = np.asarray(actions).reshape(repeats, *expected.shape)
    row = _compare("ddpm/actions", actions[0], expected)
    effect = np.abs(actions - actions[0]).max(axis=0)
    yield row._replace(sensitivity=float(effect.max()))


def _judge_chain(rows: list[OutputComparison]) -> list[OutputComparison]:
    """Return the rows with the chain judged by its steps, if x was recorded at each.

    Else by its sensitivity, if all single passes agree.
    """
    steps = [row.difference for row in rows if row.output.startswith(STEPS)]
    others = (row for row in rows if row.output != CHAIN and not row.output.startswith(STEPS))
    single = max((row.difference for row in others), default=np.inf)
    judged = []
    for row in rows:
        if row.output == CHAIN and row.difference > LIMIT and steps:
            remark = (
                f"judged by its steps, which differ by {max(steps):.1e} from the recorded x; "
                f"an error of {SCORE_ERROR:g} in the first score moves the result by up to "
                f"{row.sensitivity:.1e}"
            )
            row = row._replace(good=max(steps) <= LIMIT, remark=remark)
        elif row.output == CHAIN and row.difference > LIMIT:
            exact, bound = single <= SINGLE_PASS, max(LIMIT, row.sensitivity)
            remark = (
                f"an error of {SCORE_ERROR:g} in the first score moves the result by up to "
                f"{row.sensitivity:.1e}; every single pass differs by at most {single:.1e}"
            )
            remark += "" if exact else f", more than {SINGLE_PASS:g}"
            row = row._replace(good=exact and row.difference <= bound, remark=remark)
        judged.append(row)
    return judged


def _deterministic(
    head: Any, group: TokenGroup, run: checkpoint.Run, outputs: Mapping[str, np.ndarray]
) -> Iterator[OutputComparison]:
    actions = None
    if outputs.keys() & {"sample_actions", "sample_actions_unnormalized"}:
        actions = np.asarray(head.sample(group))
    if "sample_actions" in outputs:
        yield _compare("sample_actions", actions, outputs["sample_actions"])
    if "sample_actions_unnormalized" in outputs:
        assert actions is not None
        expected = outputs["sample_actions_unnormalized"]
        yield _compare(
            "sample_actions_unnormalized", run.embodiments[0].unnormalize_action(actions), expected
        )
