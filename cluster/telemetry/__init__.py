"""Telemetry of the control plane."""
