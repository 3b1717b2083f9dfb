"""Rows of the operations table about the audit log."""

from __future__ import annotations

import re
from typing import Any, Final, get_args

from aether.api import params
from aether.api.operation import JSON_ERRORS, WRITE_ERRORS, Operation
from aether.api.watchoperations import LINES
from aether.contract import auditcalls, calls, limits
from aether.contract.errors import AetherError
from aether.contract.records import RecordType

_TYPES: Final[tuple[str, ...]] = get_args(RecordType)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9:/._@+=#%|~-]{0,254}", re.ASCII)
_LINK: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_DATE: Final = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME: Final = re.compile(rf"({_DATE}T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9])(\.([0-9]{{1,6}}))?Z", re.ASCII)
_INDEX_SCHEMA: Final[dict[str, Any]] = {"type": "integer", "minimum": 0, "maximum": (1 << 53) - 1}


def _refuse(name: str, text: str, why: str) -> AetherError:
    return AetherError("BAD_REQUEST", f"cannot read parameter {name}={text[:80]!r}: {why}")


def parse_type(text: str) -> str:
    """A type of record."""
    if text not in _TYPES:
        raise _refuse("type", text, f"not one of {', '.join(_TYPES)}")
    return text


def parse_name(text: str) -> str:
    """The name of a principal or tenant."""
    if _NAME.fullmatch(text) is None:
        raise _refuse("principal or tenant", text, "not a name such as uid:1000")
    return text


def parse_link(text: str) -> str:
    """The id of a ticket's link."""
    if _LINK.fullmatch(text) is None:
        raise _refuse("ticket", text, "not the id of a link, 32 hex digits")
    return text


