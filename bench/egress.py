"""What the proxy of a cell adds to a request: a kept connection, and a fresh one, beside the same without it.

The server and the proxy are processes of their own on this machine's loopback, the proxy on uvloop as egressd is; no
cell is in between, since a listener in a cell's network namespace differs from one here in nothing but its loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import ssl
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from aether.contract.network import Network, NetworkLimits
from aether.egress.dial import SystemNames
from aether.egress.proxy import CellProxy, Outside
from bench import harness

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class Answering(asyncio.Protocol):
    """The least of a server: one answer per request that ends in an empty line."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"\r\n\r\n"):
            self._transport.write(ANSWER)


def serve(told: Connection) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


def proxy(told: Connection, port: int) -> None:
    async def main() -> None:
        limits = NetworkLimits(requests_per_s=10_000)
        network = Network(allow=(f"127.0.0.1:{port}", f"tcp://127.0.0.1:{port}"), limits=limits)
        outside = Outside(SystemNames().resolve, ssl.create_default_context())
        rows: list[Any] = []
        found = CellProxy("cell_bench", "job_bench", network, {}, None, outside, rows.append)
        listener = socket.create_server(("127.0.0.1", 0))
        found.attach(listener)
        told.send(listener.getsockname()[1])
        await asyncio.Event().wait()

    uvloop.run(main())


def started(target: Callable[..., None], *args: Any) -> tuple[multiprocessing.Process, int]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    return process, ours.recv()


def ask(sock: socket.socket, target: str, host: str) -> None:
    sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n".encode())
    data = b""
    while not data.endswith(b"hello"):
        data += sock.recv(65536)


def connected(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def tunnel(proxy_port: int, host: str) -> socket.socket:
    sock = connected(proxy_port)
    sock.sendall(f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += sock.recv(65536)
    return sock


def measure(count: int) -> list[dict[str, Any]]:
    server, port = started(serve)
    via, proxy_port = started(proxy, port)
    host = f"127.0.0.1:{port}"
    kept = {"direct": connected(port), "http": connected(proxy_port), "connect": tunnel(proxy_port, host)}
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], None]) -> None:
        start = time.perf_counter()
        call()
        times.setdefault(name, []).append((time.perf_counter() - start) * 1e3)

    def fresh(make: Callable[[], socket.socket], target: str) -> None:
        with make() as sock:
            ask(sock, target, host)

    for number in range(count + 20):
        if number == 20:
            times.clear()
        timed("direct, kept", lambda: ask(kept["direct"], "/", host))
        timed("http, kept", lambda: ask(kept["http"], f"http://{host}/", host))
        timed("CONNECT, kept", lambda: ask(kept["connect"], "/", host))
        timed("direct, fresh", lambda: fresh(lambda: connected(port), "/"))
        timed("http, fresh", lambda: fresh(lambda: connected(proxy_port), f"http://{host}/"))
        timed("CONNECT, fresh", lambda: fresh(lambda: tunnel(proxy_port, host), "/"))
    for process in (via, server):
        process.terminate()
        process.join()
    return rows_of(times)


def rows_of(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    found = []
    for name, values in times.items():
        base = times["direct, " + name.partition(", ")[2]]
        found.append(
            {
                "request": name,
                "n": len(values),
                "p50_ms": round(statistics.median(values), 3),
                "p99_ms": round(harness.percentile(values, 0.99), 3),
                "added_p50_ms": round(statistics.median(values) - statistics.median(base), 3),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    asked = parser.parse_args()
    harness.report("egress", measure(asked.count))


if __name__ == "__main__":
    main()
