"""What aurorad may do under a grant: only what was admitted, only what was seen, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from aether.contract import ids, wire
from aether.contract.cells import ExitStatus
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.substrate.cells.drivers.memory import Run
from aether.substrate.execution import SPAWNER_DIED
from aether.substrate.ledger import OpenJob
from tests.support.onenode import OneNode, caller, command, running


def cell_of(job_id: str) -> str:
    """The cell that is a job's own."""
    return ids.sibling(ids.CELL, job_id)


async def forever(run: Run) -> int:
    await run.terminated.wait()
    return 5


async def three(run: Run) -> int:
    return 3


PROGRAMS = {"forever": forever, "three": three}


def with_job(directory: Path, program: str, step: Callable[[OneNode, OpenJob], Awaitable[None]]) -> None:
    """A node with one started job of `program`; its aurorad is silent, the test speaks in its place."""

    async def main() -> None:
        async with running(directory, PROGRAMS) as node:
            job_id = (await node.submit(command(program), caller())).job_id
            job = node.parts.book.ledger.open[job_id]
            async with asyncio.timeout(5):
                while job.started is None:  # noqa: ASYNC110 - the record is all there is to see
                    await asyncio.sleep(0.001)
            await step(node, job)

    asyncio.run(main())


def finish(job: OpenJob, state: JobState, **more: object) -> wire.JobFinish:
    return wire.JobFinish(grant=job.grant, state=state, **more)  # type: ignore[arg-type]


def forged(grant: wire.Grant) -> list[wire.Grant]:
    """Every way in which a grant can be almost right."""
    return [
        msgspec.structs.replace(grant, **{name: value})
        for name, value in {
            "grant_id": "grant_x", "job_id": "job_01a1fc09-7f84-7307-98f5-d23592dd28c0", "attempt": 2,
            "reservation_id": "rsv_x",
        }.items()
    ]  # fmt: skip


def test_a_wrong_grant_does_nothing(tmp_path: Path) -> None:
    async def step(node: OneNode, job: OpenJob) -> None:
        execution = node.parts.execution
        for grant in forged(job.grant):
            cell_id = cell_of(job.grant.job_id)
            calls = [
                execution.finish(wire.JobFinish(grant=grant, state=JobState.FAILED)),
                execution.stop(wire.CellStop(grant=grant, cell_id=cell_id, grace_ms=0)),
                execution.collect(wire.CellCollect(grant=grant, cell_id=cell_id, globs=("*",))),
                execution.open(node.link, wire.CellOpen(grant=grant, cell_id=cell_id, path="x")),
                execution.launch(node.link, wire.CellLaunch(grant=grant, request=command("forever"))),
            ]
            for call in calls:
                with pytest.raises(AetherError) as caught:
                    await call
                assert caught.value.code == "NO_GRANT"
        assert job.end is None and await node.records("job.outcome") == []

    with_job(tmp_path, "forever", step)


def test_a_launch_of_another_request_than_the_admitted_one_is_refused(tmp_path: Path) -> None:
    async def step(node: OneNode, job: OpenJob) -> None:
        with pytest.raises(AetherError) as caught:
            await node.parts.execution.launch(
                node.link, wire.CellLaunch(grant=job.grant, request=command("forever", env={"A": "b"}))
            )
        assert caught.value.code == "NO_GRANT"

    with_job(tmp_path, "forever", step)


def test_a_repeated_launch_finds_the_cell_that_is_there(tmp_path: Path) -> None:
    async def step(node: OneNode, job: OpenJob) -> None:
        body = wire.CellLaunch(grant=job.grant, request=command("forever"), again=True)
        first, second = await asyncio.gather(*(node.parts.execution.launch(node.link, body) for _ in range(2)))
        assert first == second and first.cell_id == cell_of(job.grant.job_id)
        assert len(await node.driver.adopt()) == 1
        assert len(await node.records("job.started")) == 1

    with_job(tmp_path, "forever", step)


def test_success_needs_an_exit_code_of_zero_that_was_seen_here(tmp_path: Path) -> None:
    async def step(node: OneNode, job: OpenJob) -> None:
        execution, good = node.parts.execution, ExitStatus(code=0)
        with pytest.raises(AetherError) as caught:
            await execution.finish(finish(job, JobState.SUCCEEDED, exit=good))
        assert caught.value.code == "UNAVAILABLE", "no end was seen yet: it may still come"
        with pytest.raises(AetherError) as caught:
            await execution.finish(finish(job, JobState.SUCCEEDED))
        assert caught.value.code == "PROTOCOL"
        assert await node.records("job.outcome") == []

    with_job(tmp_path, "forever", step)


