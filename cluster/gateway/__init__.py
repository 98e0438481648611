"""The gRPC gateway: validation, admission, sessions, routing, streams."""
