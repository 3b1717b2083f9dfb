"""What a policy would decide, and why: explanations, tables of cases, differences, a second look at what was recorded.

Pure: policies and questions in, answers out. Nothing here is asked on the way of an operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

from aether.contract import limits
from aether.contract.clock import epoch_ns
from aether.contract.errors import AetherError
from aether.contract.policycalls import Asking, Case, CaseResult, Change, Difference, Reversal, RuleVerdict, Tested
from aether.contract.records import Record
from aether.substrate.access.identity import Principal, asker
from aether.substrate.access.policy import Decision, Policy, Question
from aether.substrate.access.questions import ask, resource_of
from aether.substrate.access.rules import Rule
from aether.substrate.access.schema import schema, type_of

_ALL: Final[dict[str, Any]] = {"op": "All"}
_ROLES: Final = ("queen", "user", "worker-heartbeat", "worker-gpu")
_LOADERS: Final = "policy.load"


def kind_of(operation: str) -> str:
    """The kind of resource that an operation is about, the first of several; raises AetherError BAD_FIELD."""
    types = schema().types.get(operation)
    if types is None:
        why = f"{operation[:80]!r} is no operation that a policy is asked about"
        raise AetherError("BAD_FIELD", f"cannot ask the policy: {why}", "see docs/policy.md for the actions")
    return types[0].lower()


def asked(asking: Asking, now_ns: int) -> tuple[Principal, Question, int]:
    """Who asks what, and when; raises AetherError BAD_FIELD."""
    kind = asking.kind if asking.kind is not None else kind_of(asking.operation)
    if type_of(kind) not in schema().types.get(asking.operation, ()):
        kind_of(asking.operation)
        raise AetherError("BAD_FIELD", f"cannot ask the policy: {asking.operation} is not asked of a {kind[:40]!r}")
    try:
        at_ns = now_ns if asking.time is None else epoch_ns(asking.time)
    except (ValueError, OverflowError) as error:
        raise AetherError("BAD_FIELD", f"cannot ask the policy: time {asking.time!r} is not RFC 3339") from error
    own = asking.id is None
    question = Question(
        asking.operation, kind, asking.op, asking.model, asking.labels, asking.id, asking.hosts or None,
        owner=asking.owner or (asking.principal if own else None),
        tenant=asking.tenant_id or (asking.principal_tenant if own else None),
        intent=asking.intent, provider=asking.provider, route=asking.route,
    )  # fmt: skip
    return asker(asking.principal, asking.principal_tenant, asking.principal_kind), question, at_ns


def recorded(record: Record) -> tuple[Asking, ...]:
    """The question of a recorded decision, once for every role of the ticket; empty where the record lacks it."""
    said = record.policy.question if record.policy is not None else None
    if said is None:
        return ()
    return tuple(
        Asking(
            operation=said.operation, principal=record.principal or "", principal_kind=said.principal_kind, role=role,
            principal_tenant=said.principal_tenant, kind=said.kind, id=said.id, op=said.op, model=said.model,
            labels=said.labels, hosts=said.hosts, owner=said.owner, tenant_id=said.tenant_id, intent=said.intent,
            provider=said.provider, route=said.route, time=record.time,
        )
        for role in said.roles
    )  # fmt: skip


# ---- why


def verdicts(policy: Policy, asking: Asking, now_ns: int) -> tuple[Decision, tuple[RuleVerdict, ...]]:
    """The decision, and how every policy stood to the question."""
    principal, question, at_ns = asked(asking, now_ns)
    decision = policy.decide(principal, asking.role, question, at_ns)

    def holds(rule: Rule) -> bool:
        return bool(policy.decide_by((rule,), principal, asking.role, question, at_ns).determining)

    def verdict(rule: Rule) -> RuleVerdict:
        alone = policy.decide_by((rule,), principal, asking.role, question, at_ns)
        if alone.errors:
            found, why = "error", alone.errors[0]
        elif alone.determining:
            decided = rule.name in decision.determining
            found = "decided" if decided else "applied"
            why = "" if decided else "a forbid outweighs it" if rule.effect == "permit" else "another policy failed"
        else:
            found, why = _unmet(rule, holds)
        return RuleVerdict(policy=rule.name, effect=rule.effect, verdict=found, why=why)  # type: ignore[arg-type]

    return decision, tuple(verdict(rule) for rule in policy.rules)


def _unmet(rule: Rule, holds: Any) -> tuple[str, str]:
    """Why a policy does not apply: the first part of its scope, or of its conditions, without which it would."""
    bare = _with(rule, conditions=[])
    if not holds(bare):
        for part in ("action", "principal", "resource"):
            others = {name: _ALL for name in ("action", "principal", "resource") if name != part}
            if not holds(_with(bare, **others)):
                return part, f"it is for another {part}"
        return "resource", "it is for another resource"
    for number, condition in enumerate(rule.body["conditions"], 1):
        if not holds(_with(rule, conditions=[condition])):
            reads = ", ".join(sorted(f"{variable}.{name}" for variable, name in rule.reads if name not in ("*", "is")))
            looks = f", which looks at {reads}" if reads else ""
            return "condition", f"its {condition['kind']} clause {number} is not met{looks}"
    return "condition", "its conditions are not met"


def _with(rule: Rule, **parts: Any) -> Rule:
    return replace(rule, body=rule.body | parts)


# ---- tables of cases


def run_cases(policy: Policy, cases: Iterable[Case], now_ns: int) -> Tested:
    """Every case, in order. Raises AetherError BAD_FIELD for one that no policy could be asked."""
    results = tuple(_run(policy, number, case, now_ns) for number, case in enumerate(cases, 1))
    passed = sum(result.passed for result in results)
    return Tested(digest=policy.digest, passed=passed, failed=len(results) - passed, results=results)


def _run(policy: Policy, number: int, case: Case, now_ns: int) -> CaseResult:
    try:
        principal, question, at_ns = asked(case, now_ns)
    except AetherError as error:
        raise AetherError(error.code, f"{error.message} (case {number})", error.remedy) from error
    decision = policy.decide(principal, case.role, question, at_ns)
    why = "; ".join(decision.errors)
    if decision.outcome != case.expect:
        why = why or f"expected {case.expect}"
    elif case.policies is not None and tuple(sorted(case.policies)) != decision.determining:
        why = f"expected {', '.join(sorted(case.policies)) or 'no policy'}"
    return CaseResult(
        number=number, name=case.name or f"{case.role} {case.operation}", passed=not why, expected=case.expect,
        decision=decision.outcome, policies=decision.determining, why=why,
    )  # fmt: skip


# ---- two policies


def compare(before: Policy, after: Policy, now_ns: int) -> Difference:
    """Which policies differ, and which decisions on plain requests, over every role that either names."""
    old, new = ({rule.name: _meaning(rule) for rule in policy.rules} for policy in (before, after))
    changes = list(_changes(before, after, now_ns))
    return Difference(
        digest_before=before.digest,
        digest_after=after.digest,
        added=tuple(sorted(new.keys() - old.keys())),
        removed=tuple(sorted(old.keys() - new.keys())),
        changed=tuple(sorted(name for name in old.keys() & new.keys() if old[name] != new[name])),
        decisions=tuple(changes[: limits.POLICY_CHANGES_MAX]),
        left_out=max(0, len(changes) - limits.POLICY_CHANGES_MAX),
    )


def _meaning(rule: Rule) -> Any:
    return {name: part for name, part in rule.body.items() if name != "annotations"}


def roles_of(*policies: Policy) -> tuple[str, ...]:
    """The roles that policies name in their scopes, beside those that the authority itself gives."""
    named = {
        entity["id"]
        for policy in policies
        for rule in policy.rules
        for scope in (rule.body["principal"], rule.body["principal"].get("in", {}))
        if (entity := scope.get("entity", {})).get("type") == "Role"
    }
    return (*_ROLES, *sorted(named - {*_ROLES, "node"}))


def _changes(before: Policy, after: Policy, now_ns: int) -> Iterator[Change]:
    for role in roles_of(before, after):
        for operation, types in sorted(schema().types.items()):
            for kind in types:
                asking = Asking(operation=operation, role=role, kind=kind.lower(), principal="uid:1000")
                principal, question, at_ns = asked(asking, now_ns)
                old, new = (policy.decide(principal, role, question, at_ns) for policy in (before, after))
                if old.allow != new.allow:
                    yield Change(
                        role=role, operation=operation, kind=kind.lower(), before=old.outcome, after=new.outcome,
                        determining_before=old.determining, determining_after=new.determining,
                    )  # fmt: skip


def locks_out(policy: Policy, loaders: Iterable[tuple[Principal, str]], now_ns: int) -> bool:
    """Whether none of those principals and roles could load another policy under it."""
    question = Question(_LOADERS, "policy")
    return not any(policy.decide(principal, role, question, now_ns).allow for principal, role in loaders)


# ---- the recorded decisions


def reconsider(policy: Policy, record: Record) -> Reversal | str | None:
    """What the policy would decide otherwise; what the record lacks to tell; None where nothing would change."""
    ref = record.policy
    if ref is None or ref.question is None:
        return "question"
    said = ref.question
    if not said.complete:
        return "hosts, credentials and paths"
    principal = asker(record.principal or "", said.principal_tenant, said.principal_kind)
    answer = ask(policy, principal, said.roles, said.operation, resource_of(said), epoch_ns(record.time))
    if answer.ref.decision == ref.decision:
        return None
    return Reversal(
        log_index=record.log_index,
        time=record.time,
        principal=principal.name,
        tenant_id=said.principal_tenant,
        operation=said.operation,
        job_id=record.job_id,
        before=ref.decision,
        after=answer.ref.decision,
        determining_before=ref.determining,
        determining_after=answer.ref.determining,
    )


def is_decision(record: Record) -> bool:
    """Whether the policy decided on what the record is about."""
    if record.type in _STATES or record.type.startswith("approval."):
        return False
    return record.policy is not None or (record.error is not None and record.error.code == "POLICY_DENIED")


_STATES: Final = frozenset({"policy.loaded", "node.started", "node.stopped", "job.outcome"})
