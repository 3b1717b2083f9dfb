"""The schema that policies are validated against: entity types, actions and their groups. Pure.

The JSON file beside this module is the source; schema/v1/ publishes it, and the same in Cedar's own syntax.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import cedarpy


@dataclass(frozen=True, slots=True)
class Schema:
    """`actions` maps an operation to itself and its groups, `types` to the types of resource that it is asked of."""

    handle: cedarpy.Schema
    actions: dict[str, frozenset[str]]
    types: dict[str, tuple[str, ...]]
    contexts: frozenset[str]
    """The attributes of `context`."""

    def groups(self, operation: str) -> frozenset[str]:
        """The operation and what it belongs to; one that is not known belongs to nothing."""
        return self.actions.get(operation) or frozenset({operation})

    def text(self) -> str:
        """The schema in Cedar's syntax."""
        return str(self.handle).replace("__cedar::", "").rstrip() + "\n"


@functools.cache
def schema() -> Schema:
    """The schema of this version."""
    text = json_text()
    parsed: dict[str, Any] = json.loads(text)[""]
    asked = {name: action for name, action in parsed["actions"].items() if "appliesTo" in action}
    return Schema(
        cedarpy.Schema.from_json_str(text),
        {name: frozenset({name, *(g["id"] for g in action.get("memberOf", ()))}) for name, action in asked.items()},
        {name: tuple(action["appliesTo"]["resourceTypes"]) for name, action in asked.items()},
        frozenset(parsed["commonTypes"]["Question"]["attributes"]),
    )


def json_text() -> str:
    """The schema in Cedar's JSON form."""
    return resources.files(__package__).joinpath("aether.cedarschema.json").read_text(encoding="utf-8")


def type_of(kind: str) -> str:
    """The entity type of a kind of resource: `job` is a `Job`."""
    return kind[:1].upper() + kind[1:]
