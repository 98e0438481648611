"""What a setting may be, beside the field that holds it: `slots: Annotated[int, AtLeast(1)] = 16`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol


class Constraint(Protocol):
    """Of a value that is there."""

    def problem(self, value: Any) -> str:
        """What is wrong with a value, as the end of a sentence about it; empty if nothing is."""


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """A finite number."""

    least: float

    def problem(self, value: float) -> str:
        kind = "a finite number of " if isinstance(value, float) else ""
        return "" if math.isfinite(value) and value >= self.least else f"must be {kind}at least {self.least:g}"


@dataclasses.dataclass(frozen=True)
class MoreThan:
    """A finite number."""

    bound: float

    def problem(self, value: float) -> str:
        return "" if math.isfinite(value) and value > self.bound else f"must be a finite number above {self.bound:g}"


@dataclasses.dataclass(frozen=True)
class Between:
    """A number, both ends included."""

    least: float
    most: float

    def problem(self, value: float) -> str:
        return "" if self.least <= value <= self.most else f"must be from {self.least:g} to {self.most:g}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """A name."""

    names: tuple[str, ...]

    def problem(self, value: str) -> str:
        return "" if value in self.names else f"is unknown; use {', '.join(self.names)}"


@dataclasses.dataclass(frozen=True)
class HostPort:
    """An address to listen at."""

    def problem(self, value: str) -> str:
        host, _, port = value.rpartition(":")
        return "" if host and port.isdecimal() and int(port) <= 65535 else "is no host:port"


@dataclasses.dataclass(frozen=True)
class AbsolutePath:
    """A path that means the same whatever folder a process is in."""

    def problem(self, value: str) -> str:
        return "" if value.startswith("/") else "must be an absolute path"
