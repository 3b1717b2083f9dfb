"""Calls that read the audit log: the filter they share, pages, and the lines of an export.

An export is JSON lines, each canonical JSON: an ExportHead, an ExportEntry per record in the order of the log, an
ExportDocument per document that they name, an ExportEnd. It verifies offline with the public key (docs/formats.md).
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from aether.contract import limits
from aether.contract.records import InclusionProof, Record

EXPORT_VERSION: Final = "1.0"
Order = Literal["newest", "oldest"]


class AuditFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which records are meant: those that fit all that is given. `start` and `end` bound their index, `since` and
    `until` their time (RFC 3339 UTC with six decimals); ranges leave out their end. `type` names any of several."""

    type: tuple[str, ...] = ()
    principal: str | None = None
    tenant: str | None = None
    job_id: str | None = None
    cell: str | None = None
    """An id, or the name of an allocated cell that lives or ended lately."""
    ticket: str | None = None
    """The id of any link of the ticket."""
    since: str | None = None
    until: str | None = None
    start: int = 0
    end: int | None = None


class AuditQuery(AuditFilter, frozen=True, kw_only=True):
    """`audit.query`: `cursor` is the previous page's `next_cursor`."""

    order: Order = "newest"
    cursor: int | None = None
    limit: int = limits.PAGE_ITEMS_DEFAULT


class AuditTail(AuditFilter, frozen=True, kw_only=True):
    """`audit.tail`: records from index `cursor` on, one canonical JSON text per line; without a cursor those to come.

    With `follow` it goes on for as long as the ticket holds; else it ends with the log."""

    cursor: int | None = None
    follow: bool = False


class AuditExport(AuditFilter, frozen=True, kw_only=True):
    """`audit.export`."""


class AuditPage(msgspec.Struct, frozen=True, kw_only=True):
    """Its `records` fit; `searched` were looked at. With a `next_cursor` there is more to look at, also where nothing
    was found: a call looks at about AUDIT_SEARCH_RECORDS_MAX at most. `log_size`: what the log held."""

    records: tuple[Record, ...]
    searched: int
    log_size: int
    next_cursor: int | None = None


class ExportHead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`complete`: every record from index `start` up to `end` is there; else those that fitted a filter or were the
    caller's to see. Fields stand in sorted order, as in all lines: then the bytes are canonical."""

    checkpoint: str
    complete: bool
    end: int
    export_version: str
    origin: str
    start: int


class ExportEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One record, as it was logged, with the proof that leads to the checkpoint of the head."""

    entry: str
    proof: InclusionProof


class ExportDocument(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A document that records before it name."""

    digest: str
    text: str


class ExportEnd(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The last line: how many there were. An export without it was cut off."""

    documents: int
    entries: int
