"""Calls about the policy: its versions, its decisions, and what another one would decide."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Outcome = Literal["allow", "deny"]
Mode = Literal["enforced", "shadow"]
"""How a policy on trial counts: it decides, or what it would decide is only recorded."""
DIGEST_PREFIX_PATTERN: Final = r"^(sha256:)?[0-9a-f]{6,64}$"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a policy's text, and where: lines and columns count characters from 1."""

    line: int
    column: int
    message: str
    policy: str = ""


class PolicyText(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`policy.check`, `policy.diff`: a policy set in Cedar's syntax."""

    policy: str


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `policy.check`: `policies` are the names of what the set holds when there is no problem."""

    ok: bool
    digest: str
    policies: tuple[str, ...]
    problems: tuple[Problem, ...]


class LoadCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`policy.load`. With `force` also a policy under which nobody could load another."""

    policy: str
    force: bool = False


class RollbackCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`policy.rollback`: to the version of that digest (6 or more of its hex digits)."""

    digest: str
    force: bool = False


class TrialCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`policy.trial`: tries a policy on a share of the principals, or ends the trial when `policy` is null."""

    policy: str | None = None
    share_percent: int = 10
    mode: Mode = "shadow"
    force: bool = False


class VersionCall(msgspec.Struct, frozen=True, kw_only=True):
    """`policy.show`: the loaded policy, or the version of that digest (6 or more of its hex digits)."""

    digest: str | None = None


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A policy that was loaded. `principal` is null where the node took it up at its start."""

    number: int
    digest: str
    loaded_at: str
    log_index: int
    principal: str | None = None


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """The policy on trial."""

    digest: str
    share_percent: int
    mode: Mode
    since: str
    log_index: int


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """`policy.list`: the versions, newest first, the first of them loaded; and the trial beside it."""

    versions: tuple[Version, ...]
    trial: Trial | None = None


class PolicyView(msgspec.Struct, frozen=True, kw_only=True):
    """`policy.show`: a version and its text."""

    version: Version
    loaded: bool
    policies: tuple[str, ...]
    text: str
    trial: Trial | None = None


class Asking(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A question to a policy: somebody asks for an operation on a resource. `kind` is the resource's (a job's own kind
    for `job.submit`); null for the one that the operation is about. `owner` and `tenant_id` are the resource's, null
    for the asker's own; `time` is RFC 3339 UTC, null for now."""

    operation: str
    principal: str = "uid:0"
    principal_kind: str = "user"
    role: str = "user"
    principal_tenant: str = "default"
    kind: str | None = None
    id: str | None = None
    op: str | None = None
    model: str | None = None
    labels: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    owner: str | None = None
    tenant_id: str | None = None
    intent: str | None = None
    provider: str | None = None
    route: str | None = None
    time: str | None = None


class ExplainPolicyCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`policy.explain`: the decision on a question, or the recorded one that admitted a job; exactly one of them."""

    asking: Asking | None = None
    job_id: str | None = None


class RuleVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """How one policy stood to a question: it decided; it applied, but something else decided; its scope names another
    principal, action or resource; its conditions are not met; it could not be evaluated."""

    policy: str
    effect: Literal["permit", "forbid"]
    verdict: Literal["decided", "applied", "principal", "action", "resource", "condition", "error"]
    why: str


class Decided(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `policy.explain`. `asked` is the question under the role that decided."""

    allow: bool
    digest: str
    asked: Asking
    determining: tuple[str, ...]
    errors: tuple[str, ...]
    policies: tuple[RuleVerdict, ...]


class Case(Asking, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One row of `policy.test`: what is expected of a question; `policies`, where given, are those that decide."""

    expect: Outcome
    policies: tuple[str, ...] | None = None
    name: str = ""


class TestCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`policy.test`: against `policy`, or the loaded one where that is null."""

    cases: tuple[Case, ...]
    policy: str | None = None


class CaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """How one case came out."""

    number: int
    name: str
    passed: bool
    expected: Outcome
    decision: Outcome
    policies: tuple[str, ...]
    why: str = ""


class Tested(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `policy.test`."""

    digest: str
    passed: int
    failed: int
    results: tuple[CaseResult, ...]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A decision that would be another one. `determining` are the policies that decide before and after."""

    role: str
    operation: str
    kind: str
    before: Outcome
    after: Outcome
    determining_before: tuple[str, ...]
    determining_after: tuple[str, ...]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `policy.diff`: policies by name, and the decisions that change over every role and operation for a
    plain request: no labels, no hosts, the asker's own resource. `left_out` of them are only counted."""

    digest_before: str
    digest_after: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    decisions: tuple[Change, ...]
    left_out: int = 0


class CounterfactualCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`policy.counterfactual`: the recorded decisions of a period, taken again by `policy`. Times are RFC 3339 UTC,
    `until` is left out; `start` is the index of the first record that is looked at."""

    policy: str
    since: str | None = None
    until: str | None = None
    start: int = 0


class Reversal(msgspec.Struct, frozen=True, kw_only=True):
    """A recorded decision that the candidate would not take. `log_index` is its record."""

    log_index: int
    time: str
    principal: str
    tenant_id: str
    operation: str
    job_id: str | None
    before: Outcome
    after: Outcome
    determining_before: tuple[str, ...]
    determining_after: tuple[str, ...]


class Counterfactual(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `policy.counterfactual`. `undecidable` counts decisions whose records lack part of the question,
    by what they lack; `left_out` changes are only counted; `next_start` is where the next call goes on when one was
    not enough."""

    digest: str
    searched: int
    examined: int
    unchanged: int
    changed: tuple[Reversal, ...]
    undecidable: dict[str, int]
    left_out: int = 0
    next_start: int | None = None
