"""Policy: a Cedar policy set and its decisions. Pure: the clock is an argument.

A question becomes a Cedar request (docs/policy.md, "What a policy sees"):
- principal  `Principal::"uid:1000"`, in its `Role` and its `Tenant`, with `id`, `kind`, `tenant`;
- action     `Action::"<operation>"`, in its groups;
- resource   `<Type>::"<id>"`, in its `Tenant` (a `Model::"m@1"` also in `Model::"m"`), with `id`, `kind`, `labels` and,
  where they are known, `owner` and `tenant`;
- context    what is asked and when.

Cedar skips a policy whose evaluation errs, a forbid too; so any error in the diagnostics is a deny here. Policies are
validated against the schema when they are loaded, which leaves few ways to err.

Only the policies whose scope could apply are evaluated, and only what one of those reads is told (`_Slice`): the
others could not change the decision, and most of the time would go into telling. A decision is cached only where no
policy of its slice reads the time, labels or other attributes: then it depends on the key (principal, role, tenant,
operation, kind of resource and, where a policy names one, its id) alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Literal, Protocol, TypeVar

import cedarpy
import msgspec

from aether.contract.canonical import digest_bytes
from aether.contract.clock import calendar
from aether.contract.ids import Digest
from aether.substrate.access.identity import Principal
from aether.substrate.access.policytext import parse
from aether.substrate.access.rules import ANCESTORS, IDENTITY, WHOLE, Rule
from aether.substrate.access.schema import schema, type_of

_CACHED_MAX: Final = 4_096
_IN_KEY: Final = frozenset({("context", "kind"), ("context", "tenant"), ("resource", "kind")})
_ENCODE: Final = msgspec.json.Encoder().encode
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Question:
    """What a policy decides on, beside who asks and when. `kind` is the resource's; `owner` and `tenant` are its own,
    where they are known; `hosts` is what a job or cell wants to reach, told to `job.network` and `unapproved` alone."""

    operation: str
    kind: str
    op: str | None = None
    model: str | None = None
    labels: tuple[str, ...] = ()
    id: str | None = None
    hosts: tuple[str, ...] | None = None
    owner: str | None = None
    tenant: str | None = None
    intent: str | None = None
    provider: str | None = None
    route: str | None = None

    @property
    def resource_id(self) -> str:
        """The id of the resource's entity: the model of a job of one, else what is named, else nothing."""
        return self.model or self.id or ""


@dataclass(frozen=True, slots=True)
class Decision:
    """`determining` are the names of the policies that decided; `errors` is empty unless evaluation failed. `shadow` is
    what a policy on trial would have decided (`access.trial`)."""

    allow: bool
    determining: tuple[str, ...]
    digest: Digest
    errors: tuple[str, ...] = ()
    shadow: Decision | None = None

    @property
    def outcome(self) -> Literal["allow", "deny"]:
        return "allow" if self.allow else "deny"


