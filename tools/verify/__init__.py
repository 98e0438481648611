"""Checkpoints against golden sets."""
