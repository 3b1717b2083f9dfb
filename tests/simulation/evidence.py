"""What is looked at after a simulation: the outcomes that were promised, the log, the receipts, the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from aether.client import Client
from aether.contract.errors import AetherError
from aether.contract.jobs import JobRequest, JobState, JobView
from aether.contract.paths import Layout
from aether.contract.records import Record
from aether.substrate.audit import entry, segments
from aether.substrate.audit.verify import verify_log, verify_receipt
from aether.substrate.workers import WORKER_OP

DIED = frozenset({"ABANDONED", "ENGINE_DIED", "UNAVAILABLE", "TIMED_OUT", "CELL_FAILED"})
"""Codes of a failure that a dead role explains."""
OUTPUT = b"out\n"


def unproved(client: Client, key: str, job_ids: Iterable[str], unreleased: Collection[str]) -> list[str]:
    """Jobs whose receipt does not verify, or whose outputs or result cannot be had although they succeeded.

    Of the `unreleased` the result may be gone: nobody was given it.
    """
    problems = []
    for job_id in sorted(job_ids):
        report = verify_receipt(client.receipt_bytes(job_id), key)
        problems += [f"receipt of {job_id}: {problem}" for problem in report.problems[:2]]
        view = client.get(job_id)
        if view.state is JobState.SUCCEEDED and job_id not in unreleased:
            problems += [f"{job_id}: {problem}" for problem in _left(client, view)]
    return problems


def _left(client: Client, view: JobView) -> Iterator[str]:
    """What a succeeded job should have left and did not."""
    try:
        for artifact in view.artifacts:
            if client.artifact_bytes(artifact.digest) != OUTPUT:
                yield f"{artifact.name} is not what the job wrote"
        if view.kind == "model" and "predictions" not in client.result(view.job_id):
            yield "a result without predictions"
    except AetherError as error:
        yield f"its result is gone: {error}"


def wrong(view: JobView, request: JobRequest, exit_code: int) -> str | None:
    """Why the end of a job cannot be true, given what it was asked to do."""
    code = view.error.code if view.error is not None else None
    if view.state is JobState.LOST or (view.state is JobState.FAILED and code in DIED):
        return None
    if request.kind == "model":
        return None if view.state is JobState.SUCCEEDED else f"{view.state} ({code})"
    if view.state is JobState.SUCCEEDED and exit_code == 0:
        missing = bool(request.params.get("outputs")) and not view.artifacts
        return "succeeded without its output" if missing else None
    if view.state is JobState.FAILED and code == "JOB_FAILED" and (view.exit_code == exit_code != 0):
        return None
    # PDEATHSIG and the end of its PID 1 reach a cell before anybody can say that the spawner died
    if view.state is JobState.FAILED and view.signal is not None:
        return None
    return f"{view.state} ({code}), exit code {view.exit_code} where {exit_code} was due"


def log_problems(layout: Layout) -> list[str]:
    """What does not verify in the log as a whole."""
    key = layout.audit_public_key.read_text()
    return [str(problem) for problem in verify_log(layout.audit, key).problems]


def unfinished(layout: Layout) -> list[str]:
    """Clients' jobs that the log admitted and never ended. A runtime of the node may still have been serving."""
    still: set[str] = set()
    for record in records(layout):
        if record.job_id is not None and record.type == "job.intent" and record.op != WORKER_OP:
            still.add(record.job_id)
        elif record.type == "job.outcome":
            still.discard(record.job_id or "")
    return sorted(still)


def duplicates(layout: Layout) -> list[str]:
    """Jobs with more than one intent, start or outcome, and jobs that share an idempotency key."""
    count: Counter[tuple[str, str]] = Counter()
    keys: dict[str, str] = {}
    found = []
    for record in records(layout):
        if record.job_id is None or record.type == "job.stop":
            continue
        count[(record.job_id, record.type)] += 1
        if record.type == "job.intent" and record.idempotency_hash is not None:
            first = keys.setdefault(record.idempotency_hash, record.job_id)
            if first != record.job_id:
                found.append(f"{first} and {record.job_id} share a key")
    return found + [f"{job_id}: {number} times {kind}" for (job_id, kind), number in count.items() if number > 1]


def records(layout: Layout) -> Iterator[Record]:
    """Every record of the log, in order."""
    origin = layout.audit_public_key.read_text().split("+")[0]
    for path in sorted((layout.audit / "segments").glob("0*")):
        content = path.read_bytes()
        first = int(path.name)
        header = segments.check_header(content, first, origin)
        for frame in segments.scan(content, header, first):
            for text in frame.entries:
                yield entry.decode(text)
