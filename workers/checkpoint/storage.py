"""Where a checkpoint's files are: in a directory, or in an object store."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Result = TypeVar("Result")

#: How often a request is tried, and seconds before the second time; twice as many before each further one.
_ATTEMPTS, _BACKOFF = 6, 0.2


class ObjectPath:
    """A name in an object store, with what of `pathlib.Path` a checkpoint needs. A folder is a name that others begin with.

    Requests that fail are tried again. Credentials and endpoints come from the environment, as the store's own tools take them
    (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, ...).
    """

    def __init__(self, url: str, store: ObjectStore | None = None, key: str = "") -> None:
        """The root of `url`, such as `s3://bucket/grok-1`. Raises OSError if there is no such kind of store."""
        import obstore.store

        self._url = url.rstrip("/")
        try:
            self._store = store or obstore.store.from_url(
                self._url, client_options={"allow_http": True}, retry_config={"max_retries": 0}
            )
        except Exception as error:
            raise OSError(f"{url}: {_line(error)}") from error
        self._key = key

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self._url, self._store, f"{self._key}/{name}".lstrip("/"))

    def __str__(self) -> str:
        return f"{self._url}/{self._key}".rstrip("/")

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        """The store itself stays in its process."""
        return _again, (self._url, self._key)

    @property
    def name(self) -> str:
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        """The folder that it is in."""
        return ObjectPath(self._url, self._store, self._key.rpartition("/")[0])

    def exists(self) -> bool:
        """Whether there is an object of this name."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    is_file = exists

    def is_dir(self) -> bool:
        """Whether there is an object in this folder."""
        return next(self.iterdir(), None) is not None

    def iterdir(self) -> Iterator[ObjectPath]:
        """The objects of this folder."""
        import obstore

        found = self._try(lambda: obstore.list_with_delimiter(self._store, f"{self._key}/" if self._key else None))
        for entry in found["objects"]:
            yield ObjectPath(self._url, self._store, entry["path"])

    def size(self) -> int:
        """Bytes. Raises FileNotFoundError, or OSError."""
        import obstore

        return int(self._try(lambda: obstore.head(self._store, self._key))["size"])

    def version(self) -> str:
        """What changes when the object is written again. Raises FileNotFoundError, or OSError."""
        import obstore

        found = self._try(lambda: obstore.head(self._store, self._key))
        return f"{found['size']} {found['e_tag']} {found['last_modified']}"

    def read_bytes(self) -> bytes:
        return self.read(0, self.size())

    def read_text(self) -> str:
        """All of it, which is UTF-8."""
        return self.read_bytes().decode()

    def read(self, start: int, length: int) -> bytes:
        """Bytes from `start` on."""
        import obstore

        if not length:
            return b""
        data = self._try(lambda: obstore.get_range(self._store, self._key, start=start, length=length))
        return bytes(data)

    def _try(self, request: Callable[[], Result]) -> Result:
        from obstore.exceptions import (
            NotFoundError,
            NotSupportedError,
            PermissionDeniedError,
            UnauthenticatedError,
        )

        final = (NotSupportedError, PermissionDeniedError, UnauthenticatedError)
        for attempt in range(_ATTEMPTS):
            try:
                return request()
            except (NotFoundError, FileNotFoundError) as error:
                raise FileNotFoundError(2, "no such object", str(self)) from error
            except Exception as error:
                if attempt + 1 == _ATTEMPTS or isinstance(error, final):
                    raise OSError(5, f"{type(error).__name__}: {_line(error)}", str(self)) from error
                time.sleep(_BACKOFF * 2**attempt)
        raise AssertionError


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _again(url: str, key: str) -> ObjectPath:
    return ObjectPath(url, None, key)


Location = pathlib.Path | ObjectPath


def locate(text: str) -> Location:
    """The place that a path or a URL names."""
    return ObjectPath(text) if "://" in text else pathlib.Path(text)


def size_of(location: Location) -> int:
    """Bytes of a file on a disk or in an object store."""
    return location.size() if isinstance(location, ObjectPath) else location.stat().st_size


def version_of(location: Location) -> str:
    """What changes when a file is written again. Raises OSError."""
    if isinstance(location, ObjectPath):
        return location.version()
    found = location.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def read_into(location: Location, pieces: Iterable[tuple[int, memoryview]]) -> None:
    """Fills buffers with the bytes of a file from their places on. Raises OSError."""
    if isinstance(location, ObjectPath):
        for start, out in pieces:
            out[:] = location.read(start, len(out))
        return
    descriptor = os.open(location, os.O_RDONLY)
    try:
        for start, out in pieces:
            while out:
                count = os.preadv(descriptor, [out], start)
                if not count:
                    raise OSError(5, "the file has become shorter", str(location))
                start, out = start + count, out[count:]
    finally:
        os.close(descriptor)


class Window:
    """A file as bytes of which only what is looked at is read, a block at a time. For headers."""

    def __init__(self, location: Location, block: int = 4096) -> None:
        """Raises OSError."""
        self._location = location
        self._length = size_of(location)
        self._size = block
        self._blocks: dict[int, bytes] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._length)
        first, last = start // self._size, max(start, stop - 1) // self._size
        data = b"".join(self._block(i) for i in range(first, last + 1))
        return data[start - first * self._size : max(start, stop) - first * self._size]

    def find(self, wanted: bytes, start: int, stop: int) -> int:
        """The first place of `wanted` in [start, stop), -1 if there is none."""
        at = self[start:stop].find(wanted)
        return at if at < 0 else at + start

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start = number * self._size
            data = bytearray(min(self._size, self._length - start))
            read_into(self._location, [(start, memoryview(data))])
            self._blocks[number] = bytes(data)
        return self._blocks[number]
