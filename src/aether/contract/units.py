"""Units of budgets, and how each is spent. Amounts are integers.

- Counted units are exact: what an operation may cost at most is reserved before it and settled after it.
- Metered units are spent by what runs. Nothing is reserved; what runs is ended when they run out (docs/budgets.md).

`memory_byte_s` is the memory that a cell is granted, times how long it has it: it is kept free for it whether it is
used or not. `bytes_in` and `bytes_out` are what egressd passed to and from a cell. `ticks` are reports of a worker
about itself, `gpu_ms`, `tokens` and `micro_usd` (millionths of a dollar) are what an engine states as its most for one
job; no engine of this build states any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

COUNTED: Final = ("ops", "ticks", "gpu_ms", "tokens", "micro_usd")
METERED: Final = ("cpu_ms", "wall_ms", "memory_byte_s", "bytes_in", "bytes_out")
UNITS: Final = (*COUNTED, *METERED)
AMOUNT_MAX: Final = (1 << 53) - 1
TTL: Final = "ttl"
"""Not spent but reached: the moment at which a ticket expires."""

_DIVIDED: Final[Mapping[str, tuple[int, str]]] = {
    "cpu_ms": (1_000, "s of CPU"),
    "wall_ms": (1_000, "s of run time"),
    "gpu_ms": (1_000, "s of GPU"),
    "micro_usd": (1_000_000, "USD"),
    "memory_byte_s": (1 << 30, "GiB s of memory"),
    "bytes_in": (1 << 20, "MiB in"),
    "bytes_out": (1 << 20, "MiB out"),
}


def share(unit: str, used: int, limit: int) -> str:
    """What of a limit is used, for people: `0.25 of 1 USD`."""
    divisor, name = _DIVIDED.get(unit, (1, unit))
    return f"{number(used, divisor)} of {number(limit, divisor)} {name}"


def told(unit: str, amount: int) -> str:
    """The amount for people: `1.5 USD`, `10 s of CPU`, `3 ops`."""
    divisor, name = _DIVIDED.get(unit, (1, unit))
    return f"{number(amount, divisor)} {name}"


def number(amount: int, divisor: int) -> str:
    """`amount / divisor` with what digits it needs, at most six."""
    whole, rest = divmod(amount, divisor)
    digits = f"{rest * 1_000_000 // divisor:06d}".rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)
