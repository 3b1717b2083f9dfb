"""Amounts of budgets on the command line: `ops=100,usd=1,cpu=10s,wall=1m,in=10MB`. Pure.

A unit has a short name with a notation of its own, or its own name with an integer (`micro_usd=250000`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Final, NoReturn

from aether.cli.parse import duration_ms, size_bytes
from aether.contract.errors import AetherError
from aether.contract.units import AMOUNT_MAX, UNITS, share

_MONEY: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?", re.ASCII)
_COUNT: Final = re.compile(r"[0-9]{1,16}", re.ASCII)
EXAMPLE: Final = "write it like ops=100,usd=1,cpu=10s,wall=1m,in=10MB"


def _count(text: str) -> int:
    if _COUNT.fullmatch(text) is None:
        raise AetherError("BAD_FIELD", f"cannot read {text[:80]!r}: it is no whole number")
    return int(text)


def _micro_usd(text: str) -> int:
    if _MONEY.fullmatch(text) is None:
        raise AetherError("BAD_FIELD", f"cannot read {text[:80]!r}: it is no amount in dollars")
    return int(Decimal(text) * 1_000_000)


SHORT: Final[Mapping[str, tuple[str, Callable[[str], int]]]] = {
    "cpu": ("cpu_ms", duration_ms),
    "wall": ("wall_ms", duration_ms),
    "gpu": ("gpu_ms", duration_ms),
    "memory": ("memory_byte_s", size_bytes),
    "in": ("bytes_in", size_bytes),
    "out": ("bytes_out", size_bytes),
    "usd": ("micro_usd", _micro_usd),
    "ttl": ("ttl_ms", duration_ms),
}
"""What a short name stands for, and how its amount is written; `memory=8G` is 8 GiB for a second."""


def parse(texts: Iterable[str]) -> dict[str, int]:
    """Amounts by unit, and `ttl_ms`; the smallest of a unit holds. Raises AetherError BAD_FIELD."""
    found: dict[str, int] = {}
    for entry in (part for text in texts for part in text.split(",")):
        name, equals, text = entry.partition("=")
        unit, read = SHORT.get(name, (name, _count))
        if not (equals and text) or (unit not in UNITS and name not in SHORT):
            _refuse(entry)
        amount = read(text)
        if amount > AMOUNT_MAX:
            _refuse(entry)
        found[unit] = min(amount, found.get(unit, amount))
    return found


def shown(unit: str, used: int, limit: int) -> str:
    """What of a budget is used: `2 of 5 ops`."""
    return share(unit, used, limit)


def _refuse(entry: str) -> NoReturn:
    raise AetherError("BAD_FIELD", f"cannot read --budget {entry[:80]!r}", EXAMPLE)
