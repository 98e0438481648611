"""Carries plans out on the mesh: devices, KV pages, compiled steps, sampling."""
