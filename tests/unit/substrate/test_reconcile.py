"""After a reconnect the log decides: rows without an intent, intents without a row, cells that are gone or nobody's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from aether.contract import ids, wire
from aether.contract.cells import CellSpec
from aether.contract.jobs import JobState
from aether.substrate.cells.drivers.memory import Run
from aether.substrate.cells.drivers.port import Order
from aether.substrate.execution import SPAWNER_DIED
from aether.substrate.ledger import OpenJob
from tests.support.onenode import OneNode, caller, command, running


def cell_of(job_id: str) -> str:
    """The cell that is a job's own."""
    return ids.sibling(ids.CELL, job_id)


async def forever(run: Run) -> int:
    await run.terminated.wait()
    return 5


async def brief(run: Run) -> int:
    await asyncio.sleep(0.05)
    return 0


PROGRAMS = {"forever": forever, "brief": brief}


def with_jobs(directory: Path, count: int, step: Callable[[OneNode, list[OpenJob]], Awaitable[None]]) -> None:
    """A node with `count` started jobs that run until they are stopped."""

    async def main() -> None:
        async with running(directory, PROGRAMS) as node:
            found = [await node.submit(command("forever"), caller()) for _ in range(count)]
            jobs = [node.parts.book.ledger.open[view.job_id] for view in found]
            async with asyncio.timeout(5):
                while any(job.started is None for job in jobs):  # noqa: ASYNC110 - the record is all there is to see
                    await asyncio.sleep(0.001)
            await step(node, jobs)

    asyncio.run(main())


def stated(job_id: str) -> wire.OpenJob:
    return wire.OpenJob(job_id=job_id, attempt=1, state=JobState.RUNNING)


async def reconcile(node: OneNode, *job_ids: str, applied: int | None = None) -> wire.Reconciled:
    """What aurorad is answered that states these rows, on a connection of its own."""
    rows = tuple(stated(job_id) for job_id in job_ids)
    at = node.parts.book.log.size if applied is None else applied
    return await node.parts.reconciler.reconcile(wire.Reconcile(applied_index=at, open_jobs=rows), set())


def test_rows_without_an_intent_are_dropped(tmp_path: Path) -> None:
    async def step(node: OneNode, jobs: list[OpenJob]) -> None:
        (job,) = jobs
        unknown = ids.new(ids.JOB)
        answer = await reconcile(node, job.grant.job_id, unknown)
        assert answer.drop == (unknown,)
        assert answer.grants == (job.grant,)
        assert [cell.cell_id for cell in answer.cells] == [cell_of(job.grant.job_id)]

    with_jobs(tmp_path, 1, step)


def test_a_row_whose_outcome_is_in_the_log_is_not_dropped(tmp_path: Path) -> None:
    """It ended while aurorad was away: the row learns it from the log."""

    async def step(node: OneNode, jobs: list[OpenJob]) -> None:
        (job,) = jobs
        before = node.parts.book.log.size
        await node.kill_aurorad()
        await node.parts.execution.finish(wire.JobFinish(grant=job.grant, state=JobState.FAILED))
        answer = await reconcile(node, job.grant.job_id, applied=before)
        assert (answer.drop, answer.grants, answer.cells) == ((), (), ())
        page = await node.parts.reconciler.read_log(wire.LogRead(start=before))
        assert [record.job_id for record in page.records] == [job.grant.job_id]
        assert page.next_index == answer.log_size == node.parts.book.log.size
        await node.start_aurorad()
        await node.connected()
        assert (await node.view(job.grant.job_id, wait_ms=5_000)).state is JobState.FAILED

    with_jobs(tmp_path, 1, step)


def test_intents_without_a_row_are_abandoned_after_the_last_page_only(tmp_path: Path) -> None:
    async def step(node: OneNode, jobs: list[OpenJob]) -> None:
        await node.kill_aurorad()
        first, second, lost = (job.grant.job_id for job in jobs)
        seen: set[str] = set()
        size = node.parts.book.log.size
        page = wire.Reconcile(applied_index=size, open_jobs=(stated(first),), last=False)
        await node.parts.reconciler.reconcile(page, seen)
        assert node.parts.book.ledger.open.keys() == {first, second, lost}
        page = wire.Reconcile(applied_index=size, open_jobs=(stated(second),))
        await node.parts.reconciler.reconcile(page, seen)
        assert node.parts.book.ledger.open.keys() == {first, second}
        (outcome,) = await node.records("job.outcome")
        assert (outcome.job_id, outcome.state) == (lost, "lost"), "it was started, so it may have had effects"
        await node.parts.execution.drain()
        assert cell_of(lost) not in {cell.cell_id for cell in await node.driver.adopt()}
        await node.start_aurorad()

    with_jobs(tmp_path, 3, step)


def test_cells_that_died_with_their_spawner_end_and_others_live(tmp_path: Path) -> None:
    async def step(node: OneNode, jobs: list[OpenJob]) -> None:
        gone, lives = jobs
        await node.kill_aurorad()
        node.parts.reconciler.spawner_connected(
            [a for a in await node.driver.adopt() if a.cell_id == cell_of(lives.grant.job_id)]
        )
        assert gone.end is not None and gone.end.exit.reason == SPAWNER_DIED
        assert lives.end is None
        answer = await reconcile(node, gone.grant.job_id, lives.grant.job_id)
        assert {cell.grant.job_id: cell.end for cell in answer.cells} == {
            gone.grant.job_id: gone.end,
            lives.grant.job_id: None,
        }
        await node.start_aurorad()
        await node.connected()
        assert (await node.view(gone.grant.job_id, wait_ms=5_000)).state is JobState.LOST

    with_jobs(tmp_path, 2, step)


def test_a_cell_without_an_open_job_is_freed(tmp_path: Path) -> None:
    async def step(node: OneNode, jobs: list[OpenJob]) -> None:
        orphan = ids.new(ids.CELL)
        await node.driver.launch(Order(orphan, "exec_x", CellSpec(argv=("forever",))))
        await node.kill_aetherd()
        await node.start_aetherd()
        await node.parts.execution.drain()
        assert [cell.cell_id for cell in await node.driver.adopt()] == [cell_of(jobs[0].grant.job_id)]

    with_jobs(tmp_path, 1, step)


def test_an_end_while_aetherd_was_away_is_told_afterwards(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, PROGRAMS) as node:
            job = await node.submit(command("brief"), caller())
            async with asyncio.timeout(5):
                while not await node.driver.adopt():  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.001)
            await node.kill_aetherd()
            await asyncio.sleep(0.1)
            await node.start_aetherd()
            await node.connected()
            view = await node.view(job.job_id, wait_ms=5_000)
            assert (view.state, view.exit_code) == (JobState.SUCCEEDED, 0)
            assert len(await node.records("job.started")) == len(await node.records("job.outcome")) == 1

    asyncio.run(main())


def test_pages_of_the_log_join_without_gap(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, PROGRAMS) as node:
            for _ in range(20):
                await node.submit(command("brief"), caller())
            while node.parts.book.ledger.open:  # noqa: ASYNC110 - the fold is all there is to see
                await asyncio.sleep(0.01)
            wanted = [r.log_index for r in await node.records() if r.type in ("job.intent", "job.outcome")]
            found: list[int] = []
            start = 0
            while start < node.parts.book.log.size:
                page = await node.parts.reconciler.read_log(wire.LogRead(start=start, limit=7))
                assert len(page.records) <= 7 and page.next_index > start
                found += [record.log_index for record in page.records]
                start = page.next_index
            assert found == wanted

    asyncio.run(main())
