"""From indexed episodes to batches."""
