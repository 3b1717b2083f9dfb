"""How the authority's records are built: pure functions from typed facts to `Record`."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from aether.contract.calls import Caller
from aether.contract.errors import ErrorBody
from aether.contract.jobs import JobRequest
from aether.contract.records import BudgetRef, CodeRef, Record, RecordType
from aether.contract.wire import JobFinish, JobRunReply
from aether.substrate.access.access import Admission
from aether.substrate.approvalbook import Ask
from aether.substrate.audit.redact import redact_error
from aether.substrate.ledger import OpenJob
from aether.substrate.metering.settle import usage_of


@dataclass(frozen=True, slots=True)
class Node:
    """Who this authority is."""

    node_id: str
    version: str


@dataclass(frozen=True, slots=True)
class Submission:
    """A parsed, admitted request, before any record. `created` is when it arrived (RFC 3339)."""

    job_id: str
    caller: Caller
    request: JobRequest
    admission: Admission
    budget: BudgetRef
    input_hash: str
    key_hash: str | None
    created: str
    argv: tuple[str, ...] | None = None
    cell_id: str | None = None
    guest: dict[str, str] = field(default_factory=dict)
    """The names of the allocated cell and of the executable in it, for the intent's `detail`."""
    ask: Ask | None = None
    """The approval that it waits for."""
    labels: tuple[str, ...] = ()
    """Those of the request, of its inputs, and of the cell that it enters."""
    replay_of: str | None = None
    """The job whose input it has again."""

    @property
    def effect(self) -> str:
        return "cell" if self.request.kind == "command" else "pure"

    @property
    def detail(self) -> dict[str, str]:
        """What only an intent says."""
        asked = {"approval": self.ask.approval_id} if self.ask is not None else {}
        return self.guest | asked | ({"replay_of": self.replay_of} if self.replay_of is not None else {})


def intent(node: Node, submission: Submission, index: int, time: str) -> Record:
    """`job.intent`: what was asked, by whom, on what authority, with what reserved."""
    request, admission = submission.request, submission.admission
    model, _, version = str(request.params.get("model", "")).partition("@")
    return Record(
        type="job.intent",
        log_index=index,
        time=time,
        node_id=node.node_id,
        tenant_id=admission.principal.tenant_id,
        principal=admission.principal.name,
        request_id=submission.caller.request_id,
        traceparent=submission.caller.traceparent,
        operation="job.submit",
        effect=submission.effect,
        job_id=submission.job_id,
        attempt=1,
        kind=request.kind,
        op=request.op,
        model_id=model or None,
        model_version=version or None,
        input_hash=submission.input_hash,
        idempotency_hash=submission.key_hash,
        labels=submission.labels,
        ticket=admission.ticket,
        policy=admission.policy,
        budget=submission.budget,
        cell_id=submission.cell_id,
        created_at=submission.created,
        detail=submission.detail,
    )


def follow_up(kind: RecordType, of: Record, index: int, time: str) -> Record:
    """A later record of the same job: carries what joins it to its intent."""
    return Record(
        type=kind,
        log_index=index,
        time=time,
        node_id=of.node_id,
        tenant_id=of.tenant_id,
        principal=of.principal,
        request_id=of.request_id,
        traceparent=of.traceparent,
        effect=of.effect,
        job_id=of.job_id,
        attempt=of.attempt,
        kind=of.kind,
        op=of.op,
        model_id=of.model_id,
        model_version=of.model_version,
        input_hash=of.input_hash,
        labels=of.labels,
        created_at=of.created_at,
    )


def started(
    of: Record, cell_id: str, exec_id: str, host_uid: int | None, code: CodeRef, index: int, time: str
) -> Record:
    """`job.started`: the cell runs; the sandbox as enforced and the plan are named by digest."""
    base = follow_up("job.started", of, index, time)
    detail = {"exec_id": exec_id, "host_uid": str(host_uid)}
    return replace(base, cell_id=cell_id, code=code, started_at=time, detail=detail)


def stop_asked(of: Record, caller: Caller, admission: Admission, index: int, time: str) -> Record:
    """`job.stop`: who asked for the end of the job, on what authority."""
    base = follow_up("job.stop", of, index, time)
    return replace(
        base,
        principal=admission.principal.name,
        request_id=caller.request_id,
        traceparent=caller.traceparent,
        operation="job.stop",
        effect="control",
        ticket=admission.ticket,
        policy=admission.policy,
    )


def cell_outcome(
    job: OpenJob, finish: JobFinish, settled: BudgetRef, revocation: Record | None, index: int, time: str
) -> Record:
    """`job.outcome` of a job that ran in a cell, or never started: the end and the usage are the authority's.
    `revocation` is the record that revoked its ticket."""
    end = job.end
    base = follow_up("job.outcome", job.intent, index, time)
    detail = {"intent_index": str(job.intent.log_index)}
    if job.started is not None:
        detail |= {"started_index": str(job.started.log_index), "exec_id": job.exec_id or ""}
    if job.stop is not None:
        detail["stop_index"] = str(job.stop.log_index)
    if job.egress_index is not None:
        detail["egress_index"] = str(job.egress_index)
    if job.approval is not None:
        detail["approval_index"] = str(job.approval.requested.log_index)
        if job.approval.decided is not None:
            detail["decision_index"] = str(job.approval.decided.log_index)
    if job.exhausted is not None:
        detail["exhausted_index"] = str(job.exhausted.log_index)
    if revocation is not None:
        detail["revoked_index"] = str(revocation.log_index)
    return replace(
        base,
        state=str(finish.state),
        model_id=finish.model_id or base.model_id,
        model_version=finish.model_version or base.model_version,
        cell_id=job.cell_id,
        code=finish.code if finish.code is not None else (job.started.code if job.started else None),
        exit=end.exit if end else finish.exit,
        error=masked(finish.error),
        usage=usage_of(end) if end else finish.usage,
        result_digest=finish.result_digest,
        result_bytes=finish.result_bytes,
        artifacts=finish.artifacts,
        budget=settled,
        started_at=job.started.time if job.started else None,
        finished_at=time,
        timings_us=finish.timings_us,
        detail=detail,
    )


def pure_outcome(of: Record, reply: JobRunReply, settled: BudgetRef, index: int, time: str) -> Record:
    """`job.outcome` of a pure model job that ran before its intent was written in the same batch."""
    base = follow_up("job.outcome", of, index, time)
    return replace(
        base,
        state=str(reply.state),
        model_id=reply.model_id or base.model_id,
        model_version=reply.model_version or base.model_version,
        code=reply.code,
        error=masked(reply.error),
        usage=reply.usage,
        result_digest=reply.result_digest,
        result_bytes=reply.result_bytes,
        budget=settled,
        started_at=of.created_at,
        finished_at=time,
        timings_us=reply.timings_us,
        detail={"intent_index": str(of.log_index)},
    )


def masked(error: ErrorBody | None) -> ErrorBody | None:
    """An error fit for the log."""
    return None if error is None else redact_error(error)
