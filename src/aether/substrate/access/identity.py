"""Who asks: a principal from the kernel's word on the peer of a Unix socket (SO_PEERCRED, unix(7)).

The transport reads the credentials once, at accept; nothing a client sends changes them. A uid without a ticket acts
in its own tenant, so that users of one machine do not see each other's jobs; root and the owner of the instance share
the instance's tenant.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

DEFAULT_TENANT: Final = "default"
NODE_PRINCIPAL: Final = "node"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. `name` is `uid:<n>`, or `node` for the instance itself (then `uid` is None)."""

    name: str
    tenant_id: str
    kind: Literal["user", "node"]
    uid: int | None


def principal_of(uid: int, tenant_id: str) -> Principal:
    return Principal(f"uid:{uid}", tenant_id, "user", uid)


def node_principal(tenant_id: str = DEFAULT_TENANT) -> Principal:
    return Principal(NODE_PRINCIPAL, tenant_id, "node", None)


def implicit_tenant(uid: int, operators: Collection[int]) -> str:
    """The tenant in which a uid acts without a ticket."""
    return DEFAULT_TENANT if uid in operators else f"uid-{uid}"
