"""Which replica gets a session: the one that likely has the prompt's prefix in its cache, unless others have much less to do.

Rendezvous hashing (Thaler and Ravishankar 1998): each replica has a score for each prefix, and the highest one gets it. Every
gateway comes to the same order by itself; a replica that comes or goes moves only its own prefixes. Load is bounded
as in consistent hashing with bounded loads (Mirrokni et al. 2016).
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

#: Leading tokens of a prompt that name its prefix: a few pages. Shorter prompts have nothing worth finding.
PREFIX_TOKENS = 64
#: A replica may have so many times what replicas have on average to do, and one request more.
BOUND = 1.25

#: Why a session goes where it goes: its prefix lies there; the replica of its prefix has too much to do, or it has no prefix;
#: there is one replica only.
Cause = Literal["prefix", "load", "only"]


def prefix_key(prompt: Sequence[int], salt: str = "") -> bytes | None:
    """Names the prefix of a prompt, shared by requests of the same salt; None if it is too short to matter."""
    if len(prompt) < PREFIX_TOKENS:
        return None
    return hashlib.blake2b(array.array("I", prompt[:PREFIX_TOKENS]).tobytes() + salt.encode(), digest_size=16).digest()


def ranked(key: bytes, replicas: Iterable[int]) -> list[int]:
    """Replicas in the order in which they should have a prefix."""
    return sorted(
        replicas, key=lambda replica: hashlib.blake2b(key + replica.to_bytes(8, "big")).digest(), reverse=True
    )


def choose(key: bytes | None, cost: int, outstanding: Mapping[int, int]) -> tuple[int, Cause]:
    """A replica for a request, and why that one.

    Args:
      key: of its prefix, if it has one.
      cost: tokens that it will take.
      outstanding: tokens that each replica has still to compute; at least one replica.
    """
    least = min(outstanding, key=lambda replica: (outstanding[replica], replica))
    if len(outstanding) == 1:
        return least, "only"
    if key is None:
        return least, "load"
    most = BOUND * (sum(outstanding.values()) + cost) / len(outstanding) + cost
    first, *others = ranked(key, outstanding)
    if outstanding[first] + cost <= most:
        return first, "prefix"
    return next((replica for replica in others if outstanding[replica] + cost <= most), least), "load"
