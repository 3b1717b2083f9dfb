"""The authority's memory of allocated cells: a fold of the audit log, like the ledger it is part of.

`apply` is fed every `cell.*` record exactly once, in log order, live and at start. Held: the cells that are not
ended, by id and by name within their tenant, with the jobs whose executables live in them; and the latest ones
that ended, so that whoever asks a second time is told what became of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from aether.contract.allocations import CellState
from aether.contract.cellnames import is_within, parent_of
from aether.contract.clock import epoch_ns
from aether.contract.records import Record

ENDED_KEPT: Final = 512
ENDING: Final = frozenset({"cell.freed", "cell.lost"})


@dataclass(slots=True)
class Memory:
    """The memory that a cell is granted: now, since when (epoch), and what the times before it add up to."""

    granted_bytes: int = 0
    since_ns: int = 0
    byte_us: int = 0

    def grant(self, granted_bytes: int, now_ns: int) -> None:
        self.byte_us, self.since_ns, self.granted_bytes = self.until(now_ns), now_ns, granted_bytes

    def until(self, now_ns: int) -> int:
        """Byte-microseconds up to `now_ns`."""
        return self.byte_us + self.granted_bytes * max(0, now_ns - self.since_ns) // 1000


@dataclass(slots=True)
class Allocation:
    """One allocated cell. `spec` is the digest of what it is now; `jobs` are the open ones with an executable in it;
    `used_ns` is when something was last done with it (epoch); `egress_index` is the last record about its network."""

    allocated: Record
    spec: str
    started: Record | None = None
    frozen: bool = False
    ended: Record | None = None
    jobs: dict[str, None] = field(default_factory=dict)
    used_ns: int = 0
    paid_cpu_ms: int = 0
    """Of its CPU time, what was charged already: by the executables and the cells in it."""
    memory: Memory = field(default_factory=lambda: Memory())
    egress_index: int | None = None

    labels: tuple[str, ...] = ()
    """What it was allocated with, and what went into it since."""

    @property
    def cell_id(self) -> str:
        assert self.allocated.cell_id is not None
        return self.allocated.cell_id

    @property
    def name(self) -> str:
        return self.allocated.detail["name"]

    @property
    def tenant_id(self) -> str:
        return self.allocated.tenant_id or ""

    @property
    def state(self) -> CellState:
        if self.ended is not None:
            return CellState.FREED if self.ended.type == "cell.freed" else CellState.LOST
        if self.started is None:
            return CellState.STARTING
        return CellState.FROZEN if self.frozen else CellState.RUNNING

    @property
    def reason(self) -> str | None:
        """Why it ended, in the words of the record."""
        return None if self.ended is None else self.ended.detail.get("reason")


class Allocations:
    """See the module head."""

    def __init__(self) -> None:
        self.live: dict[str, Allocation] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._ended: OrderedDict[str, Allocation] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Allocations live={len(self.live)}>"

    # ---- folding

    def apply(self, record: Record) -> None:
        """Folds one record; those of other types change nothing."""
        if record.cell_id is None:
            return
        if record.type.startswith("egress.") and record.job_id is None:
            if (reached := self.find_any(record.cell_id)) is not None:
                reached.egress_index = record.log_index
            return
        if not record.type.startswith("cell."):
            return
        if record.type == "cell.allocated":
            made = Allocation(record, record.detail["spec"], used_ns=epoch_ns(record.time))
            made.memory.grant(_granted(record), made.used_ns)
            made.labels = record.labels
            self._add(made)
            return
        cell = self.live.get(record.cell_id)
        if cell is None:
            return
        cell.used_ns = epoch_ns(record.time)
        if record.type == "cell.started":
            cell.started = record
        elif record.type in ("cell.frozen", "cell.thawed"):
            cell.frozen = record.type == "cell.frozen"
        elif record.type == "cell.resized":
            cell.spec = record.detail["spec"]
            cell.memory.grant(_granted(record), cell.used_ns)
        elif record.type == "cell.put":
            cell.labels = tuple(sorted({*cell.labels, *record.labels}))
        elif record.type in ENDING:
            self._end(cell, record)

    def entered(self, cell_id: str, job_id: str, labels: tuple[str, ...] = ()) -> None:
        """A job was admitted as an executable of the cell: what it reads may stay there."""
        if (cell := self.live.get(cell_id)) is not None:
            cell.jobs[job_id] = None
            cell.labels = tuple(sorted({*cell.labels, *labels}))

    def left(self, cell_id: str, job_id: str, time: str, cpu_ms: int = 0) -> None:
        """The job has its outcome, and paid for so much CPU time."""
        cell = self.find_any(cell_id)
        if cell is not None:
            cell.jobs.pop(job_id, None)
            cell.used_ns = epoch_ns(time)
            self._pay(cell, cpu_ms)

    def _pay(self, cell: Allocation, cpu_ms: int) -> None:
        for each in (cell, *self.around(cell)):
            each.paid_cpu_ms += cpu_ms

    def _add(self, cell: Allocation) -> None:
        self.live[cell.cell_id] = cell
        self._names[cell.tenant_id, cell.name] = cell.cell_id

    def _end(self, cell: Allocation, record: Record) -> None:
        self._pay(cell, record.budget.cpu_ms if record.budget is not None else 0)
        cell.ended = record
        del self.live[cell.cell_id]
        del self._names[cell.tenant_id, cell.name]
        self._ended[cell.cell_id] = cell
        if len(self._ended) > ENDED_KEPT:
            self._ended.popitem(last=False)

    # ---- asking

    def named(self, tenant_id: str, name: str) -> Allocation | None:
        """The tenant's live cell of that name."""
        cell_id = self._names.get((tenant_id, name))
        return None if cell_id is None else self.live[cell_id]

    def find(self, tenant_id: str, reference: str) -> Allocation | None:
        """The tenant's cell by id, or by name: the live one, else the latest that ended under it."""
        if reference.startswith("cell_"):
            found = self.live.get(reference) or self._ended.get(reference)
            return found if found is not None and found.tenant_id == tenant_id else None
        if (cell := self.named(tenant_id, reference)) is not None:
            return cell
        ended = (c for c in reversed(self._ended.values()) if (c.tenant_id, c.name) == (tenant_id, reference))
        return next(ended, None)

    def find_any(self, cell_id: str) -> Allocation | None:
        """The cell of that id, live or lately ended, whoever's it is."""
        return self.live.get(cell_id) or self._ended.get(cell_id)

    def of_tenant(self, tenant_id: str) -> list[Allocation]:
        """The tenant's live cells by name, parents before children."""
        return sorted((c for c in self.live.values() if c.tenant_id == tenant_id), key=lambda c: c.name.split("/"))

    def within(self, cell: Allocation) -> list[Allocation]:
        """The live cells in `cell`, innermost first, without itself."""
        inside = [c for c in self.of_tenant(cell.tenant_id) if c is not cell and is_within(c.name, cell.name)]
        return inside[::-1]

    def around(self, cell: Allocation) -> Iterator[Allocation]:
        """The live cells around `cell`, from the inside out."""
        name = parent_of(cell.name)
        while name is not None:
            if (outer := self.named(cell.tenant_id, name)) is not None:
                yield outer
            name = parent_of(name)

    # ---- snapshots

    def metered(self) -> dict[str, tuple[int, Memory]]:
        """What was charged already and the memory granted, of the live cells; for a snapshot."""
        return {cell_id: (cell.paid_cpu_ms, cell.memory) for cell_id, cell in self.live.items()}

    def restore_metered(self, metered: dict[str, tuple[int, Memory]]) -> None:
        """After `restore`."""
        for cell_id, (paid_cpu_ms, memory) in metered.items():
            self.live[cell_id].paid_cpu_ms, self.live[cell_id].memory = paid_cpu_ms, memory

    def marks(self) -> dict[str, tuple[str, ...]]:
        """The labels of the live cells; for a snapshot."""
        return {cell_id: cell.labels for cell_id, cell in self.live.items()}

    def restore_marks(self, marks: dict[str, tuple[str, ...]]) -> None:
        """After `restore`."""
        for cell_id, labels in marks.items():
            self.live[cell_id].labels = labels

    def snapshot(self) -> list[tuple[Record, str, Record | None, bool]]:
        """The live cells; `restore` takes them. The jobs follow from the ledger's open ones."""
        return [(cell.allocated, cell.spec, cell.started, cell.frozen) for cell in self.live.values()]

    def restore(self, cells: list[tuple[Record, str, Record | None, bool]]) -> None:
        """Takes over a snapshot; only when fresh."""
        for allocated, spec, started, frozen in cells:
            self._add(Allocation(allocated, spec, started, frozen, used_ns=epoch_ns(allocated.time)))


def _granted(record: Record) -> int:
    """The memory that a cell is charged for from that record on: one within another has its share of that one's."""
    return 0 if "/" in record.detail["name"] else int(record.detail.get("memory_bytes", "0"))
