"""Ends what runs when a budget runs out, or when its ticket expires.

It hears of every record. What has started and is charged to an account with a metered limit gets a gauge; the account
sleeps until the earliest moment at which all its gauges together can have used up what is left (`metering.due`), then
the kernel is asked through the spawner (CPU) and egressd (bytes), and it sleeps again or is exhausted. So a job that
does little is looked at a few times in its life; near the end CPU is looked at so often that NEAR_CPU_MS more cannot
be spent in between. Bytes have no highest rate: egressd tells when a cell has passed its share of what is left.

Exhausted: `budget.exhausted` is recorded for each, they are killed, and `Execution.conclude` says why. A kill does not
wait for the disk (nothing leaves the boundary by it), the outcome does. Recorded and not yet ended, because aetherd
died in between, it is ended when the spawner is connected again.

An executable in an allocated cell is seen with its share of what the cell used and nobody paid for yet: the kernel
counts the cell. Clocks: `now_s` monotonic for pauses, the book's for times that records state.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from aether.contract.clock import epoch_ns
from aether.contract.errors import AetherError
from aether.contract.records import BudgetRef, Record
from aether.contract.units import METERED, TTL
from aether.substrate.allocations import Allocation
from aether.substrate.book import Book
from aether.substrate.cells.supervisor import CellSupervisor
from aether.substrate.egress import EgressDesk
from aether.substrate.fence import Fence
from aether.substrate.ledger import OpenJob
from aether.substrate.metering import exhaustion
from aether.substrate.metering.due import NEVER, Found, Gauge, left_s, run_out
from aether.substrate.metering.settle import cpu_ms

NEAR_CPU_MS: Final = 40.0
PAUSE_S_MIN: Final = 0.005
AGAIN_S: Final = 0.25
"""After the spawner or egressd did not answer."""
EXPIRY_PAUSE_S_MAX: Final = 30.0
"""The wall clock may be set meanwhile."""
EXHAUSTED: Final = "exhausted"
EXPIRED: Final = "expired"
_BYTES: Final = ("bytes_out", "bytes_in")


@dataclass(slots=True)
class _Run:
    """One thing that runs: a job with a cell of its own, an executable in an allocated cell, or such a cell."""

    name: str
    place: str
    budget: BudgetRef
    started_ns: int
    gauge: Gauge
    job: OpenJob | None
    cell: Allocation | None
    networked: bool


@dataclass(slots=True)
class _Watched:
    """An account with what runs on it."""

    runs: dict[str, _Run] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None
    looking: bool = False
    again_s: float = 0.0
    """Not to be looked at before."""


class Meter:
    """See the module head."""

    def __init__(
        self,
        book: Book,
        cells: CellSupervisor,
        fence: Fence,
        egress: EgressDesk,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._book = book
        self._cells = cells
        self._fence = fence
        self._egress = egress
        self._now_s = now_s
        self._cpu_ms_per_s = 1000.0 * (os.cpu_count() or 1)
        self._accounts: dict[str, _Watched] = {}
        self._runs: dict[str, _Run] = {}
        self._expiring: list[tuple[int, str]] = []
        self._expiry: asyncio.TimerHandle | None = None
        self._background: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"<Meter accounts={len(self._accounts)} runs={len(self._runs)} expiring={len(self._expiring)}>"

    # ---- what happens

    def heard(self, record: Record) -> None:
        """One record was written."""
        kind = record.type
        if kind in ("job.intent", "cell.allocated"):
            if record.budget is not None and record.budget.expires_ms is not None:
                self._expires(record.budget.expires_ms, record.job_id or record.cell_id or "")
        elif kind == "job.started":
            self._start_job(self._book.ledger.open.get(record.job_id or ""))
        elif kind == "job.outcome":
            self._stop(record.job_id or "")
        elif kind in ("cell.started", "cell.resized"):
            self._start_cell(self._book.ledger.cells.live.get(record.cell_id or ""))
        elif kind in ("cell.freed", "cell.lost"):
            self._stop(record.cell_id or "")
        elif kind in ("budget.raised", "budget.set"):
            self._arm(record.detail["account"])

    def spawner_connected(self, _: object) -> None:
        """The spawner (re)connected: what was open before is metered again, what had run out is ended."""
        ledger = self._book.ledger
        for job in ledger.open.values():
            self.heard(job.intent)
            if job.started is not None and job.end is None:
                self._start_job(job)
        for cell in ledger.cells.live.values():
            self.heard(cell.allocated)
            self._start_cell(cell)
        found = [job for job in ledger.open.values() if job.exhausted is not None]
        if found:
            self._in_background(self._fence.end(found, ()))

    def passed(self, cell_id: str) -> None:
        """egressd: the cell passed its share of bytes."""
        for account, watched in list(self._accounts.items()):
            if any(run.place == cell_id for run in watched.runs.values()):
                self._look_soon(account)

    async def drain(self) -> None:
        """Stops, and waits for what is being ended."""
        for watched in self._accounts.values():
            if watched.timer is not None:
                watched.timer.cancel()
        if self._expiry is not None:
            self._expiry.cancel()
        while self._background:
            await asyncio.wait(self._background)

    # ---- what runs

    def _start_job(self, job: OpenJob | None) -> None:
        budget = job.intent.budget if job is not None else None
        if job is None or budget is None or job.started is None or not _is_metered(budget):
            return
        rates = {"wall_ms": 1000.0, "cpu_ms": float(budget.grants.get("cpu_millis", 0))}
        rates["memory_byte_s"] = float(budget.grants.get("memory_bytes", 0))
        networked = not job.is_guest and job.egress_index is not None
        self._start(job.grant.job_id, job.place, budget, job.started, rates, job, None, networked)

    def _start_cell(self, cell: Allocation | None) -> None:
        budget = cell.allocated.budget if cell is not None else None
        if cell is None or budget is None or cell.started is None or not _is_metered(budget):
            return
        rates = {"cpu_ms": self._cpu_ms_per_s, "memory_byte_s": float(cell.memory.granted_bytes)}
        networked = cell.egress_index is not None
        self._start(cell.cell_id, cell.cell_id, budget, cell.started, rates, None, cell, networked)

    def _start(
        self,
        name: str,
        place: str,
        budget: BudgetRef,
        started: Record,
        rates: dict[str, float],
        job: OpenJob | None,
        cell: Allocation | None,
        networked: bool,
    ) -> None:
        now_s, since_ns = self._now_s(), epoch_ns(started.time)
        behind_s = max(0.0, (self._book.now_ns() - since_ns) / 1e9)
        gauge = Gauge(now_s - behind_s, rates)
        run = self._runs[name] = _Run(name, place, budget, since_ns, gauge, job, cell, networked)
        for account in _metered_accounts(budget):
            self._accounts.setdefault(account, _Watched()).runs[name] = run
            self._arm(account)
            if networked:
                self._look_soon(account)

    def _stop(self, name: str) -> None:
        run = self._runs.pop(name, None)
        if run is None:
            return
        for account in _metered_accounts(run.budget):
            watched = self._accounts.get(account)
            if watched is None:
                continue
            watched.runs.pop(name, None)
            if not watched.runs:
                if watched.timer is not None:
                    watched.timer.cancel()
                del self._accounts[account]
            else:
                self._arm(account)

    # ---- accounts

    def _limits(self, account: str, watched: _Watched) -> dict[str, int]:
        """What the account may spend of each metered unit."""
        found: dict[str, int] = {}
        for run in watched.runs.values():
            for unit, stated in run.budget.limits[account].items():
                limit = self._book.accounts.limit(account, unit, stated) if unit in METERED else None
                if limit is not None:
                    found[unit] = min(limit, found.get(unit, limit))
        return found

    def _arm(self, account: str) -> None:
        """Sets the account's next look."""
        watched = self._accounts.get(account)
        if watched is None or watched.looking:
            return
        now_s, spent = self._now_s(), self._book.accounts.account(account)
        gauges = [run.gauge for run in watched.runs.values()]
        due_s = NEVER
        for unit, limit in self._limits(account, watched).items():
            rate_max = self._cpu_ms_per_s if unit == "cpu_ms" else NEVER
            due_s = min(due_s, left_s(gauges, unit, limit - spent.used(unit), now_s, rate_max))
        if watched.timer is not None:
            watched.timer.cancel()
            watched.timer = None
        if due_s < NEVER:
            loop = asyncio.get_running_loop()
            watched.timer = loop.call_later(max(due_s, watched.again_s - now_s), self._look_soon, account)

    def _look_soon(self, account: str) -> None:
        watched = self._accounts.get(account)
        if watched is not None and not watched.looking:
            watched.looking = True
            self._in_background(self._look(account, watched))

    async def _look(self, account: str, watched: _Watched) -> None:
        """Asks what was used, and ends what runs when that is all."""
        try:
            limits = self._limits(account, watched)
            answered = await self._refresh(watched, "cpu_ms" in limits)
            if any(unit in limits for unit in _BYTES):
                answered = await self._refresh_bytes(account, watched, limits) and answered
            spent = self._book.accounts.account(account)
            gauges = [run.gauge for run in watched.runs.values()]
            for unit, limit in self._limits(account, watched).items():
                found = run_out(gauges, account, unit, limit, spent.used(unit))
                if found is not None and watched.runs:
                    await self._exhaust(found, [run for run in watched.runs.values() if _spends(run, unit)])
        finally:
            watched.looking = False
        rate = min(sum(run.gauge.rates.get("cpu_ms", 0.0) for run in watched.runs.values()), self._cpu_ms_per_s)
        near_s = max(PAUSE_S_MIN, NEAR_CPU_MS / rate if rate else 0.0)
        if self._accounts.get(account) is watched:
            watched.again_s = self._now_s() + (near_s if answered else AGAIN_S)
            self._arm(account)

    async def _refresh(self, watched: _Watched, cpu: bool) -> bool:
        """Looks at every gauge of the account; whether all that was asked answered."""
        runs = list(watched.runs.values())
        used = dict.fromkeys((run.place for run in runs), 0) if cpu else {}
        answers = await asyncio.gather(*(self._cells.usage(place) for place in used), return_exceptions=True)
        failed = {place for place, answer in zip(used, answers, strict=True) if isinstance(answer, BaseException)}
        used = {p: cpu_ms(a) for p, a in zip(used, answers, strict=True) if not isinstance(a, BaseException)}
        now_s, now_ns = self._now_s(), self._book.now_ns()
        for run in runs:
            wall_s = max(0.0, (now_ns - run.started_ns) / 1e9)
            seen = {unit: rate * wall_s for unit, rate in run.gauge.rates.items() if unit != "cpu_ms"}
            if run.cell is not None:
                seen["memory_byte_s"] = run.cell.memory.until(now_ns) / 1e6
            if run.place in used:
                seen["cpu_ms"] = self._cpu_of(run, used[run.place])
            if run.place not in failed:
                run.gauge.look(now_s, seen)
        return not failed

    def _cpu_of(self, run: _Run, total_ms: int) -> float:
        """Its part of what its cell used."""
        cell = run.cell or (self._book.ledger.cells.live.get(run.place) if run.job and run.job.is_guest else None)
        if cell is None:
            return total_ms
        unpaid_ms = max(0, total_ms - cell.paid_cpu_ms)
        guests = sum(
            (job := self._book.ledger.open.get(name)) is not None and job.started is not None for name in cell.jobs
        )
        if run.cell is not None:
            return 0 if guests else unpaid_ms
        return unpaid_ms / max(1, guests)

    async def _refresh_bytes(self, account: str, watched: _Watched, limits: dict[str, int]) -> bool:
        """Asks egressd what passed, and to tell when a cell has passed its share of what is left."""
        runs = [run for run in watched.runs.values() if run.networked]
        for again in (False, True):
            shares = self._shares(account, runs, limits) if again else (0, 0)
            for run in runs:
                try:
                    sent, received = run.gauge.seen.get("bytes_out", 0), run.gauge.seen.get("bytes_in", 0)
                    told = (int(sent) + shares[0], int(received) + shares[1]) if again else None
                    sums = await self._egress.passed(run.place, told)
                except AetherError:
                    return False
                run.gauge.seen |= {"bytes_out": float(sums.sent_bytes), "bytes_in": float(sums.received_bytes)}
        return True

    def _shares(self, account: str, runs: list[_Run], limits: dict[str, int]) -> tuple[int, int]:
        """What each may still send and receive before egressd is to tell."""
        spent, found = self._book.accounts.account(account), []
        for unit in _BYTES:
            seen = sum(run.gauge.seen.get(unit, 0) for run in runs)
            left = limits.get(unit, 1 << 53) - spent.used(unit) - int(seen)
            found.append(max(1, left // max(1, len(runs))))
        return found[0], found[1]

    # ---- ending

    async def _exhaust(self, found: Found, runs: list[_Run]) -> None:
        jobs = [run.job for run in runs if run.job is not None]
        cells = [run.cell for run in runs if run.cell is not None]
        self._note(found, jobs, cells)
        await self._fence.end(jobs, cells, EXHAUSTED)

    def _note(self, found: Found, jobs: Iterable[OpenJob], cells: Iterable[Allocation]) -> None:
        """Records it for each that is still open."""
        ledger = self._book.ledger
        subjects = [job.intent for job in jobs if ledger.open.get(job.grant.job_id) is job and job.exhausted is None]
        subjects += [cell.allocated for cell in cells if cell.ended is None]
        for subject in subjects:
            self._book.write(lambda index, now, of=subject: exhaustion.record(of, found, index, now))  # type: ignore[misc]

    def _expires(self, expires_ms: int, name: str) -> None:
        heapq.heappush(self._expiring, (expires_ms, name))
        if self._expiring[0][1] == name:
            self._arm_expiry()

    def _arm_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        ledger = self._book.ledger
        while (
            self._expiring and self._expiring[0][1] not in ledger.open and self._expiring[0][1] not in ledger.cells.live
        ):
            heapq.heappop(self._expiring)
        if self._expiring:
            left_s = self._expiring[0][0] / 1e3 - self._book.now_ns() / 1e9
            pause_s = min(max(left_s, 0.0), EXPIRY_PAUSE_S_MAX)
            self._expiry = asyncio.get_running_loop().call_later(pause_s, self._expire)

    def _expire(self) -> None:
        now_ms, names = self._book.now_ns() // 1_000_000, []
        while self._expiring and self._expiring[0][0] <= now_ms:
            names.append(heapq.heappop(self._expiring))
        ledger = self._book.ledger
        jobs = [job for _, name in names if (job := ledger.open.get(name)) is not None]
        cells = [cell for _, name in names if (cell := ledger.cells.live.get(name)) is not None]
        for expires_ms, name in names:
            found = Found("", TTL, expires_ms, now_ms)
            self._note(
                found, [job for job in jobs if job.grant.job_id == name], [c for c in cells if c.cell_id == name]
            )
        if jobs or cells:
            self._in_background(self._fence.end(jobs, cells, EXPIRED))
        self._arm_expiry()

    def _in_background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _is_metered(budget: BudgetRef) -> bool:
    return any(True for _ in _metered_accounts(budget))


def _metered_accounts(budget: BudgetRef) -> Iterable[str]:
    return (account for account, units in budget.limits.items() if not units.keys().isdisjoint(METERED))


def _spends(run: _Run, unit: str) -> bool:
    return run.networked if unit in _BYTES else run.gauge.rates.get(unit, 0.0) > 0
