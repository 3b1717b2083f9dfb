"""Allocated cells: made, listed, frozen, resized and freed for callers, and kept in step with the spawner.

The log is the truth: `cell.allocated` is durable before the cell is made, `cell.freed` before it is ended, so a
death in between leaves a cell that the next start either takes up or ends. A cell that the log has and the spawner
has not is `cell.lost`; one that the spawner has and the log has not is freed (`substrate.reconcile`).

A cell of another tenant, or one that the ticket does not name, is NO_SUCH_CELL, so that names cannot be probed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from aether.contract import allocations, ids, limits
from aether.contract.allocations import (
    CellEvents,
    CellList,
    CellRequest,
    CellStats,
    CellView,
    check_idle,
    check_request,
    specification,
)
from aether.contract.calls import Caller
from aether.contract.canonical import canonical, canonical_record
from aether.contract.cellcalls import (
    AllocateCall,
    CellCall,
    CellEventsCall,
    FreeCall,
    ListCellsCall,
    ResizeCall,
)
from aether.contract.cellnames import is_within, parent_of
from aether.contract.cells import CellSpec, Limits, Usage
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.jobs import check_bounds
from aether.contract.labels import ISOLATED, LOCAL_ONLY, check_stays, union
from aether.contract.network import NEEDED, NOTHING
from aether.contract.records import CodeRef, Record
from aether.substrate import cellentries as entries
from aether.substrate.access.access import Admission, Resource
from aether.substrate.allocations import Allocation
from aether.substrate.approvalbook import Approval
from aether.substrate.asking import Asking
from aether.substrate.book import Book
from aether.substrate.cellentries import Order
from aether.substrate.cells.drivers.port import Adopted, Listening
from aether.substrate.cells.supervisor import CellSupervisor, Launched
from aether.substrate.egress import EgressDesk, Files
from aether.substrate.execution import check_enterable
from aether.substrate.gate import Gate
from aether.substrate.ledger import OpenJob
from aether.substrate.metering.settle import cell_charge, limits_of, reservation

CONCLUDE_S: Final = 3.0
"""How long the end of a cell waits for the outcomes of its executables, whose outputs lie in it."""
EVENTS_READ_MAX: Final = 1_000
EVENTS_POLL_S: Final = 0.05
_SPECS_KEPT: Final = 1_024
FREED, IDLE, FAILED, DIED, SPAWNER_DIED = "freed", "idle", "failed", "cell-died", "spawner-died"
REVOKED: Final = "revoked"


class CellHouse:
    """Handlers of the `cell.*` operations but those on files; see the module head."""

    def __init__(self, gate: Gate, book: Book, cells: CellSupervisor, egress: EgressDesk, asking: Asking) -> None:
        self._gate = gate
        self._asking = asking
        self._egress = egress
        self._book = book
        self._cells = cells
        self._specs: dict[str, CellRequest] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._making: set[str] = set()
        self._background: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<CellHouse {self._book.ledger.cells!r} timed={len(self._timers)}>"

    # ---- operations

    async def allocate(self, caller: Caller, call: AllocateCall, marks: Mapping[str, str] | None = None) -> CellView:
        """`cell.allocate`: answers when the cell stands, confined as the kernel showed. `marks` are the labels of its
        images."""
        request = msgspec.structs.replace(call.request, labels=union(call.request.labels, marks or ()))
        call = msgspec.structs.replace(call, request=request)
        check_request(request)
        what, shares = f"allocate cell {request.name}", not request.isolate_network
        admission = self._admit(caller, request)
        self._check_free(request, admission.principal.tenant_id)
        self._book.quotas.check_cell(admission.principal.tenant_id, admission.principal.name)
        check_stays(request.labels, reaches=request.network is not None, isolated=not shares, what=what)
        needed = NEEDED if request.network is not None else ISOLATED if LOCAL_ONLY in request.labels else ()
        self._cells.check_required((*request.require, *needed))
        approval = await self._approval(caller, admission, call)
        cell = self._record(request, self.order(caller, admission, "cell.allocate", request.limits), approval)
        self._making.add(cell.cell_id)
        try:
            await self._book.durable(cell.allocated)
            made = await self._make(cell)
        except AetherError as error:
            if cell.ended is None:
                self._write_end(cell, None, FAILED, None, error)
            await self._book.durable(self._end_of(cell))
            raise
        finally:
            self._making.discard(cell.cell_id)
        if cell.ended is not None:
            self._in_background(self._discard(cell.cell_id))
            raise AetherError("NO_SUCH_CELL", f"cannot make cell {cell.name}: it was freed meanwhile")
        self._stands(cell, made)
        assert cell.started is not None
        await self._book.durable(cell.started)
        return self.view(cell)

    async def again(self, caller: Caller, operation: str, cell_id: str) -> CellView:
        """The cell that a repeated call was about, as it stands."""
        return self.view(self.find(caller, operation, cell_id)[1])

    async def listing(self, caller: Caller, call: ListCellsCall) -> CellList:
        admission = self._gate.admit(caller, "cell.list", Resource(kind="cell"))
        cells = self._book.ledger.cells.of_tenant(admission.principal.tenant_id)
        within = call.within
        if within is not None and within.startswith(f"{ids.CELL}_"):
            outer = self._book.ledger.cells.find(admission.principal.tenant_id, within)
            within = outer.name if outer is not None else within
        shown = [c for c in cells if admission.sees(c.name) and (within is None or is_within(c.name, within))]
        return CellList(cells=tuple(self.view(cell) for cell in shown))

    async def show(self, caller: Caller, call: CellCall) -> CellView:
        return self.view(self.find(caller, "cell.show", call.cell)[1])

    async def free(self, caller: Caller, call: FreeCall) -> CellView:
        """`cell.free`: answers when nothing of the cell is left; freeing twice is freeing once."""
        if not 0 <= call.grace_ms <= limits.STOP_GRACE_MS_MAX:
            raise AetherError("BAD_FIELD", f"cannot free: grace_ms must be within 0..{limits.STOP_GRACE_MS_MAX}")
        admission, cell = self.find(caller, "cell.free", call.cell)
        if cell.ended is None:
            await self._end(cell, Order(caller, admission, "cell.free"), FREED, call.grace_ms)
        return self.view(cell)

    async def freeze(self, caller: Caller, call: CellCall) -> CellView:
        return await self._set_frozen(caller, call.cell, True)

    async def thaw(self, caller: Caller, call: CellCall) -> CellView:
        return await self._set_frozen(caller, call.cell, False)

    async def resize(self, caller: Caller, call: ResizeCall) -> CellView:
        """`cell.resize`: recorded before it is done; what the host refuses is recorded back."""
        check_bounds(call.limits)
        check_idle(call.idle_timeout_ms)
        admission, cell = self.live(caller, "cell.resize", call.cell)
        old = self.request_of(cell)
        idle_ms = call.idle_timeout_ms if call.idle_timeout_ms is not None else old.idle_timeout_ms
        new = msgspec.structs.replace(old, limits=call.limits, idle_timeout_ms=idle_ms)
        self._check_nested(new, cell.tenant_id)
        if new != old:
            order = self.order(caller, admission, "cell.resize")
            await self._book.durable(self._record_spec(cell, new, order))
            try:
                await self._cells.resize(cell.cell_id, new.limits)
            except AetherError:
                if cell.ended is None:
                    await self._book.durable(self._record_spec(cell, old, None))
                raise
            self.watch(cell)
        return self.view(cell)

    async def stats(self, caller: Caller, call: CellCall) -> CellStats:
        _, cell = self.live(caller, "cell.stats", call.cell)
        usage = await self._cells.usage(cell.cell_id)
        return CellStats(
            cell_id=cell.cell_id,
            name=cell.name,
            state=cell.state,
            time=rfc3339(self._book.now_ns()),
            usage=usage,
            limits=self.request_of(cell).limits,
            executables=sum(job.started is not None and job.end is None for job in self.guests(cell)),
            contention=await self._cells.contention(cell.cell_id),
        )

    async def events(self, caller: Caller, call: CellEventsCall) -> CellEvents:
        """`cell.events`: a page at a time, at most EVENTS_READ_MAX records of the log looked at in one call."""
        _, cell = self.find(caller, "cell.events", call.cell)
        index = max(call.start, cell.allocated.log_index)
        deadline_s = asyncio.get_running_loop().time() + call.wait_ms / 1000
        while True:
            records = self._book.log.read(index, EVENTS_READ_MAX)
            found: list[allocations.CellEvent] = []
            for record in records:
                index = record.log_index + 1
                if record.cell_id == cell.cell_id:
                    found.append(entries.event(record))
                if len(found) >= min(call.limit, limits.PAGE_ITEMS_MAX):
                    break
            over = cell.ended is not None or asyncio.get_running_loop().time() >= deadline_s
            if found or records or over:
                return CellEvents(cell_id=cell.cell_id, events=tuple(found), next_index=index)
            await asyncio.sleep(EVENTS_POLL_S)

    # ---- for the other parts of the authority

    def find(self, caller: Caller, operation: str, reference: str) -> tuple[Admission, Allocation]:
        """Leave for an operation on a cell, and the cell, live or lately ended; raises NO_SUCH_CELL."""
        admission = self._gate.admit(caller, operation, Resource(kind="cell", id=reference))
        cell = self._book.ledger.cells.find(admission.principal.tenant_id, reference)
        if cell is None or not admission.sees(cell.name):
            raise AetherError("NO_SUCH_CELL", f"cannot find cell {reference}", "list the cells with `aether cell list`")
        return admission, cell

    def live(self, caller: Caller, operation: str, reference: str) -> tuple[Admission, Allocation]:
        """The same of a cell that stands; raises NO_SUCH_CELL, NOT_READY."""
        admission, cell = self.find(caller, operation, reference)
        if cell.ended is not None:
            raise AetherError("NO_SUCH_CELL", f"cannot use cell {cell.name}: it is {cell.state}")
        if cell.started is None:
            raise AetherError("NOT_READY", f"cannot use cell {cell.name}: it is being made")
        return admission, cell

    def admit_labels(
        self, caller: Caller, operation: str, cell: Allocation, labels: tuple[str, ...]
    ) -> tuple[str, ...]:
        """The labels of what goes into a cell, if it may with them; raises POLICY_DENIED, LABEL_REFUSED."""
        inside = self.request_of(cell)
        if new := tuple(label for label in labels if label not in cell.labels):
            hosts = inside.network.wanted().hosts if inside.network is not None else ()
            self._gate.admit(caller, operation, Resource(kind="cell", id=cell.name, labels=new, hosts=hosts))
            what = f"put it into cell {cell.name}"
            check_stays(new, reaches=bool(hosts), isolated=inside.isolate_network, what=what)
        return labels

    def order(
        self,
        caller: Caller,
        admission: Admission,
        operation: str,
        cell: Limits | None = None,
    ) -> Order:
        """An order that costs one operation, and what a cell of these limits uses; raises DISK_FULL,
        BUDGET_EXHAUSTED."""
        if not self._book.log.room():
            raise AetherError("DISK_FULL", f"cannot {operation}: the disk of the state directory is almost full")
        tenant_id, accounts = admission.principal.tenant_id, self._book.accounts
        bounds = limits_of(admission.limits, tenant_id, accounts.tenant_limits(tenant_id))
        name = ids.new(ids.RESERVATION)
        held = reservation(name, admission.ticket.link_ids, bounds, admission.expires_ms, cell)
        charge = msgspec.structs.replace(held, settled=True)
        accounts.reserve(charge, runs=cell is not None)
        return Order(caller, admission, operation, charge)

    def write(self, order: Order | None, make: Callable[[int, str], Record]) -> Record:
        """Writes a record that an order pays for; one that cannot be written costs nothing."""
        try:
            return self._book.write(make)
        except AetherError:
            if order is not None and order.budget is not None:
                self._book.accounts.release(order.budget)
            raise

    def request_of(self, cell: Allocation) -> CellRequest:
        """What the cell is now, from the document that its latest record names."""
        known = self._specs.get(cell.spec)
        if known is None:
            spec = msgspec.json.decode(self._book.log.document(cell.spec))
            if len(self._specs) >= _SPECS_KEPT:
                self._specs.clear()
            known = self._specs[cell.spec] = msgspec.convert({**spec, "name": cell.name}, CellRequest)
        return msgspec.structs.replace(known, name=cell.name)

    def cell_spec(self, cell: Allocation) -> CellSpec:
        """What the driver is asked for."""
        request = self.request_of(cell)
        return CellSpec(
            argv=(),
            limits=request.limits,
            require=tuple(dict.fromkeys((*request.require, *(ISOLATED if LOCAL_ONLY in cell.labels else ())))),
            labels=cell.labels,
            isolate_network=request.isolate_network,
            isolate_process=request.isolate_process,
            images=request.images,
            network=request.network,
        )

    def guests(self, cell: Allocation) -> list[OpenJob]:
        """The open jobs whose executables are in the cell."""
        return [job for job_id in cell.jobs if (job := self._book.ledger.open.get(job_id)) is not None]

    def view(self, cell: Allocation) -> CellView:
        return entries.view(cell, self.request_of(cell), self.guests(cell))

    def touch(self, cell: Allocation) -> None:
        """Somebody used the cell in a way that leaves no record."""
        cell.used_ns = self._book.now_ns()

    def for_guest(self, tenant_id: str, name: str, executable: str | None) -> tuple[Allocation, Limits]:
        """The cell that a new executable is to enter, and its limits. Raises NO_SUCH_CELL, NOT_READY, CELL_FROZEN,
        NAME_TAKEN for a name that another executable in it has."""
        cells = self._book.ledger.cells
        cell = check_enterable(cells.named(tenant_id, name), name)
        for outer in cells.around(cell):
            if outer.frozen:
                raise AetherError("CELL_FROZEN", f"cannot start an executable in cell {name}: {outer.name} is frozen")
        taken = {job.intent.detail.get("executable") for job in self.guests(cell)} - {None}
        if executable in taken:
            raise AetherError("NAME_TAKEN", f"cannot start {executable}: cell {name} has one of that name")
        return cell, self.request_of(cell).limits

    # ---- in step with the spawner

    def spawner_connected(self, found: Sequence[Adopted]) -> None:
        """The spawner (re)connected: the cells that it has are taken up, those that it lost are recorded."""
        there = {adopted.cell_id: adopted for adopted in found}
        for cell in list(self._book.ledger.cells.live.values()):
            adopted = there.get(cell.cell_id)
            if adopted is not None and adopted.gone is not None:
                self.gone(cell.cell_id, adopted.gone)
            elif adopted is None and cell.started is not None:
                self._write_end(cell, None, SPAWNER_DIED, None, None, "cell.lost")
                self._in_background(self._close_network(cell.cell_id))
            elif adopted is None and cell.cell_id not in self._making:
                self._write_end(cell, None, FAILED, None, None)
            elif adopted is not None:
                launched = self._cells.found(cell.cell_id)
                if self._unserved(cell):
                    self._write_end(cell, None, FAILED, None, None)
                    self._in_background(self._discard(cell.cell_id))
                    continue
                if cell.started is None and launched is not None:
                    self._stands(cell, launched)
                self.watch(cell)

    def gone(self, cell_id: str, reason: str | None) -> None:
        """A cell is no more; one that nobody freed is lost."""
        cell = self._book.ledger.cells.live.get(cell_id)
        if cell is None:
            return
        self._write_end(cell, None, reason or DIED, None, None, "cell.lost")
        self._in_background(self._remove([cell]))

    def watch(self, cell: Allocation) -> None:
        """Frees the cell once it was idle for as long as it may be."""
        self._unwatch(cell)
        idle_ms = self.request_of(cell).idle_timeout_ms
        if idle_ms is None or cell.ended is not None:
            return
        if cell.jobs or self._book.ledger.cells.within(cell):
            self.touch(cell)
        left_s = (cell.used_ns - self._book.now_ns()) / 1e9 + idle_ms / 1000
        if left_s > 0:
            self._timers[cell.cell_id] = asyncio.get_running_loop().call_later(left_s, self.watch, cell)
        else:
            self._in_background(self._end(cell, None, IDLE, 0))

    async def fence(self, cell: Allocation, reason: str = REVOKED) -> None:
        """Ends a cell whose ticket was revoked or is used up, and those in it, without grace."""
        if cell.ended is None:
            await self._end(cell, None, reason, 0)

    async def drain(self) -> None:
        """Waits for cells that are being ended; idle timers stop."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        while self._background:
            await asyncio.wait(self._background)

    # ---- inside

    def _admit(self, caller: Caller, request: CellRequest) -> Admission:
        wanted = request.network.wanted() if request.network is not None else NOTHING
        resource = Resource(
            kind="cell", id=request.name, labels=request.labels, cells=(request.name,), raises=request.limits.raises,
            hosts=wanted.hosts, credentials=wanted.credentials, paths=wanted.paths,
        )  # fmt: skip
        admission = self._gate.admit(caller, "cell.allocate", resource)
        if not (request.isolate_network and request.isolate_process):
            try:
                self._gate.admit(caller, "cell.unisolate", resource)
            except AetherError as error:
                remedy = "keep isolate_network and isolate_process, or ask the operator to permit action cell.unisolate"
                raise AetherError(error.code, error.message, remedy, error.details) from error
        return admission

    async def _approval(self, caller: Caller, admission: Admission, call: AllocateCall) -> Approval | None:
        """The unused approval of this request, if the policy demands one; raises APPROVAL_NEEDED, APPROVAL_DENIED."""
        network = call.request.network
        hosts = network.wanted().hosts if network is not None else ()
        ask = self._asking.ask(admission, call.approval_ms, hosts, None)
        if ask is None:
            return None
        return await self._asking.for_cell(caller, admission, call.request, self._document(call.request), ask)

    def _document(self, request: CellRequest) -> str:
        return self._book.log.store_document(canonical(specification(request)))

    def _check_free(self, request: CellRequest, tenant_id: str) -> None:
        cells = self._book.ledger.cells
        if cells.named(tenant_id, request.name) is not None:
            raise AetherError("NAME_TAKEN", f"cannot allocate cell {request.name}: there is one of this name")
        if len(cells.of_tenant(tenant_id)) >= limits.CELLS_ALLOCATED_MAX:
            raise AetherError("CELL_LIMIT", f"cannot allocate a cell: {limits.CELLS_ALLOCATED_MAX} are there")
        self._check_nested(request, tenant_id)

    def _check_nested(self, request: CellRequest, tenant_id: str) -> None:
        """The cell around it stands and grants at least as much."""
        outer_name = parent_of(request.name)
        if outer_name is None:
            return
        outer = check_enterable(self._book.ledger.cells.named(tenant_id, outer_name), outer_name)
        granted = self.request_of(outer).limits
        for name in ("memory_bytes", "cpu_millis", "pids"):
            if getattr(request.limits, name) > getattr(granted, name):
                why = f"cell {outer_name} around it has {getattr(granted, name)}"
                remedy = "ask for no more than the cell around it has"
                asked = f"limits.{name} = {getattr(request.limits, name)}"
                raise AetherError("BAD_FIELD", f"cannot give cell {request.name} {asked}: {why}", remedy)

    def _record(self, request: CellRequest, order: Order, approval: Approval | None) -> Allocation:
        cell_id, node = ids.new(ids.CELL), self._gate.node
        said = {"name": request.name, "spec": self._document(request)}
        said |= {"approval": approval.approval_id} if approval is not None else {}
        self.write(order, lambda index, now: entries.allocated(node, order, cell_id, request, said, index, now))
        return self._book.ledger.cells.live[cell_id]

    def _record_spec(self, cell: Allocation, request: CellRequest, order: Order | None) -> Record:
        detail = {"spec": self._document(request), "memory_bytes": str(request.limits.memory_bytes)}
        return self.write(order, lambda index, now: entries.changed("cell.resized", cell, order, detail, index, now))

    async def _make(self, cell: Allocation) -> Launched:
        """Makes the cell; one with a network in the order that `substrate.egress` states."""
        spec, cell_id = self.cell_spec(cell), cell.cell_id
        within = next((outer.cell_id for outer in self._book.ledger.cells.around(cell)), None)
        if spec.network is None:
            return await self._cells.allocate(cell_id, spec, within)

        async def start(told: CellSpec, files: Files, listening: Listening) -> Launched:
            made = await self._cells.allocate(cell_id, told, within, listening)
            try:
                for file, fd in files:
                    await self._cells.put(cell_id, file.path, fd, file.executable)
            except BaseException:
                await self._discard(cell_id)
                raise
            return made

        return await self._egress.launch(cell_id, cell.allocated, spec, (), start)

    def _unserved(self, cell: Allocation) -> bool:
        """Whether whoever made it died before it stood with its network: nobody can tell if that is served."""
        unfinished = cell.started is None and cell.cell_id not in self._making
        return unfinished and self.request_of(cell).network is not None

    def _stands(self, cell: Allocation, made: Launched) -> None:
        log = self._book.log
        code = CodeRef(
            plan_digest=log.store_document(made.plan_text) if made.plan_text else None,
            sandbox_digest=log.store_document(canonical_record(msgspec.structs.replace(made.report, uid=None))),
            route="local",
            engine="cell",
            rung=made.report.level,
        )
        self._book.write(lambda index, now: entries.started(cell, code, made.report.uid, index, now))
        self.watch(cell)

    async def _set_frozen(self, caller: Caller, reference: str, frozen: bool) -> CellView:
        operation = "cell.freeze" if frozen else "cell.thaw"
        admission, cell = self.live(caller, operation, reference)
        if cell.frozen is not frozen:
            order = self.order(caller, admission, operation)
            await self._book.durable(self._record_frozen(cell, order, frozen))
            try:
                await self._cells.freeze(cell.cell_id, frozen)
            except AetherError:
                if cell.ended is None:
                    await self._book.durable(self._record_frozen(cell, None, not frozen))
                raise
        return self.view(cell)

    def _record_frozen(self, cell: Allocation, order: Order | None, frozen: bool) -> Record:
        kind: Any = "cell.frozen" if frozen else "cell.thawed"
        return self.write(order, lambda index, now: entries.changed(kind, cell, order, {}, index, now))

    async def _end(self, cell: Allocation, order: Order | None, reason: str, grace_ms: int) -> None:
        """Ends the cell and those in it: recorded, then told to its executables, then done."""
        ending = [*self._book.ledger.cells.within(cell), cell]
        usages = [await self._usage(each) for each in ending]
        for each, usage in zip(ending, usages, strict=True):
            if each.ended is None:
                self._write_end(each, order, reason, usage, None)
        for each in ending:
            await self._book.durable(self._end_of(each))
        await self._ask_to_end(ending, grace_ms)
        await self._remove(ending)

    async def _ask_to_end(self, ending: Sequence[Allocation], grace_ms: int) -> None:
        living = [j for cell in ending for j in self.guests(cell) if j.started is not None and j.end is None]
        if not living or grace_ms == 0:
            return
        with contextlib.suppress(AetherError):
            for cell in ending:
                if cell.frozen:
                    await self._cells.freeze(cell.cell_id, False)
        waits = [asyncio.ensure_future(self._ended(job, grace_ms)) for job in living]
        await asyncio.wait(waits, timeout=grace_ms / 1000)
        for wait in waits:
            wait.cancel()

    async def _ended(self, job: OpenJob, grace_ms: int) -> None:
        with contextlib.suppress(AetherError):
            await self._cells.stop_exec(job.place, job.executable, grace_ms)
            await self._cells.wait_exec(job.place, job.executable)

    async def _remove(self, ending: Sequence[Allocation]) -> None:
        """Kills what lives, lets the executables' jobs conclude, then removes every trace, innermost first."""
        for cell in ending:
            with contextlib.suppress(AetherError):
                await self._cells.kill(cell.cell_id)
        concluding = [self._book.wait(j.grant.job_id, CONCLUDE_S) for c in ending for j in self.guests(c) if j.started]
        await asyncio.gather(*concluding)
        for cell in ending:
            await self._discard(cell.cell_id)

    async def _discard(self, cell_id: str) -> None:
        with contextlib.suppress(AetherError):  # the spawner is away: what it lists when it is back is freed then
            await self._cells.free(cell_id)
        await self._close_network(cell_id)

    async def _close_network(self, cell_id: str) -> None:
        if (closed := await self._egress.close(cell_id)) is not None:
            await self._book.durable(closed)

    async def _usage(self, cell: Allocation) -> Usage | None:
        try:
            return await self._cells.usage(cell.cell_id)
        except AetherError:
            return None

    def _write_end(
        self,
        cell: Allocation,
        order: Order | None,
        reason: str,
        usage: Usage | None,
        error: AetherError | None,
        kind: Any = "cell.freed",
    ) -> None:
        body = error.body() if error is not None else None
        charge = cell_charge(cell, usage, self._book.now_ns())
        self._book.write(lambda index, now: entries.ended(kind, cell, order, reason, usage, body, charge, index, now))
        self._unwatch(cell)

    def _end_of(self, cell: Allocation) -> Record:
        assert cell.ended is not None
        return cell.ended

    def _unwatch(self, cell: Allocation) -> None:
        if (timer := self._timers.pop(cell.cell_id, None)) is not None:
            timer.cancel()

    def _in_background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
