"""What the authority's memory knows of a resource that a caller names: whose it is, and its labels. Pure.

A policy may look at them (docs/policy.md). What is made and what is listed is the caller's own; of what is named by an
id that is not known here nothing is told, so that a policy which needs its owner does not permit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from aether.contract.records import Record
from aether.substrate.access.identity import Principal
from aether.substrate.access.questions import MAKES, Resource, callers_own
from aether.substrate.book import Book

_KNOWN: Final = frozenset({"job", "cell", "ticket"})


class Known:
    """Describes resources from the book."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def describe(self, principal: Principal, operation: str, resource: Resource) -> Resource:
        """The resource with its owner, tenant and labels, as far as they are known."""
        if resource.owner is not None:
            return resource
        if resource.kind not in _KNOWN or resource.id is None or operation in MAKES:
            return callers_own(principal, operation, resource)
        if resource.kind == "job" and (view := self._book.known(resource.id)) is not None:
            return replace(resource, owner=view.principal, tenant=view.tenant_id, labels=view.labels)
        made = self._made(principal, resource.kind, resource.id)
        if made is None:
            return callers_own(principal, operation, resource)
        return replace(resource, owner=made.principal, tenant=made.tenant_id, labels=resource.labels or made.labels)

    def _made(self, principal: Principal, kind: str, identity: str) -> Record | None:
        """The record that made it."""
        ledger = self._book.ledger
        if kind == "job":
            job = ledger.open.get(identity)
            return job.intent if job is not None else None
        if kind == "cell":
            cell = ledger.cells.find(principal.tenant_id, identity)
            return cell.allocated if cell is not None else None
        ticket = ledger.tickets.find(identity)
        return ticket.minted if ticket is not None else None
