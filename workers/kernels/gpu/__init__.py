"""The operations for NVIDIA GPUs, in Pallas through Triton."""
