"""Hostile HTTP on the real server: malformed bytes, huge and slow requests, floods; the others are unharmed.

The server runs as a process of its own, so that its memory and CPU can be looked at from outside.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from aether.api.server import Deadlines
from aether.client import Client
from aether.contract import limits
from aether.contract.errors import AetherError
from tests.unit.api.http_node import HttpNode, read_answer

ROOT = Path(__file__).parents[2]
OK = b"GET /v0/health HTTP/1.1\r\nhost: x\r\n\r\n"
MIB = 1 << 20


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    socket_path: Path

    def connect(self, timeout_s: float = 10.0) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        connection.connect(str(self.socket_path))
        return connection

    def exchange(self, data: bytes, timeout_s: float = 10.0) -> bytes:
        with self.connect(timeout_s) as connection:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
            return read_answer(connection)

    def memory(self, field: str) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        raise AssertionError(field)

    def healthy(self) -> bool:
        started = time.monotonic()
        answer = self.exchange(OK)
        return answer.startswith(b"HTTP/1.1 200") and time.monotonic() - started < 1.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.api.http_node", str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    running = Server(process, tmp_path / "run/aetherd.sock")
    try:
        yield running
        assert running.healthy()
    finally:
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0
        assert b"Traceback" not in errors, errors.decode()


JSON_HEAD = b"POST /v0/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CORPUS = [
    b"\x00" * 100,
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\nhost: x\n\n\x16\x03\x01\x02\x00",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /%zz HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v0/jobs/%ff%fe HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v0/health HTTP/1.1\r\nhost x\r\n\r\n",
    b"GET /v0/health HTTP/1.1\r\n: x\r\n\r\n",
    b"GET /v0/health HTTP/1.1\r\nx: a\x00b\r\n\r\n",
    b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v0/health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\ngarbage after",
    b"GET /v0/health HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n\r\n",
    JSON_HEAD + b"content-length: -1\r\n\r\n",
    JSON_HEAD + b"content-length: 99999999999999999999999\r\n\r\n",
    JSON_HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    JSON_HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
    JSON_HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    JSON_HEAD + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    JSON_HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    JSON_HEAD + b"content-length: 2\r\n\r\n{}GARBAGE / HTTP/1.1\r\n\r\n",
    JSON_HEAD + b"content-length: 6\r\n\r\n\xef\xbb\xbf{}\n",
    JSON_HEAD + b"content-length: 12\r\n\r\n" + b'{"kind":NaN}',
]


@pytest.mark.parametrize("data", CORPUS, ids=range(len(CORPUS)))
def test_malformed_is_answered_4xx_and_closed(server: Server, data: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = read_answer(connection)
    status = int(answer.split(b" ")[1]) if answer else 0
    upgrade_ignored = b"upgrade" in data and status == 200
    assert upgrade_ignored or status == 0 or 400 <= status < 500, answer
    if status >= 400:
        assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"error", "request_id"}
    assert server.healthy()


def test_smuggled_second_request_is_not_served(server: Server) -> None:
    """Two lengths, or a length and chunked: whoever stands in front must not disagree with us."""
    hidden = b"GET /v0/metrics HTTP/1.1\r\nhost: x\r\n\r\n"
    for head in (
        b"content-length: 0\r\ncontent-length: %d\r\n",
        b"content-length: %d\r\ntransfer-encoding: chunked\r\n",
    ):
        data = JSON_HEAD + head % len(hidden) + b"\r\n" + hidden
        answer = server.exchange(data)
        assert b"aether_jobs" not in answer and b" 200 " not in answer


def test_random_bytes_never_harm(server: Server) -> None:
    rng = random.Random(7)
    pieces = [*CORPUS, OK, b"\r\n", b"\r\n\r\n", b"0\r\n\r\n", b"content-length: 5\r\n"]
    for _ in range(150):
        data = b"".join(rng.choice(pieces)[: rng.randrange(1, 200)] for _ in range(rng.randrange(1, 6)))
        with server.connect(0.2) as connection, suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(4096)
    assert server.healthy()


def _flood(server: Server, head: bytes, total: int, chunked: bool) -> bytes:
    """Sends up to `total` body bytes as fast as they are taken; the answer."""
    piece = (b"10000\r\n" + b"x" * 65536 + b"\r\n") if chunked else b"x" * 65536
    with server.connect() as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(head)
            for _ in range(total // 65536):
                connection.sendall(piece)
        return read_answer(connection)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", [b"/v0/jobs", b"/v0/cells/explain", b"/nope"])
def test_hundred_megabyte_body_is_refused_in_bounded_memory(server: Server, path: bytes, chunked: bool) -> None:
    assert server.healthy()
    before = server.memory("VmRSS")
    length = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % (100 * MIB)
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n%s\r\n\r\n" % (path, length)
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(_flood(server, head, 100 * MIB, chunked))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(a.startswith((b"HTTP/1.1 413", b"HTTP/1.1 404")) for a in answers), [a[:60] for a in answers]
    assert server.memory("VmHWM") - before < 24 * MIB


def test_upload_of_100_megabytes_is_spooled_not_held(server: Server, tmp_path: Path) -> None:
    """Uploads above the concurrency bound are refused, and 100 MiB pass without being held by the HTTP layer."""
    before = server.memory("VmRSS")
    peak = 0
    with server.connect(60) as connection:
        connection.sendall(b"PUT /v0/artifacts HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (100 * MIB))
        for _ in range(100 * 16 - 1):
            connection.sendall(bytes(65536))
            peak = max(peak, server.memory("VmRSS"))
        assert peak - before < 24 * MIB
        assert list((tmp_path / "spool").iterdir()) == []
    assert server.healthy()


def test_too_many_uploads_of_one_uid_are_refused(server: Server) -> None:
    head = b"PUT /v0/artifacts HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(server.connect()).sendall(head + b"x" * 1000)
        time.sleep(0.2)
        assert server.exchange(head + b"x" * 1_000_000).startswith(b"HTTP/1.1 429")


def test_endless_headers_are_cut(server: Server) -> None:
    before = server.memory("VmRSS")
    for start in (b"GET /", b"GET / HTTP/1.1\r\nx: ", b"GET / HTTP/1.1\r\n"):
        filler = b"a: b\r\n" * 10_000 if start.endswith(b"1\r\n") else b"a" * 65536
        with server.connect() as connection:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(start)
                for _ in range(200):
                    connection.sendall(filler)
            assert read_answer(connection).startswith(b"HTTP/1.1 431")
    assert server.memory("VmHWM") - before < 16 * MIB


def test_endless_pipelining_is_cut(server: Server) -> None:
    before = server.memory("VmRSS")
    with server.connect(2) as connection, suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
        for _ in range(100):
            connection.sendall(OK * 2000)
    assert server.memory("VmHWM") - before < 24 * MIB


def test_header_trailers_do_not_become_headers(server: Server) -> None:
    body = b'{"kind":"model","op":"encode_state","params":{"model":"m"},"inputs":{"obs":[]}}'
    chunk = b"%x\r\n%s\r\n0\r\nauthorization: Basic eDp5\r\n\r\n" % (len(body), body)
    answer = server.exchange(JSON_HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk)
    assert answer.startswith(b"HTTP/1.1 200"), answer


def test_hundred_concurrent_clients(server: Server) -> None:
    """Each submits, waits and reads back its own job; none sees another's."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with Client(server.socket_path) as client:
                for turn in range(5):
                    job = client.run(["echo", f"{number}-{turn}"])
                    assert b"".join(client.logs(job.job_id)) == f"{number}-{turn}\n".encode()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(100)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert time.monotonic() - started < 30


