"""Model jobs: route to a package, speak to its runtime, turn the answer into a verdict.

Route: `id` is the highest installed version, `id@version` exactly that one. The catalogue is read again when
a name is unknown or the last reading is older than a few seconds, so an installed package is found without a
restart; a version that is being served stays served. Numbers are the runtime's to check: its error codes are
the job's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from aether.contract.cells import Usage
from aether.contract.errors import AetherError, ErrorBody
from aether.contract.jobs import JobRequest, JobState, parse_model
from aether.contract.limits import MODEL_BATCH_MAX, MODEL_JOBS_IN_FLIGHT_MAX
from aether.contract.modelwire import InferReply, InferRequest
from aether.contract.ports import Link
from aether.contract.records import CodeRef
from aether.contract.wire import ModelList
from aether.orchestrator.engines import packages
from aether.orchestrator.engines.packages import Package
from aether.orchestrator.engines.worker import Worker
from aether.orchestrator.metrics import JobMetrics

DEADLINE_S: Final = 10.0
WORKERS_MAX: Final = 8
_CATALOG_AGE_S_MAX: Final = 2.0
_RESCAN_S_MIN: Final = 0.1
"""Unknown names, which cost a client nothing, make us read the directory at most this often."""
_MESSAGE_CHARS_MAX: Final = 500
_ENDED: Final = {"TIMED_OUT": JobState.TIMED_OUT}


@dataclass(frozen=True, slots=True)
class Inference:
    """A runtime's answer. Exactly one of `result` (JSON text) and `error` is set."""

    state: JobState
    result: bytes | None
    error: ErrorBody | None
    package: Package
    code: CodeRef
    usage: Usage
    timings_us: dict[str, int]


class ModelEngine:
    """Owns the workers. `link` waits for a connected, reconciled link."""

    def __init__(self, models: Path, link: Callable[[], Awaitable[Link]], metrics: JobMetrics) -> None:
        self._models = models
        self._link = link
        self._metrics = metrics
        self._catalog = packages.EMPTY
        self._scanned_at = float("-inf")
        self._scanning: asyncio.Task[None] | None = None
        self._workers: dict[tuple[str, str], Worker] = {}
        self._ending: set[Worker] = set()
        self._codes: dict[str, CodeRef] = {}
        self._room = asyncio.Semaphore(MODEL_JOBS_IN_FLIGHT_MAX)
        self._serial = 0
        self.in_flight = 0

    def __repr__(self) -> str:
        return f"<ModelEngine in_flight={self.in_flight} {list(self._workers.values())!r}>"

    async def start(self) -> None:
        """Reads the catalogue and starts the highest version of every model, within WORKERS_MAX."""
        await self.refresh()
        for package in list(self._catalog.highest.values())[:WORKERS_MAX]:
            self._worker(package)

    async def close(self) -> None:
        if self._scanning is not None:
            await self._scanning
        await asyncio.gather(*(worker.stop() for worker in (*self._workers.values(), *self._ending)))

    async def refresh(self) -> None:
        """Reads the catalogue again; callers at the same time share one reading."""
        if self._scanning is None or self._scanning.done():
            self._scanning = asyncio.get_running_loop().create_task(self._scan())
        await asyncio.shield(self._scanning)

    async def list(self) -> ModelList:
        """Every installed package with the state of its worker."""
        await self.refresh()
        infos = []
        for package in self._catalog.packages.values():
            worker = self._workers.get((package.name, package.digest))
            infos.append(packages.info(package, worker.state if worker is not None else "installed"))
        return ModelList(models=(*infos, *self._catalog.broken))

    def owner(self, job_id: str) -> Worker | None:
        """The worker that looks after the cell of `job_id`."""
        return next((worker for worker in (*self._workers.values(), *self._ending) if worker.owns(job_id)), None)

    def check_room(self) -> None:
        """Raises BUSY when MODEL_JOBS_IN_FLIGHT_MAX requests are in flight."""
        if self._room.locked():
            raise AetherError("BUSY", "cannot run the model job: too many are in flight", retry_after_s=1)

    async def infer(self, job_id: str, request: JobRequest, batch_key: str) -> Inference:
        """Runs a model job, after others when too many are in flight.

        Raises NO_SUCH_MODEL, BUSY or BAD_FIELD before anything ran, and the refusal of the worker's launch.
        What the runtime says, its death and its silence are Inferences.
        """
        params = parse_model(request)
        package = await self._route(params.model)
        worker = self._worker(package)
        async with self._room:
            self.in_flight += 1
            try:
                return await self._ask(worker, job_id, request, batch_key)
            finally:
                self.in_flight -= 1

    # ---- inside

    async def _ask(self, worker: Worker, job_id: str, request: JobRequest, batch_key: str) -> Inference:
        package = worker.package
        self._serial += 1
        started_ns = time.perf_counter_ns()
        channel = worker.channel or await worker.ready(DEADLINE_S)
        body = InferRequest(
            request_id=f"{job_id}.{self._serial}",
            op=request.op,  # type: ignore[arg-type]  # parse_model checked it
            model_id=package.model_id,
            model_version=package.version,
            params=request.params,
            inputs=request.inputs,
            batch_key=batch_key,
            deadline_ms=int(DEADLINE_S * 1000),
        )
        reply: InferReply | None = None
        failure: ErrorBody | None = None
        try:
            reply = await channel.infer(body, DEADLINE_S)
        except AetherError as error:
            failure = error.body()
        spent_us = (time.perf_counter_ns() - started_ns) // 1000
        self._metrics.engine_seconds(package.model_id).observe(spent_us / 1e6)
        return _inference(package, self._code(package), reply, failure, spent_us)

    async def _route(self, model: str) -> Package:
        """A known name is routed at once, on a catalogue of a few seconds; for an unknown one it is read again."""
        age_s = time.monotonic() - self._scanned_at
        if model not in self._catalog.packages and model not in self._catalog.highest:
            await asyncio.sleep(max(0.0, _RESCAN_S_MIN - age_s))
            await self.refresh()
        elif age_s > _CATALOG_AGE_S_MAX:
            self._refresh_aside()
        return self._catalog.route(model)

    def _refresh_aside(self) -> None:
        if self._scanning is None or self._scanning.done():
            self._scanning = asyncio.get_running_loop().create_task(self._scan())

    async def _scan(self) -> None:
        self._catalog = await asyncio.to_thread(packages.scan, self._models)
        self._scanned_at = time.monotonic()

    def _worker(self, package: Package) -> Worker:
        key = (package.name, package.digest)
        worker = self._workers.pop(key, None)
        if worker is None:
            if len(self._workers) >= WORKERS_MAX:
                self._make_room(package)
            worker = Worker(package, self._link, self._died)
            worker.start()
        self._workers[key] = worker  # at the end: the first is the one that was not asked for longest
        return worker

    def _make_room(self, wanted: Package) -> None:
        """Ends the idle worker that was not asked for longest; raises BUSY when none is idle."""
        key = next((key for key, worker in self._workers.items() if worker.idle), None)
        if key is None:
            raise AetherError("BUSY", f"cannot serve {wanted.name}: {WORKERS_MAX} others are busy", retry_after_s=1)
        worker = self._workers.pop(key)
        self._ending.add(worker)
        worker.end().add_done_callback(lambda _: self._ending.discard(worker))

    def _died(self, package: Package) -> None:
        self._metrics.worker_deaths(package.model_id).inc()

    def _code(self, package: Package) -> CodeRef:
        code = self._codes.get(package.digest)
        if code is None:
            code = CodeRef(model_digest=package.digest, route="local", engine="cfcd", rung="cell")
            self._codes[package.digest] = code
        return code


