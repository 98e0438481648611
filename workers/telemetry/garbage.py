"""Python's garbage collector, in processes whose loops may not stand still."""

from __future__ import annotations

import gc

#: Objects that may be made between collections of the youngest, of these between those of the next, and so on.
_THRESHOLDS = (2_000, 10, 50)


def settle() -> None:
    """To be called once everything is made that stays: what is there by now is never looked through again, which would take
    tens of milliseconds each time, and the collector comes less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
