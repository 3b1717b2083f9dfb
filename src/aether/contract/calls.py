"""Calls on the authority: who calls, the typed request of each operation, and the kinds of reply.

The operations table (`aether.api.operations`) names an operation, its request type here and its reply;
aetherd's service implements one handler per operation: `async (caller, request) -> Reply`. The spellings
(HTTP today) only translate. Interfaces never see a dict of parameters.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from aether.contract import limits
from aether.contract.jobs import CommandParams, JobRequest, JobState, JobView
from aether.contract.wire import RoleHealth


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """The client certificate of a TLS connection: the handshake proved its chain and key, and did not look at its time.

    `fingerprint` is SHA-256 over its DER form in hex: what it stands for is on record under that. `chain` is what the
    handshake proved, in DER: the certificate first, the trusted authority last.
    """

    fingerprint: str
    not_before_ms: int
    not_after_ms: int
    chain: tuple[bytes, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Caller:
    """Where a call came from. `uid`, `gid`, `pid` are SO_PEERCRED of the connection, taken at accept; `certificate` is
    its client certificate where it speaks TLS, and then names who calls instead of the uid.

    `credential` is the ticket, API key or token as sent, unverified. `request_id` is the client's own when it was well
    formed, else a fresh one.
    """

    uid: int
    gid: int
    pid: int
    credential: str | None
    request_id: str
    traceparent: str | None = None
    idempotency_key: str | None = None
    certificate: PeerCertificate | None = None


# ---- requests


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No parameters."""


class SubmitCall(msgspec.Struct, frozen=True, kw_only=True):
    """`job.submit`. `wait_ms` > 0: answer when the job is terminal or the time is over."""

    request: JobRequest
    wait_ms: int = 0
    approval_ms: int = limits.APPROVAL_MS_DEFAULT
    """How long it waits for an approval, if the policy demands one."""


class JobCall(msgspec.Struct, frozen=True, kw_only=True):
    """`job.get`, `job.result`, `job.receipt`, `job.story`. `wait_ms` > 0: wait for a terminal state first."""

    job_id: str
    wait_ms: int = 0


class ReplayCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`job.replay`: the same input as a new job. `allow_effects`: also where that may repeat effects."""

    job_id: str
    allow_effects: bool = False
    wait_ms: int = 0
    approval_ms: int = limits.APPROVAL_MS_DEFAULT


class ListJobsCall(msgspec.Struct, frozen=True, kw_only=True):
    """`job.list`: newest first; `cursor` is the previous page's `next_cursor`."""

    state: tuple[JobState, ...] = ()
    cursor: str | None = None
    limit: int = limits.PAGE_ITEMS_DEFAULT


class LogsCall(msgspec.Struct, frozen=True, kw_only=True):
    """`job.logs`: the executable's output from byte `cursor`; `follow` streams until it ends."""

    job_id: str
    stream: Literal["stdout", "stderr", "all"] = "all"
    follow: bool = False
    cursor: int = 0


class StopCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`job.stop`: SIGTERM, `grace_ms`, then the whole cell is killed. Stopping a terminal job changes nothing."""

    job_id: str
    grace_ms: int = limits.STOP_GRACE_MS_DEFAULT


class ArtifactCall(msgspec.Struct, frozen=True, kw_only=True):
    """`artifact.get`."""

    digest: str


@dataclass(frozen=True, slots=True)
class UploadCall:
    """`artifact.put`: the body was spooled to `fd` (an unlinked file the callee owns and closes)."""

    fd: int
    size_bytes: int
    media_type: str
    labels: tuple[str, ...] = ()


class ListArtifactsCall(msgspec.Struct, frozen=True, kw_only=True):
    """`artifact.list`: all of the tenant's, or those of one job."""

    job_id: str | None = None
    cursor: str | None = None
    limit: int = limits.PAGE_ITEMS_DEFAULT


class ExplainCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`cell.explain`: the plan that a command job with these params would get. Nothing is started."""

    params: CommandParams


# ---- replies


class SubmittedJob(JobView, frozen=True, kw_only=True):
    """The answer to `job.submit`; `result` is inline (as msgspec.Raw) when the job is terminal and it is small."""

    result: Any = None


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """`health`: `status` is `ok` or `degraded`; every role with its state."""

    status: str
    version: str
    api_version: str
    schema_version: str
    node_id: str
    tenant_id: str
    principal: str
    time: str
    uptime_s: int
    roles: tuple[RoleHealth, ...]


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.explain`: the plan as text lines and as data; what this host cannot enforce, with remedies. `bundle` is
    the config.json that an OCI runtime would be given; null for the native driver."""

    plan_digest: str
    lines: tuple[str, ...]
    plan: dict[str, Any]
    missing: dict[str, str]
    bundle: dict[str, Any] | None = None


class Doctor(msgspec.Struct, frozen=True, kw_only=True):
    """`node.doctor`: what this machine can enforce. Each check: name, ok, value, reason, remedy."""

    checks: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class RawReply:
    """Bytes as they stand."""

    body: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class FileReply:
    """`size_bytes` bytes from `offset` of `fd`; the transport sends them and closes `fd`."""

    fd: int
    offset: int
    size_bytes: int
    media_type: str
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class StreamReply:
    """A stream of chunks, pulled at the client's pace; closed (`aclose`) when the client goes."""

    chunks: AsyncIterator[bytes]
    media_type: str


Reply = msgspec.Struct | RawReply | FileReply | StreamReply
