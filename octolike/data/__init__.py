"""From episodes on disk to numpy batches; the only place that imports tensorflow."""

import os

# Before tensorflow is imported: its start-up notes say nothing about the data.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
