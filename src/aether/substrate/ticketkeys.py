"""`ticket.rotate-key`: another key to mint tickets with, while those of the earlier ones go on.

The record `ticket.key-rotated` is durable first and says the number of the epoch; then the file of keys follows
(`access.keyfile`), and minting with it. After a death in between the next start does the rest. An epoch's key is
forgotten, at the next rotation or start, once the ledger holds no ticket of it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aether.contract import limits
from aether.contract.calls import Caller, Nothing
from aether.contract.errors import AetherError
from aether.contract.ticketcalls import KeyRotated
from aether.substrate import ticketentries as entries
from aether.substrate.access.access import Access, Resource
from aether.substrate.access.keyfile import Keys
from aether.substrate.book import Book
from aether.substrate.cellhouse import CellHouse
from aether.substrate.gate import Gate


class TicketKeys:
    """The handler. `settle` brings the file of keys to what the ledger asks for."""

    def __init__(self, gate: Gate, book: Book, access: Access, house: CellHouse, settle: Callable[[], Keys]) -> None:
        self._gate = gate
        self._book = book
        self._access = access
        self._house = house
        self._settle = settle
        self._turn = asyncio.Lock()

    async def rotate(self, caller: Caller, call: Nothing) -> KeyRotated:
        """Raises TICKET_LIMIT while TICKET_EPOCHS_MAX keys are still needed."""
        admission = self._gate.admit(caller, "ticket.rotate-key", Resource(kind="ticket"))
        async with self._turn:
            tickets = self._book.ledger.tickets
            if len(tickets.kids()) >= limits.TICKET_EPOCHS_MAX:
                why = f"tickets of {limits.TICKET_EPOCHS_MAX} earlier ones have not expired"
                raise AetherError("TICKET_LIMIT", f"cannot make another key: {why}")
            order, epoch = self._house.order(caller, admission, "ticket.rotate-key"), tickets.epoch + 1
            record = self._house.write(
                order, lambda index, now: entries.key_rotated(self._gate.node, order, epoch, index, now)
            )
            await self._book.durable(record)
            keys = self._settle()
            self._access.rekey(keys)
        kept = tuple(kid for kid in keys.epochs if kid != keys.newest)
        return KeyRotated(kid=keys.newest, kept=kept, rotated_at=record.time, log_index=record.log_index)
