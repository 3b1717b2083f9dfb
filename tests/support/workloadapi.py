"""The SPIFFE Workload API as a mock of the protocol: real gRPC on a Unix socket, trust domains of the test's own."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from aether.daemons import workloadapi
from aether.substrate.pki import certificates
from aether.substrate.pki.certificates import Authority, Leaf
from aether.substrate.pki.store import serial


def field(number: int, value: bytes) -> bytes:
    """A field of Protocol Buffers that has a length."""
    return bytes([number << 3 | 2]) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def response(bundles: dict[str, bytes]) -> bytes:
    """X509BundlesResponse, with an empty revocation list before the bundles."""
    entries = (field(1, f"spiffe://{name}".encode()) + field(2, ders) for name, ders in bundles.items())
    return field(1, b"") + b"".join(field(2, entry) for entry in entries)


def authority(trust_domain: str, made: dt.timedelta = dt.timedelta(0)) -> Authority:
    """Of a trust domain, made that long from now."""
    return certificates.new_authority(trust_domain, serial(), dt.datetime.now(dt.UTC) + made)


def ders(*authorities: Authority) -> bytes:
    return b"".join(each.certificate.public_bytes(Encoding.DER) for each in authorities)


def svid(signer: Authority, spiffe_id: str, life: dt.timedelta = dt.timedelta(hours=1)) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)
    began = min(now, now + life - dt.timedelta(minutes=5))
    leaf = Leaf(spiffe_id, "client", serial(), began, now + life)
    return certificates.issue(signer, certificates.new_key().public_key(), leaf)


class Agent:
    """A server; `tell` sends a message to every stream, `deny` ends them with PERMISSION_DENIED."""

    def __init__(self, path: Path) -> None:
        import grpc

        self._grpc = grpc
        self._changed = threading.Condition()
        self._message: bytes | None = None
        self._number = 0
        self._denies = False
        self.calls = 0
        self._server = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.unary_stream_rpc_method_handler(self._fetch)
        service, method = workloadapi.METHOD.removeprefix("/").split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        assert self._server.add_insecure_port(f"unix:{path}")
        self._server.start()
        path.chmod(0o777)  # as SPIRE does: it tells callers apart by their credentials

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._number = -1
            self._changed.notify_all()
        self._server.stop(None).wait(5)

    def tell(self, bundles: dict[str, bytes]) -> None:
        self.send(response(bundles))

    def send(self, message: bytes) -> None:
        with self._changed:
            self._message, self._number, self._denies = message, self._number + 1, False
            self._changed.notify_all()

    def deny(self) -> None:
        with self._changed:
            self._denies, self._number = True, self._number + 1
            self._changed.notify_all()

    def _fetch(self, request: bytes, context: Any) -> Iterator[bytes]:
        self.calls += 1
        if ("workload.spiffe.io", "true") not in context.invocation_metadata():
            context.abort(self._grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request")
        seen = 0
        while context.is_active():
            with self._changed:
                self._changed.wait(0.2 if self._number == seen else 0)
                number, message, denies = self._number, self._message, self._denies
            if number < 0:
                return
            if denies:
                context.abort(self._grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
            if number != seen and message is not None:
                seen = number
                yield message
