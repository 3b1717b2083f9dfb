"""Tickets as operations: who may mint, see and revoke; what a revocation ends, also when aetherd dies right after."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aether.client.tickets import attenuate, inspect
from aether.contract import ticketcalls as wire
from aether.contract.allocations import CellRequest
from aether.contract.calls import Caller, LogsCall, Nothing, StreamReply
from aether.contract.cellcalls import AllocateCall, CellCall
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState, JobView
from aether.contract.limits import TICKET_EPOCHS_MAX, TICKET_LINKS_REVOKED_MAX, TICKET_MS_MAX
from aether.orchestrator.service import CELLS_RUNNING_MAX
from aether.substrate import ticketentries
from aether.substrate.access.access import Admission, Resource
from aether.substrate.book import Book
from aether.substrate.cellentries import Order
from aether.substrate.cells.drivers.memory import Program, Run
from aether.substrate.ticketbook import PRUNED_MS
from tests.support.onenode import OWNER, STRANGER, OneNode, caller, command, running

HOUR_MS = 3_600_000
OTHER = STRANGER + 1


async def ok(run: Run) -> int:
    return 0


async def forever(run: Run) -> int:
    await asyncio.sleep(600)
    return 0


PROGRAMS: dict[str, Program] = {"ok": ok, "forever": forever}
Step = Callable[[OneNode], Awaitable[None]]


def on_node(directory: Path, step: Step) -> None:
    async def main() -> None:
        async with running(directory, PROGRAMS) as node:
            await step(node)

    asyncio.run(main())


async def mint(node: OneNode, by: Caller | None = None, **fields: Any) -> wire.MintedTicket:
    request = wire.MintRequest(**{"expires_ms": HOUR_MS, **fields})
    minted = await node.call("ticket.mint", by or caller(), wire.MintCall(request=request))
    assert isinstance(minted, wire.MintedTicket)
    return minted


async def revoke(node: OneNode, target: str, by: Caller | None = None) -> wire.Revoked:
    name = "ticket" if target.startswith("aetk1_") else "link_id"
    done = await node.call("ticket.revoke", by or caller(), wire.RevokeCall(**{name: target}))
    assert isinstance(done, wire.Revoked)
    return done


async def refused(work: Awaitable[Any]) -> str:
    with pytest.raises(AetherError) as caught:
        await work
    return caught.value.code


async def is_running(node: OneNode, job_id: str) -> None:
    async with asyncio.timeout(10):
        while node.parts.book.ledger.open[job_id].started is None:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


def test_a_minted_ticket_works_counts_and_is_small(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        minted = await mint(node, role="user", budget={"ops": 2}, kinds=("command",))
        assert len(minted.ticket) < 512 and inspect(minted.ticket).link_id == minted.link_id
        by = caller(STRANGER, ticket=minted.ticket)
        assert (await node.submit(command("ok"), by, 5_000)).state is JobState.SUCCEEDED
        view = await node.call("ticket.show", caller(), wire.LinkCall(link_id=minted.link_id))
        assert view.budget == (wire.Budget(unit="ops", limit=2, spent=1, reserved=0),) and view.role == "user"
        assert not hasattr(view, "ticket")
        await node.submit(command("ok"), by, 5_000)
        assert await refused(node.submit(command("ok"), by)) == "BUDGET_EXHAUSTED"
        found = await node.call("ticket.verify", caller(), wire.VerifyCall(ticket=minted.ticket))
        assert found.roles == ("user",) and found.links[0].budget[0].spent == 2
        (record,) = [r for r in await node.records("ticket.minted") if r.operation == "ticket.mint"]
        assert record.principal == f"uid:{OWNER}" and record.policy is not None and record.budget is not None
        log = b"".join(node.parts.book.log.entry(index) for index in range(node.parts.book.log.size))
        assert minted.ticket.encode() not in log and minted.ticket[-43:].encode() not in log

    on_node(tmp_path, step)


def test_who_may_mint_what(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        stranger = caller(STRANGER)
        own = await mint(node, stranger)
        assert (own.role, own.tenant_id) == ("user", f"uid-{STRANGER}"), "for itself, as what it is"
        for role in ("queen", "node", "worker-gpu"):
            assert await refused(mint(node, stranger, role=role)) == "POLICY_DENIED"
        assert (await mint(node, role="worker-gpu")).role == "worker-gpu", "the operator mints for roles"
        for ticket in (own.ticket, (await mint(node, role="queen")).ticket):
            assert await refused(mint(node, caller(ticket=ticket))) == "TICKET_DENIED", "it would shed what narrows it"
        for fields in (
            {"budget": {"gold": 1}},
            {"budget": {"ops": -1}},
            {"role": "no role"},
            {"expires_ms": TICKET_MS_MAX + 1},
            {"expires_ms": 0},
            {"paths": ("/work",)},
            {"kinds": ("",)},
            {"hosts": ("x" * 1_025,)},
            {"operations": tuple(f"{n:0>900}" for n in range(20))},
        ):
            assert await refused(mint(node, **fields)) == "BAD_FIELD", fields
        heartbeat = caller(ticket=(await mint(node, role="worker-heartbeat")).ticket)
        assert await refused(revoke(node, own.link_id, heartbeat)) == "POLICY_DENIED"

    on_node(tmp_path, step)


def test_who_sees_and_revokes_what(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        mine, other = await mint(node, caller(STRANGER)), await mint(node, caller(STRANGER))
        narrow = attenuate(mine.ticket, budget={"ops": 9})
        listed = await node.call("ticket.list", caller(STRANGER), Nothing())
        assert [t.link_id for t in listed.tickets] == [other.link_id, mine.link_id], "newest first"
        for by in (caller(OTHER), caller()):
            assert (await node.call("ticket.list", by, Nothing())).tickets == ()
            assert await refused(node.call("ticket.show", by, wire.LinkCall(link_id=mine.link_id))) == "NOT_FOUND"
            assert await refused(revoke(node, mine.link_id, by)) == "NOT_FOUND"
        bearer = caller(OTHER, ticket=narrow)
        assert [t.link_id for t in (await node.call("ticket.list", bearer, Nothing())).tickets] == [mine.link_id]
        for link in (mine.link_id, other.link_id):
            assert await refused(revoke(node, link, bearer)) == "NOT_FOUND", "not what it derives from, nor others"
        assert (await revoke(node, narrow, caller(OTHER))).link_id == inspect(narrow).link_id, "who has it may end it"
        assert await refused(node.submit(command("ok"), bearer)) == "TICKET_REVOKED"
        await node.submit(command("ok"), caller(OTHER, ticket=mine.ticket), 5_000)
        await revoke(node, mine.link_id, caller(STRANGER))
        assert await refused(node.submit(command("ok"), caller(OTHER, ticket=mine.ticket))) == "TICKET_REVOKED"
        assert await refused(node.call("ticket.verify", caller(), wire.VerifyCall(ticket=narrow))) == "TICKET_REVOKED"
        view = await node.call("ticket.show", caller(STRANGER), wire.LinkCall(link_id=mine.link_id))
        assert view.revoked_at is not None and view.revoked_links == (inspect(narrow).link_id,)

    on_node(tmp_path, step)


def test_calls_that_name_nothing_are_told_so(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        assert await refused(node.call("ticket.revoke", caller(), wire.RevokeCall())) == "BAD_FIELD"
        assert await refused(revoke(node, "g" * 32)) == "BAD_ID"
        assert await refused(revoke(node, "0" * 32)) == "NOT_FOUND"
        assert await refused(revoke(node, "aetk1_AAAA")) == "BAD_TICKET"
        implicit = node.parts.gate.admit(caller(), "health", Resource(kind="node")).ticket.link_ids[0]
        assert await refused(revoke(node, implicit)) == "NOT_FOUND", "the policy governs what uids get by themselves"

    on_node(tmp_path, step)


def test_a_key_stands_for_one_ticket(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        by = caller(key="k")
        first = await mint(node, by, budget={"ops": 1})
        await node.kill_aetherd()
        await node.start_aetherd()
        assert await mint(node, by, budget={"ops": 1}) == first
        assert await refused(mint(node, by, budget={"ops": 2})) == "IDEMPOTENCY_CONFLICT"
        assert len((await node.call("ticket.list", caller(), Nothing())).tickets) == 1

    on_node(tmp_path, step)


def test_revoked_links_of_one_ticket_are_bounded(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        minted = await mint(node)
        for number in range(TICKET_LINKS_REVOKED_MAX):
            await revoke(node, attenuate(minted.ticket, budget={"ops": number}))
        assert await refused(revoke(node, attenuate(minted.ticket, budget={"ops": 999}))) == "TICKET_LIMIT"
        await revoke(node, minted.ticket)

    on_node(tmp_path, step)


async def _admitted(node: OneNode, ticket: str, places: int) -> tuple[list[str], list[str]]:
    """Jobs of the ticket that run, in `places` and one in an allocated cell of its own; and some that wait."""
    by = caller(OTHER, ticket=ticket)
    await node.call("cell.allocate", by, AllocateCall(request=CellRequest(name="agent")))
    runs = [(await node.submit(command("forever"), by)).job_id for _ in range(places)]
    guest = (await node.submit(command("forever", cell="agent"), by)).job_id
    for job_id in (*runs, guest):
        await is_running(node, job_id)
    waits = [(await node.submit(command("forever"), by)).job_id for _ in range(5)]
    return [*runs, guest], waits


async def _all_fenced(node: OneNode, job_ids: list[str], ran: int) -> None:
    for number, job_id in enumerate(job_ids):
        view: JobView = await node.view(job_id, wait_ms=10_000)
        assert view.state is JobState.CANCELLED and view.error is not None and view.error.code == "REVOKED", view
        assert (view.started_at is not None) == (number < ran)
    assert not node.parts.book.ledger.open and not node.parts.book.ledger.cells.live
    assert not node.parts.book.accounts._reservations


def test_revoking_ends_what_the_ticket_admitted_and_nothing_else(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        minted = await mint(node, budget={"ops": 500})
        keeps = (await node.submit(command("forever"), caller())).job_id
        await is_running(node, keeps)
        runs, waits = await _admitted(node, attenuate(minted.ticket, kinds=("command",)), CELLS_RUNNING_MAX - 1)
        done = await revoke(node, minted.link_id)
        assert (done.jobs, done.cells) == (len(runs) + len(waits), 1)
        assert node.parts.book.ledger.open.keys() == {keeps}
        account = node.parts.book.accounts.account(minted.link_id)
        assert not account.reserved and account.spent["ops"] == len(runs) + len(waits) + 1, "the cell is one"
        shown = await node.call("cell.show", caller(), CellCall(cell="agent"))
        assert shown.reason == "revoked"
        outcomes = {r.job_id: r for r in await node.records("job.outcome")}
        assert {r.detail["revoked_index"] for r in outcomes.values()} == {str(done.log_index)}
        assert (await revoke(node, minted.link_id)) == wire.Revoked(
            link_id=done.link_id, revoked_at=done.revoked_at, log_index=done.log_index, jobs=0, cells=0
        ), "repeating it finds nothing to do"
        rows = [await node.view(job_id) for job_id in (*runs, *waits)]
        assert {(row.state, row.error.code if row.error else "") for row in rows} == {(JobState.CANCELLED, "REVOKED")}

    on_node(tmp_path, step)


def test_a_streams_end_comes_with_the_revocation(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        job_id = (await node.submit(command("forever"), caller())).job_id
        await is_running(node, job_id)
        minted = await mint(node, role="user")
        by = caller(OTHER, ticket=minted.ticket)
        reply = await node.call("job.logs", by, LogsCall(job_id=job_id, follow=True))
        assert isinstance(reply, StreamReply)

        async def read() -> None:
            async for _ in reply.chunks:
                pass

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0.05)
        assert not reading.done()
        await revoke(node, minted.ticket)
        async with asyncio.timeout(1):
            assert await refused(reading) == "TICKET_REVOKED"
        assert job_id in node.parts.book.ledger.open and "streams=0" in repr(node.parts.fence)

    on_node(tmp_path, step)


def test_a_revocation_outlives_a_death_between_its_record_and_its_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def step(node: OneNode) -> None:
        minted = await mint(node)
        runs, waits = await _admitted(node, minted.ticket, CELLS_RUNNING_MAX)
        durable = Book.durable

        async def dies(book: Book, record: Any) -> None:
            await durable(book, record)
            if record.type == "ticket.revoked":
                await asyncio.Event().wait()

        monkeypatch.setattr(Book, "durable", dies)
        revoking = asyncio.ensure_future(revoke(node, minted.link_id))
        while not node.parts.book.ledger.tickets.revoked:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)
        await node.kill_aetherd()
        await asyncio.gather(revoking, return_exceptions=True)
        monkeypatch.setattr(Book, "durable", durable)
        await node.start_aetherd()
        await node.connected()
        by = caller(OTHER, ticket=minted.ticket)
        assert await refused(node.submit(command("ok"), by)) == "TICKET_REVOKED"
        await _all_fenced(node, [*runs, *waits], len(runs))

    on_node(tmp_path, step)


def test_snapshot_and_log_agree_about_tickets(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        kept, gone = await mint(node), await mint(node)
        await revoke(node, attenuate(kept.ticket, kinds=()))
        await revoke(node, gone.link_id)
        before = node.parts.book.ledger.tickets
        told, revoked = before.snapshot(), set(before.revoked)
        for snapshot in (False, True):
            if snapshot:
                await node.records()
                node.parts.book.snapshot()
            await node.kill_aetherd()
            await node.start_aetherd()
            assert node.parts.book.ledger.tickets.snapshot() == told
            assert node.parts.book.ledger.tickets.revoked == revoked

    on_node(tmp_path, step)


def test_a_record_of_a_revoked_ticket_is_not_written(tmp_path: Path) -> None:
    """A ticket that is revoked between a call's admission and its record: the call is refused, and charged nothing."""

    async def step(node: OneNode) -> None:
        minted = await mint(node)
        gate, book = node.parts.gate, node.parts.book
        admit, ticket = gate.admit, book.ledger.tickets.find(minted.link_id)
        assert ticket is not None

        def late(who: Caller, operation: str, resource: Resource) -> Admission:
            admission: Admission = admit(who, operation, resource)
            order = Order(caller(), admit(caller(), "ticket.revoke", Resource(kind="ticket")), "ticket.revoke")
            book.write(lambda index, now: ticketentries.revoked(ticket, minted.link_id, order, index, now))
            return admission

        gate.admit = late
        call = AllocateCall(request=CellRequest(name="late"))
        by = caller(OTHER, ticket=minted.ticket)
        assert await refused(node.call("cell.allocate", by, call)) == "TICKET_REVOKED"
        assert not book.ledger.cells.live and not book.accounts._reservations

    on_node(tmp_path, step)


