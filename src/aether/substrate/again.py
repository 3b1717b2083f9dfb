"""How answers are made anew for calls repeated under their Idempotency-Key after the first answer was forgotten: from
the job, cell or ticket as it stands now. Who may not make the call any more is refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from aether.contract.allocations import CellView
from aether.contract.calls import Caller, JobCall
from aether.contract.jobs import JobView
from aether.substrate.cellhouse import CellHouse
from aether.substrate.keydesk import KeyDesk
from aether.substrate.ledger import KeyEntry
from aether.substrate.pkidesk import PkiDesk
from aether.substrate.reading import Reading
from aether.substrate.repeats import Again
from aether.substrate.ticketdesk import TicketDesk

_JOBS: Final = ("job.stop", "job.signal", "job.window")
_CELLS: Final = ("cell.allocate", "cell.free", "cell.freeze", "cell.thaw", "cell.resize")


def ways(reading: Reading, house: CellHouse, tickets: TicketDesk, keys: KeyDesk, pki: PkiDesk) -> Mapping[str, Again]:
    """By operation."""
    jobs: dict[str, Again] = {name: partial(_job, reading, name) for name in _JOBS}
    cells: dict[str, Again] = {name: partial(_cell, house, name) for name in _CELLS}
    return {
        **jobs,
        **cells,
        "ticket.mint": tickets.again,
        "key.create": keys.again,
        "pki.issue": pki.again,
    }


async def _job(reading: Reading, name: str, caller: Caller, call: Any, known: KeyEntry, key_hash: str) -> JobView:
    return await reading.view(caller, name, JobCall(job_id=known.job_id))


async def _cell(house: CellHouse, name: str, caller: Caller, call: Any, known: KeyEntry, key_hash: str) -> CellView:
    return await house.again(caller, name, known.job_id)
