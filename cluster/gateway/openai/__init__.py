"""The OpenAI-compatible HTTP interface: a translation onto the same sessions as gRPC's."""
