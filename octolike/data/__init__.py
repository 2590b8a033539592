"""From episodes on disk to numpy batches; the only place that imports tensorflow."""