class Decides(Protocol):
    """Whatever answers questions: a policy, or one beside another on trial."""

    def decide(self, principal: Principal, role: str, question: Question, now_ns: int) -> Decision: ...

    def describes(self, operation: str, kind: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Slice:
    """The policies that could apply to one role, operation and type of resource, and what must be told to them."""

    set: cedarpy.PolicySet
    names: dict[str, str]
    contexts: frozenset[str]
    describes: bool
    """Whether the resource's attributes or what it belongs to are read."""
    by_id: bool
    cacheable: bool


class Policy:
    """A loaded policy set; immutable. `text` is the document that `digest` names."""

    def __init__(self, text: str) -> None:
        """Raises AetherError BAD_POLICY for text that does not parse or does not fit the schema."""
        self.rules: tuple[Rule, ...] = parse(text)
        self.text = text
        self.digest = digest_bytes(text.encode())
        self._slices: OrderedDict[tuple[str, str, str], _Slice] = OrderedDict()
        self._entities: OrderedDict[tuple[str, ...], cedarpy.Entities] = OrderedDict()
        self._describes: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._cache: OrderedDict[tuple[str, ...], Decision] = OrderedDict()

    @classmethod
    def load(cls, text: str) -> Policy:
        return cls(text)

    @classmethod
    def default(cls) -> Policy:
        """The policy of a new instance."""
        return cls(resources.files(__package__).joinpath("default.cedar").read_text(encoding="utf-8"))

    def __repr__(self) -> str:
        return f"<Policy {self.digest} rules={len(self.rules)} cached={len(self._cache)}>"

    def decide(self, principal: Principal, role: str, question: Question, now_ns: int) -> Decision:
        """Whether the principal, in that role, may do what it asks. `now_ns` is the wall clock."""
        known = self._slices.get((role, question.operation, question.kind))
        part = known if known is not None else self._slice(role, question)
        if not part.cacheable:
            return self._decide(part, principal, role, question, now_ns)
        key = (
            principal.name, principal.kind, principal.tenant_id, role, question.operation, question.kind,
            question.resource_id if part.by_id else "",
        )  # fmt: skip
        if (decision := self._cache.get(key)) is None:
            decision = _keep(self._cache, key, self._decide(part, principal, role, question, now_ns))
        return decision

    def describes(self, operation: str, kind: str) -> bool:
        """Whether a policy may look at the resource's attributes, in whatever role somebody asks."""
        known = self._describes.get((operation, kind))
        if known is None:
            actions, resource_type = schema().groups(operation), type_of(kind)
            rules = tuple(rule for rule in self.rules if rule.covers(None, actions, resource_type))
            known = _keep(self._describes, (operation, kind), _slice_of(rules).describes)
        return known

    def candidates(self, role: str, question: Question) -> tuple[Rule, ...]:
        """The rules whose scope could apply."""
        actions, resource_type = schema().groups(question.operation), type_of(question.kind)
        return tuple(rule for rule in self.rules if rule.covers(role, actions, resource_type))

    def decide_by(
        self, rules: tuple[Rule, ...], principal: Principal, role: str, question: Question, now_ns: int
    ) -> Decision:
        """What those rules alone would decide."""
        return self._decide(_slice_of(rules), principal, role, question, now_ns)

    def _slice(self, role: str, question: Question) -> _Slice:
        found = _slice_of(self.candidates(role, question))
        return _keep(self._slices, (role, question.operation, question.kind), found)

    def _decide(self, part: _Slice, principal: Principal, role: str, question: Question, now_ns: int) -> Decision:
        request = {
            "principal": {"type": "Principal", "id": principal.name},
            "action": {"type": "Action", "id": question.operation},
            "resource": {"type": type_of(question.kind), "id": question.resource_id},
            "context": _ENCODE(_context(part.contexts, principal, question, now_ns)).decode(),
        }
        try:
            entities = self._entities_of(principal, role, question.operation)
            if part.describes:
                entities = entities.with_added_json_str(_ENCODE([_resource(question)]).decode())
            result = cedarpy.is_authorized(request, part.set, entities)
        except (ValueError, UnicodeEncodeError) as error:
            return Decision(False, (), self.digest, (str(error),))
        diagnostics = result.diagnostics
        errors = tuple(diagnostics.errors)
        determining = tuple(sorted(part.names[reason] for reason in diagnostics.reasons))
        return Decision(result.allowed and not errors, determining, self.digest, errors)

    def _entities_of(self, principal: Principal, role: str, operation: str) -> cedarpy.Entities:
        """The principal and the action, with what they belong to."""
        key = (principal.name, principal.kind, principal.tenant_id, role, operation)
        entities = self._entities.get(key)
        if entities is None:
            groups = sorted(schema().groups(operation) - {operation})
            described = [
                {
                    "uid": {"type": "Principal", "id": principal.name},
                    "attrs": {
                        "id": principal.name,
                        "kind": principal.kind,
                        "tenant": _ref("Tenant", principal.tenant_id),
                    },
                    "parents": [{"type": "Role", "id": role}, {"type": "Tenant", "id": principal.tenant_id}],
                },
                {
                    "uid": {"type": "Action", "id": operation},
                    "attrs": {},
                    "parents": [{"type": "Action", "id": group} for group in groups],
                },
            ]
            entities = _keep(self._entities, key, cedarpy.Entities.from_json_str(_ENCODE(described).decode()))
        return entities


def _keep(cache: OrderedDict[K, V], key: K, value: V) -> V:
    cache[key] = value
    if len(cache) > _CACHED_MAX:
        cache.popitem(last=False)
    return value


def _slice_of(rules: tuple[Rule, ...]) -> _Slice:
    reads = frozenset(read for rule in rules for read in rule.reads)
    contexts = frozenset(attribute for variable, attribute in reads if variable == "context")
    of_resource = frozenset(attribute for variable, attribute in reads if variable == "resource")
    joined = {"staticPolicies": {rule.key: rule.body for rule in rules}, "templates": {}, "templateLinks": []}
    return _Slice(
        set=cedarpy.PolicySet.from_json_str(_ENCODE(joined).decode()),
        names={rule.key: rule.name for rule in rules},
        contexts=_told(contexts),
        describes=not of_resource <= {IDENTITY},
        by_id=bool(of_resource & {IDENTITY, ANCESTORS}),
        cacheable=not any(
            variable == "context" or (variable == "resource" and attribute not in (IDENTITY, ANCESTORS))
            for variable, attribute in reads - _IN_KEY
        ),
    )


def _told(read: frozenset[str]) -> frozenset[str]:
    """The attributes of `context` that are told: those that are read, of the time only the parts that are."""
    if WHOLE in read:
        return schema().contexts
    if "time" in read:
        read = frozenset(name for name in read if not name.startswith("time."))
    return frozenset(name for name in read if name.partition(".")[0] in schema().contexts)


def _context(contexts: frozenset[str], principal: Principal, question: Question, now_ns: int) -> dict[str, Any]:
    """The attributes of `contexts`; what does not apply is empty."""
    told: dict[str, Any] = {}
    for name in contexts:
        whole, _, part = name.partition(".")
        if whole == "time":
            parts = calendar(now_ns)
            told[whole] = parts if not part else told.get(whole, {}) | {part: parts[part]}
        elif name == "tenant":
            told[name] = principal.tenant_id
        elif name in ("labels", "hosts"):
            told[name] = getattr(question, name) or ()
        else:
            told[name] = getattr(question, name) or ""
    return told


def _resource(question: Question) -> dict[str, Any]:
    identity = question.resource_id
    attributes: dict[str, Any] = {"id": identity, "kind": question.kind, "labels": question.labels}
    parents = []
    if question.owner is not None:
        attributes["owner"] = _ref("Principal", question.owner)
    if question.tenant is not None:
        attributes["tenant"] = _ref("Tenant", question.tenant)
        parents.append({"type": "Tenant", "id": question.tenant})
    base, version, _ = identity.partition("@")
    if question.kind == "model" and version:
        parents.append({"type": "Model", "id": base})
    return {"uid": {"type": type_of(question.kind), "id": identity}, "attrs": attributes, "parents": parents}


def _ref(entity_type: str, identity: str) -> dict[str, Any]:
    return {"__entity": {"type": entity_type, "id": identity}}
