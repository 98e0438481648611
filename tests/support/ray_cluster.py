"""A Ray cluster on this machine that no service has started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from cluster.local_ray import local_cluster, prepare_environment


@contextlib.contextmanager
def ray_cluster(hosts: int) -> Iterator[str]:
    """The address of a cluster of `hosts` hosts of a processor each, which runs while the block does."""
    before = dict(os.environ)
    prepare_environment()
    try:
        with local_cluster(hosts, 1) as address:
            yield address
    finally:
        os.environ.clear()
        os.environ.update(before)
