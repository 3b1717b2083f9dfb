"""Tickets for programs: mint, narrow, look into, revoke.

    from aether.client import Client
    from aether.client.tickets import attenuate

    with Client() as client:
        ticket = client.tickets.mint(budget={"ops": 5}, expires_ms=3_600_000).ticket
    narrower = attenuate(ticket, budget={"ops": 1}, operations=["job.*"])

`attenuate` and `inspect` are pure: they need no authority, and what they are given is all they know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from aether.contract import ids, limits, ticketcalls, tickets
from aether.contract.errors import AetherError
from aether.contract.ticketcalls import Narrowing

T = TypeVar("T")


class Inspected(msgspec.Struct, frozen=True, kw_only=True):
    """What a ticket says of itself; nothing of it is proven. `link_id` is the id of its last link, `links` the caveats
    of each, root first."""

    kid: str
    tenant_id: str
    link_id: str
    links: tuple[tuple[str, ...], ...]
    chars: int


def attenuate(
    ticket: str,
    *,
    role: str | None = None,
    operations: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    hosts: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    cells: Sequence[str] | None = None,
    budget: Mapping[str, int] | None = None,
    expires_at_ms: int | None = None,
) -> str:
    """The ticket with one more link: it allows what it did and what is given here allows too, never more.

    What is left out stays as it is; an empty list allows nothing (`labels`: every job carries all of them). `budget` is
    by unit (`ops`, `cpu_ms`), `expires_at_ms` since the epoch. Raises AetherError BAD_TICKET, BAD_FIELD.
    """
    lists = {
        "operations": operations, "kinds": kinds, "models": models, "labels": labels,
        "hosts": hosts, "paths": paths, "cells": cells,
    }  # fmt: skip
    given = {name: tuple(items) for name, items in lists.items() if items is not None}
    said = ticketcalls.caveats_of(Narrowing(role=role, budget=dict(budget or {}), **given), expires_at_ms)
    return tickets.attenuate(ticket, said)


def inspect(ticket: str) -> Inspected:
    """What the ticket says; whether it holds only its authority can tell. Raises AetherError BAD_TICKET."""
    parts = tickets.parse(ticket)
    try:
        links = parts.links()
    except ValueError as error:
        raise AetherError("BAD_TICKET", f"cannot read the ticket: {error}") from error
    return Inspected(
        kid=parts.kid,
        tenant_id=parts.tenant,
        link_id=tickets.link_id(parts.tag),
        links=tuple(tuple(map(str, said)) for said in links),
        chars=len(ticket),
    )


class Calls(Protocol):
    """What is needed of `Client`."""

    def call_json(self, name: str, reply: type[T], argument: str | None = None, **rest: Any) -> T: ...


class Tickets:
    """`client.tickets`: the operations. All methods raise AetherError."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def mint(
        self, *, expires_ms: int = limits.TICKET_MS_DEFAULT, idempotency_key: str | None = None, **narrowing: Any
    ) -> ticketcalls.MintedTicket:
        """A ticket for the caller's tenant; `narrowing` are further fields of `MintRequest`. Its text is told once."""
        request = ticketcalls.MintRequest(expires_ms=expires_ms, **narrowing)
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key or ids.new(ids.REQUEST)}
        body = msgspec.json.encode(request)
        return self._calls.call_json("ticket.mint", ticketcalls.MintedTicket, body=body, headers=headers)

    def list(self) -> tuple[ticketcalls.TicketView, ...]:
        """The tenant's minted tickets that are not expired, newest first."""
        return self._calls.call_json("ticket.list", ticketcalls.TicketList).tickets

    def show(self, link_id: str) -> ticketcalls.TicketView:
        return self._calls.call_json("ticket.show", ticketcalls.TicketView, link_id)

    def verify(self, ticket: str) -> ticketcalls.VerifiedTicket:
        """What the authority found; raises BAD_TICKET, TICKET_REVOKED, TICKET_EXPIRED."""
        return self._send("ticket.verify", ticketcalls.VerifiedTicket, {"ticket": ticket})

    def rotate_key(self, *, idempotency_key: str | None = None) -> ticketcalls.KeyRotated:
        """Mints with a new key from now on; tickets of earlier keys hold until they expire. The operator's to do."""
        headers = {"Idempotency-Key": idempotency_key or ids.new(ids.REQUEST)}
        return self._calls.call_json("ticket.rotate-key", ticketcalls.KeyRotated, headers=headers)

    def revoke(self, target: str) -> ticketcalls.Revoked:
        """Ends a ticket's last link, or the link of that id, and all that derives from it."""
        name = "ticket" if target.startswith(tickets.PREFIX) else "link_id"
        return self._send("ticket.revoke", ticketcalls.Revoked, {name: target})

    def _send(self, name: str, reply: type[T], body: Mapping[str, str]) -> T:
        headers = {"Content-Type": "application/json"}
        return self._calls.call_json(name, reply, body=msgspec.json.encode(body), headers=headers)
