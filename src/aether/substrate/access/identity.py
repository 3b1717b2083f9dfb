"""Who asks: one type of principal, whatever proved it.

| name | proof | `kind` |
|---|---|---|
| `uid:<n>` | the kernel's word on the peer of the Unix socket (SO_PEERCRED, unix(7)) | `user` |
| `spiffe://<trust domain>/<path>` | a client certificate (TLS) | `workload` |
| `key:<id>` | an API key | `key` |
| `jwt:<issuer>#<subject>` | a token of an issuer that the operator named | `token` |
| `node` | the instance itself | `node` |

The transport reads the peer's credentials once, at accept; nothing a client sends changes them, and no socket of a cell
is asked for them. A certificate, a key or a token takes the place of the uid. Tenant and roles are never the client's
words: they were recorded when the key or certificate was made, or are mapped by the operator's own file.

A uid without a ticket acts in its own tenant, so that users of one machine do not see each other's jobs; root and the
owner of the instance share the instance's tenant.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, get_args

DEFAULT_TENANT: Final = "default"
NODE_PRINCIPAL: Final = "node"
QUEEN: Final = "queen"
USER: Final = "user"
NODE: Final = "node"
Kind = Literal["user", "workload", "key", "token", "node"]


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks; see the module head. `uid` is None unless `kind` is `user`. `roles` are those it may act in without
    showing a ticket: one for each way of proving who it is."""

    name: str
    tenant_id: str
    kind: Kind
    uid: int | None
    roles: tuple[str, ...] = ()


def principal_of(uid: int, tenant_id: str, roles: tuple[str, ...] = ()) -> Principal:
    return Principal(f"uid:{uid}", tenant_id, "user", uid, roles)


def node_principal(tenant_id: str = DEFAULT_TENANT) -> Principal:
    return Principal(NODE_PRINCIPAL, tenant_id, "node", None, (NODE,))


def implicit_tenant(uid: int, operators: Collection[int]) -> str:
    """The tenant in which a uid acts without a ticket."""
    return DEFAULT_TENANT if uid in operators else f"uid-{uid}"


def asker(name: str, tenant_id: str, kind: str) -> Principal:
    """Somebody whom a policy is asked about, as records name them: nobody who connected."""
    known: Kind | None = next((each for each in get_args(Kind) if each == kind), None)
    return Principal(name, tenant_id, known or "user", None)
