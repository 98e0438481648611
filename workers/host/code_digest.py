"""Which code this process runs: ranks of a mesh must run the same, or they compute different programs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import pathlib

#: Packages that decide what is computed.
_LIBRARIES = ("jax", "jaxlib", "dm-haiku", "numpy", "ml-dtypes")


@functools.cache
def code_digest() -> str:
    """A short digest of the sources of `workers`, and of the versions of the libraries that decide what is
    computed. Native kernels are compiled on each host, and agreed upon by their own names."""
    digest = hashlib.sha256()
    root = pathlib.Path(__file__).parents[1]
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.cc"), *root.rglob("*.h")]):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{name} {importlib.metadata.version(name)}\0".encode())
    return digest.hexdigest()[:12]