def test_connections_of_one_uid_are_bounded(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(limits.HTTP_CONNECTIONS_PER_UID_MAX):
            stack.enter_context(server.connect())
        answer = server.exchange(OK)
        assert answer.startswith(b"HTTP/1.1 429") and b"retry-after" in answer
    time.sleep(0.3)


def test_another_uid_is_served_beside_a_flood(server: Server) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another uid")
    server.socket_path.chmod(0o666)
    for parent in (server.socket_path.parent, *list(server.socket_path.parents)[1:4]):
        parent.chmod(parent.stat().st_mode | 0o011)
    script = (
        "import os, socket, sys, time\n"
        "os.setuid(60001)\n"
        "held = []\n"
        "for _ in range(int(sys.argv[2])):\n"
        "    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b'GET /v0/he'); held.append(s)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    count = str(limits.HTTP_CONNECTIONS_PER_UID_MAX + 20)
    flood = subprocess.Popen(
        [sys.executable, "-c", script, str(server.socket_path), count], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert flood.stdout is not None
        if flood.stdout.readline() != b"held\n":
            pytest.skip("another uid cannot reach the test's directory")
        assert server.healthy()
    finally:
        flood.communicate(timeout=10)


def test_slow_clients_are_cut_and_others_unharmed(tmp_path: Path) -> None:
    deadlines = Deadlines(header_s=0.5, body_idle_s=0.5, write_idle_s=0.5, sweep_s=0.1)
    with HttpNode(tmp_path, deadlines) as node, ExitStack() as stack:
        slow = [stack.enter_context(node.connect()) for _ in range(60)]
        for number, connection in enumerate(slow):
            connection.sendall([b"", b"GET /v0/heal", JSON_HEAD + b"content-length: 50\r\n\r\n{"][number % 3])
        deadline = time.monotonic() + 5
        while node.server.statistics()["expired"] < 60 and time.monotonic() < deadline:
            for connection in slow[1::3]:  # a byte now and then does not help
                with suppress(OSError):
                    connection.sendall(b"x")
            started = time.monotonic()
            assert node.exchange(OK).startswith(b"HTTP/1.1 200")
            assert time.monotonic() - started < 0.5
            time.sleep(0.1)
        assert node.server.statistics()["expired"] == 60
        assert node.app.statistics() == {"running": 0, "uploading": 0}
        for connection in slow:
            with suppress(ConnectionResetError):
                assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_reader_that_takes_nothing_is_cut(tmp_path: Path) -> None:
    deadlines = Deadlines(write_idle_s=0.5, sweep_s=0.1)
    with HttpNode(tmp_path, deadlines) as node, Client(node.socket_path) as client:
        digest = client.artifact_put(bytes(8 * MIB)).digest
        open_before = len(list(Path("/proc/self/fd").iterdir()))
        with ExitStack() as stack:
            for _ in range(20):
                connection = stack.enter_context(node.connect())
                connection.sendall(b"GET /v0/artifacts/%s HTTP/1.1\r\nhost: x\r\n\r\n" % digest.encode())
            deadline = time.monotonic() + 5
            while node.server.statistics()["expired"] < 20 and time.monotonic() < deadline:
                assert client.health().status == "ok"
                time.sleep(0.05)
            assert node.server.statistics()["expired"] == 20
        while node.app.statistics()["running"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert node.app.statistics()["running"] == 0
        assert len(list(Path("/proc/self/fd").iterdir())) <= open_before + 1


def test_parked_calls_of_dropped_connections_are_bounded(tmp_path: Path) -> None:
    """A submission goes on without its connection; holding many such calls open is refused, not piled up."""
    with HttpNode(tmp_path) as node:
        node.app._running[os.geteuid()] = limits.HTTP_CONNECTIONS_PER_UID_MAX  # as if so many were parked
        with Client(node.socket_path) as client, pytest.raises(AetherError) as caught:
            client._transport._retries = 0
            client.health()
        assert caught.value.code == "BUSY"
