"""The hot operations for CPU hosts, in C++ behind XLA's foreign function interface."""
