"""Plant faults in the code, one at a time, and check that the named tests go red.

    python tests/mutation_check.py                all: about 20 minutes on two cores
    python tests/mutation_check.py ema gripper    those with a word in their names

Each fault is planted in a copy of the repository, and only its test file runs. Expect a line per
fault: red, or NOT NOTICED; the exit code is 1 if any was not noticed. "stale" means that the code
to replace is not there any more: update the table.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("octolike", "tests", "configs", "scripts", "examples")
SECONDS = 900  # per test file


class Mutation(NamedTuple):
    """A planted fault: in `file`, `old` becomes `new`; `test` must go red."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "attention ignores the mask of missing inputs",
        "model/tokens.py",
        "allowed[None, None] & self.visible[:, None, None, :keys]",
        "allowed[None, None] | self.visible[:, None, None, :keys]",
        "test_model_tokens.py",
    ),
    Mutation(
        "diffusion swaps signal and noise",
        "model/diffusion.py",
        "y = jnp.sqrt(next_bar) * x0 + jnp.sqrt(1 - next_bar) * noise",
        "y = jnp.sqrt(1 - next_bar) * x0 + jnp.sqrt(next_bar) * noise",
        "test_model_heads.py",
    ),
    Mutation(
        "the closing step looks for the next one",
        "data/pipeline/closings.py",
        'side="left"',
        'side="right"',
        "test_auxiliary.py",
    ),
    Mutation(
        "PCGrad leaves out the losses of the whole batch",
        "train/group_gradients.py",
        'metrics["loss_per_example"].astype(jnp.float32), shared)',
        'metrics["loss_per_example"].astype(jnp.float32), 0 * shared)',
        "test_train_conflicts.py",
    ),
    Mutation(
        "ema keeps the new parameters",
        "train/step.py",
        "step_size=1 - d)",
        "step_size=d)",
        "test_train_optimizer.py",
    ),
    Mutation(
        "random keys on resume start anew",
        "train/loop.py",
        "step = make_step(model, tx, config, step_key,",
        "step = make_step(model, tx, config, jax.random.fold_in(step_key, int(state.step)),",
        "test_train_loop.py",
    ),
    Mutation(
        "accumulation forgets the weights of parts",
        "train/gradients.py",
        "lambda a, b: a + weight * b",
        "lambda a, b: a + b",
        "test_train_finetune.py",
    ),
    Mutation(
        "weight decay on every parameter",
        "train/optimizer.py",
        'return name == "kernel" or name.endswith("_kernel")',
        "return True",
        "test_train_optimizer.py",
    ),
    Mutation(
        "retention keeps the oldest checkpoints",
        "train/retention.py",
        "sorted(steps)[-self._newest :]",
        "sorted(steps)[: self._newest]",
        "test_train_checkpoint.py",
    ),
    Mutation(
        "damaged checkpoints are used",
        "train/checkpoint_manifest.py",
        "    if clauses:\n",
        "    if False:\n",
        "test_manifest.py",
    ),
    Mutation(
        "a living owner counts as dead",
        "owner_file.py",
        'return _start_of(owner["pid"]) not in (owner.get("started"), "unknown")',
        "return True",
        "test_train_lease.py",
    ),
    Mutation(
        "un-normalising subtracts the mean",
        "embodiment.py",
        "return (x * scale + shift).astype(np.float32)",
        "return (x * scale - shift).astype(np.float32)",
        "test_embodiment.py",
    ),
    Mutation(
        "the first dimension is not normalised",
        "embodiment.py",
        'return np.where(layout.normalized, kinds, "")',
        'return np.where(np.asarray(layout.normalized) & (np.arange(len(layout)) > 0), kinds, "")',
        "test_embodiment.py",
    ),
    Mutation(
        "gripper sign of binarize",
        "data/specs/expressions.py",
        "state = np.where(np.isfinite(flat), flat > high, np.float32(np.nan))",
        "state = np.where(np.isfinite(flat), flat < low, np.float32(np.nan))",
        "test_expressions.py",
    ),
    Mutation(
        "gripper sign of a dataset",
        "data/specs/oxe.py",
        "1 - next(observation.state[6:7])",
        "next(observation.state[6:7])",
        "test_oxe.py",
    ),
    Mutation(
        "action chunks start one step late",
        "data/pipeline/windows.py",
        "steps = start + xp.arange(horizon)",
        "steps = start + 1 + xp.arange(horizon)",
        "test_data_frames.py",
    ),
    Mutation(
        "another record at the same place is used",
        "data/rlds/record_files.py",
        "if content is not None and int(content_fingerprint(record)) != content:",
        "if False:",
        "test_corrupted_files.py",
    ),
    Mutation(
        "features.json may import modules",
        "data/rlds/known_features.py",
        "if not is_tfds and name not in registered:",
        "if False:",
        "test_strangers_datasets.py",
    ),
    Mutation(
        "HDF5 links into other files are followed",
        "data/onboarding/convert/hdf5.py",
        "if isinstance(link, h5py.ExternalLink):",
        "if False:",
        "test_strangers_recordings.py",
    ),
    Mutation(
        "stored spec files are executed",
        "config/plugins.py",
        "if isinstance(paths, StoredFiles) and paths:",
        "if False:",
        "test_strangers_runs.py",
    ),
    Mutation(
        "words have other ids in the policy",
        "text.py",
        "zlib.crc32(w.encode()) % (self.vocabulary - 1) + 1",
        "hash(w) % (self.vocabulary - 1) + 1",
        "test_text.py",
    ),
    Mutation(
        "the policy pads histories behind",
        "policy/observations.py",
        "np.concatenate([np.repeat(value[:1], padding, axis=0), value])",
        "np.concatenate([value, np.repeat(value[:1], padding, axis=0)])",
        "test_policy.py",
    ),
    Mutation(
        "ensembling prefers old chunks",
        "policy/execution.py",
        "np.exp(-self.settings.ensemble * (starts.max() - starts))",
        "np.exp(self.settings.ensemble * (starts.max() - starts))",
        "test_execution.py",
    ),
    Mutation(
        "intervals of 90 %",
        "evaluation/statistics.py",
        "Z = float(stats.norm.isf(LEVEL / 2))",
        "Z = float(stats.norm.isf(LEVEL))",
        "test_statistics.py",
    ),
    Mutation(
        "stored options are not renamed",
        "config/upgrade.py",
        'config = _rename(config, "train", "fresh", "reinit")',
        "config = dict(config)",
        "test_upgrade.py",
    ),
)


