"""aurorad: keeps jobs, runs them through the authority, serves what they left.

Composition: `Desk` (open jobs and their machine) over a `Store`; `Scheduler`; `CommandEngine` and `ModelEngine`;
`ArtifactStore`. aurorad holds no authority: each cell is asked for under a grant, each outcome is the
authority's record. It may be killed between any two steps (tests/unit/orchestrator/test_simulation.py).

Lifetime: `start`, then for each connection `attach` (handshake, reconcile) until `detach`, at last `close`.
Between connections jobs stay where they are; cells and model runtimes live on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import msgspec

from aether.contract import wire
from aether.contract.errors import AetherError
from aether.contract.limits import PROTOCOL_VERSION
from aether.contract.ports import EventHandler, Handler, Link
from aether.contract.store import JobRow, Store
from aether.orchestrator.artifacts.store import ArtifactStore
from aether.orchestrator.engines.calls import LinkLostError, insist
from aether.orchestrator.engines.model import ModelEngine
from aether.orchestrator.engines.worker import retire
from aether.orchestrator.images.store import ImageStore
from aether.orchestrator.images.verbs import ImageVerbs
from aether.orchestrator.jobs import machine
from aether.orchestrator.jobs.desk import Desk
from aether.orchestrator.metrics import JobMetrics
from aether.orchestrator.performer import Effects, Performer
from aether.orchestrator.queries import Queries
from aether.orchestrator.queue.scheduler import Scheduler
from aether.orchestrator.reconcile import Watermark, reconcile
from aether.orchestrator.tasks import cancel

ROLE: Final = "aurorad"
CELLS_RUNNING_MAX: Final = 64
_UNCLAIMED_S_MAX: Final = 60.0
_SWEEP_S: Final = 15.0
_log = logging.getLogger(__name__)

Handlers = Mapping[str, tuple[type[msgspec.Struct], Handler]]
EventHandlers = Mapping[str, tuple[type[msgspec.Struct], EventHandler]]


@dataclass(frozen=True, slots=True)
class Settings:
    """Where aurorad keeps things and how much it does at once."""

    artifacts: Path
    models: Path
    images: Path
    cells_running_max: int = CELLS_RUNNING_MAX


class Aurora:
    """The role; see the module head."""

    def __init__(self, store: Store, settings: Settings, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._store = store
        self._metrics = JobMetrics()
        self._scheduler = Scheduler(settings.cells_running_max)
        self._artifacts = ArtifactStore(settings.artifacts, store)
        self._models = ModelEngine(settings.models, self._ready_link, self._metrics)
        effects = Effects(lambda: self._link, self._post, self._enqueue, self._take_outcome, self._disown)
        self._images = ImageStore(settings.images, clock_ns)
        self._performer = Performer(store, self._artifacts, self._images, self._models, effects, clock_ns)
        self._image_verbs = ImageVerbs(self._images, self._artifacts, store)
        self._desk = Desk(store, self._scheduler, self._performer.perform, clock_ns, self._metrics)
        self._queries = Queries(store, self._artifacts, self._desk, self._models, clock_ns)
        self._link: Link | None = None
        self._reconciled = asyncio.Event()
        self._answered: dict[str, float] = {}
        self._retiring: dict[str, asyncio.Event] = {}
        self._watermark = Watermark()
        self._sweeper: asyncio.Task[None] | None = None
        self._started_s = time.monotonic()

    def __repr__(self) -> str:
        return f"<Aurora reconciled={self._reconciled.is_set()} {self._desk!r} {self._models!r}>"

    # ---- lifetime

    async def start(self) -> None:
        """Opens the store and takes up its open jobs; raises STATE_UNUSABLE."""
        await self._store.open()
        await asyncio.to_thread(self._artifacts.open)
        await asyncio.to_thread(self._images.open)
        await self._desk.load()
        await self._models.start()
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())
        self._metrics.gauge("jobs_open", "Jobs that are not done", lambda: len(self._desk.open))
        self._metrics.gauge("jobs_waiting", "Command jobs that wait", lambda: self._scheduler.waiting)
        self._metrics.gauge("cells_running", "Command jobs in a cell", lambda: self._scheduler.running)
        self._metrics.gauge("model_requests_in_flight", "At runtimes", lambda: self._models.in_flight)

    async def close(self) -> None:
        """Stops where it stands: what is open goes on at the next start."""
        if self._sweeper is not None:
            await cancel([self._sweeper])
        if self._link is not None:
            self._link.close()
        await self._desk.close()  # before the runtimes, or their end would be the end of the jobs they have
        await self._models.close()
        self._artifacts.close()
        await self._store.close()

    async def attach(self, link: Link) -> None:
        """Shakes hands and reconciles. On an AetherError the link is closed; connect again."""
        self._unready()
        self._link = link
        try:
            await self._shake(link)
            orphans = await reconcile(link, self._store, self._desk, self._is_runtime)
        except (AetherError, asyncio.CancelledError):
            link.close()
            raise
        except Exception as error:
            _log.exception("cannot reconcile")
            link.close()
            raise AetherError("INTERNAL", f"cannot reconcile: {type(error).__name__}: {error}") from error
        if link is not self._link:
            return
        self._scheduler.paused = False
        self._reconciled.set()
        self._desk.pump()
        for cell in orphans:
            self._desk.spawn(self._retire(link, cell))

    def detach(self, link: Link) -> None:
        """The connection ended; nothing new starts until the next `attach`."""
        if link is self._link:
            self._unready()

    def handlers(self) -> Handlers:
        """Verbs that aetherd calls, for the link's making."""
        return {
            "job.submit": (wire.JobSubmit, self._submit),
            "job.run": (wire.JobSubmit, self._run),
            "job.release": (wire.JobKey, self._release),
            "job.stop": (wire.JobStop, self._stop),
            "metrics": (wire.Empty, self._exposition),
            "health": (wire.Empty, self._health),
            **self._queries.handlers(lambda: self._link),
            **self._image_verbs.handlers(lambda: self._link),
        }

    def events(self) -> EventHandlers:
        """Events that aetherd sends, for the link's making."""
        return {
            "cell.exited": (wire.CellExited, self._on_exited),
            "job.outcome": (wire.JobOutcome, self._take_outcome),
        }

    # ---- calls

    async def _submit(self, body: wire.JobSubmit) -> wire.Empty:
        await self._desk.submit(body)
        return wire.Empty()

    async def _run(self, body: wire.JobSubmit) -> wire.JobRunReply:
        """The short way: answered at once, kept meanwhile, event `job.kept` when that is durable."""
        self._desk.check_room()
        self._models.check_room()
        job_id = body.view.job_id
        done = await self._models.infer(job_id, body.request, body.batch_key)
        verdict, blob = await self._performer.keep_result(body.view, done)
        kept = asyncio.ensure_future(self._desk.keep_answered(body, machine.EngineReplied(verdict=verdict), blob))
        self._answered[job_id] = time.monotonic()
        kept.add_done_callback(lambda future: self._kept(job_id, future))
        return wire.JobRunReply(
            state=done.state,
            result=done.result if blob is not None else None,
            result_digest=verdict.result_digest,
            result_bytes=verdict.result_bytes,
            error=done.error,
            model_id=done.package.model_id,
            model_version=done.package.version,
            code=done.code,
            usage=done.usage,
            timings_us=done.timings_us,
        )

    async def _release(self, body: wire.JobKey) -> wire.Empty:
        self._desk.post(body.job_id, machine.Released())
        return wire.Empty()

    async def _stop(self, body: wire.JobStop) -> wire.Empty:
        self._desk.post(body.job_id, machine.StopRequested(grace_ms=body.grace_ms))
        return wire.Empty()

    async def _exposition(self, _: wire.Empty) -> wire.MetricsReply:
        return wire.MetricsReply(text=await asyncio.to_thread(self._metrics.exposition))

    async def _health(self, _: wire.Empty) -> wire.RoleHealth:
        ok = self._reconciled.is_set()
        return wire.RoleHealth(
            role=ROLE,
            ok=ok,
            version=_version(),
            reason=None if ok else "not reconciled with the authority yet",
            facts={
                "jobs_open": len(self._desk.open),
                "jobs_waiting": self._scheduler.waiting,
                "cells_running": self._scheduler.running,
                "model_requests_in_flight": self._models.in_flight,
                "uptime_s": int(time.monotonic() - self._started_s),
            },
        )

    # ---- events

    def _on_exited(self, event: wire.CellExited) -> None:
        worker = self._models.owner(event.job_id)
        if worker is not None:
            worker.exited()
            return
        if (retiring := self._retiring.get(event.job_id)) is not None:
            retiring.set()
            return
        row = self._desk.open.get(event.job_id)
        if row is not None and row.attempt == event.attempt:
            self._desk.post(event.job_id, machine.CellExited(end=event.end))

    def _take_outcome(self, event: wire.JobOutcome) -> None:
        self._watermark.saw(event.log_index)
        self._answered.pop(event.view.job_id, None)
        written = self._desk.outcome(event.view, event.log_index)
        if written is not None:
            asyncio.ensure_future(written).add_done_callback(_log_failure)

    # ---- what performing needs

    def _post(self, job_id: str, event: machine.AnyEvent) -> None:
        self._desk.post(job_id, event)

    def _enqueue(self, job_id: str) -> None:
        self._desk.enqueue(job_id)

    def _disown(self, row: JobRow) -> None:
        """The authority knows no such open job: a pure job whose answer was never released leaves no trace;
        anything else waits for the next reconciliation to say what became of it."""
        if row.kind == "model":
            self._desk.spawn(self._desk.drop((row.job_id,)))
        else:
            _log.error("job %s: the authority does not know its grant", row.job_id)

    # ---- rows of pure jobs

    def _kept(self, job_id: str, future: asyncio.Future[bool]) -> None:
        if future.cancelled() or self._link is None:
            return
        error = future.exception()
        if error is None:
            self._link.notify("job.kept", wire.JobKept(job_id=job_id))
            return
        _log.error("job %s: cannot keep its row: %s", job_id, error)
        self._desk.open.pop(job_id, None)
        told = error if isinstance(error, AetherError) else AetherError("INTERNAL", f"cannot keep the job: {error}")
        self._link.notify("job.kept", wire.JobKept(job_id=job_id, error=told.body()))

    # ---- the link

    async def _shake(self, link: Link) -> None:
        hello = wire.Hello(role=ROLE, protocol_version=PROTOCOL_VERSION, version=_version())
        peer = await link.call("hello", hello, wire.Hello)
        if peer.protocol_version != PROTOCOL_VERSION:
            raise AetherError(
                "VERSION_MISMATCH",
                f"cannot work with {peer.role}: protocol {peer.protocol_version} is not {PROTOCOL_VERSION}",
            )

    def _unready(self) -> None:
        self._reconciled.clear()
        self._watermark = Watermark()
        self._scheduler.paused = True

    async def _ready_link(self) -> Link:
        while True:
            await self._reconciled.wait()
            if self._link is not None and not self._link.closed:
                return self._link
            await asyncio.sleep(0.05)

    def _is_runtime(self, cell: wire.LiveCell) -> bool:
        worker = self._models.owner(cell.grant.job_id)
        if worker is not None and cell.end is not None:
            worker.exited()
        return worker is not None

    async def _retire(self, link: Link, cell: wire.LiveCell) -> None:
        job_id = cell.grant.job_id
        exited = self._retiring[job_id] = asyncio.Event()
        if cell.end is not None:
            exited.set()
        why = AetherError("ABANDONED", "cannot go on: nobody looks after this cell since a restart")
        try:
            with contextlib.suppress(LinkLostError):
                row = await self._store.get(job_id)
                if row is None or row.outcome_index is None:
                    await retire(link, cell.grant, cell.cell_id, exited, why)
                else:
                    await insist(link, "cell.free", wire.CellKey(grant=cell.grant, cell_id=cell.cell_id), wire.Empty)
        except AetherError as error:
            _log.error("cell %s: cannot retire it: %s", cell.cell_id, error)
        finally:
            del self._retiring[job_id]

    async def _sweep(self) -> None:
        """Raises the applied log index, and asks after pure jobs whose outcome never came (their caller went away)."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            if not self._reconciled.is_set():
                continue
            applied_index = self._watermark.turn(self._desk.finishing())
            if applied_index is not None:
                await self._store.set_applied_index(applied_index)
            old = time.monotonic() - _UNCLAIMED_S_MAX
            for job_id in [job_id for job_id, since in self._answered.items() if since < old]:
                del self._answered[job_id]
                self._desk.post(job_id, machine.Reconciled())


def _log_failure(written: asyncio.Future[Any]) -> None:
    if not written.cancelled() and (error := written.exception()) is not None:
        _log.error("cannot apply an outcome: %s", error)


def _version() -> str:
    try:
        return version("aether-substrate")
    except PackageNotFoundError:
        return "0"
