"""The control plane: Ray, gRPC and the operator's commands. Never imports JAX."""
