"""What a row of the operations table is, who may ask, and the error codes that rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from aether.api import params
from aether.contract.errors import ErrorBody
from aether.contract.jobs import Effect

Access = Literal["open", "read", "submit", "control", "admin"]
ACCESS: Final[Mapping[str, str]] = {
    "open": "any principal that can connect",
    "read": "a principal whose ticket and the policy allow reading its tenant's objects",
    "submit": "a principal whose ticket and the policy allow this job; spends one `ops` of the budget",
    "control": "a principal whose ticket and the policy allow changing the tenant's objects; spends one `ops`",
    "admin": "a principal whom ticket and policy let administer the node, by default the operator",
}
Streaming = Literal["none", "server", "upload", "both"]
Body = Literal["none", "json", "optional_json", "raw"]

COMMON_ERRORS: Final = (
    "BAD_REQUEST",
    "UNAUTHENTICATED",
    "BAD_CREDENTIAL",
    "CREDENTIAL_EXPIRED",
    "CREDENTIAL_REVOKED",
    "BAD_TICKET",
    "TICKET_EXPIRED",
    "TICKET_REVOKED",
    "TICKET_DENIED",
    "POLICY_DENIED",
    "REQUEST_TIMEOUT",
    "TOO_LARGE",
    "HEADERS_TOO_LARGE",
    "BUSY",
    "UNAVAILABLE",
    "DRAINING",
    "INTERNAL",
    "PROTOCOL",
)
WRITE_ERRORS: Final = ("BUDGET_EXHAUSTED", "DISK_FULL")
KEYED_ERRORS: Final = ("IDEMPOTENCY_CONFLICT", "ANSWER_NOT_KEPT")
JSON_ERRORS: Final = ("BAD_JSON", "BAD_FIELD", "MEDIA_TYPE")
MODEL_ERRORS: Final = (
    "NO_SUCH_MODEL", "NONFINITE", "SHAPE", "UNIT", "DT_NONPOSITIVE", "DT_OUT_OF_RANGE", "STATE_MODEL_MISMATCH",
    "ENGINE_DIED",
)  # fmt: skip
CELL_ERRORS: Final = ("LEVEL_UNMET", "BAD_PLAN", "CELL_LIMIT", "CELL_FAILED")


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is not a success."""

    error: ErrorBody
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One row. `request` is what the handler gets: path arguments and query parameters fill its fields, the
    decoded body fills `body_field`, or its own fields when that is empty.
    """

    name: str
    method: str
    path: str
    summary: str
    request: type
    reply: type
    access: Access
    effect: Effect
    idempotent: bool
    aliases: tuple[str, ...] = ()
    query: tuple[params.Param, ...] = ()
    body: Body = "none"
    body_type: type | None = None
    body_field: str = ""
    streaming: Streaming = "none"
    descriptor: bool = False
    media_type: str = "application/json"
    statuses: tuple[int, ...] = (200,)
    errors: tuple[str, ...] = ()
    tells_secret: bool = False
    """Its answer holds a secret, which is not kept for a repeated call."""

    @property
    def keyed(self) -> bool:
        """Whether it takes an Idempotency-Key: all that changes something, but for a connection that is taken over,
        of which there is no answer to repeat."""
        return self.effect != "read" and self.streaming != "both"

    @property
    def all_errors(self) -> tuple[str, ...]:
        """Every code this operation may answer."""
        return tuple(dict.fromkeys((*COMMON_ERRORS, *self.errors, *(KEYED_ERRORS if self.keyed else ()))))

    @property
    def path_argument(self) -> str | None:
        """The one argument in the path, such as `job_id` or `digest`, if there is one."""
        return self.path.partition("{")[2].partition("}")[0] or None


JOB_PATH: Final = "/v0/jobs/{job_id}"
JOB_ERRORS: Final = ("BAD_ID", "NOT_FOUND")
