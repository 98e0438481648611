"""What keys use over all gateways, so that a limit holds whichever gateways a key's requests come by. Pure."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class KeyUse:
    """What a key uses of one gateway.

    Attributes:
      per_minute: tokens that it may use a minute, None without a limit.
      spent: tokens, since the gateway began.
      missing: tokens until its budget is whole again, as far as the gateway knows.
      requests: that are in the gateway.
    """

    per_minute: int | None = None
    spent: float = 0.0
    missing: float = 0.0
    requests: int = 0


@dataclasses.dataclass(frozen=True)
class KeyState:
    """What gateways together know of a key: its tokens a minute, if it has a limit, how many are missing until its budget is
    whole again, and its requests in other gateways."""

    per_minute: int | None
    missing: float
    elsewhere: int


class Ledger:
    """Adds up what gateways report. A budget fills up with time, to a minute's worth; so what is missing of it gets less."""

    def __init__(self) -> None:
        self._missing: dict[str, tuple[int, float, float]] = {}
        self._reports: dict[str, Mapping[str, KeyUse]] = {}

    def report(self, gateway: str, uses: Mapping[str, KeyUse], now: float) -> dict[str, KeyState]:
        """Notes what keys use of a gateway; what gateways together know of keys. What a gateway reports first may have been
        counted by another ledger: then it is what is missing that counts."""
        before = self._reports.get(gateway)
        for name, use in uses.items():
            if use.per_minute is None:
                continue
            missing = self.missing(name, use.per_minute, now)
            if before is None:
                missing = max(missing, use.missing)
            else:
                missing += use.spent - (before[name].spent if name in before else 0.0)
            self._missing[name] = use.per_minute, missing, now
        self._reports[gateway] = uses
        requests, own = self._requests(), {name: use.requests for name, use in uses.items()}
        return {
            name: KeyState(
                self._missing[name][0] if name in self._missing else None,
                self._left(name, now),
                requests[name] - own.get(name, 0),
            )
            for name in {*requests, *self._missing}
        }

    def forget(self, gateway: str) -> None:
        """Of a gateway that is gone: its requests have ended; what was spent stays."""
        self._reports.pop(gateway, None)

    def inherit(self, budgets: Mapping[str, tuple[int, float]], seconds: float, now: float) -> None:
        """Charges keys what was missing in the `budgets` of a service that ended so many seconds ago."""
        for name, (per_minute, missing) in budgets.items():
            left = max(missing - seconds * per_minute / 60, 0.0)
            self._missing[name] = per_minute, self.missing(name, per_minute, now) + left, now

    def budgets(self, now: float) -> dict[str, tuple[int, float]]:
        """Of each key with a budget that is not whole: its tokens a minute, and how many are missing."""
        found = {name: (per_minute, self._left(name, now)) for name, (per_minute, _, _) in self._missing.items()}
        return {name: budget for name, budget in found.items() if budget[1] > 0}

    def missing(self, name: str, per_minute: int, now: float) -> float:
        """Tokens until a key's budget of so many a minute is whole. Another limit than before begins with a whole budget."""
        known = self._missing.get(name)
        return self._left(name, now) if known is not None and known[0] == per_minute else 0.0

    def _left(self, name: str, now: float) -> float:
        if name not in self._missing:
            return 0.0
        per_minute, missing, at = self._missing[name]
        return max(missing - (now - at) * per_minute / 60, 0.0)

    def _requests(self) -> collections.Counter[str]:
        found: collections.Counter[str] = collections.Counter()
        for uses in self._reports.values():
            found.update({name: use.requests for name, use in uses.items()})
        return found
