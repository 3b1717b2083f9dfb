"""A listener inside a cell's network namespace, held outside: served before anything runs, reached from there alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.contract import ids
from aether.contract.cells import CellSpec
from aether.contract.errors import AetherError
from aether.contract.limits import EGRESS_PORT
from aether.substrate.cells.drivers.native import NativeDriver
from aether.substrate.cells.drivers.port import Order
from aether.substrate.cells.logs import JobLogs
from tests.support.spawnerprocess import ORDINARY, SYSTEM_PYTHON, Spawner, with_driver

ASK = f"""python3 - <<'END'
import socket
sock = socket.create_connection(("127.0.0.1", {EGRESS_PORT}), 5)
sock.sendall(b"hello")
print(sock.recv(100).decode())
END"""


@pytest.fixture(params=["own", "ordinary"])
def spawner(request: pytest.FixtureRequest) -> Iterator[Spawner]:
    uid = None
    if request.param == "ordinary":
        if os.geteuid() != 0:
            pytest.skip("this process is an ordinary user already")
        if not Path(SYSTEM_PYTHON).exists():
            pytest.skip("no system Python that an ordinary user may run")
        uid = ORDINARY
    running = Spawner(uid)
    yield running
    running.close()


def needs_namespace(driver: NativeDriver) -> None:
    if "netns" in driver.facts.missing:
        pytest.skip(f"no network namespaces here: {driver.facts.missing['netns'].reason}")


def order(script: str, listening: object) -> Order:
    spec = CellSpec(argv=("sh", "-c", script), require=("netns",))
    return Order(ids.new(ids.CELL), ids.new(ids.EXECUTABLE), spec, (), listening)  # type: ignore[arg-type]


def test_the_executable_finds_it_served(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        needs_namespace(driver)
        held: list[socket.socket] = []

        async def listening(fd: int) -> None:
            listener = socket.socket(fileno=os.dup(fd))
            assert listener.getsockname() == ("127.0.0.1", EGRESS_PORT)
            with socket.socket() as here:  # the port of this machine is another one
                assert here.connect_ex(("127.0.0.1", EGRESS_PORT)) != 0
            await asyncio.sleep(0.3)  # nothing of the cell runs meanwhile
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
            held.append(listener)

        started = await driver.launch(order(ASK, listening))
        assert started.report.enforced["netns"] and started.report.enforced["seccomp"]
        loop = asyncio.get_running_loop()
        sock, _ = await loop.sock_accept(held[0])
        await loop.sock_sendall(sock, b"served " + await loop.sock_recv(sock, 100))
        sock.close()
        end = await driver.wait(started.handle, started.exec_id)
        assert end.exit.code == 0
        logs = JobLogs(spawner.state / "logs/jobs")
        chunks = [chunk async for chunk in logs.read(str(started.handle), started.exec_id, "all", 0, False)]
        assert b"".join(chunks) == b"served hello\n"
        held[0].close()
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_when_nobody_serves_it_nothing_runs(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        needs_namespace(driver)

        async def listening(fd: int) -> None:
            raise AetherError("UNAVAILABLE", "cannot serve")

        asked = order("touch /work/ran", listening)
        with pytest.raises(AetherError) as caught:
            await driver.launch(asked)
        assert caught.value.code == "UNAVAILABLE"
        assert all(adopted.cell_id != asked.cell_id for adopted in await driver.adopt())

    with_driver(spawner, step)


def test_a_cell_that_shares_the_hosts_network_is_not_served(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        needs_namespace(driver)
        called: list[int] = []

        async def listening(fd: int) -> None:
            called.append(fd)

        asked = order("true", listening)
        shared = CellSpec(argv=("true",), isolate_network=False)
        with pytest.raises(AetherError) as caught:
            await driver.launch(Order(asked.cell_id, asked.exec_id, shared, (), listening))
        assert caught.value.code == "LEVEL_UNMET" and called == []
        with contextlib.suppress(AetherError):
            await driver.free(asked.cell_id)  # type: ignore[arg-type]

    with_driver(spawner, step)


def test_cells_of_the_pool_listen_too_ready_or_on_their_way(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        needs_namespace(driver)
        served: list[int] = []

        async def listening(fd: int) -> None:
            served.append(fd)

        async def one() -> None:
            started = await driver.launch(order("true", listening))
            assert started.report.enforced["netns"] and started.report.enforced["seccomp"]
            assert (await driver.wait(started.handle, started.exec_id)).exit.code == 0
            await driver.free(started.handle)

        for _ in range(4):
            await asyncio.gather(*(one() for _ in range(5)))
        assert len(served) == 20

    with_driver(spawner, step)
