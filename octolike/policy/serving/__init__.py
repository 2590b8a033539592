"""A policy behind a port: openpi's and vla-eval's protocols, batching, limits; see `server`."""
