"""Allocated cells through the authority, over the memory driver: life, guests, ends, tickets, restarts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aether.contract import caveats
from aether.contract import cellcalls as cc
from aether.contract.allocations import CellRequest, CellState, CellView
from aether.contract.cells import Limits
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.limits import MIB
from aether.substrate.access.access import Resource
from aether.substrate.cells.drivers.memory import Run
from tests.support.onenode import OWNER, STRANGER, OneNode, caller, command, running


async def forever(run: Run) -> int:
    await run.terminated.wait()
    return 5


async def stubborn(run: Run) -> int:
    await asyncio.sleep(60)
    return 0


async def three(run: Run) -> int:
    return 3


async def write(run: Run) -> int:
    run.files["made.txt"] = b"by the first"
    return 0


async def read(run: Run) -> int:
    return 0 if run.files["made.txt"] == b"by the first" else 1


RESOURCE = Resource(kind="node")
PROGRAMS = {"forever": forever, "stubborn": stubborn, "three": three, "write": write, "read": read}


def on_node(directory: Path, step: Callable[[OneNode], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(directory, PROGRAMS) as node:
            await step(node)

    asyncio.run(main())


async def allocate(node: OneNode, name: str, by: Any = None, **fields: Any) -> CellView:
    call = cc.AllocateCall(request=CellRequest(name=name, **fields))
    view = await node.call("cell.allocate", by or caller(), call)
    assert isinstance(view, CellView)
    return view


async def refused(work: Awaitable[Any]) -> str:
    with pytest.raises(AetherError) as caught:
        await work
    return caught.value.code


async def guest(node: OneNode, cell: str, program: str, by: Any = None, **params: Any) -> str:
    return (await node.submit(command(program, cell=cell, **params), by or caller())).job_id


async def started(node: OneNode, job_id: str) -> None:
    async with asyncio.timeout(5):
        while (await node.view(job_id)).state is JobState.QUEUED:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.002)


def test_a_cell_keeps_what_its_guests_leave_until_it_is_freed(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        cell = await allocate(node, "agent", limits=Limits(memory_bytes=64 * MIB))
        assert (cell.state, cell.level, cell.executables) == (CellState.RUNNING, "cell", ())
        for program in ("write", "read"):
            done = await node.view(await guest(node, "agent", program), wait_ms=5000)
            assert (done.state, done.cell, done.cell_id) == (JobState.SUCCEEDED, "agent", cell.cell_id)
        assert (await node.view(await guest(node, "agent", "three"), wait_ms=5000)).exit_code == 3
        freed = await node.call("cell.free", caller(), cc.FreeCall(cell="agent"))
        assert (freed.state, freed.reason) == (CellState.FREED, "freed")
        assert await node.driver.adopt() == []
        assert (await node.call("cell.free", caller(), cc.FreeCall(cell="agent"))).cell_id == cell.cell_id
        kinds = [r.type for r in await node.records() if r.cell_id == cell.cell_id]
        guests = ["job.intent", "job.started", "job.outcome"] * 3
        assert kinds == ["cell.allocated", "cell.started", *guests, "cell.freed"]

    on_node(tmp_path, step)


def test_names(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        first = await allocate(node, "a")
        assert await refused(allocate(node, "a")) == "NAME_TAKEN"
        assert await refused(allocate(node, "b/c")) == "NO_SUCH_CELL", "ancestors must exist"
        inner = await allocate(node, "a/b")
        assert inner.parent == "a"
        too_much = Limits(memory_bytes=1 << 40)
        assert await refused(allocate(node, "a/c", limits=too_much)) == "BAD_FIELD"
        for bad in ("", "a/", "-a", "a_b", "a/_", "x" * 64, "/".join("abcdefghi")):
            assert await refused(allocate(node, bad)) == "BAD_FIELD"
        listed = await node.call("cell.list", caller(), cc.ListCellsCall())
        assert [cell.name for cell in listed.cells] == ["a", "a/b"]
        await node.call("cell.free", caller(), cc.FreeCall(cell=first.cell_id))
        assert (await node.call("cell.list", caller(), cc.ListCellsCall())).cells == (), "the inner one went with it"
        again = await allocate(node, "a")
        assert again.cell_id != first.cell_id

    on_node(tmp_path, step)


def test_tenants_and_narrow_tickets_see_their_own_cells_alone(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        await allocate(node, "mine")
        await allocate(node, "other")
        job_id = await guest(node, "other", "forever")
        stranger = caller(STRANGER)
        assert await refused(node.call("cell.show", stranger, cc.CellCall(cell="mine"))) == "NO_SUCH_CELL"
        assert (await allocate(node, "mine", stranger)).tenant_id != "default", "names are a tenant's own"
        access = node.parts.gate._access
        said = (caveats.role("user"), caveats.cells("mine", "mine/*"))
        ticket, _ = access.mint(
            "default", os.urandom(16), said, node.parts.gate.admit(caller(), "health", RESOURCE).principal
        )
        narrow = caller(OWNER, ticket=ticket)
        listed = await node.call("cell.list", narrow, cc.ListCellsCall())
        assert [cell.name for cell in listed.cells] == ["mine"]
        assert await refused(node.call("cell.show", narrow, cc.CellCall(cell="other"))) == "NO_SUCH_CELL"
        assert await refused(allocate(node, "another", narrow)) == "TICKET_DENIED"
        assert await refused(guest(node, "other", "three", narrow)) == "TICKET_DENIED"
        assert await refused(node.submit(command("three"), narrow)) == "TICKET_DENIED", "commands run in its cells only"
        assert await refused(node.view(job_id, narrow)) == "NOT_FOUND"
        signal = cc.SignalCall(job_id=job_id, signal=15)
        assert await refused(node.call("job.signal", narrow, signal)) == "NOT_FOUND"
        assert (await node.view(await guest(node, "mine", "three", narrow), wait_ms=5000)).exit_code == 3
        await allocate(node, "mine/inner", narrow)

    on_node(tmp_path, step)


def test_giving_up_isolation_needs_a_permission_that_nobody_has(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        for flag in ("isolate_network", "isolate_process"):
            assert await refused(allocate(node, "open", **{flag: False})) == "POLICY_DENIED"
        denied = await node.records("access.denied")
        assert {record.operation for record in denied} == {"cell.unisolate"}
        assert (await node.call("cell.list", caller(), cc.ListCellsCall())).cells == ()

    on_node(tmp_path, step)


def test_freeing_ends_the_guests_with_the_reason(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        await allocate(node, "agent")
        jobs = [await guest(node, "agent", program) for program in ("forever", "stubborn")]
        for job_id in jobs:
            await started(node, job_id)
        await node.call("cell.free", caller(), cc.FreeCall(cell="agent", grace_ms=50))
        for job_id in jobs:
            view = await node.view(job_id, wait_ms=5000)
            assert view.state is JobState.CANCELLED and view.error is not None
            assert "its cell was freed" in view.error.message

    on_node(tmp_path, step)


def test_stopping_a_guest_leaves_its_neighbours(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        from aether.contract.calls import StopCall

        await allocate(node, "agent")
        stays, goes = [await guest(node, "agent", "forever", executable=name) for name in ("stays", "goes")]
        for job_id in (stays, goes):
            await started(node, job_id)
        assert await refused(guest(node, "agent", "three", executable="stays")) == "NAME_TAKEN"
        await node.call("job.stop", caller(), StopCall(job_id=goes, grace_ms=100))
        assert (await node.view(goes, wait_ms=5000)).state is JobState.CANCELLED
        shown = await node.call("cell.show", caller(), cc.CellCall(cell="agent"))
        assert [(each.name, each.state) for each in shown.executables] == [("stays", "running")]
        await node.call("job.signal", caller(), cc.SignalCall(job_id=stays, signal=15))
        assert (await node.view(stays, wait_ms=5000)).exit_code == 5

    on_node(tmp_path, step)


def test_a_frozen_cell_takes_no_guests_and_a_resize_is_recorded(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        cell = await allocate(node, "agent")
        frozen = await node.call("cell.freeze", caller(), cc.CellCall(cell="agent"))
        assert frozen.state is CellState.FROZEN
        assert await refused(guest(node, "agent", "three")) == "CELL_FROZEN"
        assert (await node.call("cell.thaw", caller(), cc.CellCall(cell="agent"))).state is CellState.RUNNING
        new = Limits(memory_bytes=32 * MIB, pids=7)
        resized = await node.call(
            "cell.resize", caller(), cc.ResizeCall(cell="agent", limits=new, idle_timeout_ms=60_000)
        )
        assert (resized.limits, resized.idle_timeout_ms) == (new, 60_000)
        assert resized.spec_digest != cell.spec_digest
        events = await node.call("cell.events", caller(), cc.CellEventsCall(cell="agent"))
        kinds = [event.type for event in events.events]
        assert kinds == ["cell.allocated", "cell.started", "cell.frozen", "cell.thawed", "cell.resized"]

    on_node(tmp_path, step)


def test_an_idle_cell_is_freed_and_a_used_one_is_not(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        used, idle = [await allocate(node, name, idle_timeout_ms=300) for name in ("used", "idle")]
        await guest(node, "used", "forever")
        async with asyncio.timeout(5):
            asked = cc.CellCall(cell=idle.cell_id)
            while (view := await node.call("cell.show", caller(), asked)).ended_at is None:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
        assert (view.state, view.reason) == (CellState.FREED, "idle")
        assert (await node.call("cell.show", caller(), cc.CellCall(cell=used.cell_id))).state is CellState.RUNNING

    on_node(tmp_path, step)


def test_the_same_key_allocates_once(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        keyed = caller(key="k")
        first = await allocate(node, "agent", keyed)
        assert (await allocate(node, "agent", keyed)).cell_id == first.cell_id
        assert await refused(allocate(node, "other", keyed)) == "IDEMPOTENCY_CONFLICT"

    on_node(tmp_path, step)


def test_files(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        await allocate(node, "agent")

        def put(path: str, data: bytes) -> Awaitable[Any]:
            fd = os.memfd_create("body")
            os.write(fd, data)
            os.lseek(fd, 0, os.SEEK_SET)
            call = cc.PutCall(cell="agent", path=path, fd=fd, size_bytes=len(data), media_type="text/plain")
            return node.call("cell.put", caller(), call)

        kept = await put("made.txt", b"by the first")
        assert kept.size_bytes == 12
        assert (await node.view(await guest(node, "agent", "read"), wait_ms=5000)).exit_code == 0
        reply = await node.call("cell.get", caller(), cc.FileCall(cell="agent", path="made.txt"))
        assert os.pread(reply.fd, 100, 0) == b"by the first"
        os.close(reply.fd)
        await put("deep/er/file", b"x")
        listing = await node.call("cell.files", caller(), cc.FileCall(cell="agent"))
        assert [(entry.name, entry.kind) for entry in listing.entries] == [("deep", "directory"), ("made.txt", "file")]
        for bad in ("/etc/passwd", "../x", "a/../b", "", "a\nb"):
            assert await refused(put(bad, b"x")) == "BAD_FIELD"
        (record, _) = await node.records("cell.put")
        assert (record.detail["path"], record.detail["digest"]) == ("made.txt", kept.digest)

    on_node(tmp_path, step)


def test_a_cell_that_dies_from_outside_is_lost(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        cell = await allocate(node, "agent")
        job_id = await guest(node, "agent", "forever")
        await started(node, job_id)
        await node.driver.kill(cell.cell_id)  # type: ignore[arg-type]
        node.driver.lose(cell.cell_id, "cell-died")
        view = await node.call("cell.show", caller(), cc.CellCall(cell=cell.cell_id))
        assert (view.state, view.reason) == (CellState.LOST, "cell-died")
        assert (await node.view(job_id, wait_ms=5000)).state in (JobState.CANCELLED, JobState.FAILED)
        assert await refused(guest(node, "agent", "three")) == "NO_SUCH_CELL"

    on_node(tmp_path, step)


@pytest.mark.parametrize("snapshot", [False, True])
def test_cells_and_guests_live_through_a_restart_of_the_authority(tmp_path: Path, snapshot: bool) -> None:
    async def step(node: OneNode) -> None:
        cell = await allocate(node, "agent", idle_timeout_ms=60_000)
        lost = await allocate(node, "lost")
        job_id = await guest(node, "agent", "forever", executable="server")
        await started(node, job_id)
        await node.call("cell.freeze", caller(), cc.CellCall(cell="agent"))
        if snapshot:
            await node.records()
            node.parts.book.snapshot()
        before = await node.call("cell.show", caller(), cc.CellCall(cell="agent"))
        await node.kill_aetherd()
        await node.driver.free(lost.cell_id)  # type: ignore[arg-type]
        await node.start_aetherd()
        await node.connected()
        after = await node.call("cell.show", caller(), cc.CellCall(cell="agent"))
        assert after.cell_id == cell.cell_id and after.state is CellState.FROZEN
        assert [each.job_id for each in after.executables] == [each.job_id for each in before.executables]
        assert (await node.call("cell.show", caller(), cc.CellCall(cell=lost.cell_id))).state is CellState.LOST
        await node.call("cell.thaw", caller(), cc.CellCall(cell="agent"))
        await node.call("job.signal", caller(), cc.SignalCall(job_id=job_id, signal=15))
        assert (await node.view(job_id, wait_ms=5000)).exit_code == 5
        assert (await node.view(await guest(node, "agent", "three"), wait_ms=5000)).exit_code == 3

    on_node(tmp_path, step)


def test_a_cell_that_the_log_does_not_have_is_freed_and_those_of_a_dead_spawner_are_lost(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        cell = await allocate(node, "agent")
        job_id = await guest(node, "agent", "forever")
        await started(node, job_id)
        await node.driver.allocate("cell_01900000-0000-7000-8000-000000000009", node.parts.house.cell_spec(
            node.parts.book.ledger.cells.live[cell.cell_id]
        ))  # fmt: skip
        node.driver.start()
        await node.parts.execution.drain()
        assert [adopted.cell_id for adopted in await node.driver.adopt()] == [cell.cell_id]
        node.driver.die()
        view = await node.call("cell.show", caller(), cc.CellCall(cell=cell.cell_id))
        assert (view.state, view.reason) == (CellState.LOST, "spawner-died")
        assert (await node.view(job_id, wait_ms=5000)).state is JobState.LOST

    on_node(tmp_path, step)


def test_guests_live_through_a_restart_of_aurorad(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        await allocate(node, "agent")
        running_job, queued = await guest(node, "agent", "forever"), await guest(node, "agent", "write", outputs=["*"])
        await started(node, running_job)
        done = await node.view(queued, wait_ms=5000)
        assert [artifact.name for artifact in done.artifacts] == ["made.txt"]
        await node.kill_aurorad()
        shown = await node.call("cell.show", caller(), cc.CellCall(cell="agent"))
        assert [each.job_id for each in shown.executables] == [running_job]
        await node.start_aurorad()
        await node.connected()
        await node.call("job.signal", caller(), cc.SignalCall(job_id=running_job, signal=15))
        view = await node.view(running_job, wait_ms=5000)
        assert (view.exit_code, view.cell) == (5, "agent")

    on_node(tmp_path, step)


def test_more_guests_than_places_among_cells_of_their_own(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        await allocate(node, "agent")
        for _ in range(70):
            await guest(node, "agent", "forever")
        alone = await node.submit(command("three"), caller(), wait_ms=5000)
        assert alone.exit_code == 3, "guests take no place of other jobs"

    on_node(tmp_path, step)
