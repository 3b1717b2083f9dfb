"""The proxy against real servers on loopback, spoken to by real clients."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from aether.contract.network import Credential, Network, NetworkLimits
from aether.egress.secrets import Injection
from tests.support import web
from tests.support.egress import Names, Running, proxied

HOST = "api.example.test"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> web.Authority:
    return web.Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def https(authority: web.Authority) -> Iterator[web.Server]:
    with web.server(authority.context(HOST, "127.0.0.1")) as found:
        yield found


@pytest.fixture
def http() -> Iterator[web.Server]:
    with web.server() as found:
        yield found


def names() -> Names:
    return Names({HOST: ["127.0.0.1"]})


def allow(*rules: str, **more: object) -> Network:
    return Network(allow=rules, **more)  # type: ignore[arg-type]


def network(port: int, **more: object) -> Network:
    """The test's host, whose address is this machine's and therefore named too."""
    return allow(f"{HOST}:{port}", f"127.0.0.1:{port}", **more)


async def fetch(running: Running, url: str, verify: Path | bool = True, **more: object) -> requests.Response:
    """A request by the `requests` library through the proxy."""
    via = f"http://127.0.0.1:{running.port}"

    def run() -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False
            session.headers["Connection"] = "close"
            session.proxies = {"http": via, "https": via}
            session.verify = str(verify) if isinstance(verify, Path) else verify
            return session.request(str(more.pop("method", "GET")), url, timeout=10, **more)  # type: ignore[arg-type]

    return await asyncio.to_thread(run)


def run(coroutine: object) -> None:
    asyncio.run(coroutine)  # type: ignore[arg-type]


def test_https_through_connect_stays_opaque(https: web.Server, authority: web.Authority) -> None:
    async def go() -> None:
        async with proxied(network(https.port), names()) as running:
            answer = await fetch(running, f"https://{HOST}:{https.port}/x", authority.ca)
            assert answer.text == "hello /x"
            row = await running.row()
            assert (row.host, row.port, row.address, row.verdict) == (HOST, https.port, "127.0.0.1", "allowed")
            assert row.rule == f"{HOST}:{https.port}"
            assert row.sent_bytes > 300 and row.received_bytes > 300

    run(go())


def test_plain_http_is_forwarded_and_rewritten(http: web.Server) -> None:
    async def go() -> None:
        async with proxied(network(http.port), names()) as running:
            headers = {"Proxy-Authorization": "Basic x", "Connection": "keep-alive, X-Hop", "X-Hop": "1", "X-End": "2"}
            url = f"http://{HOST}:{http.port}/a?b=c"
            answer = await fetch(running, url, method="POST", data=b"12345", headers=headers)
            assert answer.text == "hello /a?b=c"
            seen = http.seen[0]
            assert (seen.method, seen.body, seen.headers["host"]) == ("POST", b"12345", f"{HOST}:{http.port}")
            assert seen.headers["x-end"] == "2"
            assert not {"proxy-authorization", "x-hop", "proxy-connection"} & seen.headers.keys()
            row = await running.row()
            assert (row.sent_bytes, row.received_bytes) == (5, len("hello /a?b=c"))

    run(go())


def test_bodies_in_chunks_and_kept_connections(http: web.Server) -> None:
    http.answer = lambda seen: (200, {"X-Length": str(len(seen.body))}, b"z" * 300_000)

    async def go() -> None:
        async with proxied(network(http.port), names()) as running:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            for _ in range(3):
                writer.write(
                    f"POST http://{HOST}:{http.port}/ HTTP/1.1\r\nHost: {HOST}:{http.port}\r\n".encode()
                    + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
                )
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"200" in head.split(b"\r\n")[0]
                assert len(await reader.readexactly(300_000)) == 300_000
            writer.close()
            assert [seen.body for seen in http.seen] == [b"hello world"] * 3
            assert {(await running.row()).received_bytes for _ in range(3)} == {300_000}

    run(go())


def test_head_and_bodiless_answers(http: web.Server) -> None:
    http.answer = lambda seen: (204, {}, b"") if seen.path == "/none" else (200, {}, b"12345")

    async def go() -> None:
        async with proxied(network(http.port), names()) as running:
            base = f"http://{HOST}:{http.port}"
            assert (await fetch(running, f"{base}/", method="HEAD")).headers["content-length"] == "5"
            assert (await fetch(running, f"{base}/none")).status_code == 204

    run(go())


def test_early_answer_reaches_a_client_that_still_sends() -> None:
    """A server that refuses an upload after its head."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        sock, _ = listener.accept()
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        sock.recv(1)
        sock.close()

    thread = threading.Thread(target=serve)
    thread.start()

    async def go() -> None:
        async with proxied(network(port), names()) as running:
            data = f"POST http://{HOST}:{port}/ HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Length: 99\r\n\r\nabc"
            assert (await running.talk(data.encode())).startswith(b"HTTP/1.1 413")

    run(go())
    thread.join()
    listener.close()


