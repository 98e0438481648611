"""The compiler as witness: the model compiled ahead of time for devices that are not there."""
