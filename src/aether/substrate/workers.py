"""Workers: long-lived jobs of the node itself. Today one kind, the model runtime in a cell.

A worker is admitted under the node's own principal and ticket, recorded like any job, and gets a channel
socket; it has no row in the job store. aurorad asks for it and finishes it under its grant.
"""

from __future__ import annotations

import sys
from pathlib import Path

from aether.contract import ids
from aether.contract.calls import Caller
from aether.contract.canonical import input_hash
from aether.contract.cells import CellSpec, Limits
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.jobs import SCHEMA_VERSION, JobRequest
from aether.contract.limits import GIB, TIMEOUT_MS_MAX
from aether.contract.paths import Layout
from aether.contract.ports import Link
from aether.contract.wire import WorkerLaunch, WorkerLaunched
from aether.substrate import entries
from aether.substrate.access.access import Resource
from aether.substrate.book import Book
from aether.substrate.entries import Submission
from aether.substrate.execution import Execution, hand_over
from aether.substrate.gate import Gate
from aether.substrate.metering.settle import reservation

WORKER_OP = "serve"


class Workers:
    """Handler of `worker.launch`."""

    def __init__(self, gate: Gate, book: Book, execution: Execution, layout: Layout) -> None:
        self._gate = gate
        self._book = book
        self._execution = execution
        self._layout = layout

    async def launch(self, link: Link, body: WorkerLaunch) -> WorkerLaunched:
        """Starts the model runtime for one package; raises the AetherError of admission or launch."""
        package = self._package(body)
        submission = self._admit(body)
        self._book.accounts.reserve(submission.budget)
        self._book.write(lambda index, time: entries.intent(self._gate.node, submission, index, time))
        job = self._book.ledger.open[submission.job_id]
        try:
            launched, channel = await self._execution.start(job, runtime_spec(package, self._layout), ())
        except AetherError as error:
            if self._book.ledger.open.get(submission.job_id) is job:
                await self._execution.abandon(job, error.message)
            raise
        return WorkerLaunched(grant=job.grant, cell=await hand_over(link, launched, channel))

    def _package(self, body: WorkerLaunch) -> Path:
        path = self._layout.models / body.model_id / body.model_version
        if path != Path(body.package_dir) or path.resolve() != path or not path.is_dir():
            raise AetherError("BAD_PACKAGE", f"cannot serve {body.model_id}@{body.model_version}: no such package")
        return path

    def _admit(self, body: WorkerLaunch) -> Submission:
        request = JobRequest(
            kind="model",
            op=WORKER_OP,
            params={"model": f"{body.model_id}@{body.model_version}", "digest": body.model_digest},
        )
        job_id = ids.new(ids.JOB)
        caller = Caller(uid=-1, gid=-1, pid=0, credential=None, request_id=ids.new(ids.REQUEST))
        admission = self._gate.admit_node("job.submit", Resource(kind="model", op=WORKER_OP, model=body.model_id))
        return Submission(
            job_id=job_id,
            caller=caller,
            request=request,
            admission=admission,
            budget=reservation(ids.sibling(ids.RESERVATION, job_id), admission.ticket.link_ids, {}, None),
            input_hash=input_hash(SCHEMA_VERSION, "model", WORKER_OP, request.params, {}),
            key_hash=None,
            created=rfc3339(self._book.now_ns()),
        )


def runtime_spec(package: Path, layout: Layout) -> CellSpec:
    """The cell of `cfcd`: no network, the package and the trusted keys read-only, one socket."""
    argv = (sys.executable, "-m", "aether.runtime.cfcd", "--fd", "3", "--package", "/mnt/model", "--keys", "/mnt/keys")
    return CellSpec(
        argv=argv,
        env={"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        limits=Limits(memory_bytes=1 * GIB, cpu_millis=2_000, pids=64, timeout_ms=TIMEOUT_MS_MAX),
        readonly_dirs={"model": str(package), "keys": str(layout.trusted_keys)},
        channel=True,
    )
