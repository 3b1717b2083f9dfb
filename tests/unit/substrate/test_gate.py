"""The gate: what is refused is recorded, within a rate per uid; reads are not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from aether.contract import ticketcalls as wire
from aether.contract import tickets
from aether.contract.caveats import Caveat
from aether.contract.errors import AetherError
from aether.contract.records import Record
from aether.substrate.access.access import Resource
from aether.substrate.gate import REFUSALS_BURST, REFUSALS_PER_S
from tests.support.onenode import OWNER, STRANGER, OneNode, caller

SUBMIT = Resource(kind="command", op="run", labels=("local-only",))
FORGED = "aetk1_" + "A" * 80


def on_node(directory: Path, step: Callable[[OneNode], Awaitable[None]]) -> None:
    async def main() -> None:
        node = OneNode(directory, {})
        await node.start_aetherd()
        try:
            await step(node)
        finally:
            await node.stop()

    asyncio.run(main())


def refused(
    node: OneNode,
    uid: int,
    operation: str = "job.submit",
    times: int = 1,
    ticket: str = FORGED,
    code: str = "BAD_TICKET",
) -> None:
    for _ in range(times):
        with pytest.raises(AetherError) as caught:
            node.parts.gate.admit(caller(uid, ticket=ticket), operation, SUBMIT)
        assert caught.value.code == code


async def mint(node: OneNode) -> wire.MintedTicket:
    minted = await node.call("ticket.mint", caller(), wire.MintCall(request=wire.MintRequest()))
    assert isinstance(minted, wire.MintedTicket)
    return minted


async def denied(node: OneNode) -> list[Record]:
    return await node.records("access.denied")


def test_a_refusal_names_who_asked_for_what_and_why(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        refused(node, STRANGER)
        (record,) = await denied(node)
        assert record.principal == f"uid:{STRANGER}"
        assert (record.operation, record.kind, record.op) == ("job.submit", "command", "run")
        assert record.labels == SUBMIT.labels
        assert record.error is not None and record.error.code == "BAD_TICKET"
        assert FORGED not in str(record)

    on_node(tmp_path, step)


def test_reads_are_not_recorded_but_for_those_of_somebody_unknown(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        reads = ("job.get", "health", "artifact.get", "cell.explain")
        narrow = tickets.attenuate((await mint(node)).ticket, [Caveat("operations", ("none",))])
        for operation in reads:
            refused(node, STRANGER, operation, ticket=narrow, code="TICKET_DENIED")
        assert await denied(node) == []
        for operation in reads:
            refused(node, STRANGER, operation)
        assert [record.operation for record in await denied(node)] == list(reads)

    on_node(tmp_path, step)


def test_one_uid_cannot_fill_the_log_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        now_ns = node.parts.book.now_ns()
        node.parts.book.now_ns = lambda: now_ns
        refused(node, STRANGER, times=REFUSALS_BURST + 30)
        assert len(await denied(node)) == REFUSALS_BURST
        refused(node, OWNER)
        assert len(await denied(node)) == REFUSALS_BURST + 1, "another uid has a bucket of its own"
        now_ns += 1_000_000_000
        refused(node, STRANGER, times=20)
        records = [record for record in await denied(node) if record.principal == f"uid:{STRANGER}"]
        assert len(records) == REFUSALS_BURST + REFUSALS_PER_S
        assert records[REFUSALS_BURST].detail == {"not_recorded_before": "30"}

    on_node(tmp_path, step)


def test_a_peer_without_identity_is_refused(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        with pytest.raises(AetherError) as caught:
            node.parts.gate.admit(caller(-1), "job.submit", SUBMIT)
        assert caught.value.code == "UNAUTHENTICATED"

    on_node(tmp_path, step)


def test_an_implicit_ticket_is_minted_once_and_recorded(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        first = node.parts.gate.admit(caller(STRANGER), "job.submit", SUBMIT)
        again = node.parts.gate.admit(caller(STRANGER), "job.submit", SUBMIT)
        assert first.ticket == again.ticket and first.ticket.implicit
        minted = [record for record in await node.records("ticket.minted") if record.principal == f"uid:{STRANGER}"]
        assert [record.ticket for record in minted] == [first.ticket]
        await node.kill_aetherd()
        await node.start_aetherd()
        after = node.parts.gate.admit(caller(STRANGER), "job.submit", SUBMIT)
        assert after.ticket == first.ticket, "the same ticket, and so the same account, after a restart"

    on_node(tmp_path, step)
