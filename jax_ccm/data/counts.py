"""What became of the records, in numbers."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from jax_ccm.errors import UserError


class NothingLeft(UserError):
    """The limits leave nothing of some data."""

    def __init__(self, what: str, report: Any):
        """Says what became of the records.

        Args:
          what: they were meant for.
          report: or several.
        """
        super().__init__(f"no {what} data is left: {report}. Raise the limits that are named")


@dataclasses.dataclass
class Report:
    """What became of the records.

    Attributes:
      noun: what a unit is called, in the plural.
      records: records read.
      units: sessions made of them; fewer or more than records, if records are short or are cut.
      kept: sessions within the limits.
      dropped: reason -> how many were dropped for it.
      first: reason -> the first of them, where it is told.
      changed: what a converter did to records -> to how many.
    """

    noun: str
    records: int = 0
    units: int = 0
    kept: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)
    changed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def drop(self, reason: str, where: str = "") -> None:
        """Counts a dropped unit; ``where`` names a record that somebody may want to mend."""
        self.dropped[reason] += 1
        if where:
            self.first.setdefault(reason, where)

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Report:
        """The report of its fields as they stand in JSON."""
        fields: dict[str, Any] = stored | {name: collections.Counter(stored[name]) for name in ("dropped", "changed")}
        return cls(**fields)

    def joined(self, other: Report) -> Report:
        """What became of the records of both."""
        return Report(
            self.noun,
            self.records + other.records,
            self.units + other.units,
            self.kept + other.kept,
            self.dropped + other.dropped,
            other.first | self.first,
            self.changed + other.changed,
        )

    def __str__(self) -> str:
        made = "" if self.units == self.records else f" (made of {self.records:,} records)"
        text = f"{self.kept:,} of {self.units:,} {self.noun}{made} are used"
        if self.dropped:

            def place(reason):
                return f" (the first: {self.first[reason]})" if reason in self.first else ""

            text += "; dropped: " + ", ".join(
                f"{n:,} {reason}{place(reason)}" for reason, n in self.dropped.most_common()
            )
        if self.changed:
            text += "; changed: " + ", ".join(f"{n:,} {what}" for what, n in self.changed.most_common())
        return text
