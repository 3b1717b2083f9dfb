"""The socket: who may own its name, its mode, its end."""

from __future__ import annotations

import asyncio
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from aether.api.address import bind_address
from aether.api.listener import listen
from aether.api.server import serve
from aether.client import Client
from aether.contract.errors import AetherError
from tests.unit.api.http_node import HttpNode


def test_socket_has_its_mode_and_goes_with_the_server(tmp_path: Path) -> None:
    with HttpNode(tmp_path) as node:
        found = node.socket_path.stat()
        assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o660
        assert list(node.socket_path.parent.iterdir()) == [node.socket_path]
    assert not list((tmp_path / "run").iterdir())


def test_stale_socket_is_replaced_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "aetherd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    live = listen(path, mode=0o660, gid=None)
    with pytest.raises(AetherError, match="ALREADY_RUNNING"):
        listen(path, mode=0o660, gid=None)
    live.close()
    path.unlink()
    path.write_text("a file")
    with pytest.raises(AetherError, match="STATE_UNUSABLE"):
        listen(path, mode=0o660, gid=None)
    with pytest.raises(AetherError, match="STATE_UNUSABLE"):
        listen(tmp_path / "missing" / "x.sock", mode=0o660, gid=None)


def test_long_path(tmp_path: Path) -> None:
    root = tmp_path / ("d" * 100)
    root.mkdir()
    with HttpNode(root) as node, Client(node.socket_path) as client:
        assert len(str(node.socket_path)) > 108
        assert client.health().status == "ok"
    with bind_address(tmp_path / "short") as address:
        assert address == str(tmp_path / "short")


def test_shutdown_lets_a_running_request_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "x.sock"
    stop_from: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        stop_from[0][0].call_soon(stop_from[0][1].set)
        await asyncio.sleep(0.3)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def main() -> None:
        stop = asyncio.Event()
        stop_from.append((asyncio.get_running_loop(), stop))
        await serve(app, path, stop=stop)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    deadline = time.monotonic() + 5
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(path))
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        received = b""
        while part := client.recv(4096):
            received += part
    thread.join(5)
    assert received.endswith(b"ok") and not path.exists() and not thread.is_alive()