def check(mutation: Mutation, copy: Path) -> str:
    """Plant a fault in the copy, run its test file, restore the file; return the verdict."""
    path = copy / "octolike" / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        return "stale"
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    test = copy / "tests" / mutation.test
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, str(test)],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "NO RESULT: the tests hang"
    finally:
        path.write_text(text, encoding="utf-8")
    if done.returncode == 1:
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        return f"red: {failed[0].partition('::')[2].partition(' ')[0]}" if failed else "red"
    if done.returncode == 0:
        return "NOT NOTICED"
    return f"NO RESULT: exit code {done.returncode}: {done.stdout.strip()[-200:]}"


def main() -> None:
    """Check the mutations with one of the arguments in their names; print a line each."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(w in m.name for w in words)]
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for name in FOLDERS:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        for mutation in chosen:
            begin = time.monotonic()
            verdicts.append(check(mutation, copy))
            seconds = time.monotonic() - begin
            line = f"{mutation.name} ({mutation.file}; {mutation.test}): {verdicts[-1]}"
            print(f"{line} [{seconds:.0f} s]", flush=True)
    noticed = sum(verdict.startswith("red") for verdict in verdicts)
    print(f"{noticed} of {len(verdicts)} noticed")
    sys.exit(0 if noticed == len(verdicts) else 1)


if __name__ == "__main__":
    main()
