"""The operations in plain JAX, compiled by XLA for any device."""
