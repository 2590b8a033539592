"""The policy network: jax and flax only."""
