"""Log, ledger and accounts in step: the one way to write a record.

Invariant: every record goes through `write`, which assigns its index and time, appends it, and applies it to
the ledger and the accounts in the same synchronous step. What the memory says is therefore always the fold
of the log; durability is awaited separately, before anything leaves the boundary.

At start the state is a snapshot plus the tail of the log; a snapshot ahead of the log is ignored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from aether.contract.budgetcalls import Quota
from aether.contract.canonical import digest_bytes
from aether.contract.cells import ExecEnd
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.jobs import JobView
from aether.contract.records import Record
from aether.contract.wire import JobOutcome
from aether.substrate.access.budget import Accounts
from aether.substrate.allocations import ENDING, Allocation, Memory
from aether.substrate.approvalbook import Kept
from aether.substrate.audit.files import fsync_dir, write_file
from aether.substrate.audit.log import AuditLog
from aether.substrate.keymark import marked, note_written
from aether.substrate.ledger import KeyEntry, Ledger, OpenJob
from aether.substrate.quotas import Quotas
from aether.substrate.usage import UsageBook
from aether.substrate.views import final_view

_PAGE: Final = 500
_SNAPSHOT_EVERY: Final = 20_000
_OUTCOMES_KEPT: Final = 4_096

Make = Callable[[int, str], Record]
"""Builds a record from its log index and its time."""


class _Snapshot(msgspec.Struct):
    applied: int
    open: list[tuple[Record, Record | None, Record | None, ExecEnd | None]]
    keys: list[tuple[str, KeyEntry]]
    accounts: Any
    cells: list[tuple[Record, str, Record | None, bool]] = []
    egress: dict[str, int] = {}
    tickets: list[tuple[Record, list[Record]]] = []
    policies: tuple[list[Record], int, Record | None, Record | None] = ([], 0, None, None)
    epoch: int = 1
    exhausted: dict[str, Record] = {}
    metered: dict[str, tuple[int, Memory]] = {}
    approvals: list[Kept] = []
    usage: list[tuple[str, tuple[str, str, str], dict[str, int]]] = []
    quotas: dict[str, dict[Quota, int]] = {}
    marks: dict[str, tuple[str, ...]] = {}


class Book:
    """See the module head. `now_ns` is the wall clock in nanoseconds."""

    def __init__(self, log: AuditLog, accounts: Accounts, snapshot_path: Path, now_ns: Callable[[], int]) -> None:
        self.log = log
        self.ledger = Ledger()
        self.accounts = accounts
        self.usage = UsageBook()
        self.quotas = Quotas()
        self.now_ns = now_ns
        self._snapshot_path = snapshot_path
        self._snapshot_at = 0
        self._waiters: dict[str, asyncio.Future[JobOutcome]] = {}
        self._outcomes: dict[str, JobOutcome] = {}
        self._unpublished: set[str] = set()
        self._heard: Callable[[Record], None] = lambda record: None

    def __repr__(self) -> str:
        return f"<Book {self.ledger!r} waiting={len(self._waiters)}>"

    def on_record(self, call: Callable[[Record], None]) -> None:
        """`call` hears of every record that is written from now on, right after it was applied."""
        self._heard = call

    def load(self) -> int:
        """Folds snapshot and tail; returns how many records were read. Raises AetherError LOG_CORRUPT when the
        snapshot is lost that stands for pruned records."""
        self._restore()
        start = self.ledger.applied
        if start < self.log.first:
            why = f"records below {self.log.first} were pruned, and the snapshot {self._snapshot_path} is of {start}"
            raise AetherError("LOG_CORRUPT", f"cannot fold the log: {why}", "restore the snapshot from a copy")
        while self.ledger.applied < self.log.size:
            for record in self.log.read(self.ledger.applied, _PAGE):
                self._apply(record)
        return self.ledger.applied - start

    def write(self, make: Make) -> Record:
        """Appends and applies one record; not yet durable. Raises AetherError when it cannot be encoded, and
        TICKET_REVOKED for something done by a ticket that is revoked."""
        built: list[Record] = []

        def build(index: int) -> Record:
            built.append(marked(make(index, rfc3339(self.now_ns()))))
            self.ledger.tickets.check(built[0])
            return built[0]

        self.log.append(build)
        note_written(built[0])
        self._apply(built[0])
        if built[0].type == "job.outcome" and built[0].job_id is not None:
            self._unpublished.add(built[0].job_id)
        self._heard(built[0])
        return built[0]

    async def durable(self, record: Record) -> None:
        """Returns when `record` is on disk; after an outcome, those who wait for the job are told."""
        await self.log.durable(record.log_index)

    async def durable_all(self) -> None:
        """Returns when all that was written so far is on disk."""
        if self.log.size:
            await self.log.durable(self.log.size - 1)

    def publish(self, outcome: JobOutcome) -> None:
        """Tells the waiters of a job whose outcome is durable."""
        job_id = outcome.view.job_id
        self._outcomes[job_id] = outcome
        self._unpublished.discard(job_id)
        if len(self._outcomes) > _OUTCOMES_KEPT:
            del self._outcomes[next(iter(self._outcomes))]
        if (waiter := self._waiters.pop(job_id, None)) is not None and not waiter.done():
            waiter.set_result(outcome)

    async def wait(self, job_id: str, timeout_s: float) -> JobView | None:
        """The final view of an open job once its outcome is durable; None when the time is over."""
        if (known := self._outcomes.get(job_id)) is not None:
            return known.view
        if timeout_s <= 0 or not (job_id in self.ledger.open or job_id in self._unpublished):
            return None
        waiter = self._waiters.get(job_id)
        if waiter is None:
            waiter = self._waiters[job_id] = asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait({waiter}, timeout=timeout_s)
        return waiter.result().view if done else None

    def recent_outcome(self, job_id: str) -> JobOutcome | None:
        return self._outcomes.get(job_id)

    def known(self, job_id: str) -> JobView | None:
        """The final view of a job whose outcome was published lately."""
        outcome = self._outcomes.get(job_id)
        return outcome.view if outcome else None

    def remembers(self, job_id: str) -> bool:
        """Whether memory tells whose job it is: an open one, or one that ended lately."""
        return job_id in self.ledger.open or job_id in self._outcomes

    def maybe_snapshot(self) -> None:
        """Writes a snapshot when the tail has grown; cheap otherwise."""
        if self.log.durable_size - self._snapshot_at >= _SNAPSHOT_EVERY:
            self.snapshot()

    @property
    def snapshot_at(self) -> int:
        """Records below this index are not needed to start again."""
        return self._snapshot_at

    def snapshot(self) -> None:
        """Writes the fold by rename. Only a fully durable state may be kept."""
        ledger = self.ledger
        if ledger.applied != self.log.durable_size:
            return
        networked: dict[str, OpenJob | Allocation] = {**ledger.open, **ledger.cells.live}
        state = _Snapshot(
            applied=ledger.applied,
            open=[(job.intent, job.started, job.stop, job.end) for job in ledger.open.values()],
            keys=ledger.keys(),
            accounts=self.accounts.snapshot(),
            cells=ledger.cells.snapshot(),
            tickets=ledger.tickets.snapshot(),
            policies=ledger.policies.snapshot(),
            epoch=ledger.tickets.epoch,
            exhausted={name: job.exhausted for name, job in ledger.open.items() if job.exhausted is not None},
            metered=ledger.cells.metered(),
            approvals=ledger.approvals.snapshot(),
            usage=self.usage.snapshot(),
            quotas=self.quotas.snapshot(),
            marks=ledger.cells.marks(),
            egress={name: each.egress_index for name, each in networked.items() if each.egress_index is not None},
        )
        body = msgspec.msgpack.encode(state)
        # durable at once: records that it stands for may be pruned
        write_file(self._snapshot_path, digest_bytes(body).encode() + b"\n" + body, sync=True)
        fsync_dir(self._snapshot_path.parent)
        self._snapshot_at = ledger.applied

    def _restore(self) -> None:
        try:
            digest, _, body = self._snapshot_path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return
        if digest_bytes(body).encode() != digest:
            return
        state = msgspec.msgpack.decode(body, type=_Snapshot)
        if state.applied > self.log.size:
            return
        jobs = [OpenJob(intent, started, stop, end=end) for intent, started, stop, end in state.open]
        self.ledger.cells.restore(state.cells)
        self.ledger.cells.restore_marks(state.marks)
        self.ledger.tickets.restore(state.tickets)
        self.ledger.policies.restore(state.policies)
        self.ledger.tickets.epoch = state.epoch
        self.ledger.approvals.restore(state.approvals)
        self.ledger.restore(state.applied, jobs, state.keys)
        for name, record in state.exhausted.items():
            self.ledger.open[name].exhausted = record
        self.ledger.cells.restore_metered(state.metered)
        for name, index in state.egress.items():
            networked = self.ledger.open.get(name) or self.ledger.cells.live[name]
            networked.egress_index = index
        self.accounts.restore(state.accounts)
        self.usage.restore(state.usage)
        cells = [cell.allocated for cell in self.ledger.cells.live.values()]
        self.quotas.restore(state.quotas, [(job.intent, job.started is None) for job in jobs], cells)
        self._snapshot_at = state.applied

    def _apply(self, record: Record) -> None:
        cell = self.ledger.cells.live.get(record.cell_id) if record.type in ENDING and record.cell_id else None
        self.ledger.apply(record)
        self.accounts.apply(record)
        self.usage.apply(record)
        self.quotas.apply(record)
        if cell is not None:
            self.quotas.cell_ended(cell.allocated)
        for root in self.ledger.tickets.forgotten():
            self.accounts.forget(root)
        self.log.reserve(len(self.ledger.open))


def outcome_of(intent: Record, outcome: Record, argv: tuple[str, ...] | None = None) -> JobOutcome:
    """What aurorad and waiters are told of a durable outcome."""
    return JobOutcome(view=final_view(intent, outcome, argv), log_index=outcome.log_index)
