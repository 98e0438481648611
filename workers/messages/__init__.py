"""The words that both planes speak: requests, plans, specifications, and their encoding. No JAX."""
