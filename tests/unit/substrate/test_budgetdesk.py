"""Budgets, usage and quotas as operations: who may, what binds from then on, what a restart remembers."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

from aether.client.tickets import attenuate
from aether.contract import budgetcalls as wire
from aether.contract import limits
from aether.contract.allocations import CellRequest
from aether.contract.calls import Caller
from aether.contract.cellcalls import AllocateCall
from aether.contract.errors import AetherError
from aether.contract.records import BudgetRef
from aether.contract.ticketcalls import Budget, LinkCall, MintCall, MintedTicket, MintRequest
from aether.daemons import aetherd, identity
from aether.substrate import quotas
from aether.substrate.cells.drivers.memory import Run
from tests.support.onenode import OWNER, STRANGER, OneNode, caller, command, running


async def ok(run: Run) -> int:
    return 0


async def forever(run: Run) -> int:
    await asyncio.sleep(3_600)
    return 0


def on_node(directory: Path, step: Callable[[OneNode], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(directory, {"ok": ok, "forever": forever}) as node:
            await step(node)
            ledger = node.parts.book.ledger
            await node.parts.fence.end(list(ledger.open.values()), list(ledger.cells.live.values()))

    asyncio.run(main())


async def mint(node: OneNode, **budget: int) -> MintedTicket:
    minted = await node.call("ticket.mint", caller(), MintCall(request=MintRequest(role="user", budget=budget)))
    assert isinstance(minted, MintedTicket)
    return minted


async def refused(work: Awaitable[Any]) -> AetherError:
    with pytest.raises(AetherError) as caught:
        await work
    return caught.value


async def top_up(node: OneNode, account: str, by: Caller | None = None, **amounts: int) -> wire.AccountView:
    call = wire.TopUpCall(request=wire.TopUp(account=account, amounts=amounts))
    view = await node.call("budget.top-up", by or caller(), call)
    assert isinstance(view, wire.AccountView)
    return view


async def set_budget(node: OneNode, tenant: str, by: Caller | None = None, **amounts: int | None) -> wire.AccountView:
    call = wire.SetBudgetCall(request=wire.SetBudget(tenant_id=tenant, limits=amounts))
    view = await node.call("budget.set", by or caller(), call)
    assert isinstance(view, wire.AccountView)
    return view


async def set_quota(node: OneNode, subject: str, by: Caller | None = None, **amounts: int | None) -> wire.QuotaList:
    call = wire.SetQuotaCall(request=wire.SetQuota(subject=subject, quotas=amounts))  # type: ignore[arg-type]
    found = await node.call("quota.set", by or caller(), call)
    assert isinstance(found, wire.QuotaList)
    return found


async def restarted(node: OneNode) -> None:
    await node.kill_aetherd()
    await node.start_aetherd()
    await node.connected()


def test_256_spenders_of_100(tmp_path: Path) -> None:
    """Two derived tickets and the first one: exactly 100 in all, 30 through the narrower."""

    async def step(node: OneNode) -> None:
        minted = await mint(node, ops=100)
        narrow = attenuate(minted.ticket, budget={"ops": 30})
        asked = [
            node.submit(command("ok"), caller(ticket=narrow if number % 2 else minted.ticket), 5_000)
            for number in range(256)
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        codes = Counter(each.code if isinstance(each, AetherError) else "OK" for each in answers)
        assert codes == {"OK": 100, "BUDGET_EXHAUSTED": 156}
        error = next(each for each in answers if isinstance(each, AetherError))
        assert "100 of 100" in error.message or "30 of 30" in error.message or "used or reserved" in error.message
        shown = await node.call("budget.show", caller(ticket=narrow), wire.ShowBudgetCall())
        assert [account.budget[0].spent for account in shown.accounts] == [100, 30]
        assert [account.budget[0].reserved for account in shown.accounts] == [0, 0]

    on_node(tmp_path, step)


def test_a_top_up_adds_and_is_remembered(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        minted = await mint(node, ops=1, micro_usd=5)
        narrow = attenuate(minted.ticket, budget={"ops": 1})
        by = caller(ticket=narrow)
        await node.submit(command("ok"), by, 5_000)
        assert (await refused(node.submit(command("ok"), by))).code == "BUDGET_EXHAUSTED"
        derived = next(a.account for a in (await node.call("budget.show", by, wire.ShowBudgetCall())).accounts[1:])
        await top_up(node, derived, ops=5)
        assert (await refused(node.submit(command("ok"), by))).details["account"] == minted.link_id, (
            "its ancestor binds"
        )
        view = await top_up(node, minted.link_id, ops=1)
        assert view.budget[1] == Budget(unit="ops", limit=2, spent=1, reserved=0)
        await restarted(node)
        await node.submit(command("ok"), by, 5_000)
        assert (await refused(node.submit(command("ok"), by))).code == "BUDGET_EXHAUSTED"
        told = await node.call("ticket.show", caller(), LinkCall(link_id=minted.link_id))
        assert [(b.unit, b.limit, b.spent) for b in told.budget] == [("micro_usd", 5, 0), ("ops", 2, 2)]
        record = (await node.records("budget.raised"))[0]
        assert record.detail["account"] == derived and record.detail["root_id"] == minted.link_id

    on_node(tmp_path, step)


def test_who_may_top_up_what(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        minted, free = await mint(node, ops=5), await mint(node)
        assert (await refused(top_up(node, minted.link_id, caller(STRANGER), ops=1))).code == "POLICY_DENIED"
        for ticket in (minted.ticket, free.ticket):
            error = await refused(top_up(node, minted.link_id, caller(ticket=ticket), ops=1))
            assert error.code in ("POLICY_DENIED", "TICKET_DENIED")
        assert (await refused(top_up(node, "0" * 32, ops=1))).code == "NOT_FOUND"
        assert (await refused(top_up(node, minted.link_id, tokens=1))).code == "BAD_FIELD"
        assert (await refused(top_up(node, minted.link_id, ops=0))).code == "BAD_FIELD"
        assert (await refused(top_up(node, "tenant:acme", ops=1))).code == "BAD_FIELD", "it has no budget"
        key = caller(key="once")
        assert (await top_up(node, minted.link_id, key, ops=7)) == (await top_up(node, minted.link_id, key, ops=7))
        assert (await refused(top_up(node, minted.link_id, key, ops=8))).code == "IDEMPOTENCY_CONFLICT"
        shown = await node.call("budget.show", caller(), wire.ShowBudgetCall(account=minted.link_id))
        assert shown.accounts[0].budget[0].limit == 12
        for by in (caller(STRANGER), caller(ticket=free.ticket)):
            call = wire.ShowBudgetCall(account=minted.link_id)
            assert (await refused(node.call("budget.show", by, call))).code == "NOT_FOUND"

    on_node(tmp_path, step)


def test_a_tenant_has_a_budget_of_its_own(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        by = caller(STRANGER)
        tenant = (await node.submit(command("ok"), by, 5_000)).tenant_id
        assert (await refused(set_budget(node, tenant, by, ops=9))).code == "POLICY_DENIED"
        await set_budget(node, tenant, ops=2, wall_ms=60_000)
        for _ in range(2):
            await node.submit(command("ok"), by, 5_000)
        error = await refused(node.submit(command("ok"), by))
        assert error.code == "BUDGET_EXHAUSTED" and tenant in error.message
        await node.submit(command("ok"), caller(), 5_000)
        await restarted(node)
        assert (await refused(node.submit(command("ok"), by))).code == "BUDGET_EXHAUSTED"
        await top_up(node, f"tenant:{tenant}", ops=1)
        await node.submit(command("ok"), by, 5_000)
        shown = await node.call("budget.show", by, wire.ShowBudgetCall())
        assert next((b.unit, b.limit, b.spent > 0) for b in shown.accounts[0].budget) == ("ops", 3, True)
        await set_budget(node, tenant, ops=None, wall_ms=None)
        await node.submit(command("ok"), by, 5_000)
        assert (await node.call("budget.show", by, wire.ShowBudgetCall())).accounts == ()

    on_node(tmp_path, step)


def test_a_tenants_wall_time_ends_its_jobs(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        by = caller(STRANGER)
        tenant = (await node.submit(command("ok"), by, 5_000)).tenant_id
        await set_budget(node, tenant, wall_ms=300)
        mine = (await node.submit(command("forever"), caller())).job_id
        view = await node.submit(command("forever"), by, 10_000)
        assert view.error is not None and view.error.details["account"] == f"tenant:{tenant}"
        assert mine in node.parts.book.ledger.open

    on_node(tmp_path, step)


def test_usage_is_told_and_survives(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        for by in (caller(), caller(), caller(STRANGER)):
            await node.submit(command("ok"), by, 5_000)

        async def told(by: wire.By, who: Caller) -> dict[str, tuple[int, int]]:
            report = await node.call("usage", who, wire.UsageCall(by=by))
            return {row.name: (row.jobs, row.amounts["ops"]) for row in report.rows}

        everyone = {f"uid:{OWNER}": (2, 2), f"uid:{STRANGER}": (1, 1)}
        assert await told("principal", caller()) == everyone
        assert await told("principal", caller(STRANGER)) == {f"uid:{STRANGER}": (1, 1)}
        assert await told("kind", caller()) == {"command": (3, 3)}
        day = (await node.records("job.outcome"))[0].time[:10]
        assert (await told("day", caller()))[day][0] > 0
        node.parts.book.snapshot()
        await restarted(node)
        assert await told("principal", caller()) == everyone
        empty = await node.call("usage", caller(), wire.UsageCall(until="2000-01-01"))
        assert empty.rows == ()

    on_node(tmp_path, step)


def test_quotas_bound_what_is_there_at_once(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        by = caller(STRANGER)
        name = f"principal:uid:{STRANGER}"
        assert (await refused(set_quota(node, name, by, open_jobs=9))).code == "POLICY_DENIED"
        assert (await refused(set_quota(node, "job:x", open_jobs=9))).code == "BAD_FIELD"
        await set_quota(node, name, open_jobs=2, live_cells=1)
        jobs = [(await node.submit(command("forever"), by)).job_id for _ in range(2)]
        error = await refused(node.submit(command("ok"), by))
        assert error.code == "BUSY" and error.retry_after_s and error.details["quota"] == "open_jobs"
        await node.submit(command("ok"), caller(), 5_000)
        await node.call("cell.allocate", by, AllocateCall(request=CellRequest(name="one")))
        call = AllocateCall(request=CellRequest(name="two"))
        assert (await refused(node.call("cell.allocate", by, call))).details["quota"] == "live_cells"
        await restarted(node)
        assert (await refused(node.submit(command("ok"), by))).code == "BUSY"
        await node.parts.fence.end([node.parts.book.ledger.open[jobs[0]]], ())
        await node.submit(command("ok"), by, 5_000)
        shown = await node.call("quota.show", by, wire.ShowQuotaCall())
        mine = {view.quota: view for view in shown.quotas if view.subject == name}
        assert (mine["open_jobs"].limit, mine["open_jobs"].used, mine["open_jobs"].is_default) == (2, 1, False)
        assert mine["live_cells"].used == 1 and mine["requests_per_s"].is_default
        await set_quota(node, name, open_jobs=None, live_cells=None)
        await node.submit(command("ok"), by, 5_000)

    on_node(tmp_path, step)


def test_a_flood_of_requests_is_told_to_wait(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        await node.call("usage", caller(STRANGER), wire.UsageCall())
        await set_quota(node, f"principal:uid:{STRANGER}", requests_per_s=20)
        asked = (node.call("usage", caller(STRANGER), wire.UsageCall()) for _ in range(200))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        busy = sum(isinstance(each, AetherError) and each.code == "BUSY" for each in answers)
        assert 170 <= busy <= 180, busy
        await node.call("usage", caller(), wire.UsageCall())
        await asyncio.sleep(0.2)
        await node.call("usage", caller(STRANGER), wire.UsageCall())

    on_node(tmp_path, step)


def test_one_tenant_leaves_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that asks for all gets half; whoever comes later is admitted."""
    monkeypatch.setattr(limits, "JOBS_OPEN_MAX", 40)

    async def step(node: OneNode) -> None:
        greedy = 0
        for _ in range(60):
            try:
                await node.submit(command("forever"), caller(STRANGER))
                greedy += 1
            except AetherError as error:
                assert error.code == "BUSY" and error.retry_after_s
        assert greedy == 20
        late = [await node.submit(command("ok"), caller()) for _ in range(5)]
        assert len(late) == 5

    monkeypatch.setattr(quotas.limits, "JOBS_OPEN_MAX", 40)
    on_node(tmp_path, step)


