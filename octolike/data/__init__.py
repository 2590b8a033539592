"""From episodes on disk to numpy batches; the only place that imports tensorflow."""

import os

# Before tensorflow is imported: its start-up notes say nothing about the data. The one on oneDNN is
# written before the log level is read; oneDNN has no part in reading, decoding or resizing.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# Nor do gRPC's notes on connections: what they mean is said by data/workers.py.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
