"""Operations that read the audit log: `audit.query`, `audit.tail`, `audit.export`.

Who sees what: records of the caller's tenant, and of no tenant those that it caused itself without a ticket; all of
them where the policy allows `audit.inspect`. A ticket that is narrowed to cells must name a cell or a job that it may
know of.

The log is searched bundle by bundle on a thread, at most SEARCHES_LIVE_MAX at once: the event loop only waits. A search
looks at indexes below the size that was durable when it began, in one direction; so nothing is skipped and nothing
repeated while the log grows. A job's records lie between its intent and its outcome: only those are looked at.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, TypeVar

from aether.contract import ids
from aether.contract.auditcalls import AuditExport, AuditFilter, AuditPage, AuditQuery, AuditTail
from aether.contract.calls import Caller, JobCall, StreamReply
from aether.contract.clock import epoch_ns
from aether.contract.errors import AetherError
from aether.contract.jobs import JobView
from aether.contract.limits import AUDIT_PAGE_BYTES_MAX, AUDIT_SEARCH_RECORDS_MAX, PAGE_ITEMS_MAX, TILE_WIDTH
from aether.substrate.access.access import Admission, Resource
from aether.substrate.audit import entry as entries
from aether.substrate.audit.export import Export
from aether.substrate.audit.log import AuditLog
from aether.substrate.audit.search import Found, Sight, Wanted, search
from aether.substrate.book import Book
from aether.substrate.cellhouse import CellHouse
from aether.substrate.gate import Gate
from aether.substrate.orchestra import Orchestra
from aether.substrate.reading import Reading

LINES: Final = "application/x-ndjson"
SEARCHES_LIVE_MAX: Final = 2
CHUNK_BYTES: Final = 256 * 1024
EXPORT_ENTRIES: Final = 64
"""Proven at once: about a millisecond of a thread."""
POLL_S_MIN: Final = 0.02
POLL_S_MAX: Final = 0.25
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z", re.ASCII)
_LINK: Final = re.compile(r"[0-9a-f]{32}")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Scope:
    """What a call means once it was admitted: the filter, and the indexes outside of which nothing can fit."""

    wanted: Wanted
    start: int
    end: int | None

    def span(self, size: int) -> tuple[int, int]:
        return self.start, size if self.end is None else min(self.end, size)


class AuditReading:
    """The handlers."""

    def __init__(self, gate: Gate, book: Book, orchestra: Orchestra, reading: Reading, house: CellHouse) -> None:
        self._gate = gate
        self._log: AuditLog = book.log
        self._orchestra = orchestra
        self._reading = reading
        self._house = house
        self._turns = asyncio.Semaphore(SEARCHES_LIVE_MAX)

    async def query(self, caller: Caller, call: AuditQuery) -> AuditPage:
        """One page. Raises BAD_FIELD, BAD_ID, NO_SUCH_CELL, NOT_FOUND, LOG_CORRUPT."""
        scope = await self._scope(caller, "audit.query", call)
        size = self._log.durable_size
        start, end = scope.span(size)
        newest = call.order == "newest"
        if call.cursor is not None:
            start, end = (start, min(end, call.cursor)) if newest else (max(start, call.cursor), end)
        items, left = min(call.limit, PAGE_ITEMS_MAX), AUDIT_PAGE_BYTES_MAX
        found: list[tuple[int, bytes]] = []
        searched = 0
        while start < end and searched < AUDIT_SEARCH_RECORDS_MAX and len(found) < items and left > 0:
            span = _piece(start, end, newest)
            piece = await self._search(span, scope.wanted, newest, (items - len(found), left))
            searched += span[1] - piece.at if newest else piece.at - span[0]
            start, end = (start, piece.at) if newest else (piece.at, end)
            left -= sum(len(entry) for _, entry in piece.entries)
            found += piece.entries
        more = (end if newest else start) if start < end else None
        records = tuple(entries.decode(entry) for _, entry in found)
        return AuditPage(records=records, searched=searched, log_size=size, next_cursor=more)

    async def tail(self, caller: Caller, call: AuditTail) -> StreamReply:
        """Records as they come. Raises like `query`."""
        scope = await self._scope(caller, "audit.tail", call)
        if call.cursor is not None and call.cursor > self._log.durable_size:
            why = f"the log has {self._log.durable_size} records, the cursor is {call.cursor}"
            raise AetherError("BAD_FIELD", f"cannot audit.tail: {why}")
        at = self._log.durable_size if call.cursor is None else call.cursor
        return StreamReply(self._lines(caller, scope, at, call.follow), LINES)

    async def export(self, caller: Caller, call: AuditExport) -> StreamReply:
        """Records with proofs. Raises like `query`."""
        scope = await self._scope(caller, "audit.export", call)
        start, end = scope.span(self._log.durable_size)
        note, size = self._log.checkpoint(end)
        out = Export(self._log, note, size, (min(start, end), end), scope.wanted.is_everything)
        return StreamReply(self._exported(out, scope.wanted), LINES)

    # ---- inside

    async def _scope(self, caller: Caller, operation: str, call: AuditFilter) -> _Scope:
        _check(operation, call)
        admission = self._gate.admit(caller, operation, Resource(kind="audit"))
        if admission.cells and call.cell is None and call.job_id is None:
            raise AetherError(
                "TICKET_DENIED",
                f"cannot {operation}: the ticket is narrowed to cells",
                "name one of its cells, or a job in one",
            )
        cell_id = self._cell_id(caller, operation, call.cell, admission) if call.cell is not None else None
        everything = self._inspects(caller)
        view = await self._job(caller, operation, call.job_id, admission, everything) if call.job_id else None
        own = admission.principal.name if admission.ticket.implicit else None
        wanted = Wanted(
            sight=Sight(everything, admission.principal.tenant_id, own),
            types=call.type,
            principal=call.principal,
            tenant_id=call.tenant,
            job_id=call.job_id,
            cell_id=cell_id,
            link_id=call.ticket,
            since=call.since,
            until=call.until,
        )
        start, end = max(call.start, self._log.first), call.end
        if view is not None and view.intent_index is not None:
            start = max(start, view.intent_index)
            if view.outcome_index is not None:
                end = min(view.outcome_index + 1, view.outcome_index + 1 if end is None else end)
        return _Scope(wanted, start, end)

    def _inspects(self, caller: Caller) -> bool:
        try:
            self._gate.admit(caller, "audit.inspect", Resource(kind="audit"))
        except AetherError:
            return False
        return True

    def _cell_id(self, caller: Caller, operation: str, cell: str, admission: Admission) -> str:
        if cell.startswith(f"{ids.CELL}_") and not admission.cells:
            return ids.parse(ids.CELL, cell)
        return self._house.find(caller, operation, cell)[1].cell_id

    async def _job(
        self, caller: Caller, operation: str, job_id: str, admission: Admission, everything: bool
    ) -> JobView | None:
        """The job where it is known and the caller's to see: it says between which records its own lie. A ticket that
        is narrowed to cells gets NOT_FOUND otherwise."""
        try:
            if everything and not admission.cells:
                return await self._orchestra.job(ids.parse(ids.JOB, job_id))
            return await self._reading.view(caller, operation, JobCall(job_id=job_id))
        except AetherError as error:
            if admission.cells or error.code not in ("NOT_FOUND", "UNAVAILABLE"):
                raise
            return None

    async def _search(self, span: tuple[int, int], wanted: Wanted, newest: bool, room: tuple[int, int]) -> Found:
        """`span` lies in one bundle."""
        number = span[0] // TILE_WIDTH

        def look() -> Found:
            found = search(self._log.bundle(number), number * TILE_WIDTH, span, wanted, newest, room)
            for index, entry in found.entries:
                self._log.check(index, entry)
            return found

        return await self._threaded(look)

    async def _threaded(self, work: Callable[[], T]) -> T:
        async with self._turns:
            return await asyncio.to_thread(work)

    async def _pieces(self, start: int, end: int, wanted: Wanted, room: tuple[int, int]) -> AsyncGenerator[Found, None]:
        """What fits from `start` up to `end`, oldest first, in bounded pieces."""
        while start < end:
            found = await self._search(_piece(start, end, False), wanted, False, room)
            start = found.at
            yield found

    async def _lines(self, caller: Caller, scope: _Scope, at: int, follow: bool) -> AsyncIterator[bytes]:
        start, _ = scope.span(0)
        at, pause_s = max(at, start), POLL_S_MIN
        while True:
            _, end = scope.span(self._log.durable_size)
            if at < end:
                self._gate.admit(caller, "audit.tail", Resource(kind="audit"))  # the ticket may have ended meanwhile
                pause_s = POLL_S_MIN
                async with aclosing(self._pieces(at, end, scope.wanted, (TILE_WIDTH, CHUNK_BYTES))) as pieces:
                    async for found in pieces:
                        at = found.at
                        yield b"".join(entry + b"\n" for _, entry in found.entries)
            elif not follow or (scope.end is not None and at >= scope.end):
                return
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, POLL_S_MAX)

    async def _exported(self, out: Export, wanted: Wanted) -> AsyncIterator[bytes]:
        yield out.head()
        async with aclosing(self._pieces(*out.span, wanted, (EXPORT_ENTRIES, CHUNK_BYTES))) as pieces:
            async for found in pieces:
                yield await self._threaded(lambda found=found: out.entries(found.entries))  # type: ignore[misc]
        for digest in out.named:
            yield await self._threaded(lambda digest=digest: out.document(digest))  # type: ignore[misc]
        yield out.end()


def _piece(start: int, end: int, newest: bool) -> tuple[int, int]:
    """The part of start..end that is searched next: what of it lies in one bundle."""
    if newest:
        return max(start, (end - 1) // TILE_WIDTH * TILE_WIDTH), end
    return start, min(end, (start // TILE_WIDTH + 1) * TILE_WIDTH)


def _check(operation: str, call: AuditFilter) -> None:
    """Raises AetherError BAD_FIELD or BAD_ID for values that no record could have."""
    for name in ("since", "until"):
        text = getattr(call, name)
        if text is not None and not _is_time(text):
            raise AetherError(
                "BAD_FIELD", f"cannot {operation}: {name} is not a time such as 2026-09-21T13:33:20.000000Z"
            )
    if call.ticket is not None and _LINK.fullmatch(call.ticket) is None:
        raise AetherError("BAD_FIELD", f"cannot {operation}: ticket is not the id of a link, 32 hex digits")
    if call.job_id is not None:
        ids.parse(ids.JOB, call.job_id)
    if call.start < 0 or (call.end is not None and call.end < 0):
        raise AetherError("BAD_FIELD", f"cannot {operation}: an index is below 0")


def _is_time(text: str) -> bool:
    try:
        return _TIME.fullmatch(text) is not None and epoch_ns(text) is not None
    except (ValueError, OverflowError):
        return False
