"""Sessions in cells as a program sees them, against the real HTTP server."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.client import Client
from aether.contract.allocations import CellState
from aether.contract.cells import Limits
from aether.contract.errors import AetherError
from aether.contract.limits import MIB
from tests.unit.api.http_node import HttpNode


@pytest.fixture
def node(tmp_path: Path) -> Iterator[HttpNode]:
    with HttpNode(tmp_path) as running:
        yield running


@pytest.fixture
def client(node: HttpNode) -> Iterator[Client]:
    with Client(node.socket_path) as made:
        yield made


def test_the_operations(client: Client) -> None:
    cells = client.cells
    cell = cells.allocate("a", limits=Limits(memory_bytes=64 * MIB), idle_timeout_ms=60_000)
    inner = cells.allocate("a/b")
    assert [each.name for each in cells.list()] == ["a", "a/b"]
    assert [each.name for each in cells.list("a/b")] == ["a/b"]
    assert cells.show("a/b").cell_id == cells.show(inner.cell_id).cell_id == inner.cell_id
    assert cells.freeze("a/b").state is CellState.FROZEN
    assert cells.thaw("a/b").state is CellState.RUNNING
    assert cells.resize("a", Limits(memory_bytes=128 * MIB)).limits.memory_bytes == 128 * MIB
    assert cells.stats("a").usage.pids_peak == 3
    assert [event.type for event in cells.events("a")] == ["cell.allocated"]
    assert cells.free(cell.cell_id, grace_ms=10).state is CellState.FREED
    for call in (lambda: cells.show("a"), lambda: cells.free("a"), lambda: cells.stats("nobody")):
        with pytest.raises(AetherError) as caught:
            call()
        assert caught.value.code == "NO_SUCH_CELL"
    with pytest.raises(AetherError) as caught:
        cells.allocate("a/b")
    assert caught.value.code == "NAME_TAKEN"


def test_a_session(client: Client) -> None:
    with client.cell("agent") as cell:
        assert client.cell("agent").cell_id == cell.cell_id, "the one that is there"
        result = cell.exec(["echo", "hello"])
        assert (result.ok, result.stdout, result.stderr) == (True, b"hello\n", b"")
        assert cell.exec(["exit", "3"]).exit_code == 3
        process = cell.start(["sleep", "0.1"], name="server")
        assert process.wait().exit_code == 0
        cell.put("in.bin", bytes(range(256)))
        assert cell.get("in.bin") == bytes(range(256))
        assert [entry.name for entry in cell.files()] == ["in.bin"]
        assert cell.pause().state is CellState.FROZEN and cell.resume().state is CellState.RUNNING
        assert cell.info.cell_id == cell.stats.cell_id == cell.cell_id
    assert client.cells.list() == ()


def test_an_attached_connection_is_bytes_both_ways(client: Client) -> None:
    job = client.run(["echo", "hello"])
    with client.attach(job.job_id) as connection, connection.makefile("rwb") as stream:
        for line in (b"one\n", b"two\n"):
            stream.write(line)
            stream.flush()
            assert stream.readline() == line.upper()
        stream.write(b"bye\n")
        stream.flush()
        assert stream.read() == b""
    assert client.health().status == "ok"


def test_attaching_to_nothing_says_so(client: Client) -> None:
    with pytest.raises(AetherError) as caught:
        client.attach("job_01900000-0000-7000-8000-000000000000")
    assert caught.value.code == "NOT_FOUND"


def raw(node: HttpNode, head: str, more: bytes = b"") -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(node.socket_path))
        sock.sendall(head.encode() + more)
        return sock.recv(65536)


@pytest.mark.parametrize(
    "headers",
    ["", "Connection: Upgrade\r\n", "Upgrade: aether-stream\r\n", "Connection: Upgrade\r\nUpgrade: websocket\r\n"],
)
def test_a_request_that_does_not_upgrade_is_refused(node: HttpNode, client: Client, headers: str) -> None:
    job = client.run(["echo", "hello"])
    answer = raw(node, f"POST /v0/jobs/{job.job_id}/attach HTTP/1.1\r\nHost: x\r\n{headers}\r\n")
    assert answer.startswith(b"HTTP/1.1 400"), answer


def test_bytes_ahead_of_the_answer_are_refused(node: HttpNode, client: Client) -> None:
    job = client.run(["echo", "hello"])
    asked = "Host: x\r\nConnection: Upgrade\r\nUpgrade: aether-stream\r\n\r\n"
    head = f"POST /v0/jobs/{job.job_id}/attach HTTP/1.1\r\n{asked}"
    assert raw(node, head, b"early").startswith(b"HTTP/1.1 400")
    assert raw(node, head).startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
