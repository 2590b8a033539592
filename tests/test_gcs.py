"""Reading gs:// by TensorFlow's own client against a local stand-in: requests and bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_fakes import numbered, write
from gcs_stand_in import GcsStandIn

STREAM = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from data_fakes import config
from octolike.data import open_data
settings = config(Path({cache!r}), batch_size=8, lanes=2, validation_split="")
settings.data.root = "gs://bucket"
data = open_data(settings)
print(json.dumps(data._sources[0].index.length.tolist()), flush=True)
sys.stdin.readline()
stream = data.train()
for _ in range(6):
    next(stream)
stream.close()
"""
EPISODES, STEPS, SIDE = 8, 6, 128


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_public_bucket_is_read_by_record(tmp_path):
    rng, episodes = np.random.default_rng(0), []
    for i in range(EPISODES):
        episode = numbered(i, STEPS, ())
        for camera in ("image_primary", "image_wrist"):
            noise = rng.integers(0, 255, (STEPS, SIDE, SIDE, 3)).astype(np.uint8)
            episode["steps"]["observation"][camera] = noise
        episodes.append(episode)
    write(tmp_path / "data", "fake", {"train": episodes})
    code = STREAM.format(tests=str(Path(__file__).parent), cache=str(tmp_path))
    (tmp_path / "certificates").mkdir()
    with (
        GcsStandIn(tmp_path / "data", tmp_path / "certificates") as bucket,
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | bucket.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        lengths = json.loads(process.stdout.readline())  # the bucket cannot be written
        first = len(bucket.requests)
        process.communicate("\n", timeout=300)
        assert process.returncode == 0
        requests = bucket.requests[first:]
    assert {r.kind for r in requests} == {"read"}
    framed = {length + 16 for length in lengths}
    records = [r.size for r in requests if r.size in framed]
    assert {*records} == framed  # all episodes, each with one request of its bytes
    assert len(requests) <= 2 * len(records)
    assert sum(r.size for r in requests) <= 1.1 * sum(records)
