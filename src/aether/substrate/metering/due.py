"""When an account can run out at the earliest. Pure; times are seconds of one monotonic clock.

Each thing that runs spends a unit at a rate that it cannot exceed (its CPU quota, its memory, one second a second).
From what it had spent when it was last looked at follows the most that it can have spent now, and the moment before
which the account cannot run out: until then nobody needs to look.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

NEVER: Final = float("inf")


@dataclass(slots=True)
class Gauge:
    """One thing that runs: what it had spent by unit at `at_s`, and the most it can spend a second."""

    at_s: float
    rates: dict[str, float]
    seen: dict[str, float] = field(default_factory=dict)

    def unseen(self, unit: str, now_s: float) -> float:
        """The most that it can have spent since it was looked at."""
        return self.rates.get(unit, 0.0) * max(0.0, now_s - self.at_s)

    def look(self, now_s: float, seen: Mapping[str, float]) -> None:
        """What was found now."""
        self.seen.update(seen)
        self.at_s = now_s


@dataclass(frozen=True, slots=True)
class Found:
    """An account that ran out."""

    account: str
    unit: str
    limit: int
    used: int


def left_s(gauges: Collection[Gauge], unit: str, left: float, now_s: float, rate_max: float = NEVER) -> float:
    """Seconds from now before which `left` of the unit cannot be gone; 0 when it can be gone already. All of them
    together spend at most `rate_max` a second: what the machine has."""
    if not gauges:
        return NEVER
    seen = sum(gauge.seen.get(unit, 0.0) for gauge in gauges)
    since_s = now_s - min(gauge.at_s for gauge in gauges)
    unseen = min(sum(gauge.unseen(unit, now_s) for gauge in gauges), rate_max * since_s if since_s > 0 else 0.0)
    rate = min(sum(gauge.rates.get(unit, 0.0) for gauge in gauges), rate_max)
    rest = left - seen - unseen
    if rest <= 0:
        return 0.0
    return rest / rate if rate else NEVER


def run_out(gauges: Collection[Gauge], account: str, unit: str, limit: int, spent: int) -> Found | None:
    """Whether what was seen of the gauges and what was spent before makes up the limit."""
    used = spent + int(sum(gauge.seen.get(unit, 0.0) for gauge in gauges))
    return Found(account, unit, limit, used) if used >= limit else None
