"""The authority's service: one handler per operation of the table, and the verbs it offers to aurorad.

Composition only: submission, execution, reading and reconciliation each do their part on one Book. Nothing
here parses client bytes (the interface did) and nothing here talks TCP.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from aether.backends.link import EventHandlers, Handlers
from aether.contract import ids
from aether.contract.calls import (
    Caller,
    Doctor,
    ExplainCall,
    Explanation,
    Health,
    Nothing,
    RawReply,
    Reply,
    StopCall,
)
from aether.contract.cellcalls import UpgradeReply
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.images import CellDiff
from aether.contract.jobs import SCHEMA_VERSION, TERMINAL, JobRequest, JobView, parse_command
from aether.contract.limits import PROTOCOL_VERSION, STOP_GRACE_MS_MAX
from aether.contract.ports import Link
from aether.contract.wire import (
    CellCollect,
    CellKey,
    CellLaunch,
    CellOpen,
    CellStop,
    Empty,
    Hello,
    JobFinish,
    JobKept,
    JobStop,
    LogRead,
    MetricsReply,
    Reconcile,
    Reconciled,
    RoleHealth,
    WorkerLaunch,
)
from aether.substrate import entries
from aether.substrate.access.access import Resource
from aether.substrate.approvals import ApprovalDesk
from aether.substrate.asking import Asking
from aether.substrate.auditkeeping import AuditKeeping
from aether.substrate.auditreading import AuditReading
from aether.substrate.book import Book
from aether.substrate.budgetdesk import BudgetDesk
from aether.substrate.cellfiles import CellFileDesk
from aether.substrate.cellhouse import CellHouse
from aether.substrate.cells.supervisor import CellSupervisor
from aether.substrate.egress import EgressDesk
from aether.substrate.egressreading import EgressReading
from aether.substrate.execution import Execution
from aether.substrate.fence import Fence
from aether.substrate.gate import Gate
from aether.substrate.images import ImageDesk
from aether.substrate.keydesk import KeyDesk
from aether.substrate.meter import Meter
from aether.substrate.orchestra import Orchestra
from aether.substrate.pkidesk import PkiDesk
from aether.substrate.policydesk import PolicyDesk
from aether.substrate.reading import Reading
from aether.substrate.reconcile import Reconciler
from aether.substrate.repeats import Repeats
from aether.substrate.replay import Replayer
from aether.substrate.submission import Submitter
from aether.substrate.talking import Talking
from aether.substrate.ticketdesk import TicketDesk
from aether.substrate.ticketkeys import TicketKeys
from aether.substrate.watching import Watching
from aether.substrate.workers import Workers
from aether.telemetry.metrics import Metrics

Handler = Callable[[Caller, Any], Awaitable[Reply | UpgradeReply]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a service is made of; the composition root builds them."""

    gate: Gate
    book: Book
    policy: PolicyDesk
    cells: CellSupervisor
    orchestra: Orchestra
    egress: EgressDesk
    submitter: Submitter
    replayer: Replayer
    asking: Asking
    approvals: ApprovalDesk
    execution: Execution
    reading: Reading
    reconciler: Reconciler
    workers: Workers
    house: CellHouse
    files: CellFileDesk
    talking: Talking
    egress_reading: EgressReading
    watching: Watching
    images: ImageDesk
    tickets: TicketDesk
    ticket_keys: TicketKeys
    keys: KeyDesk
    pki: PkiDesk
    fence: Fence
    meter: Meter
    budgets: BudgetDesk
    repeats: Repeats
    audit: AuditReading
    audit_keeping: AuditKeeping
    metrics: Metrics


