"""Rows of the operations table about tickets. `attenuate` and `inspect` need no authority, hence no row."""

from __future__ import annotations

from typing import Final

from aether.api.operation import JSON_ERRORS, WRITE_ERRORS, Operation
from aether.contract import calls, ticketcalls

TICKET_OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        name="ticket.mint",
        method="POST",
        path="/v0/tickets",
        summary="Make a ticket for the caller's tenant, no wider than the caller; its text is told this once.",
        request=ticketcalls.MintCall,
        reply=ticketcalls.MintedTicket,
        access="control",
        effect="control",
        idempotent=False,
        body="json",
        body_type=ticketcalls.MintRequest,
        body_field="request",
        statuses=(201,),
        errors=(*JSON_ERRORS, *WRITE_ERRORS, "TICKET_LIMIT", "IDEMPOTENCY_CONFLICT"),
    ),
    Operation(
        name="ticket.list",
        method="GET",
        path="/v0/tickets",
        summary="The tenant's minted tickets that are not expired, newest first, and what they spent.",
        request=calls.Nothing,
        reply=ticketcalls.TicketList,
        access="read",
        effect="read",
        idempotent=True,
    ),
    Operation(
        name="ticket.show",
        method="GET",
        path="/v0/tickets/link/{link_id}",
        summary="One minted ticket, by the id of its link; never its text.",
        request=ticketcalls.LinkCall,
        reply=ticketcalls.TicketView,
        access="read",
        effect="read",
        idempotent=True,
        errors=("BAD_ID", "NOT_FOUND"),
    ),
    Operation(
        name="ticket.verify",
        method="POST",
        path="/v0/tickets/verify",
        summary="Whether a ticket holds: made here, not revoked, not expired; and what it may still spend.",
        request=ticketcalls.VerifyCall,
        reply=ticketcalls.VerifiedTicket,
        access="read",
        effect="read",
        idempotent=True,
        body="json",
        body_type=ticketcalls.VerifyCall,
        errors=JSON_ERRORS,
    ),
    Operation(
        name="ticket.revoke",
        method="POST",
        path="/v0/tickets/revoke",
        summary="End a link of a ticket and all that was derived from it: its jobs and cells end, its streams close.",
        request=ticketcalls.RevokeCall,
        reply=ticketcalls.Revoked,
        access="control",
        effect="control",
        idempotent=True,
        body="json",
        body_type=ticketcalls.RevokeCall,
        errors=(*JSON_ERRORS, *WRITE_ERRORS, "BAD_ID", "NOT_FOUND", "TICKET_LIMIT"),
    ),
)