SECRET = b"sk-live-0123456789"


def credential(port: int) -> Credential:
    return Credential(
        name="api", host=f"{HOST}:{port}", header="Authorization", source="env:AETHER_SECRET_KEY", prefix="Bearer "
    )  # fmt: skip


INJECTION = {"api": Injection("api", b"authorization", b"Bearer " + SECRET, SECRET)}


def test_a_rewritten_name_gets_its_credential(https: web.Server, authority: web.Authority) -> None:
    async def go() -> None:
        wanted = allow(f"127.0.0.1:{https.port}", credentials=(credential(https.port),))
        async with proxied(wanted, names(), authority.client(), INJECTION) as running:
            answer = await fetch(running, "http://api.internal/v1", headers={"Authorization": "mine"})
            assert answer.text == "hello /v1"
            seen = https.seen[0]
            assert seen.headers["authorization"] == "Bearer " + SECRET.decode()
            assert seen.headers["host"] == f"{HOST}:{https.port}"
            row = await running.row()
            assert (row.host, row.credential, row.verdict) == (HOST, "api", "allowed")
            assert SECRET.decode() not in repr(row) and SECRET.decode() not in repr(INJECTION)

    run(go())


def test_an_echoed_credential_is_blanked(https: web.Server, authority: web.Authority) -> None:
    https.answer = lambda seen: (
        200,
        {"X-Echo": seen.headers["authorization"]},
        b"[" * 70_000 + seen.headers["authorization"].encode() + b"]",
    )

    async def go() -> None:
        wanted = allow(f"127.0.0.1:{https.port}", credentials=(credential(https.port),))
        async with proxied(wanted, names(), authority.client(), INJECTION) as running:
            answer = await fetch(running, "http://api.internal/v1")
            assert SECRET not in answer.content and SECRET.decode() not in str(answer.headers)
            assert answer.content.endswith(b"Bearer " + b"*" * len(SECRET) + b"]")

    run(go())


def test_interception_adds_the_credential(https: web.Server, authority: web.Authority, tmp_path: Path) -> None:
    async def go() -> None:
        wanted = allow(f"127.0.0.1:{https.port}", credentials=(credential(https.port),), intercept=True)
        async with proxied(wanted, names(), authority.client(), INJECTION) as running:
            trusted = tmp_path / "cell.pem"
            assert running.proxy.authority is not None
            trusted.write_bytes(running.proxy.authority.pem)
            url = f"https://{HOST}:{https.port}/deep"
            answer = await fetch(running, url, trusted, method="POST", data=b"x" * 200_000)
            assert answer.text == "hello /deep"
            assert https.seen[0].headers["authorization"] == "Bearer " + SECRET.decode()
            assert len(https.seen[0].body) == 200_000
            assert (await running.row()).credential == "api"
            with pytest.raises(requests.exceptions.SSLError):
                await fetch(running, url, authority.ca)  # trusts the server, not the cell's authority
            assert (await running.row()).reason == "tls"

    run(go())


