"""What runs is ended when a budget runs out or a ticket expires: soon, all that share the account, and it is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from aether.contract.allocations import CellRequest
from aether.contract.cellcalls import AllocateCall, CellCall
from aether.contract.cells import Limits
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState, JobView
from aether.contract.ticketcalls import MintCall, MintedTicket, MintRequest
from aether.substrate.cells.drivers.memory import Run
from tests.support.onenode import OneNode, caller, command, running


async def ok(run: Run) -> int:
    return 0


async def forever(run: Run) -> int:
    await asyncio.sleep(3_600)
    return 0


def on_node(directory: Path, step: Callable[[OneNode], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(directory, {"ok": ok, "forever": forever}) as node:
            await step(node)
            meter = node.parts.meter
            assert not meter._runs and not meter._accounts, "nothing is metered any more"

    asyncio.run(main())


async def mint(node: OneNode, expires_ms: int = 3_600_000, **budget: int) -> MintedTicket:
    call = MintCall(request=MintRequest(role="user", budget=budget, expires_ms=expires_ms))
    minted = await node.call("ticket.mint", caller(), call)
    assert isinstance(minted, MintedTicket)
    return minted


async def over(node: OneNode, job_id: str) -> JobView:
    view = await node.view(job_id, wait_ms=10_000)
    assert view.finished_at is not None, view
    return view


def test_wall_time_that_jobs_share_runs_out_for_all_of_them(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        minted = await mint(node, wall_ms=900)
        by = caller(ticket=minted.ticket)
        free = (await node.submit(command("forever"), caller())).job_id
        began_s = time.monotonic()
        jobs = [(await node.submit(command("forever"), by)).job_id for _ in range(3)]
        views = [await over(node, job_id) for job_id in jobs]
        assert 0.25 < time.monotonic() - began_s < 2, "a third of it each"
        for view in views:
            assert view.state is JobState.FAILED and view.error is not None
            assert view.error.code == "BUDGET_EXHAUSTED" and "0.9 s of run time" in view.error.message
            assert view.error.details["unit"] == "wall_ms" and view.error.details["limit"] == 900
        spent = node.parts.book.accounts.account(minted.link_id).spent
        assert 900 <= spent["wall_ms"] < 1_500 and spent["ops"] == 3
        with pytest.raises(AetherError) as refused:
            await node.submit(command("ok"), by)
        assert refused.value.code == "BUDGET_EXHAUSTED"
        records = await node.records("budget.exhausted")
        assert {r.job_id for r in records} == set(jobs) and records[0].detail["account"] == minted.link_id
        outcomes = {r.job_id: r.detail for r in await node.records("job.outcome")}
        assert {outcomes[r.job_id]["exhausted_index"] for r in records} == {str(r.log_index) for r in records}
        assert node.parts.book.ledger.open.keys() == {free}
        await node.parts.fence.end([node.parts.book.ledger.open[free]], ())

    on_node(tmp_path, step)


def test_memory_is_metered_as_granted(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        minted = await mint(node, memory_byte_s=100 << 20)
        asked = command("forever", limits={"memory_bytes": 256 << 20})
        view = await over(node, (await node.submit(asked, caller(ticket=minted.ticket))).job_id)
        assert view.error is not None and view.error.details["unit"] == "memory_byte_s"
        spent = node.parts.book.accounts.account(minted.link_id).spent["memory_byte_s"]
        assert 100 << 20 <= spent < 250 << 20

    on_node(tmp_path, step)


def test_an_allocated_cell_and_what_is_in_it_end(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        minted = await mint(node, memory_byte_s=100 << 20)
        by = caller(ticket=minted.ticket)
        request = CellRequest(name="agent", limits=Limits(memory_bytes=256 << 20))
        await node.call("cell.allocate", by, AllocateCall(request=request))
        guest = (await node.submit(command("forever", cell="agent"), caller())).job_id
        await over(node, guest)
        view = await node.call("cell.show", caller(), CellCall(cell="agent"))
        assert (view.state, view.reason) == ("freed", "exhausted")
        freed = (await node.records("cell.freed"))[0]
        assert freed.budget is not None and freed.budget.amounts["memory_byte_s"] >= 100 << 20
        with pytest.raises(AetherError) as refused:
            await node.call("cell.allocate", by, AllocateCall(request=request))
        assert refused.value.code == "BUDGET_EXHAUSTED"

    on_node(tmp_path, step)


def test_a_ticket_that_expires_takes_along_what_it_admitted(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        minted = await mint(node, expires_ms=1_000)
        by = caller(ticket=minted.ticket)
        await node.call("cell.allocate", by, AllocateCall(request=CellRequest(name="agent")))
        job = (await node.submit(command("forever"), by)).job_id
        done = (await node.submit(command("ok"), by, 5_000)).job_id
        view = await over(node, job)
        assert view.state is JobState.CANCELLED and view.error is not None and view.error.code == "TICKET_EXPIRED"
        assert (await node.view(done)).state is JobState.SUCCEEDED
        async with asyncio.timeout(5):
            while node.parts.book.ledger.cells.live:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        assert {r.detail["unit"] for r in await node.records("budget.exhausted")} == {"ttl"}

    on_node(tmp_path, step)


def test_a_budget_binds_after_aetherd_died(tmp_path: Path) -> None:
    """The limits are in the log: a new aetherd meters what runs on without ever seeing the ticket."""

    async def step(node: OneNode) -> None:
        minted = await mint(node, wall_ms=700)
        job = (await node.submit(command("forever"), caller(ticket=minted.ticket))).job_id
        while node.parts.book.ledger.open[job].started is None:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        await node.kill_aetherd()
        await node.start_aetherd()
        await node.connected()
        view = await over(node, job)
        assert view.error is not None and view.error.code == "BUDGET_EXHAUSTED"

    on_node(tmp_path, step)


def test_what_is_given_back_in_time_goes_on(tmp_path: Path) -> None:
    """A job that ends within its budget is not touched, and a job beside it gets what is left."""

    async def step(node: OneNode) -> None:
        minted = await mint(node, wall_ms=60_000, cpu_ms=60_000)
        by = caller(ticket=minted.ticket)
        views = [await node.submit(command("ok"), by, 5_000) for _ in range(5)]
        assert {view.state for view in views} == {JobState.SUCCEEDED}
        assert not await node.records("budget.exhausted")

    on_node(tmp_path, step)
