"""`client.audit`: records of the audit log, as pages, as they come, and as an export that verifies offline.

A filter is given by keyword, as `AuditFilter` names it: `type`, `principal`, `tenant`, `job_id`, `cell`, `ticket`,
`since`, `until`, `start`, `end`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Final, Protocol, TypeVar

import msgspec

from aether.contract import limits
from aether.contract.auditcalls import (
    AuditFilter,
    AuditKeyRotated,
    AuditPage,
    Cosignature,
    CosignCall,
    GrowthProof,
    Order,
    RetainCall,
    Retained,
    Witnesses,
)
from aether.contract.records import Record

T = TypeVar("T")
RETAIN_S: Final = 600.0
_JSON: Final = {"Content-Type": "application/json"}
_NAMES: Final = {"job_id": "job"}


class Calls(Protocol):
    """What is needed of `Client`."""

    def call_json(self, name: str, reply: type[T], argument: str | None = None, **rest: Any) -> T: ...

    def copy(self, name: str, argument: str, query: Sequence[tuple[str, str]], out: BinaryIO) -> int: ...

    def lines(self, name: str, query: Sequence[tuple[str, str]], follow: bool) -> Iterator[bytes]: ...


class Audit:
    """The operations. All methods raise AetherError."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def query(
        self,
        wanted: AuditFilter,
        *,
        order: Order = "newest",
        cursor: int | None = None,
        limit: int = limits.PAGE_ITEMS_DEFAULT,
    ) -> AuditPage:
        """One page; with a `next_cursor` there is more to look at, even where nothing was found."""
        query = [*_query(wanted), ("order", order), ("limit", str(limit))]
        if cursor is not None:
            query.append(("cursor", str(cursor)))
        return self._calls.call_json("audit.query", AuditPage, query=query)

    def records(self, wanted: AuditFilter, *, order: Order = "newest") -> Iterator[Record]:
        """All that fit, page by page."""
        cursor: int | None = None
        while True:
            page = self.query(wanted, order=order, cursor=cursor, limit=limits.PAGE_ITEMS_MAX)
            yield from page.records
            cursor = page.next_cursor
            if cursor is None:
                return

    def tail(self, wanted: AuditFilter, *, cursor: int | None = None, follow: bool = False) -> Iterator[bytes]:
        """The canonical text of each record from index `cursor` on, without a cursor of those to come."""
        query = [*_query(wanted), ("follow", "1" if follow else "0")]
        if cursor is not None:
            query.append(("cursor", str(cursor)))
        return self._calls.lines("audit.tail", query, follow)

    def export(self, wanted: AuditFilter, out: BinaryIO) -> int:
        """Writes an export to `out`; returns its bytes."""
        return self._calls.copy("audit.export", "", _query(wanted), out)

    # ---- keeping the log

    def growth(self, size: int = 0) -> GrowthProof:
        """The newest checkpoint, and the proof that it contains the first `size` records."""
        return self._calls.call_json("audit.growth", GrowthProof, query=[("size", str(size))])

    def witnesses(self) -> Witnesses:
        """The witnesses that the node lists, and what each cosigned last."""
        return self._calls.call_json("audit.witnesses", Witnesses)

    def cosign(self, size: int, cosignatures: Sequence[Cosignature]) -> Witnesses:
        """Hands over what witnesses signed on the checkpoint of `size` records."""
        call = CosignCall(size=size, cosignatures=tuple(cosignatures))
        return self._calls.call_json("audit.cosign", Witnesses, body=msgspec.json.encode(call), headers=_JSON)

    def retain(self, keep_ms: int) -> Retained:
        """Takes away records older than that, as far as nobody needs them."""
        body = msgspec.json.encode(RetainCall(keep_ms=keep_ms))
        return self._calls.call_json("audit.retain", Retained, body=body, headers=_JSON, extra_s=RETAIN_S)

    def rotate_key(self) -> AuditKeyRotated:
        """Has the log signed by a new key; the node's authority starts again for it."""
        return self._calls.call_json("audit.rotate-key", AuditKeyRotated)


def _query(wanted: AuditFilter) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for field in msgspec.structs.fields(AuditFilter):
        value = getattr(wanted, field.name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        found += [(_NAMES.get(field.name, field.name), str(item)) for item in values]
    return found
