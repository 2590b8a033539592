"""Train small runs on the devices of this process, or of several: for test_train_sharding.

    python tests/sharding_runs.py '[{"workdir": "a", "fsdp": 1}, ...]'

A run that is there is resumed. With "stop": the process of that number is told to end, as a cluster
does, while it makes batch 4. How many devices and processes there are is for the environment to
say. Prints a line of JSON per run: the exit code, and the parts of the largest array of the state.
"""

import json
import os
import signal
import sys

import jax
from train_fakes import FakeSource, Stream, Tiny, config, make_batch

from octolike.train import loop, sharding

SIZE, STEPS, STOP_AT = 8, 20, 4


class Share(Stream):
    """The share of this process of batches of `SIZE` examples."""

    stop = None

    def __next__(self):
        index, count = sharding.process()
        if self.index == STOP_AT and self.stop == index:
            os.kill(os.getpid(), signal.SIGTERM)
        batch = make_batch(self.index, SIZE)
        self.index += 1
        mine = slice(index * SIZE // count, (index + 1) * SIZE // count)
        return jax.tree.map(lambda x: x[mine], batch)


def train(workdir: str, fsdp: int = 1, stop: int | None = None, cache: str = "") -> dict:
    """Run one; the network is wide enough for its first kernel to be cut."""
    made = config(workdir, steps=STEPS, fsdp=fsdp, log_every=1, checkpoint_every=10)
    made.data.batch_size, made.optim.ema = SIZE, 0.9
    made.train.compilation_cache = cache
    made.train.distributed = "JAX_NUM_PROCESSES" in os.environ
    batches = type("Batches", (Share,), {"stop": stop})
    # three held-out examples, which no number of devices divides
    data = FakeSource(batches, {"one": lambda: iter([make_batch(99, 3)])})
    try:
        state = loop.train(made, data, model=Tiny(width=64))
    except SystemExit as error:
        return {"code": error.code}
    largest = max(jax.tree.leaves(state.params), key=lambda x: x.size)
    copies = [x.data.shape for x in largest.addressable_shards]
    held = state.opt_state[1][0].mu["stem"]["kernel"].addressable_shards[0].data.shape
    return {"code": 0, "whole": largest.shape, "pieces": copies, "moments": held}


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        print("RUN " + json.dumps(train(**job)), file=sys.__stdout__, flush=True)
