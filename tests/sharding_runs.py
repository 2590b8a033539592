"""Train small runs on the devices of one process or several; used by test_train_sharding.py.

    python tests/sharding_runs.py '[{"workdir": "a", "fsdp": 1}, ...]'

An existing run is resumed. "stop" is the index of a process that gets SIGTERM, as from a cluster,
while it makes batch 4. "hidden" is [index of a process, step of a checkpoint that it cannot read].
The environment sets the number of devices and processes. Prints a line of JSON per run: the exit
code, and the shards of the largest array of the state.
"""

import json
import os
import signal
import sys

import jax
from train_fakes import FakeSource, Stream, Tiny, config, make_batch

from octolike.train import checkpoint_store, loop, sharding

SIZE, STEPS, STOP_AT = 8, 20, 4


class ProcessShare(Stream):
    """The share of one process in batches of `SIZE` examples."""

    stop = None

    def __next__(self):
        index, count = sharding.process()
        if self.index == STOP_AT and self.stop == index:
            os.kill(os.getpid(), signal.SIGTERM)
        batch = make_batch(self.index, SIZE)
        self.index += 1
        share = slice(index * SIZE // count, (index + 1) * SIZE // count)
        return jax.tree.map(lambda x: x[share], batch)


def hide(checkpoint: int) -> None:
    """Let this process alone fail to read a checkpoint."""
    read = checkpoint_store.CheckpointStore._read

    def fail(store, folder, state):
        if folder.name == str(checkpoint):
            raise OSError("input/output error")
        return read(store, folder, state)

    checkpoint_store.CheckpointStore._read = fail


def train(
    workdir: str,
    fsdp: int = 1,
    stop: int | None = None,
    cache: str = "",
    hidden: tuple[str, int] = ("", 0),
) -> dict:
    """Train one run; the network is wide enough for its first kernel to be sharded."""
    if hidden[0] == os.environ.get("JAX_PROCESS_ID", "0"):
        hide(hidden[1])
    run_config = config(workdir, steps=STEPS, fsdp=fsdp, log_every=1, checkpoint_every=10)
    run_config.data.batch_size, run_config.optim.ema = SIZE, 0.9
    run_config.train.compilation_cache = cache
    run_config.train.distributed = "JAX_NUM_PROCESSES" in os.environ
    batches = type("Batches", (ProcessShare,), {"stop": stop})
    # Three held-out examples: eight devices do not divide them.
    data = FakeSource(batches, {"one": lambda: iter([make_batch(99, 3)])})
    try:
        state = loop.train(run_config, data, model=Tiny(width=64))
    except SystemExit as error:
        return {"code": error.code}
    largest = max(jax.tree.leaves(state.params), key=lambda x: x.size)
    shards = [x.data.shape for x in largest.addressable_shards]
    moments = state.opt_state[1][0].mu["stem"]["kernel"].addressable_shards[0].data.shape
    return {"code": 0, "shape": largest.shape, "pieces": shards, "moments": moments}


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        print("RUN " + json.dumps(train(**job)), file=sys.__stdout__, flush=True)