class Service:
    """`handlers` by operation name for the interfaces; `verbs` and `events` for a link to aurorad."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._started_s = time.monotonic()
        self._calls = parts.metrics.counter("calls", "Calls by operation and code", ("operation", "code"))
        reading = parts.reading
        plain: dict[str, Handler] = {
            "health": self._health,
            "metrics": self._metrics,
            "node.doctor": self._doctor,
            "cell.explain": self._explain,
            **parts.images.handlers(),
            **parts.policy.handlers(),
            **parts.budgets.handlers(),
            "job.submit": parts.submitter.submit,
            "job.replay": parts.replayer.replay,
            "job.stop": self._stop,
            "job.get": reading.job,
            "job.list": reading.jobs,
            "job.result": reading.result,
            "job.logs": reading.logs,
            "job.receipt": reading.receipt,
            "job.story": reading.story,
            "artifact.put": reading.put,
            "artifact.get": reading.artifact,
            "artifact.list": reading.artifacts,
            "model.list": reading.models,
            "audit.checkpoint": reading.checkpoint,
            "audit.growth": parts.audit_keeping.growth,
            "audit.witnesses": parts.audit_keeping.witnesses,
            "audit.cosign": parts.audit_keeping.cosign,
            "audit.retain": parts.audit_keeping.retain,
            "audit.rotate-key": parts.audit_keeping.rotate_key,
            "audit.query": parts.audit.query,
            "audit.tail": parts.audit.tail,
            "audit.export": parts.audit.export,
            "cell.allocate": parts.images.allocate,
            "cell.list": parts.house.listing,
            "cell.show": parts.house.show,
            "cell.free": parts.house.free,
            "cell.freeze": parts.house.freeze,
            "cell.thaw": parts.house.thaw,
            "cell.resize": parts.house.resize,
            "cell.stats": parts.house.stats,
            "cell.events": parts.house.events,
            "cell.put": parts.files.put,
            "cell.get": parts.files.get,
            "cell.files": parts.files.files,
            "job.signal": parts.talking.signal,
            "job.attach": parts.talking.attach,
            "job.window": parts.talking.window,
            "job.egress": parts.egress_reading.egress,
            "cell.egress": parts.egress_reading.of_cell,
            "job.activity": parts.watching.job_activity,
            "cell.activity": parts.watching.cell_activity,
            "job.trace": parts.watching.job_trace,
            "cell.trace": parts.watching.cell_trace,
            "approval.list": parts.approvals.listing,
            "approval.show": parts.approvals.show,
            "approval.approve": parts.approvals.approve,
            "approval.deny": parts.approvals.deny,
            "ticket.mint": parts.tickets.mint,
            "ticket.list": parts.tickets.listing,
            "ticket.show": parts.tickets.show,
            "ticket.verify": parts.tickets.verify,
            "ticket.revoke": parts.tickets.revoke,
            **parts.keys.handlers,
            **parts.pki.handlers,
            "ticket.rotate-key": parts.ticket_keys.rotate,
        }
        self.handlers: Mapping[str, Handler] = {name: self._counted(name, run) for name, run in plain.items()}

    def _counted(self, name: str, run: Handler) -> Handler:
        children: dict[str, Any] = {"OK": self._calls.labels(name, "OK")}
        guard, quotas, now_ns = self._parts.fence.guard, self._parts.book.quotas, self._parts.book.now_ns
        once = self._parts.repeats.once

        async def counted(caller: Caller, call: Any) -> Reply | UpgradeReply:
            code = "OK"
            try:
                quotas.take_request(caller, now_ns())
                return guard(caller, await once(name, run, caller, call))
            except AetherError as error:
                code = error.code
                raise
            finally:
                child = children.get(code)
                if child is None:
                    child = children[code] = self._calls.labels(name, code)
                child.inc()

        return counted

    # ---- operations

    async def _health(self, caller: Caller, call: Nothing) -> Health:
        parts = self._parts
        admission = parts.gate.admit(caller, "health", Resource(kind="node"))
        node = parts.gate.node
        roles = (
            RoleHealth(role="aetherd", ok=True, version=node.version, facts={"log_size": parts.book.log.size}),
            await self._orchestrator_health(),
            parts.cells.health(),
            await parts.egress.health(),
        )
        return Health(
            status="ok" if all(role.ok for role in roles) else "degraded",
            version=node.version,
            api_version="v0",
            schema_version=SCHEMA_VERSION,
            node_id=node.node_id,
            tenant_id=admission.principal.tenant_id,
            principal=admission.principal.name,
            time=rfc3339(parts.book.now_ns()),
            uptime_s=int(time.monotonic() - self._started_s),
            roles=roles,
        )

    async def _orchestrator_health(self) -> RoleHealth:
        try:
            return await self._parts.orchestra.link().call("health", Empty(), RoleHealth)
        except AetherError as error:
            return RoleHealth(role="aurorad", ok=False, version=self._parts.gate.node.version, reason=error.message)

    async def _metrics(self, caller: Caller, call: Nothing) -> RawReply:
        self._parts.gate.admit(caller, "metrics", Resource(kind="node"))
        text = self._parts.metrics.exposition()
        if self._parts.orchestra.connected:
            text += (await self._parts.orchestra.link().call("metrics", Empty(), MetricsReply)).text
        return RawReply(text, "text/plain; version=0.0.4; charset=utf-8")

    async def _doctor(self, caller: Caller, call: Nothing) -> Doctor:
        self._parts.gate.admit(caller, "node.doctor", Resource(kind="node"))
        return Doctor(checks=await self._parts.cells.probe())

    async def _explain(self, caller: Caller, call: ExplainCall) -> Explanation:
        self._parts.gate.admit(caller, "cell.explain", Resource(kind="cell"))
        parse_command(JobRequest(kind="command", op="run", params=msgspec.to_builtins(call.params)))
        return await self._parts.cells.explain(call.params)

    async def _stop(self, caller: Caller, call: StopCall) -> JobView:
        parts = self._parts
        if not 0 <= call.grace_ms <= STOP_GRACE_MS_MAX:
            raise AetherError("BAD_FIELD", f"cannot stop: grace_ms must be within 0..{STOP_GRACE_MS_MAX}")
        job_id = ids.parse(ids.JOB, call.job_id)
        admission = parts.gate.admit(caller, "job.stop", Resource(kind="job", id=job_id))
        view = await parts.reading.view_in_tenant(job_id, admission)
        job = parts.book.ledger.open.get(job_id)
        if view.state in TERMINAL or job is None:
            return view
        if job.stop is None:  # repeating it asks for nothing new
            parts.book.write(lambda index, now: entries.stop_asked(job.intent, caller, admission, index, now))
        assert job.stop is not None
        await parts.book.durable(job.stop)
        await parts.orchestra.link().call("job.stop", JobStop(job_id=job_id, grace_ms=call.grace_ms), Empty)
        return parts.book.known(job_id) or await parts.orchestra.job(job_id)

    # ---- verbs of aurorad

    def verbs(self, link: Callable[[], Link], hello: Callable[[], None]) -> Handlers:
        """The handlers of one connection; `hello` is called when the handshake was good."""
        parts = self._parts
        stated: set[str] = set()  # rows that the pages of this connection named so far

        async def greet(body: Hello) -> Hello:
            if body.protocol_version != PROTOCOL_VERSION or body.version != parts.gate.node.version:
                raise AetherError("VERSION_MISMATCH", f"cannot work with {body.role} {body.version}")
            hello()
            node = parts.gate.node
            return Hello(role="aetherd", protocol_version=PROTOCOL_VERSION, version=node.version, node_id=node.node_id)

        async def reconcile(body: Reconcile) -> Reconciled:
            answer = await parts.reconciler.reconcile(body, stated)
            if body.last:
                parts.orchestra.attach(link())
                parts.asking.watch()
            return answer

        return {
            "hello": (Hello, greet),
            "reconcile": (Reconcile, reconcile),
            "log.read": (LogRead, parts.reconciler.read_log),
            "cell.launch": (CellLaunch, lambda body: parts.execution.launch(link(), body)),
            "cell.stop": (CellStop, parts.execution.stop),
            "cell.collect": (CellCollect, parts.execution.collect),
            "cell.free": (CellKey, parts.execution.free_now),
            "cell.open": (CellOpen, lambda body: parts.execution.open(link(), body)),
            "cell.diff": (CellDiff, lambda body: parts.images.diff(link(), body)),
            "job.finish": (JobFinish, parts.execution.finish),
            "worker.launch": (WorkerLaunch, lambda body: parts.workers.launch(link(), body)),
        }

    def events(self) -> EventHandlers:
        return {"job.kept": (JobKept, self._parts.orchestra.kept)}
