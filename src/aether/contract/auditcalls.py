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


class AuditGrowth(msgspec.Struct, frozen=True, kw_only=True):
    """`audit.growth`: what proves that the published checkpoint contains the first `size` records."""

    size: int = 0


class GrowthProof(msgspec.Struct, frozen=True, kw_only=True):
    """The newest `checkpoint` (a signed note) and `hashes`, base64: the consistency proof of RFC 9162 section 2.1.4.1
    from the first `size` records to it; none from 0 or from the checkpoint's own size."""

    size: int
    checkpoint: str
    hashes: tuple[str, ...]


class Cosignature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a witness signed (C2SP tlog-cosignature): its name, and the base64 of key id, time and signature as they
    stand in its signature line."""

    witness: str
    signature: str


class CosignCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`audit.cosign`: cosignatures on the log's checkpoint of `size` records."""

    size: int
    cosignatures: tuple[Cosignature, ...]


class WitnessState(msgspec.Struct, frozen=True, kw_only=True):
    """A witness that the node lists, by its verifier `key`; `size` and time of what it cosigned last, if anything."""

    witness: str
    key: str
    address: str
    size: int | None
    cosigned_at: str | None


class Witnesses(msgspec.Struct, frozen=True, kw_only=True):
    """`size` is that of the published checkpoint."""

    size: int
    witnesses: tuple[WitnessState, ...]


class RetainCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`audit.retain`: records older than `keep_ms` may go."""

    keep_ms: int


class Retained(msgspec.Struct, frozen=True, kw_only=True):
    """Records below `first` are gone, `pruned` of them by this call, recorded at `log_index` (null when nothing was
    to go); `held_by` says what keeps older ones, if anything does."""

    first: int
    pruned: int
    log_index: int | None
    held_by: str | None


class AuditKeyRotated(msgspec.Struct, frozen=True, kw_only=True):
    """The log is signed by `key`, for `origin`, as soon as the authority has started again; until then for `former`."""

    key: str
    origin: str
    former: str
    log_index: int


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
