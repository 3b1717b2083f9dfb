"""From records to the view of a job: pure functions."""

from __future__ import annotations

from aether.contract.jobs import JobState, JobView
from aether.contract.records import Record


def queued_view(intent: Record, argv: tuple[str, ...] | None = None) -> JobView:
    """The view of a job that was admitted by `intent`."""
    assert intent.job_id is not None and intent.principal is not None and intent.tenant_id is not None
    return JobView(
        job_id=intent.job_id,
        request_id=intent.request_id or "",
        kind=intent.kind or "",
        op=intent.op or "",
        state=JobState.WAITING_APPROVAL if "approval" in intent.detail else JobState.QUEUED,
        tenant_id=intent.tenant_id,
        node_id=intent.node_id,
        principal=intent.principal,
        attempt=intent.attempt or 1,
        labels=intent.labels,
        schema_version=intent.schema_version,
        input_hash=intent.input_hash or "",
        model_id=intent.model_id,
        model_version=intent.model_version,
        created_at=intent.time,
        intent_index=intent.log_index,
        argv=argv,
        cell=intent.detail.get("cell"),
        executable=intent.detail.get("executable"),
        approval_id=intent.detail.get("approval"),
        replay_of=intent.detail.get("replay_of"),
    )


def final_view(intent: Record, outcome: Record, argv: tuple[str, ...] | None = None) -> JobView:
    """The view of a job that ended with `outcome`; `argv` only where the caller still knows it."""
    assert intent.job_id is not None
    end = outcome.exit
    return JobView(
        job_id=intent.job_id,
        request_id=intent.request_id or "",
        kind=intent.kind or "",
        op=intent.op or "",
        state=JobState(outcome.state or "failed"),
        tenant_id=intent.tenant_id or "",
        node_id=intent.node_id,
        principal=intent.principal or "",
        attempt=intent.attempt or 1,
        labels=intent.labels,
        schema_version=intent.schema_version,
        input_hash=intent.input_hash or "",
        model_id=outcome.model_id,
        model_version=outcome.model_version,
        created_at=intent.time,
        started_at=outcome.started_at,
        finished_at=outcome.finished_at,
        exit_code=end.code if end else None,
        signal=end.signal if end else None,
        error=outcome.error,
        result_digest=outcome.result_digest,
        result_bytes=outcome.result_bytes,
        artifacts=outcome.artifacts,
        usage=outcome.usage,
        cell_id=outcome.cell_id,
        exec_id=outcome.detail.get("exec_id"),
        intent_index=intent.log_index,
        outcome_index=outcome.log_index,
        argv=argv,
        cell=intent.detail.get("cell"),
        executable=intent.detail.get("executable"),
        approval_id=intent.detail.get("approval"),
        replay_of=intent.detail.get("replay_of"),
    )
