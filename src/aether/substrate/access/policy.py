"""Policy: a Cedar policy set and its decisions. Pure.

Cedar skips a policy whose evaluation errs, a forbid too; so any error in the diagnostics is a deny here. Policies are
validated against the schema when they are loaded, which leaves few ways to err.

A decision is cached only where no policy that could match it reads context or attributes: then it depends on the key
(principal, role, tenant, operation, resource kind) alone.
"""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import cedarpy

from aether.contract.canonical import digest_bytes
from aether.contract.errors import AetherError
from aether.contract.ids import Digest
from aether.contract.records import PolicyRef
from aether.substrate.access.identity import Principal

POLICY_BYTES_MAX: Final = 1 << 20
_CACHED_MAX: Final = 4_096
_READS: Final = frozenset({".", "has", "like", "is", "getTag", "hasTag"})


@dataclass(frozen=True, slots=True)
class Question:
    """What a policy decides on, beside who asks. `kind` is the resource's."""

    operation: str
    kind: str
    op: str | None = None
    model: str | None = None
    labels: tuple[str, ...] = ()
    id: str | None = None
    hosts: tuple[str, ...] | None = None
    """What a job or cell wants to reach; asked about by `job.network`, `job.unapproved`, `cell.unapproved`."""


@dataclass(frozen=True, slots=True)
class Decision:
    """`determining` are the ids of the policies that decided; `errors` is empty unless evaluation failed."""

    allow: bool
    determining: tuple[str, ...]
    digest: Digest
    errors: tuple[str, ...] = ()

    def ref(self) -> PolicyRef:
        return PolicyRef(digest=self.digest, decision="allow" if self.allow else "deny", determining=self.determining)


class Policy:
    """A loaded policy set; immutable. `text` is the document that `digest` names."""

    def __init__(self, text: str) -> None:
        """Raises AetherError BAD_FIELD for text that does not parse or does not fit the schema."""
        if len(text.encode()) > POLICY_BYTES_MAX:
            raise AetherError("BAD_FIELD", f"cannot load the policy: it is longer than {POLICY_BYTES_MAX} bytes")
        schema = _schema()
        try:
            self._set = cedarpy.PolicySet.from_str(text)
            found = cedarpy.validate_policies(text, schema.handle)
            rules = json.loads(cedarpy.policies_to_json_str(text))["staticPolicies"]
        except ValueError as error:
            raise AetherError("BAD_FIELD", f"cannot load the policy: {error}") from error
        if not found.validation_passed:
            raise AetherError("BAD_FIELD", f"cannot load the policy: {'; '.join(map(str, found.errors[:5]))}")
        self.text = text
        self.digest = digest_bytes(text.encode())
        self._reading = [rule for rule in rules.values() if _reads(rule["conditions"])]
        self._entities: OrderedDict[tuple[str, str, str, str], cedarpy.Entities] = OrderedDict()
        self._cache: OrderedDict[tuple[str, str, str, str, str], Decision] = OrderedDict()

    @classmethod
    def load(cls, text: str) -> Policy:
        return cls(text)

    @classmethod
    def default(cls) -> Policy:
        """The policy of a new instance."""
        return cls(resources.files(__package__).joinpath("default.cedar").read_text(encoding="utf-8"))

    def __repr__(self) -> str:
        return f"<Policy {self.digest} cached={len(self._cache)}>"

    def decide(self, principal: Principal, role: str, question: Question) -> Decision:
        """Whether the principal, in that role, may do what it asks."""
        key = (principal.name, role, principal.tenant_id, question.operation, question.kind)
        if (known := self._cache.get(key)) is not None:
            return known
        decision = self._decide(principal, role, question)
        if self._cacheable(question):
            self._cache[key] = decision
            if len(self._cache) > _CACHED_MAX:
                self._cache.popitem(last=False)
        return decision

    def _decide(self, principal: Principal, role: str, question: Question) -> Decision:
        context: dict[str, Any] = {
            "id": question.id or "",
            "kind": question.kind,
            "labels": question.labels,
            "model": question.model or "",
            "op": question.op or "",
            "tenant": principal.tenant_id,
        }
        if question.hosts is not None:
            context["hosts"] = question.hosts
        request = {
            "principal": {"type": "Principal", "id": principal.name},
            "action": {"type": "Action", "id": question.operation},
            "resource": {"type": "Resource", "id": question.kind},
            "context": context,
        }
        try:
            result = cedarpy.is_authorized(request, self._set, self._entities_of(principal, role))
        except ValueError as error:
            return Decision(False, (), self.digest, (str(error),))
        diagnostics = result.diagnostics
        errors = tuple(diagnostics.errors)
        names: Mapping[str, str] = diagnostics.id_annotations_by_reason
        determining = tuple(sorted(names.get(reason) or reason for reason in diagnostics.reasons))
        return Decision(result.allowed and not errors, determining, self.digest, errors)

    def _entities_of(self, principal: Principal, role: str) -> cedarpy.Entities:
        key = (principal.name, role, principal.tenant_id, principal.kind)
        entities = self._entities.get(key)
        if entities is None:
            entity = {
                "uid": {"type": "Principal", "id": principal.name},
                "attrs": {"tenant": principal.tenant_id, "kind": principal.kind},
                "parents": [{"type": "Role", "id": role}],
            }
            entities = self._entities[key] = _schema().base.with_added_json_str(json.dumps([entity]))
            if len(self._entities) > _CACHED_MAX:
                self._entities.popitem(last=False)
        return entities

    def _cacheable(self, question: Question) -> bool:
        return not any(
            _scope_covers(rule["action"], question.operation, _schema().groups.get(question.operation, frozenset()))
            and _scope_covers(rule["resource"], question.kind, frozenset())
            for rule in self._reading
        )


@dataclass(frozen=True, slots=True)
class _Schema:
    handle: cedarpy.Schema
    base: cedarpy.Entities
    groups: dict[str, frozenset[str]]
    """The action groups of each operation."""


@functools.cache
def _schema() -> _Schema:
    text = resources.files(__package__).joinpath("aether.cedarschema.json").read_text(encoding="utf-8")
    handle = cedarpy.Schema.from_json_str(text)
    actions: dict[str, Any] = json.loads(text)[""]["actions"]
    groups = {name: frozenset(group["id"] for group in action.get("memberOf", ())) for name, action in actions.items()}
    entities = [
        {
            "uid": {"type": "Action", "id": name},
            "attrs": {},
            "parents": [{"type": "Action", "id": group} for group in sorted(members)],
        }
        for name, members in groups.items()
    ]
    return _Schema(handle, cedarpy.Entities.from_json_str(json.dumps(entities)), groups)


def _reads(node: Any) -> bool:
    """Whether an expression (Cedar's JSON form) looks at anything but the entities of the scope."""
    if isinstance(node, dict):
        if node.get("Var") == "context" or not _READS.isdisjoint(node):
            return True
        return any(_reads(child) for child in node.values())
    if isinstance(node, list):
        return any(_reads(child) for child in node)
    return False


def _scope_covers(scope: dict[str, Any], identity: str, groups: frozenset[str]) -> bool:
    """Whether a policy's scope could match the entity; when in doubt it could."""
    entities = [scope["entity"]] if "entity" in scope else scope.get("entities", [])
    if scope["op"] not in ("==", "in") or not entities:
        return True
    return any(entity.get("id") == identity or entity.get("id") in groups for entity in entities)
