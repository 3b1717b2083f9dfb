"""Calls about tickets, and what a ticket is narrowed to when it is minted or attenuated.

A ticket is a secret: its text is in the answer to `ticket.mint` and in what its holder sends, nowhere else. Everybody
else names it by the id of a link (32 hex digits), which says nothing about the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from aether.contract import caveats as c
from aether.contract import limits
from aether.contract.caveats import Caveat
from aether.contract.errors import AetherError
from aether.contract.units import AMOUNT_MAX, UNITS

LINK_PATTERN: Final = r"^[0-9a-f]{32}$"
ROLE_PATTERN: Final = r"^[a-z][a-z0-9-]{0,62}$"
LISTS: Final = ("operations", "kinds", "models", "labels", "hosts", "paths", "cells")
"""What a ticket can be narrowed to, beside its role, its budget and its time."""
_ITEM_BYTES_MAX: Final = 1_024
_GRANT: Final = re.compile(r"[rwx]{1,3}:/.*", re.DOTALL)


class Narrowing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one link of a ticket allows. Null leaves a matter as it is; an empty list allows nothing (of `labels`: every
    job carries all that are listed). `budget` maps a unit to the most that may be spent from now on."""

    role: str | None = None
    operations: tuple[str, ...] | None = None
    kinds: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    hosts: tuple[str, ...] | None = None
    paths: tuple[str, ...] | None = None
    cells: tuple[str, ...] | None = None
    budget: dict[str, int] = {}


class MintRequest(Narrowing, frozen=True, kw_only=True):
    """The body of `ticket.mint`. A null `role` is the caller's own."""

    expires_ms: int = limits.TICKET_MS_DEFAULT


class MintCall(msgspec.Struct, frozen=True, kw_only=True):
    """`ticket.mint`."""

    request: MintRequest


class LinkCall(msgspec.Struct, frozen=True, kw_only=True):
    """`ticket.show`: a ticket by the id of its first link."""

    link_id: str


class RevokeCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`ticket.revoke`: the last link of `ticket`, or the link of that id; exactly one of them."""

    ticket: str | None = None
    link_id: str | None = None


class VerifyCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`ticket.verify`."""

    ticket: str


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What a link may spend of one unit, and what it and all derived from it have spent or hold."""

    unit: str
    limit: int
    spent: int
    reserved: int


class TicketView(msgspec.Struct, frozen=True, kw_only=True):
    """A minted ticket. `revoked_links` are links that its holders derived from it and that were revoked. `credential`
    is the API key (`key:<id>`) or certificate (`certificate:<fingerprint>`) that stands for it, if one does."""

    link_id: str
    role: str
    tenant_id: str
    principal: str
    kid: str
    minted_at: str
    expires_at: str
    caveats: tuple[str, ...]
    budget: tuple[Budget, ...]
    revoked_at: str | None = None
    revoked_links: tuple[str, ...] = ()
    credential: str | None = None


class MintedTicket(TicketView, frozen=True, kw_only=True):
    """The answer to `ticket.mint`: the one time that the text is told."""

    ticket: str


class TicketList(msgspec.Struct, frozen=True, kw_only=True):
    """`ticket.list`: the tenant's minted tickets that are not expired, newest first."""

    tickets: tuple[TicketView, ...]


class Revoked(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `ticket.revoke`: how many open jobs and allocated cells it ended. `log_index` is its record."""

    link_id: str
    revoked_at: str
    log_index: int
    jobs: int
    cells: int


class KeyRotated(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `ticket.rotate-key`: the key that tickets are minted with from now on, and the earlier ones that
    are kept because a ticket of theirs may still be used. `log_index` is its record."""

    kid: str
    kept: tuple[str, ...]
    rotated_at: str
    log_index: int


class LinkView(msgspec.Struct, frozen=True, kw_only=True):
    """One link of a verified ticket, root first."""

    link_id: str
    caveats: tuple[str, ...]
    budget: tuple[Budget, ...]


class VerifiedTicket(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `ticket.verify`: the authority made this ticket, no link is revoked and none has expired."""

    kid: str
    tenant_id: str
    roles: tuple[str, ...]
    links: tuple[LinkView, ...]


def link(text: str) -> str:
    """The id of a link; raises AetherError BAD_ID."""
    if re.fullmatch(LINK_PATTERN, text) is None:
        raise AetherError("BAD_ID", f"cannot read {text[:80]!r}: the id of a link is 32 hex digits")
    return text


def caveats_of(said: Narrowing, expires_at_ms: int | None) -> tuple[Caveat, ...]:
    """The caveats of one link, role first. `expires_at_ms` is since the epoch. Raises AetherError BAD_FIELD."""
    found: list[Caveat] = []
    if said.role is not None:
        if re.fullmatch(ROLE_PATTERN, said.role) is None:
            raise _refused(f"the role {said.role[:80]!r} is no name such as user or worker-gpu")
        found.append(c.role(said.role))
    for name in LISTS:
        items: tuple[str, ...] | None = getattr(said, name)
        if items is not None:
            _check_items(name, items)
            found.append(Caveat(name, items))
    if expires_at_ms is not None:
        found.append(c.expires(expires_at_ms))
    return (*found, *_budgets(said.budget))


def _check_items(name: str, items: tuple[str, ...]) -> None:
    if len(items) > c.ITEMS_MAX:
        raise _refused(f"{name} has {len(items)} items, more than {c.ITEMS_MAX}")
    for item in items:
        try:
            good = 0 < len(item.encode()) <= _ITEM_BYTES_MAX and item.isprintable()
        except UnicodeEncodeError:
            good = False
        if not good or (name == "paths" and _GRANT.fullmatch(item) is None):
            raise _refused(f"{name} has the item {item[:80]!r}")


def _budgets(budget: Mapping[str, int]) -> tuple[Caveat, ...]:
    for unit, amount in budget.items():
        if unit not in UNITS:
            raise _refused(f"{unit[:40]!r} is no unit of a budget", f"limit {', '.join(UNITS)}")
        if not 0 <= amount <= AMOUNT_MAX:
            raise _refused(f"a budget of {amount} {unit} is not within 0..{AMOUNT_MAX}")
    return tuple(c.budget(unit, budget[unit]) for unit in sorted(budget))


def _refused(why: str, remedy: str = "") -> AetherError:
    return AetherError("BAD_FIELD", f"cannot write the ticket: {why}", remedy)
