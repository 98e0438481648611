"""Grok-1 in Haiku: configuration, parameters, layers and their sharding rules."""
