"""Replicas: placed, formed, watched, rebuilt and scaled."""
