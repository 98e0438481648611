"""Which code this process runs: ranks of a mesh must run the same, or they compute different programs."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import pathlib

#: Packages that decide what is computed.
_LIBRARIES = ("jax", "jaxlib", "dm-haiku", "numpy", "ml-dtypes")


@functools.cache
def code_digest() -> str:
    """A short digest of the sources of `workers` and of the versions of the libraries that decide what is computed."""
    root = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    for name in _LIBRARIES:
        digest.update(f"{name} {importlib.metadata.version(name)}\0".encode())
    return digest.hexdigest()[:12]