def _state(node: OneNode) -> dict[str, Any]:
    book = node.parts.book
    return {
        "accounts": msgspec.to_builtins(book.accounts.snapshot()),
        "usage": sorted(book.usage.snapshot()),
        "quotas": book.quotas.snapshot(),
        "counts": [dict(each) for each in (book.quotas._open, book.quotas._queued, book.quotas._cells)],
    }


@pytest.mark.parametrize("seed", range(3))
def test_what_is_remembered_is_the_fold_of_the_log(tmp_path: Path, seed: int) -> None:
    """Deaths at any moment of a mixed load, with and without a snapshot: the next life knows what this one knew of
    what was durable, and nothing else."""
    dice = random.Random(seed)

    async def act(node: OneNode, tickets: list[str], number: int) -> None:
        by = caller(dice.choice([OWNER, STRANGER])) if dice.random() < 0.4 else caller(ticket=dice.choice(tickets))
        doing: list[Callable[[], Awaitable[Any]]] = [
            lambda: node.submit(command("ok"), by, dice.choice([0, 2_000])),
            lambda: node.submit(command("forever"), by),
            lambda: node.call("cell.allocate", by, AllocateCall(request=CellRequest(name=f"c{number}"))),
            lambda: set_budget(node, "default", ops=dice.randint(50, 90), wall_ms=dice.choice([None, 400_000])),
            lambda: set_quota(node, "tenant:default", open_jobs=dice.choice([None, 30])),
            lambda: node.call("ticket.mint", caller(), MintCall(request=MintRequest(budget={"ops": number}))),
        ]
        with contextlib.suppress(AetherError):
            await dice.choices(doing, weights=[8, 3, 2, 1, 1, 1])[0]()

    async def step(node: OneNode) -> None:
        tickets = [(await mint(node, ops=40, wall_ms=900_000, micro_usd=9)).ticket for _ in range(2)]
        tickets.append(attenuate(tickets[0], budget={"ops": 7, "cpu_ms": 900_000}))
        for life in range(3):
            doing = [asyncio.ensure_future(act(node, tickets, life * 100 + n)) for n in range(dice.randint(10, 25))]
            await asyncio.wait(doing, timeout=dice.choice([0.02, 0.1, 3]))
            book = node.parts.book
            await book.log.durable(book.log.size - 1)
            if dice.random() < 0.5:
                book.snapshot()
            recorded = {job.intent.budget.reservation_id for job in book.ledger.open.values() if job.intent.budget}
            for name in set(book.accounts._reservations) - recorded:  # held for nothing that was recorded: dies with it
                book.accounts.release(BudgetRef(reservation_id=name, accounts=(), ops=0, cpu_ms=0, settled=False))
            known, size = _state(node), book.log.size
            await node.kill_aetherd()
            await asyncio.gather(*doing, return_exceptions=True)
            loaded = await _loaded(node, size)
            assert known == loaded
            await node.start_aetherd()
            await node.connected()

    on_node(tmp_path, step)


async def _loaded(node: OneNode, size: int) -> dict[str, Any]:
    """What a new process knows once it has read the log, before it does anything."""
    quiet = mock.patch.object(aetherd, "record_node", lambda *_: None)
    with quiet, mock.patch.object(identity, "_loaded", lambda *_: None):
        await node.start_aetherd(spawner=False)
    assert node.parts.book.log.size == size
    state = _state(node)
    await node.kill_aetherd()
    return state
