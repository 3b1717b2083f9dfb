"""Verbs between aetherd and egressd, and their bodies; envelopes and descriptors as in `aether.contract.wire`.

egressd connects to aetherd, says `hello`, then `egress.serving` with the cells it still serves; the answer names
those that it must let go. From then on aetherd calls: `egress.open` before a cell is made (rules and credentials are
checked, its certificate authority made), `egress.listen` with the listener that lives in the cell's network
namespace, `egress.close` when the cell has ended. egressd tells what happened in events `egress.connections`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from aether.contract import limits
from aether.contract.network import Network

Verdict = Literal["allowed", "refused", "failed"]


class EgressServing(msgspec.Struct, frozen=True, kw_only=True):
    """`egress.serving`: the cells that egressd has rules for, after a reconnect."""

    cell_ids: tuple[str, ...]


class EgressDrop(msgspec.Struct, frozen=True, kw_only=True):
    """Its answer: cells that ended meanwhile."""

    cell_ids: tuple[str, ...]


class EgressOpen(msgspec.Struct, frozen=True, kw_only=True):
    """`egress.open`: what a cell may reach. Repeated for a cell, it changes nothing."""

    cell_id: str
    job_id: str
    network: Network


class EgressOpened(msgspec.Struct, frozen=True, kw_only=True):
    """`ca_token` names the descriptor of a PEM bundle to put into the cell, when its TLS is intercepted."""

    ca_token: int | None = None


class EgressListen(msgspec.Struct, frozen=True, kw_only=True):
    """`egress.listen`: serve the connections of the listening socket `token`."""

    cell_id: str
    token: int


class EgressSecret(msgspec.Struct, frozen=True, kw_only=True):
    """`egress.secret`: what a reference stands for now. The answer is a Token: a descriptor of the value."""

    name: str
    source: str


class EgressCell(msgspec.Struct, frozen=True, kw_only=True):
    """`egress.close`: end the cell's connections and forget its secrets; closing twice is closing once."""

    cell_id: str


class EgressWatch(msgspec.Struct, frozen=True, kw_only=True):
    """`egress.passed`: what a cell has passed until now (EgressSums); NO_SUCH_CELL for one that is not served. With
    `sent_bytes` and `received_bytes` there is an event `egress.reached` once when either sum is that much."""

    cell_id: str
    sent_bytes: int | None = None
    received_bytes: int | None = None


class EgressReached(msgspec.Struct, frozen=True, kw_only=True):
    """Event `egress.reached`."""

    cell_id: str


class EgressConnection(msgspec.Struct, frozen=True, kw_only=True):
    """What the cell did, `count` times alike: bytes and time are sums. `address` is null where none was dialled.

    `reason` says in one word why it was refused, failed or ended by a limit; `credential` is a name, never a value.
    """

    cell_id: str
    job_id: str
    host: str
    port: int
    address: str | None
    rule: str | None
    verdict: Verdict
    reason: str | None
    credential: str | None
    sent_bytes: int
    received_bytes: int
    ms: int
    count: int = 1


class EgressConnections(msgspec.Struct, frozen=True, kw_only=True):
    """Event `egress.connections`."""

    rows: tuple[EgressConnection, ...]


class EgressSums(msgspec.Struct, frozen=True, kw_only=True):
    """Over a cell's life. `unlisted` connections were too many to be told one by one."""

    connections: int = 0
    refused: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    unlisted: int = 0


class EgressClosed(msgspec.Struct, frozen=True, kw_only=True):
    """Answers `egress.close`: what was not told yet, and the sums."""

    rows: tuple[EgressConnection, ...] = ()
    sums: EgressSums = EgressSums()


class EgressCall(msgspec.Struct, frozen=True, kw_only=True):
    """`job.egress`: newest first; `cursor` is the previous page's `next_cursor`, 0 begins with the last."""

    job_id: str
    cursor: int = 0
    limit: int = limits.PAGE_ITEMS_DEFAULT


class CellEgressCall(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.egress`: the same of an allocated cell, by name or id."""

    cell: str
    cursor: int = 0
    limit: int = limits.PAGE_ITEMS_DEFAULT


class CellEgressPage(msgspec.Struct, frozen=True, kw_only=True):
    """Its answer, like an EgressPage."""

    cell_id: str
    connections: tuple[EgressConnection, ...]
    closed: EgressSums | None = None
    next_cursor: int | None = None


class EgressPage(msgspec.Struct, frozen=True, kw_only=True):
    """Its answer. `closed` are the sums, null while the cell lives or where they are not known."""

    job_id: str
    connections: tuple[EgressConnection, ...]
    closed: EgressSums | None = None
    next_cursor: int | None = None
