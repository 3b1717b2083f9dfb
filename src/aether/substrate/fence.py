"""What a revoked link takes with it: jobs and cells that it admitted end, streams that it opened close.

The record of the revocation comes first and is durable before anything here. From that record on the ticket is
refused (`TicketBook.revoked`), a job of it is not launched, and whatever ends it ends it as revoked
(`Execution.conclude`). So what is done here only makes it soon, and may be done again: after a crash it is, when the
spawner is connected.

Order: streams close; what runs is killed and concluded once its end was seen, and allocated cells are ended; jobs that
wait are concluded meanwhile: a launch of one that comes first is refused, since it asks for the ticket.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from aether.contract.calls import Caller, Reply, StreamReply
from aether.contract.cellcalls import UpgradeReply
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.records import Record
from aether.contract.wire import JobFinish
from aether.substrate.allocations import Allocation
from aether.substrate.book import Book
from aether.substrate.cellhouse import REVOKED, CellHouse
from aether.substrate.cells.supervisor import CellSupervisor
from aether.substrate.egress import EgressDesk
from aether.substrate.execution import Execution
from aether.substrate.ledger import OpenJob
from aether.substrate.orchestra import Orchestra

KILL_S: Final = 10.0
"""How long the end of what was killed is waited for; a later one is recorded when it comes."""
_TURN: Final = 50
"""Outcomes written before others get their turn."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """How much one revocation ended."""

    jobs: int
    cells: int


class Fence:
    """See the module head. `links_of` tells the links that a caller was admitted by."""

    def __init__(
        self,
        book: Book,
        execution: Execution,
        cells: CellSupervisor,
        house: CellHouse,
        egress: EgressDesk,
        orchestra: Orchestra,
        links_of: Callable[[Caller], tuple[str, ...]],
    ) -> None:
        self._book = book
        self._execution = execution
        self._cells = cells
        self._house = house
        self._egress = egress
        self._orchestra = orchestra
        self._links_of = links_of
        self._streams: dict[asyncio.Future[None], tuple[str, ...]] = {}
        self._background: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"<Fence streams={len(self._streams)}>"

    async def apply(self, links: Collection[str]) -> Fenced:
        """Ends what was admitted under these links; returns when it is over, or after KILL_S."""
        under = frozenset(links)
        for cut, path in self._streams.items():
            if not under.isdisjoint(path) and not cut.done():
                cut.set_result(None)
        jobs = [job for job in self._book.ledger.open.values() if _is_under(job.intent, under)]
        cells = [cell for cell in self._book.ledger.cells.live.values() if _is_under(cell.allocated, under)]
        return await self.end(jobs, cells)

    async def end(self, jobs: Sequence[OpenJob], cells: Sequence[Allocation], reason: str = REVOKED) -> Fenced:
        """Ends these jobs, and these cells with what is in them for that reason; returns like `apply`."""
        ending = [asyncio.ensure_future(self._end(job)) for job in jobs if job.started is not None]
        ending += [asyncio.ensure_future(self._house.fence(cell, reason)) for cell in _outermost(cells)]
        await asyncio.sleep(0)  # what is to be killed is asked for now, and dies while the rest is written down
        concluded: list[tuple[OpenJob, Record]] = []
        for job in jobs:
            if job.started is None and self._book.ledger.open.get(job.grant.job_id) is job:
                concluded.append((job, self._conclude(job)))
                if len(concluded) % _TURN == 0:
                    await asyncio.sleep(0)
        await asyncio.gather(self._tell(concluded), *ending)
        return Fenced(len(jobs), len(cells))

    def spawner_connected(self, _: object) -> None:
        """The spawner (re)connected: what a crash left of earlier revocations is ended now."""
        revoked = self._book.ledger.tickets.revoked
        if revoked:
            task = asyncio.ensure_future(self.apply(revoked))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def drain(self) -> None:
        """Waits for what is being ended."""
        while self._background:
            await asyncio.wait(self._background)

    # ---- streams

    def guard(self, caller: Caller, reply: Reply | UpgradeReply) -> Reply | UpgradeReply:
        """The reply; one that goes on is cut off when the caller's ticket is revoked."""
        if not isinstance(reply, StreamReply | UpgradeReply) or not (links := self._links_of(caller)):
            return reply
        if isinstance(reply, StreamReply):
            return replace(reply, chunks=self._chunks(links, reply.chunks))
        if isinstance(reply, UpgradeReply):
            run = reply.run
            return replace(reply, run=lambda connection: self._run(links, run(connection)))
        return reply

    async def _chunks(self, links: tuple[str, ...], chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        step: asyncio.Future[bytes] | None = None
        with self._held(links) as cut:
            try:
                while True:
                    step = asyncio.ensure_future(anext(chunks))
                    await _either(step, cut)
                    if cut.done():
                        raise AetherError("TICKET_REVOKED", "cannot go on with the answer: the ticket was revoked")
                    try:
                        chunk = step.result()
                    except StopAsyncIteration:
                        return
                    yield chunk
            finally:
                if step is not None and not step.done():
                    step.cancel()
                    await asyncio.wait({step})
                await chunks.aclose()  # type: ignore[attr-defined]

    async def _run(self, links: tuple[str, ...], running: Any) -> None:
        task: asyncio.Future[None] = asyncio.ensure_future(running)
        with self._held(links) as cut:
            try:
                await _either(task, cut)
            finally:
                if not task.done():
                    task.cancel()
                    await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    @contextlib.contextmanager
    def _held(self, links: tuple[str, ...]) -> Iterator[asyncio.Future[None]]:
        cut: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._book.ledger.tickets.revoked.isdisjoint(links):
            cut.set_result(None)
        self._streams[cut] = links
        try:
            yield cut
        finally:
            del self._streams[cut]

    # ---- jobs

    def _conclude(self, job: OpenJob) -> Record:
        return self._execution.conclude(job, JobFinish(grant=job.grant, state=JobState.CANCELLED))

    async def _tell(self, concluded: Sequence[tuple[OpenJob, Record]]) -> None:
        if concluded:
            await self._book.durable(concluded[-1][1])
        for job, outcome in concluded:
            self._orchestra.tell_outcome(self._execution.told(job, outcome))

    async def _end(self, job: OpenJob) -> None:
        if job.end is None and not await self._killed(job):
            return
        if job.egress_index is not None:  # its last word belongs before the outcome
            await self._egress.close(job.place)
        if self._book.ledger.open.get(job.grant.job_id) is job:
            await self._tell([(job, self._conclude(job))])
        else:  # aurorad was told of its end, too, and was sooner
            await self._book.wait(job.grant.job_id, KILL_S)

    async def _killed(self, job: OpenJob) -> bool:
        """Whether its executable is seen to be over; else its end will be told, and aurorad finishes it."""
        try:
            async with asyncio.timeout(KILL_S):
                if job.is_guest:
                    await self._cells.stop_exec(job.place, job.executable, 0)
                else:
                    await self._cells.kill(job.place)
                await self._cells.wait_exec(job.place, job.executable)
        except (AetherError, TimeoutError):
            return job.end is not None
        return True


async def _either(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _is_under(record: Record, links: frozenset[str]) -> bool:
    return record.ticket is not None and not links.isdisjoint(record.ticket.link_ids)


def _outermost(cells: Sequence[Allocation]) -> list[Allocation]:
    """The cells that are in no other of them: ending one ends those in it."""
    names = {(cell.tenant_id, cell.name) for cell in cells}

    def is_inner(cell: Allocation) -> bool:
        parts = cell.name.split("/")
        return any((cell.tenant_id, "/".join(parts[:end])) in names for end in range(1, len(parts)))

    return [cell for cell in cells if not is_inner(cell)]
