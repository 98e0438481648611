"""The data plane: JAX workers that form one device mesh and carry out plans on it."""
