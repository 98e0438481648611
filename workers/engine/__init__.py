"""The leader's brain: requests become plans. Pure Python, without JAX, Ray or gRPC."""
