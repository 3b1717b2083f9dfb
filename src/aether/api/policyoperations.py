"""Rows of the operations table about the policy."""

from __future__ import annotations

import re
from typing import Final

from aether.api import params
from aether.api.operation import JOB_ERRORS, JSON_ERRORS, WRITE_ERRORS, Operation
from aether.contract import calls, policycalls
from aether.contract.errors import AetherError

_DIGEST: Final = re.compile(policycalls.DIGEST_PREFIX_PATTERN)


def parse_digest(text: str) -> str:
    """A digest, or 6 or more of its first hex digits."""
    if _DIGEST.fullmatch(text) is None:
        raise AetherError("BAD_REQUEST", f"cannot read parameter digest={text[:80]!r}: not the begin of a digest")
    return text


_VERSION: Final = params.Param(
    "digest",
    "digest",
    {"type": "string", "pattern": policycalls.DIGEST_PREFIX_PATTERN},
    parse_digest,
    "The version of that digest, or of its first hex digits; without it the one in force.",
)


def _reading(name: str, summary: str, request: type, reply: type, *errors: str, access: str = "admin") -> Operation:
    return Operation(
        name=name,
        method="POST",
        path=f"/v0/policy/{name.partition('.')[2]}",
        summary=summary,
        request=request,
        reply=reply,
        access=access,  # type: ignore[arg-type]
        effect="read",
        idempotent=True,
        body="json",
        body_type=request,
        errors=(*JSON_ERRORS, *errors),
    )


def _changing(name: str, summary: str, request: type, reply: type, *errors: str) -> Operation:
    return Operation(
        name=name,
        method="POST",
        path=f"/v0/policy/{name.partition('.')[2]}",
        summary=summary,
        request=request,
        reply=reply,
        access="admin",
        effect="control",
        idempotent=True,
        body="json",
        body_type=request,
        errors=(*JSON_ERRORS, *WRITE_ERRORS, "BAD_POLICY", "POLICY_LOCKOUT", *errors),
    )


POLICY_OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        name="policy.show",
        method="GET",
        path="/v0/policy",
        summary="The policy in force, or an earlier version: its text and the names of its policies.",
        request=policycalls.VersionCall,
        reply=policycalls.PolicyView,
        access="read",
        effect="read",
        idempotent=True,
        query=(_VERSION,),
        errors=("NOT_FOUND", "BAD_FIELD"),
    ),
    Operation(
        name="policy.list",
        method="GET",
        path="/v0/policy/versions",
        summary="The versions that were loaded, newest first, and the policy on trial.",
        request=calls.Nothing,
        reply=policycalls.Versions,
        access="read",
        effect="read",
        idempotent=True,
    ),
    _reading(
        "policy.explain",
        "A decision and how every policy stood to it: on a question, or on the job that was admitted.",
        policycalls.ExplainPolicyCall,
        policycalls.Decided,
        *JOB_ERRORS,
        access="read",
    ),
    _reading(
        "policy.check",
        "What is wrong with a policy's text, with lines and columns.",
        policycalls.PolicyText,
        policycalls.Checked,
    ),
    _reading(
        "policy.test",
        "Whether a table of questions is decided as expected, by a policy or by the one in force.",
        policycalls.TestCall,
        policycalls.Tested,
        "BAD_POLICY",
    ),
    _reading(
        "policy.diff",
        "What another policy changes: policies by name, and decisions over every role and operation.",
        policycalls.PolicyText,
        policycalls.Difference,
        "BAD_POLICY",
    ),
    _reading(
        "policy.counterfactual",
        "The recorded decisions of a period, taken again by another policy: which would change.",
        policycalls.CounterfactualCall,
        policycalls.Counterfactual,
        "BAD_POLICY",
        "LOG_CORRUPT",
    ),
    _changing(
        "policy.load",
        "Put another policy in force: examined, recorded, then effective at once.",
        policycalls.LoadCall,
        policycalls.Version,
    ),
    _changing(
        "policy.rollback",
        "Put an earlier version in force again, and end a trial.",
        policycalls.RollbackCall,
        policycalls.Version,
        "NOT_FOUND",
    ),
    _changing(
        "policy.trial",
        "Try a policy on a share of the principals, enforced or only recorded; or end the trial.",
        policycalls.TrialCall,
        policycalls.Versions,
    ),
)
