"""ClientHellos: those of OpenSSL read right, all others refused and never misread."""

from __future__ import annotations

import ssl
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.egress.hello import HELLO_BYTES_MAX, EncryptedHelloError, Hello, NotTlsError, read_hello


def hello_of(name: str | None) -> bytes:
    """What OpenSSL sends first."""
    context = ssl.create_default_context()
    context.check_hostname = name is not None
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def made(*extensions: tuple[int, bytes], cut: int = 1 << 14) -> bytes:
    """A ClientHello by hand, in records of at most `cut` bytes."""
    block = b"".join(struct.pack(">HH", kind, len(value)) + value for kind, value in extensions)
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\0\2\x13\x01" + b"\1\0" + struct.pack(">H", len(block)) + block
    message = b"\1" + len(body).to_bytes(3, "big") + body
    parts = [message[at : at + cut] for at in range(0, len(message), cut)]
    return b"".join(b"\x16\x03\x01" + struct.pack(">H", len(part)) + part for part in parts)


def name(*names: bytes) -> bytes:
    entries = b"".join(b"\0" + struct.pack(">H", len(n)) + n for n in names)
    return struct.pack(">H", len(entries)) + entries


def test_the_name_openssl_sends() -> None:
    assert read_hello(hello_of("api.example.org")) == Hello("api.example.org")
    assert read_hello(hello_of(None)) == Hello(None)


def test_however_it_is_cut() -> None:
    data = hello_of("api.example.org")
    assert all(read_hello(data[:count]) is None for count in range(len(data)))
    assert read_hello(data + b"more") == Hello("api.example.org")
    for cut in (1, 3, 5, 50):
        assert read_hello(made((0, name(b"a.test")), cut=cut)) == Hello("a.test")


@pytest.mark.parametrize("kind", [0xFE0D, 0xFFCE])
def test_hidden_names_are_refused(kind: int) -> None:
    with pytest.raises(EncryptedHelloError):
        read_hello(made((0, name(b"front.test")), (kind, b"\0")))


@pytest.mark.parametrize(
    "data",
    [
        made((0, name(b"a.test", b"b.test"))),
        made((0, name(b"a.test")), (0, name(b"b.test"))),
        made((0, name(b"a.test") + b"x")),
        made((0, b"\0\3\1\0\0")),
        made((0, b"")),
        made((0, name(b"\xff.test"))),
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\x7f\xff",
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"\x16\x03\x01\x00\x04\x01\xff\xff\xff",
    ],
)
def test_what_two_readers_could_read_differently(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_hello(data)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\x16\x02", b"SSH-2.0-x", b"\x80\x2e\x01\x03\x01"])
def test_what_is_no_tls(data: bytes) -> None:
    with pytest.raises(NotTlsError):
        read_hello(data)


def test_endless_hellos_end() -> None:
    endless = b"\x16\x03\x01\x00\x01\x01" + b"\x16\x03\x01\x00\x01\x00" * HELLO_BYTES_MAX
    with pytest.raises(ValueError):
        read_hello(endless[:HELLO_BYTES_MAX])


@settings(max_examples=300)
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes(data: bytes, framed: bool) -> None:
    if framed:
        body = b"\1" + len(data).to_bytes(3, "big") + data
        data = b"\x16\x03\x01" + struct.pack(">H", len(body)) + body
    try:
        found = read_hello(data)
    except ValueError:
        return
    assert found is None or isinstance(found, Hello)


@settings(max_examples=300)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_never_breaks_it(at: int, value: int) -> None:
    data = bytearray(hello_of("api.example.org"))
    data[at % len(data)] = value
    try:
        read_hello(bytes(data))
    except ValueError:
        return