def parse_time(text: str) -> str:
    """RFC 3339 UTC, with six decimals when it comes out."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise _refuse("since or until", text, "not a time such as 2026-09-21T13:33:20Z")
    return f"{match[1]}.{match[6] or '':0<6}Z"


def parse_order(text: str) -> str:
    """`newest` or `oldest`."""
    if text not in get_args(auditcalls.Order):
        raise _refuse("order", text, "not one of newest, oldest")
    return text


def _name(name: str, field: str, summary: str) -> params.Param:
    return params.Param(name, field, {"type": "string", "pattern": f"^{_NAME.pattern}$"}, parse_name, summary)


def _time(name: str, summary: str) -> params.Param:
    schema = {"type": "string", "pattern": f"^{_TIME.pattern}$", "examples": ["2026-09-21T13:33:20Z"]}
    return params.Param(name, name, schema, parse_time, summary)


def _index(name: str, summary: str) -> params.Param:
    return params.Param(name, name, _INDEX_SCHEMA, params.parse_offset, summary)


_ORDER: Final = params.Param(
    "order",
    "order",
    {"type": "string", "enum": ["newest", "oldest"], "default": "newest"},
    parse_order,
    "Which records come first.",
)
_LINK_ID: Final = params.Param(
    "ticket",
    "ticket",
    {"type": "string", "pattern": f"^{_LINK.pattern}$"},
    parse_link,
    "Only what was done with a ticket that has this link.",
)
_TYPE: Final = params.Param(
    "type",
    "type",
    {"type": "array", "items": {"type": "string", "enum": list(_TYPES)}},
    parse_type,
    "Only records of this type; may be repeated.",
    repeats=True,
)
_FOLLOW: Final = params.Param(
    "follow",
    "follow",
    {"type": "string", "enum": ["1", "true", "0", "false"], "default": "0"},
    params.parse_flag,
    "Go on with the records that are written meanwhile, for as long as the ticket holds.",
)
_FILTER: Final = (
    _TYPE,
    _name("principal", "principal", "Only what this principal did."),
    _name("tenant", "tenant", "Only this tenant's records."),
    params.Param("job", "job_id", params.JOB_ID_SCHEMA, params.parse_job, "Only records of this job."),
    params.Param(
        "cell", "cell", params.CELL_SCHEMA, params.parse_cell, "Only records of this cell: its id or its name."
    ),
    _LINK_ID,
    _time("since", "Only records from this time on."),
    _time("until", "Only records before this time."),
    _index("start", "Only records from this index on."),
    _index("end", "Only records before this index."),
)
_ERRORS: Final = ("BAD_FIELD", "BAD_ID", "NOT_FOUND", "NO_SUCH_CELL")

AUDIT_OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        name="audit.checkpoint",
        method="GET",
        path="/v0/audit/checkpoint",
        summary="The signed checkpoint of the audit log (C2SP tlog-checkpoint note); keep it elsewhere.",
        request=calls.Nothing,
        reply=calls.RawReply,
        access="read",
        effect="read",
        idempotent=True,
        media_type="text/plain",
    ),
    Operation(
        name="audit.growth",
        method="GET",
        path="/v0/audit/growth",
        summary="The newest checkpoint and the proof that it contains the first `size` records (RFC 9162).",
        request=auditcalls.AuditGrowth,
        reply=auditcalls.GrowthProof,
        access="read",
        effect="read",
        idempotent=True,
        query=(_index("size", "How many records the older checkpoint has; 0 asks for no proof."),),
        errors=("NOT_FOUND",),
    ),
    Operation(
        name="audit.witnesses",
        method="GET",
        path="/v0/audit/witnesses",
        summary="The witnesses that the node lists, and what each cosigned last.",
        request=calls.Nothing,
        reply=auditcalls.Witnesses,
        access="read",
        effect="read",
        idempotent=True,
        errors=("BAD_FIELD",),
    ),
    Operation(
        name="audit.cosign",
        method="POST",
        path="/v0/audit/cosignatures",
        summary="Hand over what witnesses cosigned; only what verifies under the keys that the node lists is kept.",
        request=auditcalls.CosignCall,
        reply=auditcalls.Witnesses,
        access="control",
        effect="control",
        idempotent=True,
        body="json",
        body_type=auditcalls.CosignCall,
        errors=(*JSON_ERRORS, *WRITE_ERRORS, "NOT_FOUND", "VERIFY_FAILED"),
    ),
    Operation(
        name="audit.retain",
        method="POST",
        path="/v0/audit/retain",
        summary="Take away old records; their hashes stay, so that every proof still holds.",
        request=auditcalls.RetainCall,
        reply=auditcalls.Retained,
        access="control",
        effect="control",
        idempotent=True,
        body="json",
        body_type=auditcalls.RetainCall,
        errors=(*JSON_ERRORS, *WRITE_ERRORS, "LOG_CORRUPT"),
    ),
    Operation(
        name="audit.rotate-key",
        method="POST",
        path="/v0/audit/rotate-key",
        summary="Sign the log with a new key from now on; the authority starts again for it, cells live on.",
        request=calls.Nothing,
        reply=auditcalls.AuditKeyRotated,
        access="control",
        effect="control",
        idempotent=False,
        errors=(*WRITE_ERRORS, "STATE_UNUSABLE"),
    ),
    Operation(
        name="audit.query",
        method="GET",
        path="/v0/audit/records",
        summary=f"Records of the audit log that fit; a call looks at {limits.AUDIT_SEARCH_RECORDS_MAX} at most.",
        request=auditcalls.AuditQuery,
        reply=auditcalls.AuditPage,
        access="read",
        effect="read",
        idempotent=True,
        query=(*_FILTER, _ORDER, _index("cursor", "Go on from the previous page: its `next_cursor`."), params.LIMIT),
        errors=_ERRORS,
    ),
    Operation(
        name="audit.tail",
        method="GET",
        path="/v0/audit/tail",
        summary="Records as they are written, one canonical JSON text per line.",
        request=auditcalls.AuditTail,
        reply=calls.StreamReply,
        access="read",
        effect="read",
        idempotent=True,
        query=(*_FILTER, _index("cursor", "Begin at this index; at the end of the log otherwise."), _FOLLOW),
        streaming="server",
        media_type=LINES,
        errors=_ERRORS,
    ),
    Operation(
        name="audit.export",
        method="GET",
        path="/v0/audit/export",
        summary="Records with the proofs that lead to a signed checkpoint, as JSON lines that verify offline.",
        request=auditcalls.AuditExport,
        reply=calls.StreamReply,
        access="read",
        effect="read",
        idempotent=True,
        query=_FILTER,
        streaming="server",
        media_type=LINES,
        errors=_ERRORS,
    ),
)
