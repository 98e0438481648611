"""The last epoch of each replica, which Ray's head remembers for the controllers that come after this one."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import ray
from ray.experimental.internal_kv import internal_kv_get_gcs_client

_LOG = logging.getLogger(__name__)

_PREFIX = b"epoch-"
#: Seconds that the head may take. An epoch does not wait longer for a head that is away.
SECONDS = 2.0


async def remember(replica: int, epoch: int) -> None:
    """Notes that an epoch begins."""
    key = b"%s%d" % (_PREFIX, replica)
    try:
        await asyncio.to_thread(
            internal_kv_get_gcs_client().internal_kv_put, key, b"%d" % epoch, True, _namespace(), SECONDS
        )
    except ray.exceptions.RpcError as error:
        _LOG.warning("replica %d: Ray's head does not note epoch %d: %s", replica, epoch, error)


async def remembered() -> dict[int, int]:
    """The last epoch of each replica."""
    head, namespace = internal_kv_get_gcs_client(), _namespace()
    keys = await asyncio.to_thread(head.internal_kv_keys, _PREFIX, namespace)
    found = await asyncio.to_thread(head.internal_kv_multi_get, keys, namespace)
    return {int(key.removeprefix(_PREFIX)): int(epoch) for key, epoch in found.items()}


async def forget() -> None:
    """The service has ended: the next one begins anew."""
    with contextlib.suppress(ray.exceptions.RpcError):
        head = internal_kv_get_gcs_client()
        await asyncio.to_thread(head.internal_kv_del, _PREFIX, True, _namespace(), SECONDS)


def _namespace() -> bytes:
    namespace: str = ray.get_runtime_context().namespace
    return namespace.replace(":", "-").encode()  # a colon would end it
