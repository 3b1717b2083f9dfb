"""What can be told of a Cedar policy without evaluating it. Pure.

Two things follow from its JSON form (https://docs.cedarpolicy.com/policies/json-format.html): to which questions its
scope could apply, and what else it looks at. Where a form is not known the answer is the careful one: it could
apply, it reads everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

_LITERALS: Final = frozenset({"Value", "Slot", "Unknown"})
_PARTS: Final = ("left", "right", "arg", "if", "then", "else", "in")
_TIME: Final = {".": {"left": {"Var": "context"}, "attr": "time"}}
WHOLE: Final = "*"
"""The attribute that stands for all."""
ANCESTORS: Final = "in"
"""The attribute that stands for what an entity belongs to; a keyword, hence no attribute's name."""
IDENTITY: Final = "is"
"""The attribute that stands for which entity it is; a keyword too."""

Read = tuple[str, str]
"""A variable and its attribute: `("context", "labels")`."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One policy. `key` is Cedar's id for it, `name` its `@id`, or `key` where it has none."""

    key: str
    name: str
    effect: Literal["permit", "forbid"]
    body: dict[str, Any]
    reads: frozenset[Read]

    def covers(self, role: str | None, actions: frozenset[str], resource_type: str) -> bool:
        """Whether its scope could apply to somebody in `role` (null: in any) who asks one of `actions` (an operation
        and its groups) of a resource of that type."""
        return (
            _action_covers(self.body["action"], actions)
            and (role is None or _covers(self.body["principal"], "Principal", role))
            and _covers(self.body["resource"], resource_type, None)
        )


def rules_of(policies: dict[str, Any]) -> tuple[Rule, ...]:
    """The rules of a policy set in Cedar's JSON form, in the order of its text."""
    found = []
    for key, body in sorted(policies.items(), key=lambda item: _number(item[0])):
        name = body.get("annotations", {}).get("id") or key
        found.append(Rule(key, name, body["effect"], body, frozenset(_reads(body))))
    return tuple(found)


def _number(key: str) -> int:
    """Cedar calls the policies of a text policy0, policy1, ..."""
    return int(key.removeprefix("policy"))


def _entities(scope: dict[str, Any]) -> list[dict[str, str]]:
    return [scope["entity"]] if "entity" in scope else scope.get("entities", [])


def _action_covers(scope: dict[str, Any], actions: frozenset[str]) -> bool:
    entities = _entities(scope)
    if scope["op"] not in ("==", "in") or not entities:
        return True
    return any(entity["id"] in actions for entity in entities)


def _covers(scope: dict[str, Any], entity_type: str, role: str | None) -> bool:
    if scope["op"] == "is":
        inner = scope.get("in")
        return scope["entity_type"] == entity_type and (inner is None or _within(inner, entity_type, role))
    if scope["op"] == "==":
        return all(entity["type"] == entity_type for entity in _entities(scope))
    return scope["op"] != "in" or _within(scope, entity_type, role)


def _within(scope: dict[str, Any], entity_type: str, role: str | None) -> bool:
    """Whether an entity of the type could belong to the one that the scope names; it belongs to itself."""
    return all(
        entity["type"] in ("Tenant", entity_type) or (entity["type"] == "Role" and entity["id"] == role)
        for entity in _entities(scope)
    )


def _reads(body: dict[str, Any]) -> Iterator[Read]:
    scope = body["resource"]
    inner = scope.get("in", scope) if scope["op"] != "==" else {}
    if scope["op"] == "==":
        yield "resource", IDENTITY
    for entity in _entities(inner):
        yield from (("resource", IDENTITY), ("resource", ANCESTORS))
        if entity["type"] == "Tenant":
            yield "resource", "tenant"
    yield from _expression_reads(condition["body"] for condition in body["conditions"])


def _expression_reads(expressions: Iterable[Any]) -> Iterator[Read]:
    """Iterative, since a policy of many terms nests deeper than Python recurses."""
    stack = list(expressions)
    while stack:
        node = stack.pop()
        if not isinstance(node, dict) or len(node) != 1:
            continue
        ((operator, argument),) = node.items()
        if operator == "Var":
            yield (argument, IDENTITY if argument == "resource" else WHOLE)
        elif operator in (".", "has"):
            left = argument["left"]
            if left == _TIME:
                yield "context", f"time.{argument['attr']}"
            elif _variable(left):
                yield _variable(left), argument["attr"]
            else:
                stack.append(left)
                if "." not in left:  # what is computed may be any of them
                    yield from (("resource", WHOLE), ("context", WHOLE))
        elif operator == "in" or (operator == "is" and "in" in argument):
            if _variable(argument["left"]) in ("", "resource"):  # of whatever it is asked to belong to
                yield from (("resource", IDENTITY), ("resource", ANCESTORS), ("resource", "tenant"))
            stack.extend(_children(argument))
        elif operator == "is":
            stack.extend([] if _variable(argument["left"]) else [argument["left"]])
        elif operator == "Record":
            stack.extend(argument.values())
        elif operator not in _LITERALS:
            stack.extend(_children(argument))


def _variable(node: Any) -> str:
    """The name of the variable that the expression is, or nothing."""
    return node["Var"] if isinstance(node, dict) and isinstance(node.get("Var"), str) else ""


def _children(argument: Any) -> list[Any]:
    if isinstance(argument, list):
        return argument
    return [argument[part] for part in _PARTS if part in argument] if isinstance(argument, dict) else []
