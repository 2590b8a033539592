"""RLDS datasets on disk: reading, indexing, statistics and writing."""