async def rotate(node: OneNode, by: Caller | None = None) -> wire.KeyRotated:
    rotated = await node.call("ticket.rotate-key", by or caller(), Nothing())
    assert isinstance(rotated, wire.KeyRotated)
    return rotated


def test_another_key_breaks_no_live_ticket_and_no_account(tmp_path: Path) -> None:
    """Also across a restart, and with a death between the record and the file of keys."""

    async def step(node: OneNode) -> None:
        own = (await node.submit(command("ok"), caller(), 10_000)).job_id
        old = await mint(node, caller(key="k"), budget={"ops": 3})
        await node.submit(command("ok"), caller(ticket=old.ticket), 10_000)
        rotated = await rotate(node)
        assert (rotated.kid, rotated.kept) == ("e2", ("e1",))
        again = await mint(node, caller(key="k"), budget={"ops": 3})
        assert again.ticket == old.ticket, "a repeated call tells the ticket that it made, of the key of then"
        new = await mint(node)
        assert inspect(new.ticket).kid == "e2" and inspect(old.ticket).kid == "e1"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(node.parts.ticket_keys, "_settle", lambda: (_ for _ in ()).throw(OSError("died")))
            with pytest.raises(OSError, match="died"):
                await rotate(node)
        await node.kill_aetherd()
        await node.start_aetherd()
        await node.connected()
        assert inspect((await mint(node)).ticket).kid == "e3"
        for ticket in (old.ticket, new.ticket):
            await node.submit(command("ok"), caller(ticket=ticket), 10_000)
        assert (await node.call("ticket.show", caller(), wire.LinkCall(link_id=old.link_id))).budget[0].spent == 2
        later = (await node.submit(command("ok"), caller(), 10_000)).job_id
        intents = {record.job_id: record for record in await node.records("job.intent")}
        assert intents[own].ticket == intents[later].ticket, "the account of a uid is the same"
        records = await node.records("ticket.key-rotated")
        assert [record.detail["kid"] for record in records] == ["e2", "e3"]
        assert all(record.budget is not None and record.budget.ops == 1 for record in records)

    on_node(tmp_path, step)


def test_only_the_operator_changes_keys_and_never_too_many(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        assert await refused(rotate(node, caller(STRANGER))) == "POLICY_DENIED"
        for _ in range(TICKET_EPOCHS_MAX - 1):
            await mint(node)
            rotated = await rotate(node)
        assert len(rotated.kept) == TICKET_EPOCHS_MAX - 1
        await mint(node)
        assert await refused(rotate(node)) == "TICKET_LIMIT"

    on_node(tmp_path, step)


def test_a_key_is_forgotten_when_no_ticket_of_it_is_left(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        await mint(node, expires_ms=1_000)
        assert (await rotate(node)).kept == ("e1",)
        book = node.parts.book
        real = book.now_ns
        book.now_ns = lambda: real() + (PRUNED_MS + 5_000) * 1_000_000
        kept = await mint(node)
        assert (await rotate(node)).kept == ("e2",)
        keys = (node.layout.keys / "tickets.key").read_text().split()
        assert keys[::2] == ["implicit", "e2", "e3"]
        book.now_ns = real
        assert await node.call("ticket.verify", caller(), wire.VerifyCall(ticket=kept.ticket))

    on_node(tmp_path, step)
