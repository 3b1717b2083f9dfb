"""The relay of an attached connection: bytes both ways, ends on either side, nothing left open."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.contract import cellcalls as cc
from aether.contract.allocations import CellRequest
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.substrate.cells.drivers.memory import Run
from aether.substrate.talking import relay
from tests.support.onenode import STRANGER, OneNode, caller, command, running


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # noqa: PTH208 - the listing itself


def test_a_terminal_carries_both_ways_until_its_last_program_is_gone() -> None:
    async def main() -> None:
        outer, inner = os.openpty()
        ours, theirs = socket.socketpair()
        work = asyncio.ensure_future(relay("tty", outer, theirs.detach()))
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(b"typed\n")
        assert await reader.readuntil(b"typed\r\n") == b"typed\r\n"
        assert os.read(inner, 100) == b"typed\n"
        os.write(inner, b"said\n")
        assert await reader.readuntil(b"said\r\n") == b"said\r\n"
        os.close(inner)
        assert await reader.read() == b""
        await asyncio.wait_for(work, 5)
        writer.close()

    asyncio.run(main())


def test_a_client_that_goes_leaves_the_terminal() -> None:
    async def main() -> None:
        outer, inner = os.openpty()
        ours, theirs = socket.socketpair()
        work = asyncio.ensure_future(relay("tty", os.dup(outer), theirs.detach()))
        ours.close()
        await asyncio.wait_for(work, 5)
        os.write(inner, b"still there\n")
        assert os.read(outer, 100) == b"still there\r\n"
        os.close(inner)
        os.close(outer)

    asyncio.run(main())


def test_a_slow_reader_holds_back_the_writer_and_loses_nothing() -> None:
    async def main() -> None:
        read_end, write_end = os.pipe()
        ours, theirs = socket.socketpair()
        work = asyncio.ensure_future(relay("pipe", write_end, theirs.detach()))
        _, writer = await asyncio.open_connection(sock=ours)
        data = bytes(range(256)) * 4096
        writer.write(data)
        writer.write_eof()
        await asyncio.sleep(0.05)
        got = await asyncio.to_thread(lambda: b"".join(iter(lambda: os.read(read_end, 65536), b"")))
        assert got == data
        await asyncio.wait_for(work, 5)
        os.close(read_end)
        writer.close()

    asyncio.run(main())


def test_a_pipe_that_nobody_reads_any_more_ends_the_connection() -> None:
    async def main() -> None:
        read_end, write_end = os.pipe()
        ours, theirs = socket.socketpair()
        work = asyncio.ensure_future(relay("pipe", write_end, theirs.detach()))
        os.close(read_end)
        await asyncio.wait_for(work, 5)
        assert ours.recv(1) == b""
        ours.close()

    asyncio.run(main())


async def upper(run: Run) -> int:
    """Says what it hears, in capitals, until the line `bye`."""
    assert run.channel is not None
    reader, writer = await asyncio.open_connection(sock=run.channel)
    while (line := await reader.readline()) not in (b"", b"bye\n"):
        writer.write(line.upper())
        await writer.drain()
    writer.close()
    await writer.wait_closed()
    return 4


def test_attaching_through_the_authority(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, {"upper": upper}) as node:
            await node.call("cell.allocate", caller(), cc.AllocateCall(request=CellRequest(name="agent")))
            job_id = (await node.submit(command("upper", cell="agent", stdio="tty"), caller())).job_id
            with pytest.raises(AetherError) as caught:
                await node.call("job.attach", caller(STRANGER), cc.AttachCall(job_id=job_id))
            assert caught.value.code == "NOT_FOUND"
            await talk(node, job_id, b"one\n", b"ONE\n")
            await node.call("job.window", caller(), cc.WindowCall(job_id=job_id, rows=20, columns=90))
            await talk(node, job_id, b"two\n", b"TWO\n")  # detached and attached again
            await talk(node, job_id, b"bye\n", b"")
            assert (await node.view(job_id, wait_ms=5000)).exit_code == 4
            records = [record.detail["stdio"] for record in await node.records("job.attach")]
            assert records == ["tty"] * 3

    asyncio.run(main())


async def talk(node: OneNode, job_id: str, typed: bytes, wanted: bytes) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                reply = await node.call("job.attach", caller(), cc.AttachCall(job_id=job_id))
                break
            except AetherError as error:  # the last one has not let go yet
                assert error.code == "NOT_READY"
                await asyncio.sleep(0.01)
    ours, theirs = socket.socketpair()
    work = asyncio.ensure_future(reply.run(theirs.detach()))
    reader, writer = await asyncio.open_connection(sock=ours)
    writer.write(typed)
    assert await reader.readline() == wanted
    writer.close()
    await asyncio.wait_for(work, 5)


def test_what_cannot_be_attached_to_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, {"upper": upper}) as node:
            await node.call("cell.allocate", caller(), cc.AllocateCall(request=CellRequest(name="agent")))
            for request in (command("upper"), command("upper", stdio="tty"), command("upper", executable="x")):
                if request.params.keys() == {"argv"}:
                    continue
                with pytest.raises(AetherError) as caught:
                    await node.submit(request, caller())
                assert caught.value.code == "BAD_FIELD", "a terminal needs a cell"
            job_id = (await node.submit(command("nothing", cell="agent"), caller(), wait_ms=5000)).job_id
            assert (await node.view(job_id)).state is JobState.FAILED
            for operation, call in (
                ("job.attach", cc.AttachCall(job_id=job_id)),
                ("job.signal", cc.SignalCall(job_id=job_id, signal=15)),
                ("job.window", cc.WindowCall(job_id=job_id, rows=1, columns=1)),
            ):
                with pytest.raises(AetherError) as caught:
                    await node.call(operation, caller(), call)
                assert caught.value.code == "NOT_READY"
            for signal in (0, -1, 65):
                with pytest.raises(AetherError) as caught:
                    await node.call("job.signal", caller(), cc.SignalCall(job_id=job_id, signal=signal))
                assert caught.value.code == "BAD_FIELD"

    asyncio.run(main())
