"""This host's shards as its kernels want them, in files that the next epoch and the next start of the service map.

    DIRECTORY/MODEL/lock              held by each process that uses what is in MODEL
    DIRECTORY/MODEL/SHARDS/index.json, and a file for each array

MODEL names a checkpoint, the form of its weights and their layout on a mesh, SHARDS what this host holds of it. Loading fills
the files of a folder of its own, which gets its name when all is there. The index has a checksum for each layer of each file.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np

from workers.checkpoint.checkpoint import Checkpoint
from workers.checkpoint.digests import digest
from workers.checkpoint.folder_locks import LOCK, locked, remove_unused
from workers.checkpoint.storage import version_of
from workers.kernels.packing import Array

_LOG = logging.getLogger(__name__)

#: Changes when files of an earlier version would be misread.
VERSION = 1
INDEX, _PARTIAL = "index.json", ".partial"
#: Headers that are asked for at a time.
THREADS = 16

#: Locks of what this process uses, which it holds until it ends.
_HELD: list[int] = []


class CacheError(ValueError):
    """Files that are not what the index says, or not what this host holds."""


@dataclasses.dataclass
class CachedArray:
    """An array in a file: [layers, ...], with a checksum for each layer."""

    shape: tuple[int, ...]
    dtype: str
    checksums: list[int]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def parse_index(text: str | bytes) -> tuple[dict[str, CachedArray], dict[str, int]]:
    """Arrays by their names, and digests of what they were made from. Raises CacheError."""
    try:
        index = json.loads(text)
        files = {
            str(name): CachedArray(
                tuple(map(int, file["shape"])), jnp.dtype(file["dtype"]).name, list(file["checksums"])
            )
            for name, file in index["files"].items()
        }
        return files, {str(name): int(value) for name, value in index["digests"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(str(error)) from error


def model_key(checkpoint: Checkpoint, form: object) -> str:
    """The name of a checkpoint's bytes in some form. A file is the same while size and time of change are. Raises OSError."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        versions = list(pool.map(lambda tensor: version_of(tensor[1].path), checkpoint.tensors))
    return _digest(VERSION, str(checkpoint.directory), checkpoint.config, versions, form)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


class WeightsCache:
    """The files of one host's shards. They are `complete`, to be mapped, or else to be filled."""

    def __init__(self, directory: pathlib.Path, model: str, shards: object) -> None:
        """Makes the folder, and removes what other models left there that no process uses. Raises OSError."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_uid != os.geteuid():
            raise PermissionError(f"{directory} belongs to another user")
        self._folder = directory / model / _digest(shards)
        #: Of the folder; another host that holds the same has one of the same name.
        self.name = f"{model}/{self._folder.name}"
        self._partial: pathlib.Path | None = None
        self._begin = threading.Lock()
        self._files: dict[str, CachedArray] = {}
        self.digests: dict[str, int] = {}
        (directory / model).mkdir(mode=0o700, exist_ok=True)
        _HELD.append(locked(directory / model / LOCK, fcntl.LOCK_SH))
        for other in directory.iterdir():
            if other.name != model:
                remove_unused(other)
        for other in (directory / model).glob(f"*{_PARTIAL}"):
            remove_unused(other)
        self.complete = self._read_index()

    def _read_index(self) -> bool:
        try:
            self._files, self.digests = parse_index((self._folder / INDEX).read_text())
        except FileNotFoundError:
            return False
        except (CacheError, UnicodeDecodeError) as error:
            _LOG.warning("%s: %s; the checkpoint is read", self._folder / INDEX, error)
            self.discard()
            return False
        return True

    def discard(self) -> None:
        """Removes files that are wrong; what is loaded then fills new ones."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.complete, self._files, self.digests = False, {}, {}

    def mapped(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array, as it lies in its file, whose bytes are to be checked. Raises CacheError."""
        file = self._files.get(name)
        if file is None or (file.shape, file.dtype) != (shape, jnp.dtype(dtype).name):
            raise CacheError(f"{name} is missing, or another array")
        try:
            array: Array = np.memmap(self._folder / name, jnp.dtype(dtype), "r", shape=shape)
        except (OSError, ValueError) as error:
            raise CacheError(f"{name}: {error}") from error
        return array

    def check(self, name: str, layer: int, array: Array) -> None:
        """Raises CacheError if a layer of an array has other bytes than were written."""
        if digest(array) != self._files[name].checksums[layer]:
            raise CacheError(f"{name} has other bytes than were written")

    def room(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array to be filled, layer by layer, in a file of its own. Raises OSError if there is no space."""
        with self._begin:
            if self._partial is None:
                # Locked before it has the name by which other processes find what no process writes any more.
                new = self._folder.with_name(f"{self._folder.name}.{os.getpid()}")
                new.mkdir(mode=0o700)
                _HELD.append(locked(new / LOCK, fcntl.LOCK_EX))
                self._partial = new.rename(new.with_name(f"{new.name}{_PARTIAL}"))
        dtype = jnp.dtype(dtype)
        with (self._partial / name).open("wb") as file:
            # Without it, a full memory would show only as the signal that ends the process.
            os.posix_fallocate(file.fileno(), 0, max(math.prod(shape) * dtype.itemsize, 1))
        self._files[name] = CachedArray(shape, dtype.name, [0] * shape[0])
        array: Array = np.memmap(self._partial / name, dtype, "r+", shape=shape)
        return array

    def filled(self, name: str, layer: int, array: Array) -> None:
        """A layer of an array has got its values."""
        self._files[name].checksums[layer] = digest(array)

    def keep(self, digests: dict[str, int]) -> None:
        """All arrays are filled: they are the next load's, with the digests of what was read. Raises OSError."""
        assert self._partial is not None
        files = {name: dataclasses.asdict(file) for name, file in self._files.items()}
        (self._partial / INDEX).write_text(json.dumps({"files": files, "digests": digests}))
        try:
            self._partial.rename(self._folder)
        except OSError:  # another process of this host was first
            shutil.rmtree(self._partial)
        self._partial = None

    def abandon(self) -> None:
        """Removes what was filled so far."""
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None
