"""A share with its 95 % interval by Wilson: 0 of 12 is 0 to 24 %, not 0 to 0.

E. B. Wilson, JASA 22 (1927); Brown, Cai and DasGupta, Statistical Science 16 (2001), section 3.1.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Share:
    """`count` of `total`."""

    count: int
    total: int

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Share:
        """How many of the outcomes are true."""
        listed = list(outcomes)
        return cls(sum(listed), len(listed))

    @property
    def value(self) -> float | None:
        """0 to 1; None of nothing."""
        return self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end; 0 to 1 of nothing."""
        if not self.total:
            return 0.0, 1.0
        share, weight = self.count / self.total, Z ** 2 / self.total
        middle = (share + weight / 2) / (1 + weight)
        reach = Z / (1 + weight) * math.sqrt(share * (1 - share) / self.total + weight / (4 * self.total))
        low = 0.0 if self.count == 0 else middle - reach
        high = 1.0 if self.count == self.total else middle + reach
        return low, high

    def __str__(self) -> str:
        if self.value is None:
            return "none to count"
        low, high = self.interval
        return f"{self.value:.1%} ({self.count} of {self.total}, {low:.1%} to {high:.1%})"

    def to_json(self) -> dict[str, float | int | None]:
        """value, low and high (0 to 1), count and total."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "count": self.count, "total": self.total}
