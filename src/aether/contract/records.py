"""Audit records: one shape for all, so that readers need one parser; what does not apply is null.

A record commits to documents that repeat (policy, sandbox report, plan) by digest and to personal data by
salted digest only. It holds no floats: amounts are integers, times are RFC 3339 text. Its canonical JSON is
one entry of the log; `log_index` is that entry's index.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from aether.contract.cells import ExitStatus, Usage
from aether.contract.errors import ErrorBody
from aether.contract.jobs import ArtifactRef

RECORD_SCHEMA_VERSION: Final = "1.0"

RecordType = Literal[
    "node.started",
    "node.stopped",
    "ticket.minted",
    "ticket.revoked",
    "ticket.key-rotated",
    "key.created",
    "pki.created",
    "pki.rotated",
    "pki.issued",
    "issuers.loaded",
    "policy.loaded",
    "access.denied",
    "document.stored",
    "audit.pruned",
    "audit.key-rotated",
    "audit.epoch",
    "image.imported",
    "image.removed",
    "job.intent",
    "job.started",
    "job.stop",
    "job.outcome",
    "job.signal",
    "job.attach",
    "job.trace",
    "cell.allocated",
    "cell.started",
    "cell.frozen",
    "cell.thawed",
    "cell.resized",
    "cell.trace",
    "cell.put",
    "cell.freed",
    "cell.lost",
    "egress.opened",
    "egress.connection",
    "egress.closed",
    "budget.set",
    "budget.raised",
    "budget.exhausted",
    "quota.set",
    "approval.requested",
    "approval.granted",
    "approval.denied",
    "approval.expired",
]


class TicketRef(msgspec.Struct, frozen=True, kw_only=True):
    """The capability that was shown: the ids of its links, root first. Never the ticket's text or tail."""

    kid: str
    role: str
    link_ids: tuple[str, ...]
    implicit: bool


class QuestionRef(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the policy was asked, as far as the record does not say it elsewhere: enough to ask another policy the same.

    `operation`, `kind` and `id` are those of the question, which differ from the record's where that belongs to a job;
    `principal_tenant` is the asker's, which a refusal does not say elsewhere.
    `tenant_id` and `owner` are the resource's. Where hosts, credentials and paths are too long to keep, they are left
    out and `complete` is false. What has a default is left out where it has it.
    """

    operation: str
    roles: tuple[str, ...]
    principal_kind: str
    principal_tenant: str
    kind: str
    op: str | None = None
    model: str | None = None
    id: str | None = None
    labels: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    credentials: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    raises: bool = False
    owner: str | None = None
    tenant_id: str | None = None
    intent: str | None = None
    provider: str | None = None
    route: str | None = None
    complete: bool = True


class ShadowRef(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy on trial would have decided; it decided nothing."""

    digest: str
    decision: Literal["allow", "deny"]
    determining: tuple[str, ...]


class PolicyRef(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The decision: the digest of the policy set that took it and the ids of the policies that decided. The question,
    and what a policy on trial would have decided, are left out where there was none."""

    digest: str
    decision: Literal["allow", "deny"]
    determining: tuple[str, ...]
    question: QuestionRef | None = None
    shadow: ShadowRef | None = None


class BudgetRef(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A movement on accounts: reserved by an intent, spent by an outcome. `reservation_id` joins the two.

    `accounts` are the links of the ticket. Charged are those that `limits` names, with what each may spend by unit: a
    link, or `tenant:<id>`. `amounts` are those of units that have no field of their own; `grants` is what the cell may
    use at most (`cpu_millis`, `memory_bytes`); `expires_ms` is when the ticket ends (epoch). These four are left out
    where they are empty.
    """

    reservation_id: str
    accounts: tuple[str, ...]
    ops: int
    cpu_ms: int
    settled: bool
    amounts: dict[str, int] = {}
    limits: dict[str, dict[str, int]] = {}
    grants: dict[str, int] = {}
    expires_ms: int | None = None


class CodeRef(msgspec.Struct, frozen=True, kw_only=True):
    """What ran: a model package's digest, or the digest of the cell plan of a command."""

    model_digest: str | None = None
    plan_digest: str | None = None
    sandbox_digest: str | None = None
    route: str | None = None
    engine: str | None = None
    rung: str | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One audit entry. `detail` is a short flat map of text for what only one type needs."""

    schema_version: str = RECORD_SCHEMA_VERSION
    type: RecordType
    log_index: int
    time: str
    node_id: str
    tenant_id: str | None = None
    principal: str | None = None
    request_id: str | None = None
    traceparent: str | None = None
    operation: str | None = None
    effect: str | None = None
    job_id: str | None = None
    attempt: int | None = None
    kind: str | None = None
    op: str | None = None
    model_id: str | None = None
    model_version: str | None = None
    input_hash: str | None = None
    idempotency_hash: str | None = None
    labels: tuple[str, ...] = ()
    ticket: TicketRef | None = None
    policy: PolicyRef | None = None
    budget: BudgetRef | None = None
    code: CodeRef | None = None
    cell_id: str | None = None
    state: str | None = None
    exit: ExitStatus | None = None
    error: ErrorBody | None = None
    usage: Usage | None = None
    result_digest: str | None = None
    result_bytes: int | None = None
    artifacts: tuple[ArtifactRef, ...] = ()
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    timings_us: dict[str, int] = {}
    detail: dict[str, str] = {}


class InclusionProof(msgspec.Struct, frozen=True, kw_only=True):
    """RFC 6962 audit path of entry `log_index` in the tree of the receipt's checkpoint; base64 hashes."""

    hashes: tuple[str, ...]
    log_index: int


class ReceiptEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One record of the job: `entry` is the exact canonical JSON text that was logged."""

    entry: str
    proof: InclusionProof


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The joined proof of one job; a view computed from records. Verifies offline with the public key.

    `documents` maps a digest to the canonical JSON text it stands for (sandbox report, plan, policy set).
    `verdict` is a signed note by the authority: it verified the ticket whose link ids the intent names.
    Its fields, and those of its parts, stand in sorted order: then however it is encoded, its bytes are canonical.
    """

    checkpoint: str
    documents: dict[str, str]
    entries: tuple[ReceiptEntry, ...]
    job_id: str
    origin: str
    receipt_version: str
    verdict: str
