"""Grafana's dashboards, as Python."""
