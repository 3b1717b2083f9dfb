"""Which records a search finds: a filter over entries, pure.

An entry is canonical JSON, so that a field with a known value is a known piece of text: entries that lack it are passed
over by a search for bytes, and only the rest are decoded, of them only what the filter looks at.
That costs about 2 us per record, reading the bundle included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec


class _Links(msgspec.Struct):
    link_ids: tuple[str, ...]


class _Head(msgspec.Struct):
    """What a filter looks at."""

    type: str
    time: str
    tenant_id: str | None
    principal: str | None
    job_id: str | None
    cell_id: str | None
    ticket: _Links | None


_DECODER: Final = msgspec.json.Decoder(_Head)


@dataclass(frozen=True, slots=True)
class Sight:
    """Which records somebody may see: all; or those of one tenant, and the tenantless ones that `own` caused."""

    everything: bool
    tenant_id: str
    own: str | None = None

    def shows(self, tenant_id: str | None, principal: str | None) -> bool:
        if self.everything or tenant_id == self.tenant_id:
            return True
        return tenant_id is None and principal is not None and principal == self.own


@dataclass(frozen=True, slots=True)
class Wanted:
    """A filter: what is None or empty is not looked at. Times are RFC 3339 with six decimals, which sort as text."""

    sight: Sight
    types: tuple[str, ...] = ()
    principal: str | None = None
    tenant_id: str | None = None
    job_id: str | None = None
    cell_id: str | None = None
    link_id: str | None = None
    since: str | None = None
    until: str | None = None

    @property
    def is_everything(self) -> bool:
        """Whether every record fits."""
        return self == Wanted(Sight(True, self.sight.tenant_id, self.sight.own))

    def pieces(self) -> tuple[bytes, ...]:
        """Texts that every entry that fits holds."""
        fields = (
            ("cell_id", self.cell_id),
            ("job_id", self.job_id),
            ("principal", self.principal),
            ("tenant_id", self.tenant_id),
            ("type", self.types[0] if len(self.types) == 1 else None),
        )
        texts = [f'"{name}":'.encode() + msgspec.json.encode(value) for name, value in fields if value is not None]
        if self.link_id is not None:
            texts.append(msgspec.json.encode(self.link_id))
        return tuple(texts)

    def fits(self, entry: bytes) -> bool:
        """Whether the entry is meant and may be seen. Raises msgspec.DecodeError on what is no record."""
        head = _DECODER.decode(entry)
        return (
            self.sight.shows(head.tenant_id, head.principal)
            and (not self.types or head.type in self.types)
            and self.principal in (None, head.principal)
            and self.tenant_id in (None, head.tenant_id)
            and self.job_id in (None, head.job_id)
            and self.cell_id in (None, head.cell_id)
            and (self.link_id is None or (head.ticket is not None and self.link_id in head.ticket.link_ids))
            and (self.since is None or head.time >= self.since)
            and (self.until is None or head.time < self.until)
        )


@dataclass(frozen=True, slots=True)
class Found:
    """`entries` that fit with their indexes, in the order of the search; it goes on at `at`."""

    entries: tuple[tuple[int, bytes], ...]
    at: int


def search(
    entries: Sequence[bytes],
    first: int,
    span: tuple[int, int],
    wanted: Wanted,
    newest_first: bool,
    room: tuple[int, int],
) -> Found:
    """What fits among the entries of `span` (indexes, the end left out); `first` is the index of entries[0].

    `room` is how many entries and bytes may be found; it ends there, but never before one was. Oldest first it goes on
    at the next index; newest first at the end of what is left.
    """
    start, end = span
    pieces, (items, size) = wanted.pieces(), room
    found: list[tuple[int, bytes]] = []
    for index in range(end - 1, start - 1, -1) if newest_first else range(start, end):
        entry = entries[index - first]
        if not all(piece in entry for piece in pieces) or not wanted.fits(entry):
            continue
        if found and (len(found) == items or size < len(entry)):
            return Found(tuple(found), index + 1 if newest_first else index)
        size -= len(entry)
        found.append((index, entry))
        if len(found) == items:
            return Found(tuple(found), index if newest_first else index + 1)
    return Found(tuple(found), start if newest_first else end)
