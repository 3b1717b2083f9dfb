"""A small authority behind the real HTTP server, in a thread of its own, on a real Unix socket.

It admits everything, keeps jobs in memory and interprets a few words instead of commands:
`echo A...`, `stderr A...`, `exit N`, `die SIGNAL`, `sleep SECONDS`, `lines N INTERVAL_S`, `write NAME TEXT`, `oom`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import msgspec
import uvloop

from aether.api.http import HttpApp
from aether.api.operations import OPERATIONS
from aether.api.server import Deadlines, HttpServer
from aether.contract import activity, calls, ids, limits, wire
from aether.contract.cells import Requirement
from aether.contract.errors import AetherError
from aether.contract.jobs import (
    SCHEMA_VERSION,
    TERMINAL,
    ArtifactRef,
    JobRequest,
    JobState,
    JobView,
    check_labels,
    parse_command,
    parse_model,
)
from aether.contract.modelwire import EncodeInputs, PlainParams, PredictInputs, PredictParams, ScoreInputs
from aether.contract.records import InclusionProof, Receipt, ReceiptEntry
from tests.unit.api.fake_cells import FakeCells

NOW = "2026-09-21T13:33:20.123456Z"
DIGEST = "sha256:" + "0" * 64


@dataclass
class FakeJob:
    view: JobView
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    result: bytes | None = None
    task: asyncio.Task[None] | None = None

    def change(self, **fields: Any) -> None:
        self.view = msgspec.structs.replace(self.view, **fields)
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def terminal(self) -> bool:
        return self.view.state in TERMINAL


def activity_line(kind: str, **fields: Any) -> bytes:
    empty = dict.fromkeys(activity.ActivityEvent.__struct_fields__)
    return msgspec.json.encode(empty | {"kind": kind, "time_us": 1_790_000_000_000_000, **fields}) + b"\n"


class FakeService:
    """`handlers` as the authority gives them."""

    def __init__(self) -> None:
        self.jobs: dict[str, FakeJob] = {}
        self.artifacts: dict[str, tuple[bytes, wire.ArtifactInfo]] = {}
        self.keys: dict[str, str] = {}
        self.callers: list[calls.Caller] = []
        self.streams_open = 0
        self.fail_next: list[Exception] = []
        self.handlers: dict[str, Callable[..., Any]] = {
            "health": self.health,
            "metrics": self.metrics,
            "job.submit": self.submit,
            "job.list": self.list_jobs,
            "job.get": self.get,
            "job.result": self.result,
            "job.logs": self.logs,
            "job.receipt": self.receipt,
            "job.story": self.story,
            "job.activity": self.activity,
            "job.trace": self.trace,
            "job.stop": self.stop,
            "artifact.put": self.put,
            "artifact.list": self.list_artifacts,
            "artifact.get": self.artifact,
            "model.list": self.models,
            "audit.checkpoint": self.checkpoint,
            "cell.explain": self.explain,
            "node.doctor": self.doctor,
        }
        self.cells = FakeCells(self._job)
        self.handlers |= self.cells.handlers
        for operation in OPERATIONS:
            self.handlers.setdefault(operation.name, self.absent)

    async def absent(self, caller: calls.Caller, request: Any) -> Any:
        """Stands for the operations that this fake has nothing for."""
        raise AetherError("NOT_FOUND", "cannot find it: the fake has none")

    def _note(self, caller: calls.Caller) -> None:
        self.callers.append(caller)
        del self.callers[:-100]
        if self.fail_next:
            raise self.fail_next.pop(0)

    async def health(self, caller: calls.Caller, request: calls.Nothing) -> calls.Health:
        self._note(caller)
        return calls.Health(
            status="ok", version="0.1.0", api_version="v0", schema_version="1.0", node_id="node_x", tenant_id="t",
            principal=f"uid:{caller.uid}", time=NOW, uptime_s=1,
            roles=(wire.RoleHealth(role="aetherd", ok=True, version="0.1.0"),),
        )  # fmt: skip

    async def metrics(self, caller: calls.Caller, request: calls.Nothing) -> calls.RawReply:
        return calls.RawReply(b"# TYPE aether_jobs gauge\naether_jobs 1\n", "text/plain; version=0.0.4")

    async def submit(self, caller: calls.Caller, call: calls.SubmitCall) -> calls.SubmittedJob:
        self._note(caller)
        request = call.request
        job = self._admit(caller, request)  # what is no request is refused, whatever its key stands for
        if caller.idempotency_key in self.keys:
            del self.jobs[job.view.job_id]
            job = self.jobs[self.keys[caller.idempotency_key]]
        else:
            if caller.idempotency_key:
                self.keys[caller.idempotency_key] = job.view.job_id
        await self._wait(job, call.wait_ms)
        fields = {name: getattr(job.view, name) for name in job.view.__struct_fields__}
        return calls.SubmittedJob(**fields, result=msgspec.Raw(job.result) if job.result else None)

    def _admit(self, caller: calls.Caller, request: JobRequest) -> FakeJob:
        view = JobView(
            job_id=ids.new(ids.JOB), request_id=caller.request_id, kind=request.kind, op=request.op,
            state=JobState.QUEUED, tenant_id="t", node_id="node_x", principal=f"uid:{caller.uid}", attempt=1,
            labels=request.labels, schema_version="1.0", input_hash=DIGEST, created_at=NOW,
        )  # fmt: skip
        job = FakeJob(view)
        check_labels(request.labels)
        if request.schema_version != SCHEMA_VERSION:
            raise AetherError("BAD_FIELD", f"cannot accept schema_version {request.schema_version!r}")
        if request.kind == "model":
            parse_model(request)
            _check_model(request)
            job.result = msgspec.json.encode({"op": request.op, "inputs": sorted(request.inputs)})
            job.change(state=JobState.SUCCEEDED, model_id="pendulum", finished_at=NOW, result_digest=DIGEST)
        else:
            params, inputs = parse_command(request)
            _check_require(params.require)
            for file in inputs.files:
                if file.artifact not in self.artifacts:
                    raise AetherError("NOT_FOUND", f"cannot find artifact {file.artifact}")
            job.change(argv=params.argv)
            job.task = asyncio.get_running_loop().create_task(self._run(job, list(params.argv)))
        self.jobs[job.view.job_id] = job
        return job

    async def _run(self, job: FakeJob, argv: list[str]) -> None:
        job.change(state=JobState.RUNNING, started_at=NOW)
        end: dict[str, Any] = {"state": JobState.SUCCEEDED, "exit_code": 0}
        failed = AetherError("JOB_FAILED", "cannot succeed: the executable failed").body()
        match argv:
            case ["echo", *words]:
                job.stdout += " ".join(words).encode() + b"\n"
            case ["stderr", *words]:
                job.stderr += " ".join(words).encode() + b"\n"
            case ["exit", code]:
                if code != "0":
                    end = {"state": JobState.FAILED, "exit_code": int(code), "error": failed}
            case ["die", number]:
                end = {"state": JobState.FAILED, "signal": int(number), "error": failed}
            case ["timeout"]:
                error = AetherError("TIMED_OUT", "cannot go on: the time is over").body()
                end = {"state": JobState.TIMED_OUT, "signal": 9, "error": error}
            case ["sleep", seconds]:
                await asyncio.sleep(float(seconds))
            case ["lines", count, interval_s]:
                for number in range(int(count)):
                    job.stdout += b"line %d\n" % number
                    job.stderr += b"note %d\n" % number
                    job.change()
                    await asyncio.sleep(float(interval_s))
            case ["write", name, text]:
                digest = self._keep(text.encode(), "text/plain", job.view.job_id, name)
                ref = ArtifactRef(name=name, digest=digest, size_bytes=len(text.encode()))
                end["artifacts"] = (ref,)
        if end["state"] is JobState.SUCCEEDED:
            job.result = b'{"exit_code":0}'
        job.change(**end, finished_at=NOW)

    async def _wait(self, job: FakeJob, wait_ms: int) -> None:
        deadline = asyncio.get_running_loop().time() + wait_ms / 1000
        while not job.terminal:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return
            try:
                await asyncio.wait_for(job.changed.wait(), left)
            except TimeoutError:
                return

    def _job(self, job_id: str) -> FakeJob:
        if job_id not in self.jobs:
            raise AetherError("NOT_FOUND", f"cannot find {job_id}: no such job")
        return self.jobs[job_id]

    async def list_jobs(self, caller: calls.Caller, call: calls.ListJobsCall) -> wire.JobPage:
        names = sorted(self.jobs, reverse=True)
        if call.cursor:
            names = [name for name in names if name < call.cursor]
        found = [self.jobs[n].view for n in names if not call.state or self.jobs[n].view.state in call.state]
        page = found[: call.limit]
        return wire.JobPage(jobs=tuple(page), next_cursor=page[-1].job_id if len(found) > len(page) else None)

    async def get(self, caller: calls.Caller, call: calls.JobCall) -> JobView:
        self._note(caller)
        job = self._job(call.job_id)
        await self._wait(job, call.wait_ms)
        return job.view

    async def result(self, caller: calls.Caller, call: calls.JobCall) -> calls.Reply:
        job = self._job(call.job_id)
        await self._wait(job, call.wait_ms)
        if not job.terminal:
            raise AetherError("NOT_READY", f"cannot give the result of {call.job_id}: it is {job.view.state}")
        if job.result is None:
            raise AetherError("NO_RESULT", f"cannot give the result of {call.job_id}: it is {job.view.state}")
        return calls.RawReply(job.result, "application/json")

    async def logs(self, caller: calls.Caller, call: calls.LogsCall) -> calls.StreamReply:
        return calls.StreamReply(self._chunks(self._job(call.job_id), call), "application/octet-stream")

    async def _chunks(self, job: FakeJob, call: calls.LogsCall) -> AsyncIterator[bytes]:
        self.streams_open += 1
        try:
            sent = call.cursor
            while True:
                changed, terminal = job.changed, job.terminal
                text = {"stdout": job.stdout, "stderr": job.stderr, "all": job.stdout + job.stderr}[call.stream]
                if len(text) > sent:
                    chunk = bytes(text[sent : sent + 65536])
                    sent += len(chunk)
                    yield chunk
                elif terminal or not call.follow:
                    return
                else:
                    await changed.wait()
        finally:
            self.streams_open -= 1

    async def receipt(self, caller: calls.Caller, call: calls.JobCall) -> Receipt:
        job = self._job(call.job_id)
        proof = InclusionProof(log_index=1, hashes=())
        return Receipt(
            receipt_version="1.0", job_id=job.view.job_id, origin="node_x", documents={}, verdict="", checkpoint="",
            entries=(ReceiptEntry(entry="{}", proof=proof),),
        )  # fmt: skip

    async def story(self, caller: calls.Caller, call: calls.JobCall) -> wire.Story:
        job = self._job(call.job_id)
        line = wire.StoryLine(time=NOW, event="submitted", text="the job was accepted")
        return wire.Story(job_id=job.view.job_id, lines=(line,))

    async def activity(self, caller: calls.Caller, call: activity.ActivityCall) -> calls.StreamReply:
        job = self._job(call.job_id)
        lines = [activity_line("exec", comm="ev\x1b[2Jil", path="/usr/bin/evil"), activity_line("gap", count=4096)]
        if job.terminal:
            lines.append(activity_line("ended", count=0))
        return calls.StreamReply(self._lines(lines, call.cursor), "application/x-ndjson")

    async def _lines(self, lines: list[bytes], cursor: int) -> AsyncIterator[bytes]:
        yield b"".join(lines)[cursor:]

    async def trace(self, caller: calls.Caller, call: activity.TraceCall) -> activity.Trace:
        self._job(call.job_id)
        count = activity.CallCount(number=257, name="openat", count=7)
        last = activity.TracedCall(
            time_us=1, pid=2, thread=2, number=257, name="openat", arguments=("0x1", "0x2", "0x3"), comm="ev\x1b[2Jil"
        )
        return activity.Trace(arch="x86_64", duration_ms=call.duration_ms, total=7, calls=(count,), last=(last,))

    async def stop(self, caller: calls.Caller, call: calls.StopCall) -> JobView:
        job = self._job(call.job_id)
        if not 0 <= call.grace_ms <= limits.STOP_GRACE_MS_MAX:
            raise AetherError("BAD_FIELD", f"cannot accept grace_ms = {call.grace_ms}")
        if not job.terminal:
            if job.task:
                job.task.cancel()
            error = AetherError("CANCELLED", "cannot go on: stopped on request").body()
            job.change(state=JobState.CANCELLED, signal=15, error=error, finished_at=NOW)
        return job.view

    def _keep(self, data: bytes, media_type: str, job_id: str | None = None, name: str | None = None) -> str:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        info = wire.ArtifactInfo(
            digest=digest, size_bytes=len(data), media_type=media_type, created_at=NOW, tenant_id="t", job_id=job_id,
            name=name,
        )  # fmt: skip
        self.artifacts[digest] = (data, info)
        return digest

    async def put(self, caller: calls.Caller, call: calls.UploadCall) -> wire.ArtifactInfo:
        try:
            data = await asyncio.to_thread(_read_all, call.fd, call.size_bytes)
        finally:
            os.close(call.fd)
        return self.artifacts[self._keep(data, call.media_type)][1]

    async def list_artifacts(self, caller: calls.Caller, call: calls.ListArtifactsCall) -> wire.ArtifactPage:
        infos = [info for _, info in self.artifacts.values() if call.job_id in (None, info.job_id)]
        return wire.ArtifactPage(artifacts=tuple(infos[: call.limit]), next_cursor=None)

    async def artifact(self, caller: calls.Caller, call: calls.ArtifactCall) -> calls.FileReply:
        if call.digest not in self.artifacts:
            raise AetherError("NOT_FOUND", f"cannot find {call.digest}: no such artifact")
        data, info = self.artifacts[call.digest]
        fd = os.memfd_create("artifact", os.MFD_CLOEXEC)
        os.write(fd, data)
        return calls.FileReply(fd, 0, len(data), info.media_type, info.digest)

    async def models(self, caller: calls.Caller, request: calls.Nothing) -> wire.ModelList:
        model = wire.ModelInfo(
            model_id="pendulum", version="1.0.0", digest=DIGEST, state="ready", ops=("predict_next_state",)
        )
        return wire.ModelList(models=(model,))

    async def checkpoint(self, caller: calls.Caller, request: calls.Nothing) -> calls.RawReply:
        return calls.RawReply(b"node_x\n1\nAAAA\n\n-- node_x AAAA\n", "text/plain; charset=utf-8")

    async def explain(self, caller: calls.Caller, call: calls.ExplainCall) -> calls.Explanation:
        _check_require(call.params.require)
        parse_command(JobRequest(kind="command", op="run", params=msgspec.to_builtins(call.params)))
        return calls.Explanation(plan_digest=DIGEST, lines=("mount tmpfs on /",), plan={}, missing={})

    async def doctor(self, caller: calls.Caller, request: calls.Nothing) -> calls.Doctor:
        return calls.Doctor(checks=({"name": "userns", "ok": True, "value": "yes", "reason": None, "remedy": None},))


def _check_model(request: JobRequest) -> None:
    params, inputs = {
        "predict_next_state": (PredictParams, PredictInputs),
        "encode_state": (PlainParams, EncodeInputs),
        "score_sequence": (PlainParams, ScoreInputs),
    }[request.op]
    try:
        msgspec.convert(request.params, params)
        msgspec.convert(request.inputs, inputs)
    except msgspec.ValidationError as error:
        raise AetherError("BAD_FIELD", f"cannot read the job: {error}") from error


def _check_require(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in get_args(Requirement):
            raise AetherError("BAD_FIELD", f"cannot accept require {name!r}")


def _read_all(fd: int, size: int) -> bytes:
    parts, offset = [], 0
    while offset < size:
        part = os.pread(fd, 1 << 20, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


class HttpNode:
    """The server with its fake authority, running in a thread; a context manager."""

    def __init__(self, root: Path, deadlines: Deadlines | None = None) -> None:
        self.root = root
        self.service = FakeService()
        self.socket_path = root / "run" / "aetherd.sock"
        self.socket_path.parent.mkdir(parents=True, exist_ok=True)
        (root / "spool").mkdir(exist_ok=True)
        self.app = HttpApp(self.service.handlers, root / "spool")
        self._deadlines = deadlines
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._main()), daemon=True)
        self.server: HttpServer
        self.loop: asyncio.AbstractEventLoop

    def __enter__(self) -> HttpNode:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(15)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.server = await HttpServer.start(self.app, self.socket_path, deadlines=self._deadlines)
        self._ready.set()
        await self._stop.wait()
        await self.server.close(0.5)
        for job in self.service.jobs.values():
            if job.task:
                job.task.cancel()

    def connect(self, timeout_s: float = 10.0) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        connection.connect(str(self.socket_path))
        return connection

    def exchange(self, data: bytes, timeout_s: float = 10.0) -> bytes:
        """Sends `data`, reads until the server closes or one whole answer with Content-Length is there."""
        with self.connect(timeout_s) as connection:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
            return read_answer(connection)


def read_answer(connection: socket.socket) -> bytes:
    received = b""
    try:
        while not _complete(received):
            part = connection.recv(65536)
            if not part:
                break
            received += part
    except ConnectionResetError:
        pass
    return received


def _complete(received: bytes) -> bool:
    head, found, body = received.partition(b"\r\n\r\n")
    if not found:
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.split(b":")[1])
    return b" 204 " in head or received.endswith(b"0\r\n\r\n")


def serve_until_eof(root: Path) -> None:
    """The node as a process of its own: `ready` on stdout, ends when stdin does."""
    import sys

    with HttpNode(root):
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    import sys

    serve_until_eof(Path(sys.argv[1]))
