"""What a self-test finds, and how it is shown. Without JAX.

Each section is a process of its own that prints a finding a line.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Sequence


class Outcome(enum.StrEnum):
    """`SLOW` is right, but slower than the planner expects at worst."""

    OK = "ok"
    SLOW = "slow"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      section: to which it belongs.
      name: what was looked at.
      outcome: how it came out.
      text: what was found, for people.
      figures: what was measured, for programs, in seconds, bytes and operations, or as shares.
    """

    section: str
    name: str
    outcome: Outcome
    text: str = ""
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def say(self) -> None:
        """Prints it for the process that has started this one."""
        print(f"{_MARK}{json.dumps(dataclasses.asdict(self))}", flush=True)

    @classmethod
    def said(cls, line: str) -> Finding | None:
        """The finding of a line; None if it has none."""
        if not line.startswith(_MARK):
            return None
        fields = json.loads(line.removeprefix(_MARK))
        return cls(**{**fields, "outcome": Outcome(fields["outcome"])})


_MARK = "finding: "


def row(finding: Finding) -> str:
    """A line of the table."""
    return f"{finding.outcome:<8} {finding.section:<12} {finding.name:<34} {finding.text}".rstrip()


def summary(findings: Sequence[Finding], seconds: float) -> str:
    """The last line of the table."""
    counts = [(sum(f.outcome == outcome for f in findings), outcome) for outcome in Outcome]
    return ", ".join(f"{count} {outcome}" for count, outcome in counts if count) + f"; {seconds:.0f} s"
