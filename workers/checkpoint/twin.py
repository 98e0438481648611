"""Weights from another host's cache: a host that has none of its own takes them from one that holds the same, if that is faster
than the checkpoint."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from workers.checkpoint.digests import digest
from workers.checkpoint.storage import Location, read_into, size_of
from workers.checkpoint.weights_cache import INDEX, CacheError, parse_index
from workers.kernels.packing import Array
from workers.messages.specs import WeightsAddress

_LOG = logging.getLogger(__name__)

#: Seconds in which another host must answer.
ANSWER_SECONDS = 5.0
#: Hosts that are asked at a time.
_ASKED = 16
#: Bytes that are read from both to find out which is faster.
PROBE_BYTES = 8 << 20


class Twin:
    """Another host's part of the weights, which is the same as this host's is to be."""

    def __init__(self, address: WeightsAddress, folder: str) -> None:
        """Asks for the index of a folder of its cache. Raises OSError or CacheError if it has none."""
        #: Until it fails to send something.
        self.usable = True
        self._address = address
        self._folder = folder
        self._files, self.digests = parse_index(self._get(INDEX))

    def __str__(self) -> str:
        return self._address.host

    def take(self, name: str, layer: int, out: Array) -> None:
        """Fills an array with a layer of the one that has this name. Raises OSError, or CacheError if it is another one."""
        file = self._files.get(name)
        if file is None or (file.shape[1:], file.dtype) != (out.shape, out.dtype.name):
            raise CacheError(f"{self} has no {name} of this kind")
        self._get(name, layer * out.nbytes, out.reshape(-1).view(np.uint8).data)
        if digest(out) != file.checksums[layer]:
            raise CacheError(f"{self} has sent other bytes of {name} than were written")

    def probe(self) -> int:
        """Reads PROBE_BYTES of its largest array, or less if there are no more. The number of bytes."""
        name, file = max(self._files.items(), key=lambda item: item[1].nbytes)
        out = bytearray(min(PROBE_BYTES, file.nbytes))
        self._get(name, 0, memoryview(out))
        return len(out)

    def _get(self, name: str, start: int = 0, out: memoryview | None = None) -> bytes:
        """A file, or bytes of it into `out`. Raises OSError."""
        headers = {"Authorization": f"Bearer {self._address.secret}"}
        if out is not None:
            headers["Range"] = f"bytes={start}-{start + len(out) - 1}"
        address = self._address
        connection = http.client.HTTPConnection(address.host, address.port, timeout=ANSWER_SECONDS)
        try:
            with contextlib.closing(connection):
                connection.request("GET", f"/{self._folder}/{name}", headers=headers)
                with connection.getresponse() as answer:
                    if answer.status not in (200, 206):
                        raise FileNotFoundError(2, f"answers {answer.status}", name)
                    if out is None:
                        return answer.read()
                    while out:
                        count = answer.readinto(out)
                        if not count:
                            raise ConnectionError(f"has sent too little of {name}")
                        out = out[count:]
        except (OSError, http.client.HTTPException) as error:
            self.usable = False
            raise OSError(f"{self}: {error!r}") from error
        return b""


def find_twin(addresses: Sequence[WeightsAddress], folder: str, file: Location) -> Twin | None:
    """The first of other hosts that has a folder in its weights cache; None if none has, or the checkpoint, of which
    `file` is a large one, is faster."""

    def ask(address: WeightsAddress) -> Twin | None:
        try:
            return Twin(address, folder)
        except (OSError, CacheError):
            return None

    with concurrent.futures.ThreadPoolExecutor(_ASKED) as pool:
        twin = next(filter(None, pool.map(ask, addresses)), None)
    if twin is None:
        return None
    try:
        theirs = _rate(twin.probe)
    except OSError as error:
        _LOG.warning("%s has the weights, but can't send them: %s", twin, error)
        return None
    own = 0.0
    with contextlib.suppress(OSError):  # what can't be read is slow
        own = _rate(lambda: _probe(file))
    _LOG.info("%s sends %.2f GB/s of the weights, the checkpoint %.2f GB/s", twin, theirs / 1e9, own / 1e9)
    return twin if theirs > own else None


def _probe(file: Location) -> int:
    """Reads PROBE_BYTES from the middle of a file, whose headers are likely in memory."""
    start = size_of(file) // 2
    out = bytearray(min(PROBE_BYTES, size_of(file) - start))
    read_into(file, [(start, memoryview(out))])
    return len(out)


def _rate(read: Callable[[], int]) -> float:
    """Bytes a second."""
    began = time.monotonic()
    count = read()
    return count / max(time.monotonic() - began, 1e-9)
