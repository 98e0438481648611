"""Clients that people use, unmodified, against a real service. `make test-clients` runs them in an environment of their own."""
