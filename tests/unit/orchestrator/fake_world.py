"""A world around aurorad for tests: an authority with cells and a log, a store that can lose what was not
durable, model runtimes, and a count of steps at which aurorad may be killed. What it holds outlives aurorad."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from aether.backends.link import UnixLink, pair
from aether.backends.memory.store import MemoryStore
from aether.contract import ids, wire
from aether.contract.cells import ExecEnd, ExitStatus, Usage
from aether.contract.clock import rfc3339
from aether.contract.codec import FrameBuffer, encode_frame
from aether.contract.errors import AetherError
from aether.contract.jobs import JobRequest, JobState, JobView
from aether.contract.modelwire import Hello, InferReply, InferRequest, ModelInfo, ModelSchema, RuntimeLimits
from aether.contract.records import Record
from aether.contract.store import Blob, Entry, JobRow
from aether.orchestrator.reconcile import outcome_view
from aether.orchestrator.service import Aurora, Settings

CLOCK_NS = 1_790_000_000_000_000_000


class Steps:
    """Counts steps; calls `at_step` when `kill_at` is reached."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.names: list[str] = []
        self.kill_at = kill_at
        self.at_step: Callable[[], None] = lambda: None

    def step(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.kill_at:
            self.at_step()


class CrashStore(MemoryStore):
    """A write becomes durable a turn of the loop after it was issued; what is not durable when `crash` is
    called is lost, and nothing is written any more until `revive`."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self._steps = steps
        self._pending: list[tuple[str, Callable[[], Awaitable[Any]], asyncio.Future[Any]]] = []
        self.crashed = False

    def crash(self) -> None:
        self.crashed = True
        self._pending.clear()

    def revive(self) -> None:
        self.crashed = False

    def submit(self, row: JobRow, entry: Entry, blob: Blob | None = None) -> Awaitable[bool]:
        return self._later("submit", lambda: MemoryStore.submit(self, row, entry, blob))

    def advance(self, row: JobRow, entry: Entry, lazy: bool = False) -> Awaitable[bool]:
        return self._later(f"advance {row.phase}", lambda: MemoryStore.advance(self, row, entry))

    def drop(self, job_ids: Sequence[str]) -> Awaitable[None]:
        return self._later("drop", lambda: MemoryStore.drop(self, job_ids))

    def set_applied_index(self, index: int) -> Awaitable[None]:
        return self._later("applied", lambda: MemoryStore.set_applied_index(self, index))

    def put_blob(self, blob: Blob) -> Awaitable[None]:
        return self._later("blob", lambda: MemoryStore.put_blob(self, blob))

    def _later(self, name: str, write: Callable[[], Awaitable[Any]]) -> Awaitable[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if self.crashed:
            return future
        self._steps.step(f"issue {name}")
        self._pending.append((name, write, future))
        loop.call_soon(loop.call_soon, self._flush)
        return future

    def _flush(self) -> None:
        if not self._pending or self.crashed:
            return
        name, write, future = self._pending.pop(0)
        done = write()
        assert isinstance(done, asyncio.Future)
        self._steps.step(f"durable {name}")
        if future.done():
            return
        if (error := done.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(done.result())


@dataclass
class Cell:
    """One simulated cell. `ends_after_s` None: it lives until it is stopped."""

    grant: wire.Grant
    cell_id: str
    exec_id: str
    started_at: str
    end: ExecEnd | None = None
    freed: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    inputs: list[bytes] = field(default_factory=list)
    runtime: Runtime | None = None


class Runtime:
    """A model runtime at the other end of a channel: answers `{"echo": <inputs>}` or what `answer` says."""

    def __init__(self, package: wire.WorkerLaunch, answer: Callable[[InferRequest], InferReply | None]) -> None:
        self._package = package
        self._answer = answer
        ours, theirs = socket.socketpair()
        self.socket = theirs
        ours.setblocking(False)
        self._ours = ours
        self.requests: list[InferRequest] = []
        self.task = asyncio.get_running_loop().create_task(self._serve())

    def kill(self) -> None:
        self._ours.close()
        self.task.cancel()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        frames = FrameBuffer()
        with contextlib.suppress(OSError):
            await loop.sock_sendall(self._ours, encode_frame(self._hello()))
            while data := await loop.sock_recv(self._ours, 65536):
                for payload in frames.feed(data):
                    request = msgspec.msgpack.decode(payload, type=InferRequest)
                    self.requests.append(request)
                    reply = self._answer(request)
                    if reply is not None:
                        await loop.sock_sendall(self._ours, encode_frame(reply))
        self._ours.close()

    def _hello(self) -> Hello:
        schema = ModelSchema(
            schema_version=1, predictor="cfc", observation=(), action=(), time_unit="s", dt_min_s=0.01, dt_max_s=0.25,
            horizon_max_s=1.0, latent_size=8, state_size=96, state_layout="h",
        )  # fmt: skip
        limits = RuntimeLimits(history_max=64, sequence_max=64, horizons_max=64, encode_rows_max=64)
        model = ModelInfo(
            id=self._package.model_id, version=self._package.model_version, digest=self._package.model_digest,
            schema=schema, limits=limits,
        )  # fmt: skip
        return Hello(protocol_version=1, pid=1, models=(model,))


def echo(request: InferRequest) -> InferReply:
    result = msgspec.json.encode({"echo": request.inputs})
    return InferReply(
        request_id=request.request_id, ok=True, result=result, error=None, batch_size=1, infer_us=50, queue_us=0
    )


class Authority:
    """aetherd as aurorad sees it. `violations` must stay empty."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.log: list[Record] = []
        self.open: dict[str, Record] = {}
        self.requests: dict[str, JobRequest] = {}
        self.cells: dict[str, Cell] = {}
        self.launches: dict[tuple[str, int], int] = {}
        self.outcomes: dict[str, Record] = {}
        self.violations: list[str] = []
        self.link: UnixLink | None = None
        self.cell_end: Callable[[Cell], tuple[float, ExitStatus] | None] = lambda cell: (0.0, ExitStatus(code=0))
        self.outputs: dict[str, bytes] = {}
        self.answer: Callable[[InferRequest], InferReply | None] = echo
        self.refuse_launch: AetherError | None = None
        self.kept: set[str] = set()
        self.keeping: dict[str, asyncio.Event] = {}
        self.released: dict[str, wire.JobRunReply] = {}

    # ---- clients

    def admit(self, request: JobRequest, job_id: str | None = None) -> wire.JobSubmit:
        job_id = job_id or ids.new(ids.JOB)
        intent = Record(
            type="job.intent", log_index=len(self.log), time=rfc3339(CLOCK_NS + len(self.log)), node_id="node_x",
            tenant_id="default", principal="uid:1", request_id="req", job_id=job_id, attempt=1, kind=request.kind,
            op=request.op, labels=request.labels, input_hash="sha256:" + "0" * 64, created_at=rfc3339(CLOCK_NS),
        )  # fmt: skip
        self.requests[job_id] = request
        self._write(intent)
        return self._body(intent)

    def _body(self, intent: Record) -> wire.JobSubmit:
        assert intent.job_id is not None
        return wire.JobSubmit(
            grant=grant_of(intent.job_id),
            request=self.requests[intent.job_id],
            view=view_of(intent),
            batch_key="default",
        )

    async def submit(self, request: JobRequest) -> str | None:
        """The id of an accepted job, or None (then it is abandoned, as aetherd does)."""
        body = self.admit(request)
        job_id = body.view.job_id
        kept = self.keeping[job_id] = asyncio.Event()
        try:
            assert self.link is not None
            await self.link.call("job.submit", body, wire.Empty)
        except AetherError:
            self._outcome(job_id, JobState.FAILED, AetherError("ABANDONED", "cannot start"))
            return None
        finally:
            kept.set()
        return job_id

    async def run(self, request: JobRequest) -> wire.JobRunReply:
        job_id = ids.new(ids.JOB)
        draft = Record(
            type="job.intent", log_index=0, time=rfc3339(CLOCK_NS), node_id="node_x", tenant_id="default",
            principal="uid:1", request_id="req", job_id=job_id, attempt=1, kind="model", op=request.op,
            input_hash="sha256:" + "0" * 64, created_at=rfc3339(CLOCK_NS),
        )  # fmt: skip
        self.requests[job_id] = request
        assert self.link is not None
        reply = await self.link.call("job.run", self._body(draft), wire.JobRunReply)
        self._write(msgspec.structs.replace(draft, log_index=len(self.log)))
        self._outcome(
            job_id, reply.state, AetherError.of(reply.error) if reply.error else None, digest=reply.result_digest,
            size=len(reply.result) if reply.result is not None else None,
        )  # fmt: skip
        self.released[job_id] = reply
        return reply

    # ---- the link

    def handlers(self) -> dict[str, Any]:
        table: dict[str, tuple[type[msgspec.Struct], Any]] = {
            "hello": (wire.Hello, self._hello),
            "reconcile": (wire.Reconcile, self._reconcile),
            "log.read": (wire.LogRead, self._log_read),
            "cell.launch": (wire.CellLaunch, self._launch),
            "cell.stop": (wire.CellStop, self._stop),
            "cell.collect": (wire.CellCollect, self._collect),
            "cell.open": (wire.CellOpen, self._open),
            "cell.free": (wire.CellKey, self._free),
            "job.finish": (wire.JobFinish, self._finish),
            "worker.launch": (wire.WorkerLaunch, self._worker),
        }
        return {verb: (kind, self._stepping(verb, run)) for verb, (kind, run) in table.items()}

    def events(self) -> dict[str, Any]:
        return {"job.kept": (wire.JobKept, lambda event: event.error or self.kept.add(event.job_id))}

    def _stepping(self, verb: str, run: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        async def stepped(body: Any) -> Any:
            self.steps.step(f"call {verb}")
            try:
                return await run(body)
            finally:
                self.steps.step(f"answer {verb}")

        return stepped

    async def _hello(self, body: wire.Hello) -> wire.Hello:
        return wire.Hello(role="aetherd", protocol_version=1, version="0")

    async def _reconcile(self, body: wire.Reconcile) -> wire.Reconciled:
        stated = {job.job_id for job in body.open_jobs}
        for job_id, intent in list(self.open.items()):
            if job_id not in stated and intent.op != "serve" and job_id not in self.cells:
                self._outcome(job_id, JobState.FAILED, AetherError("ABANDONED", "no row"))
        known = self.open.keys() | self.outcomes.keys()
        cells = [
            wire.LiveCell(grant=c.grant, cell_id=c.cell_id, exec_id=c.exec_id, started_at=c.started_at, end=c.end)
            for c in self.cells.values()
            if not c.freed
        ]
        return wire.Reconciled(
            drop=tuple(job_id for job_id in stated if job_id not in known),
            grants=tuple(grant_of(job_id) for job_id in stated if job_id in self.open),
            cells=tuple(cells),
            log_size=len(self.log),
        )

    async def _log_read(self, body: wire.LogRead) -> wire.LogPage:
        found = self.log[body.start : body.start + min(body.limit, 3)]
        return wire.LogPage(records=tuple(found), next_index=body.start + len(found))

    async def _launch(self, body: wire.CellLaunch) -> wire.CellLaunched:
        assert self.link is not None
        job_id, attempt = body.grant.job_id, body.grant.attempt
        inputs = [await _read_all(self.link, token) for token in body.tokens]
        if job_id in self.keeping:
            await self.keeping[job_id].wait()  # a launch is held until the row is known to be durable
        if job_id not in self.open:
            raise AetherError("NO_GRANT", f"cannot launch {job_id}: not open")
        if self.refuse_launch is not None:
            raise self.refuse_launch
        cell = self.cells.get(job_id)
        if cell is None and (job_id, attempt) in self.launches:
            raise AetherError("LOST", f"cannot launch {job_id} again: it ran, and its cell is gone")
        if cell is None:
            self.launches[job_id, attempt] = self.launches.get((job_id, attempt), 0) + 1
            cell = self._make_cell(body.grant)
            cell.inputs = inputs
            cell.files = dict(self.outputs)
            self._schedule_end(cell)
        return wire.CellLaunched(
            cell_id=cell.cell_id, exec_id=cell.exec_id, started_at=cell.started_at, plan_digest="sha256:" + "1" * 64
        )

    def _make_cell(self, grant: wire.Grant) -> Cell:
        suffix = grant.job_id[len("job_") :]
        cell = Cell(grant=grant, cell_id=f"cell_{suffix}", exec_id=f"exec_{suffix}", started_at=rfc3339(CLOCK_NS))
        self.cells[grant.job_id] = cell
        return cell

    def _schedule_end(self, cell: Cell) -> None:
        end = self.cell_end(cell)
        if end is not None:
            asyncio.get_running_loop().call_later(end[0], self.end_cell, cell, end[1])

    def end_cell(self, cell: Cell, status: ExitStatus) -> None:
        if cell.end is not None:
            return
        if cell.runtime is not None:
            cell.runtime.kill()
        cell.end = ExecEnd(cell_id=cell.cell_id, exec_id=cell.exec_id, exit=status, usage=Usage(wall_us=1))
        if self.link is not None:
            self.link.notify("cell.exited", wire.CellExited(job_id=cell.grant.job_id, attempt=1, end=cell.end))

    def _cell(self, grant: wire.Grant, cell_id: str) -> Cell:
        cell = self.cells.get(grant.job_id)
        if cell is None or cell.freed or cell.cell_id != cell_id:
            raise AetherError("NO_SUCH_CELL", f"cannot find {cell_id}")
        return cell

    async def _stop(self, body: wire.CellStop) -> wire.Empty:
        self.end_cell(self._cell(body.grant, body.cell_id), ExitStatus(signal=15, reason="killed"))
        return wire.Empty()

    async def _collect(self, body: wire.CellCollect) -> wire.CellFiles:
        cell = self._cell(body.grant, body.cell_id)
        files = tuple(wire.CellFile(path=path, size_bytes=len(data)) for path, data in cell.files.items())
        return wire.CellFiles(files=files)

    async def _open(self, body: wire.CellOpen) -> wire.Token:
        assert self.link is not None
        fd = os.memfd_create("out")
        try:
            os.write(fd, self._cell(body.grant, body.cell_id).files[body.path])
            return wire.Token(token=await self.link.send_fd(fd))
        finally:
            os.close(fd)

    async def _free(self, body: wire.CellKey) -> wire.Empty:
        if body.grant.job_id not in self.outcomes:
            self.violations.append(f"{body.grant.job_id} was freed before its outcome")
        return wire.Empty()

    async def _finish(self, body: wire.JobFinish) -> wire.JobOutcome:
        job_id = body.grant.job_id
        done = self.outcomes.get(job_id)
        if done is None and job_id not in self.open:
            raise AetherError("NO_GRANT", f"cannot finish {job_id}: not open")
        if done is not None:
            if done.state != body.state and done.error is None:
                self.violations.append(f"{job_id} finished {done.state} and then {body.state}")
            return wire.JobOutcome(view=outcome_view(done, None, None), log_index=done.log_index)
        cell = self.cells.get(job_id)
        if cell is not None and cell.end is None:
            self.violations.append(f"{job_id} finished {body.state} while its cell lives")
        error = AetherError.of(body.error) if body.error else None
        done = self._outcome(job_id, body.state, error, body.result_digest, body.result_bytes, body, tell=False)
        if cell is not None:
            cell.freed = True
        return wire.JobOutcome(view=outcome_view(done, None, None), log_index=done.log_index)

    async def _worker(self, body: wire.WorkerLaunch) -> wire.WorkerLaunched:
        assert self.link is not None
        if self.refuse_launch is not None:
            raise self.refuse_launch
        job_id = ids.new(ids.JOB)
        intent = Record(
            type="job.intent", log_index=len(self.log), time=rfc3339(CLOCK_NS), node_id="node_x", tenant_id="default",
            principal="node", job_id=job_id, attempt=1, kind="model", op="serve",
        )  # fmt: skip
        self._write(intent)
        cell = self._make_cell(grant_of(job_id))
        cell.runtime = Runtime(body, lambda request: self.answer(request))
        cell.runtime.task.add_done_callback(lambda _: self.end_cell(cell, ExitStatus(code=0)))
        token = await self.link.send_fd(cell.runtime.socket.fileno())
        cell.runtime.socket.close()
        launched = wire.CellLaunched(
            cell_id=cell.cell_id, exec_id=cell.exec_id, started_at=cell.started_at, plan_digest="x", channel=token
        )
        return wire.WorkerLaunched(grant=cell.grant, cell=launched)

    # ---- the log

    def _write(self, record: Record) -> None:
        assert record.log_index == len(self.log) and record.job_id is not None
        self.log.append(record)
        if record.type == "job.intent":
            self.open[record.job_id] = record
        else:
            del self.open[record.job_id]
            self.outcomes[record.job_id] = record

    def _outcome(
        self, job_id: str, state: JobState, error: AetherError | None = None, digest: str | None = None,
        size: int | None = None, finish: wire.JobFinish | None = None, tell: bool = True,
    ) -> Record:  # fmt: skip
        intent = self.open[job_id]
        cell = self.cells.get(job_id)
        record = msgspec.structs.replace(
            intent, type="job.outcome", log_index=len(self.log), state=state.value,
            error=error.body() if error else None,
            result_digest=digest, result_bytes=size, finished_at=rfc3339(CLOCK_NS + len(self.log)),
            cell_id=cell.cell_id if cell else None, exit=cell.end.exit if cell and cell.end else None,
            artifacts=finish.artifacts if finish else (), detail={"intent_index": str(intent.log_index)},
        )  # fmt: skip
        self._write(record)
        if tell and self.link is not None:
            view = outcome_view(record, None, None)
            self.link.notify("job.outcome", wire.JobOutcome(view=view, log_index=record.log_index))
        return record


class World:
    """Authority + store + one aurorad at a time."""

    def __init__(self, tmp: Path, kill_at: int | None = None) -> None:
        self.tmp = tmp
        self.steps = Steps(kill_at)
        self.steps.at_step = self.kill_now
        self.authority = Authority(self.steps)
        self.store = CrashStore(self.steps)
        self.aurora: Aurora | None = None
        self.link: UnixLink | None = None
        self.dead = asyncio.Event()
        self.ready = False

    async def start(self) -> None:
        self.store.revive()
        self.dead.clear()
        self.aurora = Aurora(
            self.store, Settings(self.tmp / "artifacts", self.tmp / "models", self.tmp / "images"), lambda: CLOCK_NS
        )
        await self.aurora.start()
        await self.connect()

    async def connect(self) -> None:
        """One connection; if it breaks during the handshake because aurorad was killed, that is all right."""
        aurora = self.aurora
        assert aurora is not None
        theirs, self.link = await pair(
            lambda side: UnixLink(side, self.authority.handlers(), self.authority.events()),
            lambda side: UnixLink(side, aurora.handlers(), aurora.events(), aurora.detach),
        )
        self.authority.link = theirs
        self.ready = False
        try:
            await aurora.attach(self.link)
            self.ready = True
        except AetherError:
            if not self.dead.is_set():
                raise

    def kill_now(self) -> None:
        """SIGKILL: nothing more is written or said from this step on."""
        self.store.crash()
        self.dead.set()
        if self.link is not None:
            self.link._transport.abort()  # type: ignore[union-attr]

    async def bury(self) -> None:
        """Cleans up the tasks and sockets of a killed aurorad."""
        assert self.aurora is not None
        self.kill_now()
        await asyncio.sleep(0)
        await self.aurora.close()
        self.aurora = None
        self.authority.link = None

    async def stop(self) -> None:
        if self.aurora is not None:
            await self.bury()
        for cell in self.authority.cells.values():
            if cell.runtime is not None:
                cell.runtime.kill()
                await asyncio.gather(cell.runtime.task, return_exceptions=True)
        if self.authority.link is not None:
            self.authority.link.close()

    async def settled(self, job_id: str, within_s: float = 5.0) -> JobRow:
        """The row once it is done."""
        return await eventually(lambda: self._done(job_id), within_s)

    async def _done(self, job_id: str) -> JobRow | None:
        row = await self.store.get(job_id)
        return row if row is not None and row.phase == "done" else None


async def eventually(probe: Callable[[], Awaitable[Any]], within_s: float = 5.0) -> Any:
    loop = asyncio.get_running_loop()
    end = loop.time() + within_s
    while True:
        if (value := await probe()) is not None:
            return value
        if loop.time() > end:
            raise AssertionError("not in time")
        await asyncio.sleep(0.001)


def grant_of(job_id: str) -> wire.Grant:
    return wire.Grant(grant_id="grant" + job_id[3:], job_id=job_id, attempt=1, reservation_id="rsv" + job_id[3:])


def view_of(intent: Record) -> JobView:
    assert intent.job_id is not None and intent.kind is not None and intent.op is not None
    return JobView(
        job_id=intent.job_id, request_id="req", kind=intent.kind, op=intent.op, state=JobState.QUEUED,
        tenant_id="default", node_id="node_x", principal="uid:1", attempt=1, labels=intent.labels,
        schema_version="1.0", input_hash=intent.input_hash or "", created_at=intent.created_at or "",
        intent_index=intent.log_index,
    )  # fmt: skip


async def _read_all(link: UnixLink, token: int) -> bytes:
    fd = await link.take_fd(token)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def command(*argv: str, outputs: tuple[str, ...] = (), **more: Any) -> JobRequest:
    return JobRequest(
        kind="command",
        op="run",
        params={"argv": list(argv or ("true",)), "outputs": list(outputs)},
        inputs={"files": more.get("files", [])},
        labels=more.get("labels", ()),
    )


def predict(model: str = "pendulum", **inputs: Any) -> JobRequest:
    return JobRequest(
        kind="model", op="predict_next_state", params={"model": model, "horizons_s": [0.1]}, inputs=inputs
    )


def install_model(models: Path, model_id: str = "pendulum", version: str = "1.0.0") -> None:
    directory = models / model_id / version
    directory.mkdir(parents=True)
    manifest = {
        "id": model_id, "version": version, "schema_version": 1, "created": "2026-01-01T00:00:00.000000Z",
        "files": {"schema.json": {"sha256": "sha256:" + "0" * 64, "size_bytes": 2}},
        "limits": {"history_max": 64, "sequence_max": 64, "horizons_max": 64, "encode_rows_max": 64}, "opset": 20,
        "provenance": {"command": "train", "seed": 7, "trained_with": "torch"},
    }  # fmt: skip
    (directory / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    (directory / "schema.json").write_bytes(b"{}")