def _inference(
    package: Package, code: CodeRef, reply: InferReply | None, failure: ErrorBody | None, spent_us: int
) -> Inference:
    if reply is None:
        assert failure is not None
        state = _ENDED.get(failure.code, JobState.FAILED)
        return Inference(state, None, failure, package, code, Usage(wall_us=spent_us), {"engine": spent_us})
    error = _error(reply)
    infer_us = min(max(reply.infer_us, 0), spent_us)
    batch_size = min(max(reply.batch_size, 1), MODEL_BATCH_MAX)
    usage = Usage(
        wall_us=spent_us,
        cpu_user_us=infer_us // batch_size,
        batch_size=batch_size,
        basis={"wall_us": "measured", "cpu_user_us": "apportioned"},
    )
    timings_us = {"engine": spent_us, "queue": min(max(reply.queue_us, 0), spent_us), "infer": infer_us}
    if error is not None:
        return Inference(_ENDED.get(error.code, JobState.FAILED), None, error, package, code, usage, timings_us)
    return Inference(JobState.SUCCEEDED, reply.result, None, package, code, usage, timings_us)


def _error(reply: InferReply) -> ErrorBody | None:
    """The runtime's error within bounds (it is untrusted and this goes into the log), or what its answer lacks."""
    if reply.error is not None:
        said = AetherError.of(reply.error)
        return AetherError(said.code, said.message[:_MESSAGE_CHARS_MAX]).body()
    if not _is_json(reply.result):
        return AetherError("ENGINE_DIED", "cannot use the answer of the model runtime: it is not JSON").body()
    return None


def _is_json(text: bytes | None) -> bool:
    """The runtime's text goes into our answers as it stands, so it must be one JSON value in UTF-8."""
    if text is None:
        return False
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
        text.decode()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True
