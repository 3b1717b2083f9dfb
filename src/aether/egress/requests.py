"""What a client asks of the proxy: a request's head, read strictly and written anew. Pure.

Nothing is passed on as it came. The target is split here, the Host that is sent is made from it, framing headers are
taken only where there is exactly one way to read them (RFC 9112 section 6.3: a message with both Content-Length and
Transfer-Encoding is the mark of smuggling), and headers that are meant for one hop end here (RFC 9110 7.6.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import h11

from aether.contract import limits
from aether.contract.network import INTERNAL, Address, parse_host, parse_port
from aether.egress.rules import RefusedError

Headers = list[tuple[bytes, bytes]]
HOP_HEADERS: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"proxy-authenticate", b"te",
        b"trailer", b"upgrade", b"host", b"content-length", b"transfer-encoding",
    }
)  # fmt: skip
_ABSOLUTE: Final = re.compile(r"http://([^/?#@\\\s]+)([/?][^#\s]*)?", re.ASCII | re.IGNORECASE)
_ORIGIN: Final = re.compile(r"/[^#\s]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes: the host as named, in normal form, and the path that is asked of it."""

    host: str | Address
    port: int
    path: str

    @property
    def credential(self) -> str | None:
        """The credential that a rewritten name speaks of, if it is one."""
        if isinstance(self.host, str) and self.host.endswith(INTERNAL) and self.port == 80:
            return self.host.removesuffix(INTERNAL)
        return None


def bad(message: str) -> RefusedError:
    return RefusedError("request", message)


def split_authority(text: str, default_port: int | None) -> tuple[str | Address, int]:
    """`host[:port]`, without user information; raises RefusedError `request`."""
    closing, colon = text.rfind("]"), text.rfind(":")
    host, port_text = (text[:colon], text[colon + 1 :]) if colon > closing else (text, "")
    try:
        port = parse_port(port_text) if port_text else default_port
        if port is None or (colon > closing and not port_text):
            raise ValueError("it has no port")
        return parse_host(host), port
    except ValueError as error:
        raise bad(f"{text[:100]!r} is no host and port: {error}") from error


def connect_target(request: h11.Request) -> Target:
    """What CONNECT asks for; raises RefusedError."""
    host, port = split_authority(request.target.decode("ascii"), None)
    _check_host(request, host, port, None)
    return Target(host, port, "")


def forward_target(request: h11.Request) -> Target:
    """What an absolute-form request asks for; raises RefusedError."""
    found = _ABSOLUTE.fullmatch(request.target.decode("ascii"))
    if found is None:
        raise bad("a proxy takes CONNECT host:port or http://host/path")
    path = found[2] or "/"
    host, port = split_authority(found[1], 80)
    _check_host(request, host, port, 80)
    return Target(host, port, path if path.startswith("/") else f"/{path}")


def inner_target(request: h11.Request, outer: Target) -> Target:
    """What a request inside an intercepted CONNECT asks for: of the same host and no other; raises RefusedError."""
    path = request.target.decode("ascii")
    if _ORIGIN.fullmatch(path) is None:
        raise bad("inside CONNECT a request names its path alone")
    _check_host(request, outer.host, outer.port, 443)
    return Target(outer.host, outer.port, path)


def _check_host(request: h11.Request, host: str | Address, port: int, default_port: int | None) -> None:
    """Host must name where the request goes (RFC 9112 3.2.2); HTTP/1.0 and CONNECT clients may leave it out.

    A Host without a port means the scheme's, and for CONNECT, which has none, whatever the target says.
    """
    named = [value for name, value in request.headers if name == b"host"]
    if not named:
        return
    text = named[0].decode("latin-1")
    mine = split_authority(text, port if default_port is None else default_port)
    if mine != (host, port):
        raise RefusedError("host", f"Host {text[:100]!r} is not where the request goes")


def check_framing(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Exactly one way to tell where the body ends, and a head of bounded size; raises RefusedError `request`."""
    size, lengths, codings = 0, 0, 0
    for name, value in headers:
        size += len(name) + len(value) + 4
        lengths += name == b"content-length"
        codings += name == b"transfer-encoding"
    if lengths + codings > 1:
        raise bad("Content-Length and Transfer-Encoding leave it open where the body ends")
    if size > limits.EGRESS_HEADER_BYTES_MAX:
        raise bad("the headers are too long")


def onward(headers: Iterable[tuple[bytes, bytes]], *, without: bytes = b"") -> Headers:
    """The headers that go further, `without` one by name: end-to-end ones, and the framing that h11 has read."""
    listed = list(headers)
    named = {word.strip().lower() for name, value in listed if name == b"connection" for word in value.split(b",")} - {
        b"content-length",
        b"transfer-encoding",
    }
    stop = HOP_HEADERS | named | {without.lower()}
    kept = [(name, value) for name, value in listed if name not in stop]
    return kept + [(n, v) for n, v in listed if n in (b"content-length", b"transfer-encoding")]


def authority(host: str | Address, port: int, default_port: int) -> bytes:
    """The Host header for a destination."""
    text = f"[{host}]" if not isinstance(host, str) and host.version == 6 else str(host)
    return (text if port == default_port else f"{text}:{port}").encode()
