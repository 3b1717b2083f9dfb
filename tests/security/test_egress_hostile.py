"""A hostile workload at its proxy: names that change, addresses, other names in TLS, smuggling, slow and huge input.

Only loopback is ever dialled: "public" names resolve, in the test's own resolver, to where nothing may go.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aether.contract.limits import EGRESS_HEADER_BYTES_MAX
from aether.contract.network import Credential, Network, NetworkLimits
from aether.egress import forward, proxy
from aether.egress.secrets import Injection
from tests.support import web
from tests.support.egress import Names, Running, proxied

HOST = "api.example.test"
SECRET = b"sk-test-0123456789"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> web.Authority:
    return web.Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def https(authority: web.Authority) -> Iterator[web.Server]:
    with web.server(authority.context(HOST, "127.0.0.1", "other.test")) as found:
        yield found


@pytest.fixture
def http() -> Iterator[web.Server]:
    with web.server() as found:
        yield found


def asked(target: str, host: str | None = None, *more: str, method: str = "GET") -> bytes:
    """A request's head as it goes over the wire."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host or target.split('/')[2]}", *more, "", ""]
    return "\r\n".join(lines).encode()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


Step = Callable[[Running], "object"]


def against(network: Network, names: Names, step: Step, **more: object) -> None:
    async def go() -> None:
        async with proxied(network, names, **more) as running:  # type: ignore[arg-type]
            await step(running)  # type: ignore[misc]

    asyncio.run(go())


# ---- where to


