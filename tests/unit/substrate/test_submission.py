"""Submitting: one job and one charge per key, budgets that hold under a crowd, intents that nobody keeps."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

from aether.contract import caveats
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.substrate.access.access import Access, Resource
from aether.substrate.access.identity import DEFAULT_TENANT
from aether.substrate.cells.drivers.memory import Run
from tests.support.onenode import OWNER, OneNode, caller, command, running


async def ok(run: Run) -> int:
    return 0


def ticket(node: OneNode, *said: caveats.Caveat) -> tuple[str, str]:
    """A ticket's text for the owner, and the id of its link."""
    access = node.parts.gate._access
    assert isinstance(access, Access)
    principal = node.parts.gate.admit(caller(), "health", Resource(kind="node")).principal
    text, minted = access.mint(DEFAULT_TENANT, os.urandom(16), (caveats.role("queen"), *said), principal)
    return text, minted.ticket.link_ids[-1]


def test_a_key_stands_for_one_job_and_one_charge(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, {"ok": ok}) as node:
            text, link = ticket(node, caveats.budget("ops", 100))
            by = caller(key="once", ticket=text)
            jobs = await asyncio.gather(*(node.submit(command("ok"), by, 5_000) for _ in range(20)))
            assert len({job.job_id for job in jobs}) == 1
            assert {job.state for job in jobs} == {JobState.SUCCEEDED}
            assert node.parts.book.accounts.account(link).spent["ops"] == 1
            assert len(await node.records("job.intent")) == 1
            with pytest.raises(AetherError) as caught:
                await node.submit(command("ok", "other"), by)
            assert caught.value.code == "IDEMPOTENCY_CONFLICT"
            assert caught.value.details["job_id"] == jobs[0].job_id
            await node.kill_aetherd()
            await node.start_aetherd()
            await node.connected()
            again = await node.submit(command("ok"), by)
            assert (again.job_id, again.state) == (jobs[0].job_id, JobState.SUCCEEDED), "remembered over a restart"

    asyncio.run(main())


def test_keys_of_different_principals_do_not_meet(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, {"ok": ok}) as node:
            first = await node.submit(command("ok"), caller(OWNER, key="same"), 5_000)
            second = await node.submit(command("ok"), caller(OWNER + 1, key="same"), 5_000)
            assert first.job_id != second.job_id

    asyncio.run(main())


def test_a_failed_attempt_does_not_use_up_its_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, {"ok": ok}) as node:
            text, link = ticket(node, caveats.budget("ops", 1))
            await node.kill_aurorad()
            await asyncio.sleep(0.01)
            with pytest.raises(AetherError) as caught:
                await node.submit(command("ok"), caller(key="k", ticket=text))
            assert caught.value.code == "UNAVAILABLE"
            assert node.parts.book.accounts.account(link).used("ops") == 0
            await node.start_aurorad()
            await node.connected()
            assert (await node.submit(command("ok"), caller(key="k", ticket=text), 5_000)).state is JobState.SUCCEEDED

    asyncio.run(main())


def test_a_budget_admits_exactly_what_it_holds(tmp_path: Path) -> None:
    """20 at once under ops = 3: three jobs, 17 refusals, and the account says so, now and after a restart."""

    async def main() -> None:
        async with running(tmp_path, {"ok": ok}) as node:
            text, link = ticket(node, caveats.budget("ops", 3))
            asked = (node.submit(command("ok"), caller(ticket=text), 5_000) for _ in range(20))
            answers = await asyncio.gather(*asked, return_exceptions=True)
            codes = Counter(answer.code if isinstance(answer, AetherError) else "OK" for answer in answers)
            assert codes == {"OK": 3, "BUDGET_EXHAUSTED": 17}
            account = node.parts.book.accounts.account(link)
            assert (account.spent["ops"], account.reserved) == (3, {})
            assert len(await node.records("job.outcome")) == 3
            await node.kill_aetherd()
            await node.start_aetherd()
            await node.connected()
            with pytest.raises(AetherError) as caught:
                await node.submit(command("ok"), caller(ticket=text))
            assert caught.value.code == "BUDGET_EXHAUSTED"

    asyncio.run(main())


def test_a_burst_is_admitted_or_told_to_wait(tmp_path: Path) -> None:
    """More at once than the log has room allocated for: the disk is not full, and nobody may be told so."""

    async def main() -> None:
        async with running(tmp_path, {"ok": ok}) as node:
            asked = (node.submit(command("ok"), caller()) for _ in range(600))
            answers = await asyncio.gather(*asked, return_exceptions=True)
            codes = Counter(answer.code if isinstance(answer, AetherError) else "OK" for answer in answers)
            assert codes.keys() <= {"OK", "BUSY"} and codes["OK"] >= 100, codes
            accepted = [answer for answer in answers if not isinstance(answer, BaseException)]
            await asyncio.gather(*(node.view(job.job_id, wait_ms=20_000) for job in accepted))
            assert len(await node.records("job.outcome")) == codes["OK"]

    asyncio.run(main())


def test_what_cannot_be_recorded_is_not_charged(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, {"ok": ok}) as node:
            text, link = ticket(node, caveats.budget("ops", 1))

            def full(make: object) -> None:
                raise AetherError("DISK_FULL", "cannot record: no room")

            with mock.patch.object(node.parts.book.log, "append", full), pytest.raises(AetherError) as caught:
                await node.submit(command("ok"), caller(ticket=text))
            assert caught.value.code == "DISK_FULL"
            assert node.parts.book.accounts.account(link).used("ops") == 0
            assert (await node.submit(command("ok"), caller(ticket=text), 5_000)).state is JobState.SUCCEEDED

    asyncio.run(main())


def test_an_intent_whose_row_is_not_kept_is_abandoned(tmp_path: Path) -> None:
    """aurorad dies on the call that hands it the row: the caller is told, the log says ABANDONED, nothing ran."""

    async def main() -> None:
        async with running(tmp_path, {"ok": ok}) as node:
            node.on_step = lambda name: node.link.close() if name == "call job.submit" else None
            with pytest.raises(AetherError) as caught:
                await node.submit(command("ok"), caller())
            node.on_step = lambda name: None
            job_id = caught.value.details["job_id"]
            assert caught.value.code == "UNAVAILABLE"
            await node.connected()
            view = await node.view(job_id, wait_ms=5_000)
            assert view.state is JobState.FAILED and view.error is not None and view.error.code == "ABANDONED"
            (outcome,) = await node.records("job.outcome")
            assert outcome.job_id == job_id and outcome.budget is not None and outcome.budget.settled
            assert await node.driver.adopt() == [], "nothing was started for it, or it was freed"

    asyncio.run(main())


def test_a_requirement_that_cannot_be_met_is_refused_before_anything_is_charged(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, {"ok": ok}) as node:
            node.driver._missing["microvm"] = ("there is no driver", "install one")
            text, link = ticket(node, caveats.budget("ops", 1))
            with pytest.raises(AetherError) as caught:
                await node.submit(command("ok", require=["microvm"]), caller(ticket=text))
            assert caught.value.code == "LEVEL_UNMET"
            assert node.parts.book.accounts.account(link).used("ops") == 0

    asyncio.run(main())
