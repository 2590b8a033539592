"""One step, one loop, for every script: jax, optax and orbax."""