def test_rebinding_changes_nothing(http: web.Server) -> None:
    """First a public address, then this machine's: whatever was checked is what is dialled, each time anew."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]
    names = Names({HOST: lambda: answers[min(len(names.asked), 2) - 1]})

    async def step(running: Running) -> None:
        first = asyncio.create_task(running.talk(asked(f"http://{HOST}:{http.port}/"), timeout_s=1))
        await asyncio.sleep(0.2)
        answer = await running.talk(asked(f"http://{HOST}:{http.port}/"))
        assert status(answer) == 403 and b"not public" in answer
        assert http.seen == []
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert names.asked == [HOST, HOST]  # once per connection

    against(Network(allow=(f"{HOST}:{http.port}",)), names, step)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "169.254.169.254", "10.0.0.1", "100.64.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "0.0.0.0",
     "fd00:ec2::254", "224.0.0.1", "168.63.129.16"],
)  # fmt: skip
def test_names_of_inner_addresses_are_refused(address: str) -> None:
    async def step(running: Running) -> None:
        answer = await running.talk(asked("http://inner.test/"))
        assert status(answer) == 403
        row = await running.row()
        assert (row.verdict, row.reason, row.address) == ("refused", "address", None)

    against(Network(allow=("inner.test:80",)), Names({"inner.test": [address]}), step)


@pytest.mark.parametrize(
    "target",
    ["127.0.0.1:{}", "127.1:{}", "2130706433:{}", "0x7f.0.0.1:{}", "0177.0.0.1:{}", "[::1]:{}", "[::ffff:127.0.0.1]:{}",
     "localhost:{}", "[::1%lo]:{}", "127.0.0.1.:{}", "169.254.169.254:80", "1.2.3.4:443",
     "metadata.google.internal:80"],
)  # fmt: skip
def test_connect_to_what_is_not_named(http: web.Server, target: str) -> None:
    names = Names({"localhost": ["127.0.0.1"]})

    async def step(running: Running) -> None:
        line, _, writer = await running.connect(target.format(http.port))
        writer.close()
        assert line.split(b" ")[1] in (b"400", b"403")
        assert names.asked == []  # nothing that is not allowed is even looked up
        assert (await running.row()).verdict == "refused"

    against(Network(allow=("*.example.test:*", f"{HOST}:{http.port}")), names, step)


def test_names_that_are_not_allowed_are_not_resolved() -> None:
    """A look-up carries its labels to whoever answers for the name: a way out of its own."""
    names = Names({"exfiltrated-data.evil.test": ["93.184.216.34"]})

    async def step(running: Running) -> None:
        for target in ("http://exfiltrated-data.evil.test/", "http://x.example.test.evil.test/"):
            assert status(await running.talk(asked(target))) == 403
        assert names.asked == []

    against(Network(allow=("*.example.test:80",)), names, step)


def test_learning_reaches_nothing_private(http: web.Server) -> None:
    names = Names({"inner.test": ["127.0.0.1"], "meta.test": ["169.254.169.254"]})

    async def step(running: Running) -> None:
        for target in (f"http://inner.test:{http.port}/", "http://meta.test/", f"http://127.0.0.1:{http.port}/"):
            assert status(await running.talk(asked(target))) == 403
        assert http.seen == []

    against(Network(learn=True), names, step)


def test_a_redirect_is_checked_like_anything_else(http: web.Server) -> None:
    """The proxy follows nothing; the client that follows asks anew."""
    http.answer = lambda seen: (302, {"Location": f"http://10.0.0.1:{http.port}/"}, b"")

    async def step(running: Running) -> None:
        answer = await running.talk(asked(f"http://{HOST}:{http.port}/", None, "Connection: close"))
        assert status(answer) == 302
        assert status(await running.talk(asked(f"http://10.0.0.1:{http.port}/"))) == 403
        assert len(http.seen) == 1

    against(Network(allow=(f"{HOST}:{http.port}", f"127.0.0.1:{http.port}")), Names({HOST: ["127.0.0.1"]}), step)


# ---- TLS


async def hello_through(running: Running, target: str, name: str | None, authority: web.Authority) -> str:
    """CONNECT, then TLS in the name of `name`; what became of it."""
    line, reader, writer = await running.connect(target)
    assert b"200" in line
    context = authority.client()
    context.check_hostname = False
    try:
        await asyncio.wait_for(asyncio.shield(_tls(reader, writer, context, name)), 5)
        return "passed"
    except (OSError, asyncio.IncompleteReadError, ConnectionError):
        return "cut"
    finally:
        writer.close()


async def _tls(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext, name: str | None
) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    while True:
        try:
            tls.do_handshake()
            return
        except ssl.SSLWantReadError:
            writer.write(outgoing.read())
            data = await reader.read(65536)
            if not data:
                raise ConnectionResetError from None
            incoming.write(data)


@pytest.mark.parametrize(
    ("name", "fate", "reason"),
    [(HOST, "passed", None), ("other.test", "cut", "server-name"), (None, "cut", "server-name")],
)
def test_tls_must_name_the_host(
    https: web.Server, authority: web.Authority, name: str | None, fate: str, reason: str | None
) -> None:
    async def step(running: Running) -> None:
        assert await hello_through(running, f"{HOST}:{https.port}", name, authority) == fate
        row = await running.row()
        assert row.reason == reason
        assert fate == "passed" or row.sent_bytes == 0  # not a byte of it left

    network = Network(allow=(f"{HOST}:{https.port}", f"127.0.0.1:{https.port}"))
    against(network, Names({HOST: ["127.0.0.1"]}), step)


def test_an_address_takes_no_name(https: web.Server, authority: web.Authority) -> None:
    async def step(running: Running) -> None:
        target = f"127.0.0.1:{https.port}"
        assert await hello_through(running, target, None, authority) == "passed"
        assert await hello_through(running, target, "other.test", authority) == "cut"

    against(Network(allow=(f"127.0.0.1:{https.port}",)), Names(), step)


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-OpenSSH_9\r\n", b"\x16\x03\x01\x40\x01" + b"x" * 99]
)
def test_other_bytes_need_a_rule_of_their_own(http: web.Server, first: bytes) -> None:
    async def step(running: Running) -> None:
        _, reader, writer = await running.connect(f"{HOST}:{http.port}")
        writer.write(first)
        assert await reader.read() == b""
        writer.close()
        assert (await running.row()).reason in ("not-tls", "hello")
        assert http.seen == []

    network = Network(allow=(f"{HOST}:{http.port}", f"127.0.0.1:{http.port}"))
    against(network, Names({HOST: ["127.0.0.1"]}), step)


# ---- HTTP


@pytest.mark.parametrize(
    "request_bytes",
    [
        asked("http://api.example.test:{}/", "other.test"),
        asked("http://api.example.test:{}/", "api.example.test"),  # another port
        asked("http://api.example.test:{}/", "api.example.test:{}\r\nHost: other.test"),
        asked("http://api.example.test:{}/", "api.example.test:{}", "Content-Length: 5", "Transfer-Encoding: chunked"),
        asked("http://api.example.test:{}/", "api.example.test:{}", "Content-Length: 5", "Content-Length: 6"),
        asked("http://api.example.test:{}/", "api.example.test:{}", "Transfer-Encoding: chunked, identity"),
        asked("http://api.example.test:{}/", "api.example.test:{}", "Transfer-Encoding: x"),
        asked("http://api.example.test:{}/", "api.example.test:{}", "Transfer-Encoding : chunked"),
        asked("http://user@api.example.test:{}/", "api.example.test:{}"),
        asked("http://api.example.test:{}\\@other.test/", "api.example.test:{}"),
        asked("http://api.example.test:{}/a b", "api.example.test:{}"),
        asked("/", "api.example.test:{}"),
        asked("https://api.example.test:{}/", "api.example.test:{}"),
        asked("ftp://api.example.test:{}/", "api.example.test:{}"),
        asked("*", "api.example.test:{}", method="OPTIONS"),
        b"GET http://api.example.test:{}/ HTTP/3.0\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
    ],
)
def test_ambiguous_requests_go_nowhere(http: web.Server, request_bytes: bytes) -> None:
    async def step(running: Running) -> None:
        answer = await running.talk(request_bytes.replace(b"{}", str(http.port).encode()))
        assert status(answer) in (400, 403), answer
        assert http.seen == []
        assert (await running.row()).verdict == "refused"

    network = Network(allow=(f"{HOST}:{http.port}", f"127.0.0.1:{http.port}"))
    against(network, Names({HOST: ["127.0.0.1"]}), step)


def test_a_pipelined_request_is_checked_by_itself(http: web.Server) -> None:
    async def step(running: Running) -> None:
        good = asked(f"http://{HOST}:{http.port}/good")
        answer = await running.talk(good + asked(f"http://127.0.0.1:{http.port + 1}/bad") + good)
        assert answer.count(b"HTTP/1.1 ") == 2 and b" 403 " in answer
        assert [seen.path for seen in http.seen] == ["/good"]

    network = Network(allow=(f"{HOST}:{http.port}", f"127.0.0.1:{http.port}"))
    against(network, Names({HOST: ["127.0.0.1"]}), step)


def test_chunk_tricks_do_not_reach_the_server(http: web.Server) -> None:
    """Extensions, trailers and leading zeros end here: the server sees frames of our own making."""

    async def step(running: Running) -> None:
        body = b'005;x="y"\r\nhello\r\n0\r\nX-Trailer: evil\r\n\r\n'
        data = asked(
            f"http://{HOST}:{http.port}/", None, "Transfer-Encoding: chunked", "Connection: close", method="POST"
        )
        assert status(await running.talk(data + body)) == 200
        assert http.seen[-1].body == b"hello" and "x-trailer" not in http.seen[-1].headers
        assert status(await running.talk(data + b"5\r\nhelloXX0\r\n\r\n")) in (0, 400)

    network = Network(allow=(f"{HOST}:{http.port}", f"127.0.0.1:{http.port}"))
    against(network, Names({HOST: ["127.0.0.1"]}), step)


def test_a_hostile_server_cannot_split_answers() -> None:
    """A server whose answer is framed in two ways, and one that says too much."""
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw += b"2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(65536)
            sock.sendall(raw)

    async def step(running: Running) -> None:
        serving = asyncio.create_task(asyncio.to_thread(serve))
        answer = await running.talk(asked(f"http://{HOST}:{port}/", None, "Connection: close"))
        await serving
        assert answer.count(b"HTTP/1.1") == 1
        assert b"content-length" not in answer.lower() and answer.endswith(b"2\r\nok\r\n0\r\n\r\n")

    against(Network(allow=(f"{HOST}:{port}", f"127.0.0.1:{port}")), Names({HOST: ["127.0.0.1"]}), step)
    listener.close()


def test_huge_heads_and_slow_ones(http: web.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.contract.limits.EGRESS_HEADER_TIMEOUT_S", 0.3)
    assert forward.limits is proxy.limits

    async def step(running: Running) -> None:
        url = f"http://{HOST}:{http.port}/"
        many = [f"X-{n}: {'y' * 1000}" for n in range(EGRESS_HEADER_BYTES_MAX // 1000 + 2)]
        assert status(await running.talk(asked(url, None, *many))) == 400
        assert status(await running.talk(b"GET http://" + b"a" * 200_000)) in (0, 400)
        assert status(await running.talk(asked(url)[:-2])) == 408
        _, reader, writer = await running.connect(f"{HOST}:{http.port}")
        writer.write(b"\x16\x03\x01")
        assert await reader.read() == b""
        writer.close()
        assert http.seen == []

    network = Network(allow=(f"{HOST}:{http.port}", f"127.0.0.1:{http.port}"))
    against(network, Names({HOST: ["127.0.0.1"]}), step)


def test_many_slow_clients_do_not_hold_up_another_cell(http: web.Server) -> None:
    async def go() -> None:
        network = Network(allow=(f"127.0.0.1:{http.port}",), limits=NetworkLimits(connections=8))
        async with proxied(network) as slow, proxied(network) as quick:
            held = [await asyncio.open_connection("127.0.0.1", slow.port) for _ in range(40)]
            answer = await quick.talk(asked(f"http://127.0.0.1:{http.port}/", None, "Connection: close"), timeout_s=2)
            assert status(answer) == 200
            for _, writer in held:
                writer.close()

    asyncio.run(go())


# ---- credentials


def test_a_credential_goes_to_its_host_alone(https: web.Server, authority: web.Authority, http: web.Server) -> None:
    """Not to another port, not over plain HTTP, not under another credential's name, not by a header of the job's."""
    secrets = {"api": Injection("api", b"x-key", SECRET, SECRET)}
    credential = Credential(name="api", host=f"{HOST}:{https.port}", header="X-Key", source="env:AETHER_SECRET_X")
    network = Network(
        allow=(f"{HOST}:{http.port}", f"127.0.0.1:{http.port}", f"127.0.0.1:{https.port}"), credentials=(credential,)
    )

    async def step(running: Running) -> None:
        assert status(await running.talk(asked(f"http://{HOST}:{http.port}/", None, "Connection: close"))) == 200
        assert "x-key" not in http.seen[-1].headers
        for target in ("http://other.internal/", "http://api.internal:81/", "http://x.api.internal/"):
            assert status(await running.talk(asked(target))) == 403
        head = asked("http://api.internal/", None, "X-Key: mine", "X-KEY: too", "Connection: close, X-Key")
        assert status(await running.talk(head)) == 200
        assert https.seen[-1].headers["x-key"] == SECRET.decode()

    against(network, Names({HOST: ["127.0.0.1"]}), step, tls=authority.client(), secrets=secrets)


# ---- anything


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=300), st.integers(0, 2**32))
def test_no_bytes_break_the_proxy(noise: bytes, seed: int) -> None:
    """Broken and mangled requests: an answer of ours or a closed connection, and it serves on."""
    rng = random.Random(seed)
    good = bytearray(asked("http://nowhere.test/", None, "Content-Length: 3", method="POST") + b"abc")
    for _ in range(rng.randrange(4)):
        good[rng.randrange(len(good))] = rng.randrange(256)

    async def step(running: Running) -> None:
        for data in (noise, bytes(good), bytes(good[: rng.randrange(len(good))]) + noise):
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(data)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 5)
            assert answer == b"" or status(answer) in (400, 403, 408, 429)
            writer.close()
        assert status(await running.talk(asked("http://nowhere.test/"))) == 403

    against(Network(allow=("somewhere.test:80",)), Names(), step)
