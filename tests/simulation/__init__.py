"""The whole control plane on a virtual clock; see README.md."""
