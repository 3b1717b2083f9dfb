"""What an operation is about, and what the policy is asked about it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, TypedDict

from aether.contract.jobs import JobRequest
from aether.contract.network import LEARN
from aether.contract.records import PolicyRef, QuestionRef, ShadowRef
from aether.substrate.access.identity import Principal
from aether.substrate.access.policy import Decides, Decision, Question

_LISTS_CHARS_MAX: Final = 16 * 1024
MAKES: Final = frozenset({"cell.allocate", "cell.unisolate"})
"""What names something that is not there yet."""


@dataclass(frozen=True, slots=True)
class Resource:
    """What an operation is about. `kind` is the job's in `job.submit`, else `job`, `cell`, `artifact`, `audit`, `node`,
    ...: the entity type in small letters. `owner` (a principal) and `tenant` are its own; null stands for the caller's.

    `model` is `id` or `id@version`.
    """

    kind: str
    op: str | None = None
    model: str | None = None
    labels: tuple[str, ...] = ()
    id: str | None = None
    hosts: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    credentials: tuple[str, ...] = ()
    """`host:port source` of each secret that a job wants to be sent."""
    raises: bool = False
    """Whether a cell is to be scheduled before others."""
    owner: str | None = None
    tenant: str | None = None
    intent: str | None = None
    provider: str | None = None
    route: str | None = None


def questions(operation: str, resource: Resource) -> Iterator[Question]:
    """What the policy is asked: the operation; for a job with a network that, learning, each credential and each file
    that one lies in; and for one that goes before others that."""

    def asked(name: str, kind: str = resource.kind, **more: object) -> Question:
        about = {"labels": resource.labels, "owner": resource.owner, "tenant": resource.tenant, "route": resource.route}
        return Question(name, kind, **(about | more))  # type: ignore[arg-type]

    yield asked(
        operation, op=resource.op, model=resource.model, id=resource.id,
        intent=resource.intent, provider=resource.provider,
    )  # fmt: skip
    if resource.hosts:
        yield asked("job.network", hosts=resource.hosts)
    if LEARN in resource.hosts:
        yield asked("job.learn")
    if resource.raises:
        yield asked("cell.prioritize", id=resource.id)
    for credential in resource.credentials:
        yield asked("job.credential", id=credential)
    for path in resource.paths:
        yield asked("path.read", "path", id=path.partition(":")[2])


@dataclass(frozen=True, slots=True)
class Answer:
    """The decision on all that a request asks; `role` and `operation` are those of the question that decided, `errors`
    why it could not be evaluated."""

    ref: PolicyRef
    role: str
    operation: str
    errors: tuple[str, ...] = ()


def ask(
    policy: Decides, principal: Principal, roles: tuple[str, ...], operation: str, resource: Resource, now_ns: int
) -> Answer:
    """Asks for every role of a ticket (one at least): the first refusal, else the leave."""
    determining: set[str] = set()
    shadows: list[Decision] = []
    for role in roles:
        for question in questions(operation, resource):
            decision = policy.decide(principal, role, question, now_ns)
            shadows.extend([] if decision.shadow is None else [decision.shadow])
            determining.update(decision.determining)
            if not decision.allow:
                determining = set(decision.determining)
                break
        if not decision.allow:
            break
    ref = PolicyRef(
        digest=decision.digest,
        decision=decision.outcome,
        determining=tuple(sorted(determining)),
        question=_asked(principal, roles, operation, resource),
        shadow=_shadow(shadows),
    )
    return Answer(ref, role, question.operation, decision.errors)


def callers_own(principal: Principal, operation: str, resource: Resource) -> Resource:
    """The resource as the caller's own, where it names no other: what is made, and what is listed."""
    if resource.id is not None and operation not in MAKES:
        return resource
    return replace(resource, owner=principal.name, tenant=principal.tenant_id)


def _shadow(decisions: list[Decision]) -> ShadowRef | None:
    """What a policy on trial would have said to the questions that were put; those after a refusal were not."""
    if not decisions:
        return None
    refused = next((decision for decision in decisions if not decision.allow), None)
    names = refused.determining if refused else sorted({name for each in decisions for name in each.determining})
    return ShadowRef(digest=decisions[0].digest, decision="deny" if refused else "allow", determining=tuple(names))


def _asked(principal: Principal, roles: tuple[str, ...], operation: str, resource: Resource) -> QuestionRef:
    hosts, credentials, paths = resource.hosts, resource.credentials, resource.paths
    complete = sum(len(item) for items in (hosts, credentials, paths) for item in items) <= _LISTS_CHARS_MAX
    return QuestionRef(
        operation=operation,
        roles=roles,
        principal_kind=principal.kind,
        principal_tenant=principal.tenant_id,
        kind=resource.kind,
        op=resource.op,
        model=resource.model,
        id=resource.id,
        labels=resource.labels,
        hosts=hosts if complete else (),
        credentials=credentials if complete else (),
        paths=paths if complete else (),
        raises=resource.raises,
        owner=resource.owner,
        tenant_id=resource.tenant,
        intent=resource.intent,
        provider=resource.provider,
        route=resource.route,
        complete=complete,
    )


def resource_of(asked: QuestionRef) -> Resource:
    """The resource that a recorded question was about, but for the cells that only a ticket looks at."""
    return Resource(
        kind=asked.kind, op=asked.op, model=asked.model, labels=asked.labels, id=asked.id, hosts=asked.hosts,
        paths=asked.paths, credentials=asked.credentials, raises=asked.raises, owner=asked.owner,
        tenant=asked.tenant_id, intent=asked.intent, provider=asked.provider, route=asked.route,
    )  # fmt: skip


class Routed(TypedDict):
    """What is known of a job's route before it is routed."""

    intent: str | None
    provider: str | None
    route: str | None


def routed(request: JobRequest) -> Routed:
    """An intent's name (its op), a provider's, and where the work would go: an intent does not say yet."""
    kind, named = str(request.kind), request.params.get("provider")
    return Routed(
        intent=request.op if kind == "intent" else None,
        provider=named if kind == "provider" and isinstance(named, str) else None,
        route={"intent": None, "provider": "api"}.get(kind, "local"),
    )
