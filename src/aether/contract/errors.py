"""One error tree and one table: a stable code, its HTTP status, the CLI's exit code, the remedy.

Messages read "cannot X: why". A code is never renamed or reused; `docs/errors.md` is generated from this
table. An error crosses every boundary as `{"code", "message", "remedy", "details"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """What is fixed about a code: `http` status, `exit` code of the CLI, the general `remedy`."""

    http: int
    exit: int
    remedy: str


# CLI exit codes of our own start at 120, so that a job's exit code (0-119 in practice, 128+n for signals)
# is told apart from ours; see docs/operations.md.
EXIT_USAGE: Final = 2
EXIT_FAILED: Final = 120
EXIT_REFUSED: Final = 121
EXIT_UNREACHABLE: Final = 122
EXIT_VERIFY: Final = 123
EXIT_TIMEOUT: Final = 124

KINDS: Final[Mapping[str, ErrorKind]] = {
    # the request
    "BAD_REQUEST": ErrorKind(400, EXIT_USAGE, "see the request's schema in /openapi.json"),
    "BAD_JSON": ErrorKind(400, EXIT_USAGE, "send one JSON object encoded as UTF-8"),
    "BAD_ID": ErrorKind(400, EXIT_USAGE, "copy the id from the answer that named it"),
    "BAD_FIELD": ErrorKind(422, EXIT_USAGE, "see the request's schema in /openapi.json"),
    "TOO_LARGE": ErrorKind(413, EXIT_USAGE, "upload large inputs with PUT /v0/artifacts and name their digest"),
    "HEADERS_TOO_LARGE": ErrorKind(431, EXIT_USAGE, "send fewer or shorter headers"),
    "MEDIA_TYPE": ErrorKind(415, EXIT_USAGE, "send Content-Type: application/json"),
    "METHOD_NOT_ALLOWED": ErrorKind(405, EXIT_USAGE, "see the Allow header for the methods of this path"),
    "NO_SUCH_ROUTE": ErrorKind(404, EXIT_USAGE, "see /openapi.json for the paths"),
    "REQUEST_TIMEOUT": ErrorKind(408, EXIT_FAILED, "send the whole request without long pauses"),
    # things that are not there, or not any more
    "NOT_FOUND": ErrorKind(404, EXIT_FAILED, "list what exists with `aether job list` or `aether artifact list`"),
    "NO_SUCH_MODEL": ErrorKind(404, EXIT_FAILED, "list the models with `aether model list`"),
    "NOT_READY": ErrorKind(409, EXIT_FAILED, "wait until the job is terminal, for instance with ?wait=10s"),
    "NO_RESULT": ErrorKind(409, EXIT_FAILED, "read the job's error; only a succeeded job has a result"),
    "NOT_REPEATABLE": ErrorKind(409, EXIT_REFUSED, "replay it with --allow-effects if it may have its effects again"),
    "GONE": ErrorKind(410, EXIT_FAILED, "run the job again"),
    "IDEMPOTENCY_CONFLICT": ErrorKind(409, EXIT_USAGE, "use a new Idempotency-Key for another request"),
    "ANSWER_NOT_KEPT": ErrorKind(409, EXIT_FAILED, "the call was done once; read what it left, and use a new key"),
    # authority
    "UNAUTHENTICATED": ErrorKind(401, EXIT_REFUSED, "connect over the Unix socket or send a ticket"),
    "BAD_CREDENTIAL": ErrorKind(401, EXIT_REFUSED, "send a ticket, an API key or a token of an issuer known here"),
    "CREDENTIAL_EXPIRED": ErrorKind(401, EXIT_REFUSED, "get a new key, certificate or token"),
    "CREDENTIAL_REVOKED": ErrorKind(401, EXIT_REFUSED, "ask the operator for a new key or certificate"),
    "NO_PKI": ErrorKind(409, EXIT_FAILED, "make a certificate authority with `aether pki init`"),
    "BAD_TICKET": ErrorKind(401, EXIT_REFUSED, "mint a new ticket"),
    "TICKET_EXPIRED": ErrorKind(401, EXIT_REFUSED, "mint a new ticket"),
    "TICKET_REVOKED": ErrorKind(401, EXIT_REFUSED, "ask the operator for a new ticket"),
    "TICKET_DENIED": ErrorKind(403, EXIT_REFUSED, "use a ticket whose caveats allow this operation"),
    "TICKET_LIMIT": ErrorKind(429, EXIT_FAILED, "wait until tickets expire, or revoke a ticket instead of its links"),
    "POLICY_DENIED": ErrorKind(403, EXIT_REFUSED, "ask the operator; the answer names the deciding policies"),
    "BAD_POLICY": ErrorKind(422, EXIT_USAGE, "mend it where the message says; `aether policy check FILE` shows where"),
    "POLICY_LOCKOUT": ErrorKind(409, EXIT_REFUSED, "permit somebody to load another policy, or give --force"),
    "BUDGET_EXHAUSTED": ErrorKind(402, EXIT_REFUSED, "ask for a larger budget"),
    "APPROVAL_NEEDED": ErrorKind(
        403, EXIT_REFUSED, "have it approved with `aether approvals approve`, then repeat the same request"
    ),
    "APPROVAL_DENIED": ErrorKind(403, EXIT_REFUSED, "ask whoever denied it; the approval names them"),
    "APPROVAL_EXPIRED": ErrorKind(403, EXIT_REFUSED, "submit it again, and have it approved in time"),
    "APPROVAL_DECIDED": ErrorKind(409, EXIT_FAILED, "see `aether approvals show`; a new request needs a new approval"),
    "APPROVAL_LIMIT": ErrorKind(429, EXIT_FAILED, "wait until what waits is decided, or stop waiting jobs"),
    "LABEL_REFUSED": ErrorKind(
        403, EXIT_REFUSED, "run it without a network, in a cell that has none; see docs/labels.md"
    ),
    "NO_GRANT": ErrorKind(403, EXIT_REFUSED, "submit the job through the API"),
    # capacity
    "BUSY": ErrorKind(429, EXIT_FAILED, "retry after the time in Retry-After"),
    "UNAVAILABLE": ErrorKind(503, EXIT_UNREACHABLE, "retry after the time in Retry-After; see `aether health`"),
    "DRAINING": ErrorKind(503, EXIT_UNREACHABLE, "retry when the node is back"),
    "DISK_FULL": ErrorKind(507, EXIT_FAILED, "free space on the file system of $AETHER_STATE"),
    # cells
    "LEVEL_UNMET": ErrorKind(412, EXIT_REFUSED, "run `aether doctor` to see what this host can enforce"),
    "CELL_FAILED": ErrorKind(500, EXIT_FAILED, "the message names the step, the errno and the remedy"),
    "BAD_PLAN": ErrorKind(422, EXIT_USAGE, "see `aether cell explain`"),
    "NO_SUCH_CELL": ErrorKind(404, EXIT_FAILED, "the cell ended; see the job's receipt"),
    "NO_LAYER": ErrorKind(409, EXIT_FAILED, "run it with `--image ... --writable-root`, or with `--workspace`"),
    "NAME_TAKEN": ErrorKind(409, EXIT_FAILED, "use another name, or free or stop what has it"),
    "CELL_FROZEN": ErrorKind(409, EXIT_FAILED, "thaw the cell with `aether cell thaw`"),
    "LIMIT_REFUSED": ErrorKind(409, EXIT_FAILED, "choose a limit above what is used and within the cell around it"),
    "CELL_LIMIT": ErrorKind(429, EXIT_FAILED, "stop cells or wait until some end"),
    # jobs
    "JOB_FAILED": ErrorKind(200, EXIT_FAILED, "read the job's logs"),
    "TIMED_OUT": ErrorKind(200, EXIT_TIMEOUT, "raise the job's timeout"),
    "CANCELLED": ErrorKind(200, EXIT_FAILED, "the job was stopped on request"),
    "REVOKED": ErrorKind(200, EXIT_REFUSED, "the job's ticket was revoked; ask for a new one"),
    "LOST": ErrorKind(200, EXIT_FAILED, "the job may have had effects; check before you run it again"),
    "ABANDONED": ErrorKind(200, EXIT_FAILED, "the job never started; submit it again"),
    "OUT_OF_MEMORY": ErrorKind(200, EXIT_FAILED, "raise the job's memory limit"),
    "DISK_LIMIT": ErrorKind(200, EXIT_FAILED, "raise the job's disk limit with --disk, or let it keep less in /work"),
    "OUTPUT_REFUSED": ErrorKind(422, EXIT_FAILED, "declare regular files below the work directory"),
    "ENGINE_DIED": ErrorKind(503, EXIT_FAILED, "submit again; the model runtime is being restarted"),
    # models (422 with the reference's codes)
    "NONFINITE": ErrorKind(422, EXIT_USAGE, "remove NaN and infinite values from the input"),
    "SHAPE": ErrorKind(422, EXIT_USAGE, "match the shapes in the model's schema"),
    "UNIT": ErrorKind(422, EXIT_USAGE, "match the units and names in the model's schema"),
    "DT_NONPOSITIVE": ErrorKind(422, EXIT_USAGE, "times must increase strictly"),
    "DT_OUT_OF_RANGE": ErrorKind(422, EXIT_USAGE, "keep time steps within the model's dt_min and dt_max"),
    "STATE_MODEL_MISMATCH": ErrorKind(422, EXIT_USAGE, "use the state only with the model that made it"),
    "BAD_PACKAGE": ErrorKind(422, EXIT_FAILED, "install a package whose hashes and signature verify"),
    # images
    "BAD_IMAGE": ErrorKind(
        422, EXIT_FAILED, "save the image again as an OCI image layout: skopeo copy ... oci-archive:"
    ),
    # verification
    "VERIFY_FAILED": ErrorKind(422, EXIT_VERIFY, "the evidence was changed or belongs to another key"),
    "LOG_CORRUPT": ErrorKind(500, EXIT_VERIFY, "restore the audit log from a copy; do not start on it"),
    # this machine and ourselves
    "STATE_UNUSABLE": ErrorKind(500, EXIT_FAILED, "check the owner and mode of $AETHER_STATE"),
    "ALREADY_RUNNING": ErrorKind(409, EXIT_FAILED, "use the running instance or stop it with `aether down`"),
    "UNREACHABLE": ErrorKind(503, EXIT_UNREACHABLE, "start an instance with `aether up`"),
    "VERSION_MISMATCH": ErrorKind(503, EXIT_FAILED, "restart all roles from one installation"),
    "PROTOCOL": ErrorKind(500, EXIT_FAILED, "restart the roles; report this with the daemon logs"),
    "INTERNAL": ErrorKind(500, EXIT_FAILED, "report this with the request id and the daemon logs"),
}


class ErrorBody(msgspec.Struct, frozen=True):
    """An error as it travels. `details` is a flat JSON object, empty when there is nothing to add."""

    code: str
    message: str
    remedy: str
    details: dict[str, Any] = {}


@dataclass(slots=True)
class AetherError(Exception):
    """The one exception that crosses parts. `code` is a key of KINDS; an empty `remedy` means the kind's."""

    code: str
    message: str
    remedy: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    retry_after_s: int | None = None

    def __post_init__(self) -> None:
        Exception.__init__(self, self.message)
        if self.code not in KINDS:
            raise ValueError(f"unknown error code {self.code!r}")
        self.remedy = self.remedy or KINDS[self.code].remedy

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"

    @property
    def kind(self) -> ErrorKind:
        return KINDS[self.code]

    def body(self) -> ErrorBody:
        return ErrorBody(self.code, self.message, self.remedy, self.details)

    @classmethod
    def of(cls, body: ErrorBody) -> AetherError:
        """The exception for an error that arrived; an unknown code (a newer peer) becomes INTERNAL."""
        code = body.code if body.code in KINDS else "INTERNAL"
        return cls(code, body.message, body.remedy, body.details)