def test_a_failure_called_success_is_refused_and_the_failure_is_recorded(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, PROGRAMS) as node:
            claimed: list[str] = []

            def at(name: str) -> None:
                if name != "call job.finish":
                    return
                for job in node.parts.book.ledger.open.values():
                    assert job.end is not None and job.end.exit.code == 3
                    lie = node.parts.execution.finish(finish(job, JobState.SUCCEEDED, exit=ExitStatus(code=0)))
                    with pytest.raises(AetherError) as caught:
                        lie.send(None)
                    claimed.append(caught.value.code)

            node.on_step = at
            job = await node.submit(command("three"), caller(), 5_000)
            assert (job.state, job.exit_code) == (JobState.FAILED, 3)
            assert claimed == ["PROTOCOL"]

    asyncio.run(main())


def test_an_end_that_died_with_the_spawner_is_lost_whoever_claims_to_have_seen_it(tmp_path: Path) -> None:
    async def step(node: OneNode, job: OpenJob) -> None:
        await node.kill_aurorad()
        node.driver.die()
        assert job.end is not None and job.end.exit.reason == SPAWNER_DIED
        told = await node.parts.execution.finish(finish(job, JobState.SUCCEEDED, exit=ExitStatus(code=0)))
        assert told.view.state is JobState.LOST and told.view.exit_code is None
        (outcome,) = await node.records("job.outcome")
        assert outcome.state == "lost" and outcome.error is not None and outcome.error.code == "LOST"
        await node.start_aurorad()
        await node.connected()
        assert (await node.view(job.grant.job_id, wait_ms=5_000)).state is JobState.LOST

    with_job(tmp_path, "forever", step)


def test_finishing_twice_is_finishing_once(tmp_path: Path) -> None:
    async def step(node: OneNode, job: OpenJob) -> None:
        await node.kill_aurorad()
        body = finish(job, JobState.FAILED)
        first = await node.parts.execution.finish(body)
        assert await node.parts.execution.finish(body) == first
        assert await node.parts.execution.finish(finish(job, JobState.CANCELLED)) == first, "the log wins"
        assert len(await node.records("job.outcome")) == 1
        await node.parts.execution.drain()
        assert await node.driver.adopt() == [], "the cell of a finished job is freed"
        await node.start_aurorad()

    with_job(tmp_path, "forever", step)


def test_the_cell_of_an_open_job_is_not_freed_and_that_of_a_finished_one_is(tmp_path: Path) -> None:
    async def step(node: OneNode, job: OpenJob) -> None:
        key = wire.CellKey(grant=job.grant, cell_id=cell_of(job.grant.job_id))
        with pytest.raises(AetherError) as caught:
            await node.parts.execution.free_now(key)
        assert caught.value.code == "NO_GRANT"
        await node.kill_aurorad()
        await node.parts.execution.finish(finish(job, JobState.FAILED))
        await node.parts.execution.free_now(key)
        assert await node.driver.adopt() == []
        await node.start_aurorad()

    with_job(tmp_path, "forever", step)


def test_what_is_abandoned_says_whether_it_may_have_run(tmp_path: Path) -> None:
    async def step(node: OneNode, job: OpenJob) -> None:
        await node.kill_aurorad()
        await node.parts.execution.abandon(job, "a test said so")
        (outcome,) = await node.records("job.outcome")
        assert outcome.state == "lost" and outcome.error is not None and outcome.error.code == "LOST"
        assert outcome.budget is not None and outcome.budget.settled
        await node.start_aurorad()

    with_job(tmp_path, "forever", step)


def test_an_end_of_a_cell_whose_start_was_not_durable_is_lost(tmp_path: Path) -> None:
    """aetherd died before `job.started` was durable, and the spawner with the cell: only aurorad saw any of it."""

    async def step(node: OneNode, job: OpenJob) -> None:
        await node.kill_aurorad()
        job.started = None  # as a log that lost its tail would say
        body = finish(job, JobState.SUCCEEDED, exit=ExitStatus(code=0))
        with pytest.raises(AetherError) as caught:
            await node.parts.execution.finish(body)
        assert caught.value.code == "UNAVAILABLE", "its cell is there"
        node.driver.die()
        told = await node.parts.execution.finish(body)
        assert told.view.state is JobState.LOST
        await node.start_aurorad()

    with_job(tmp_path, "forever", step)