def test_the_server_behind_a_credential_is_verified(tmp_path: Path, https: web.Server) -> None:
    async def go() -> None:
        wanted = allow(f"127.0.0.1:{https.port}", credentials=(credential(https.port),))
        stranger = web.Authority(tmp_path).client()
        async with proxied(wanted, names(), stranger, INJECTION) as running:
            answer = await fetch(running, "http://api.internal/v1")
            assert answer.status_code == 502
            assert https.seen == []
            row = await running.row()
            assert (row.verdict, row.reason) == ("failed", "tls")

    run(go())


def test_raw_tcp_where_a_rule_says_so() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        for _ in range(1):
            sock, _ = listener.accept()
            sock.sendall(b"220 ready\r\n" + sock.recv(100))
            sock.shutdown(socket.SHUT_WR)
            sock.close()

    thread = threading.Thread(target=serve)
    thread.start()

    async def go() -> None:
        async with proxied(allow(f"tcp://127.0.0.1:{port}")) as running:
            status, reader, writer = await running.connect(f"127.0.0.1:{port}")
            assert b"200" in status
            writer.write(b"hello")
            assert await reader.read() == b"220 ready\r\nhello"
            writer.close()

    run(go())
    thread.join()
    listener.close()


def test_limits_of_bytes_rate_and_time(http: web.Server) -> None:
    http.answer = lambda seen: (200, {}, b"x" * 500_000)

    async def go() -> None:
        few = NetworkLimits(received_bytes=100_000, requests_per_s=3, idle_ms=300)
        async with proxied(network(http.port, limits=few), names()) as running:
            url = f"GET http://{HOST}:{http.port}/ HTTP/1.1\r\nHost: {HOST}:{http.port}\r\n\r\n".encode()
            cut = await running.talk(url)
            assert 0 < len(cut) < 400_000
            assert (await running.row()).reason == "bytes"
            silent = await running.talk(b"GET http", timeout_s=3)
            assert silent == b""
            statuses = [(await running.talk(url)).split(b" ")[1:2] for _ in range(8)]
            assert [b"429"] in statuses

    run(go())


def test_connections_beyond_the_limit_wait(http: web.Server) -> None:
    async def go() -> None:
        two = NetworkLimits(connections=2, idle_ms=60_000)
        async with proxied(network(http.port, limits=two), names()) as running:
            open_ones = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(2)]
            await asyncio.sleep(0.05)
            waiting = asyncio.create_task(fetch(running, f"http://{HOST}:{http.port}/"))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            open_ones[0][1].close()
            assert (await waiting).status_code == 200
            open_ones[1][1].close()

    run(go())


def test_a_slow_reader_grows_nothing(http: web.Server) -> None:
    http.answer = lambda seen: (200, {}, b"x" * 30_000_000)

    async def go() -> None:
        async with proxied(network(http.port), names()) as running:
            _, writer = await asyncio.open_connection("127.0.0.1", running.port, limit=1024)
            writer.write(f"GET http://{HOST}:{http.port}/ HTTP/1.1\r\nHost: {HOST}:{http.port}\r\n\r\n".encode())
            await asyncio.sleep(0.5)
            assert running.proxy.meter.received_bytes < 12_000_000  # what socket buffers and ours hold
            writer.transport.abort()
            assert (await running.row()).verdict == "allowed"

    run(go())


def test_close_ends_what_is_open(http: web.Server) -> None:
    async def go() -> None:
        async with proxied(network(http.port), names()) as running:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            await asyncio.sleep(0.05)
            await running.proxy.close()
            assert await reader.read() == b""
            writer.close()
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", running.port)

    run(go())


def test_context_of_strangers_is_not_made() -> None:
    async def go() -> None:
        wanted = Network(credentials=(credential(443),), intercept=True)
        async with proxied(wanted, names(), ssl.create_default_context(), INJECTION) as running:
            assert running.proxy.authority is not None
            with pytest.raises(KeyError):
                running.proxy.authority.context("other.test")

    run(go())
