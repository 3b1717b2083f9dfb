"""What happened, on its way to aetherd: rows that differ in nothing but time and bytes become one with a count.

Bounded: at most EGRESS_BATCH_ROWS_MAX different rows wait per cell, and what is beyond them is counted. A cell that
knocks a thousand times a second makes one row of it.
"""

from __future__ import annotations

from msgspec.structs import replace

from aether.contract.egresswire import EgressConnection
from aether.contract.limits import EGRESS_BATCH_ROWS_MAX

_Key = tuple[str, int, str | None, str | None, str, str | None, str | None]


class Journal:
    """The rows of one cell since they were last taken; `unlisted` connections of its life were left out."""

    def __init__(self) -> None:
        self._rows: dict[_Key, EgressConnection] = {}
        self.unlisted = 0

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: EgressConnection) -> None:
        key = (row.host, row.port, row.address, row.rule, row.verdict, row.reason, row.credential)
        known = self._rows.get(key)
        if known is not None:
            self._rows[key] = replace(
                known,
                sent_bytes=known.sent_bytes + row.sent_bytes,
                received_bytes=known.received_bytes + row.received_bytes,
                ms=known.ms + row.ms,
                count=known.count + row.count,
            )
        elif len(self._rows) < EGRESS_BATCH_ROWS_MAX:
            self._rows[key] = row
        else:
            self.unlisted += row.count

    def take(self) -> tuple[EgressConnection, ...]:
        """The rows; they start anew."""
        rows = tuple(self._rows.values())
        self._rows = {}
        return rows
