"""The SPIFFE Workload API as a client: the trust bundles of `FetchX509Bundles`, a stream over gRPC on a Unix socket.

Source: github.com/spiffe/spiffe, standards/SPIFFE_Workload_API.md and SPIFFE_Workload_Endpoint.md; the message is

    message X509BundlesResponse { repeated bytes crl = 1; map<string, bytes> bundles = 2; }

with the id of a trust domain and its authorities, DER one after another. Each message says all that holds. A message of
two fields needs no code generator: it is read here, by the wire format of Protocol Buffers
(protobuf.dev/programming-guides/encoding); grpcio (extra `spire`) speaks HTTP/2. Private keys are not asked for:
`FetchX509SVID` would send them, and nothing here could use one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from aether.contract import spiffe
from aether.contract.errors import AetherError

METHOD: Final = "/SpiffeWorkloadAPI/FetchX509Bundles"
METADATA: Final = (("workload.spiffe.io", "true"),)
"""Without it the endpoint refuses, so that no confused HTTP client gets through (SPIFFE Workload Endpoint, 6)."""
MESSAGE_BYTES_MAX: Final = 1 << 20
_BUNDLES: Final = 2
_KEY, _VALUE = 1, 2
_LENGTHS: Final = {1: 8, 5: 4}
"""Of fields of the wire types I64 and I32."""


def target(endpoint: str) -> str:
    """gRPC's name of the endpoint `unix:///path`; raises AetherError STATE_UNUSABLE."""
    path = endpoint.removeprefix("unix://")
    if path == endpoint or not path.startswith("/") or any(c in path for c in "?#%\0"):
        raise AetherError(
            "STATE_UNUSABLE",
            f"cannot use {spiffe.ENDPOINT_VARIABLE}={endpoint[:200]!r}: it is no absolute path of a Unix socket",
            "set it like unix:///run/spire/agent/api.sock",
        )
    return f"unix:{path}"


def channel(endpoint: str) -> Any:
    """A gRPC channel to the endpoint; raises AetherError STATE_UNUSABLE, also where the extra is not installed."""
    address = target(endpoint)
    try:
        import grpc
    except ImportError as error:
        raise AetherError(
            "STATE_UNUSABLE",
            "cannot speak to the SPIFFE Workload API: grpcio is not installed",
            "pip install 'aether-substrate[spire]'",
        ) from error
    options = (
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.enable_http_proxy", 0),
        ("grpc.default_authority", "localhost"),  # the path of a socket is no authority that servers written in Go take
    )
    return grpc.insecure_channel(address, options=options)


def messages(connected: Any) -> Any:
    """The call: iterates over messages, as bytes, until it fails (grpc.RpcError) or is cancelled."""
    return connected.unary_stream(METHOD)(b"", metadata=METADATA, wait_for_ready=False)


def read_bundles(message: bytes) -> tuple[dict[str, str], dict[str, str]]:
    """The bundles of a message, PEM by trust domain, and why others of it cannot be used. Raises ValueError when the
    message is malformed."""
    good: dict[str, str] = {}
    bad: dict[str, str] = {}
    for number, entry in _fields(message):
        if number != _BUNDLES:
            continue
        parts = dict(_fields(entry))
        name = parts.get(_KEY, b"").decode()
        try:
            domain = spiffe.parse(name if name.startswith("spiffe://") else f"spiffe://{name}")
            if domain.path:
                raise ValueError("it is named by a workload's id")
            good[domain.trust_domain] = _pem(parts.get(_VALUE, b""))
        except (AetherError, ValueError) as error:
            bad[name[:255]] = str(error)
    return good, bad


def document(bundles: Mapping[str, str]) -> bytes:
    """What is handed to aetherd."""
    return json.dumps(bundles, indent=1, sort_keys=True).encode() + b"\n"


def follow(calls: Callable[[], Any], heard: Callable[[bytes], None]) -> BaseException | None:
    """Hands each message of one call to `heard`; returns why it ended, None when the other side did so in order."""
    import grpc

    try:
        for message in calls():
            heard(message)
    except (grpc.RpcError, ValueError) as error:
        return error
    return None


def reason(error: BaseException) -> tuple[str, bool]:
    """Why a call ended, and whether it was refused for good (PERMISSION_DENIED: no identity is issued to us)."""
    import grpc

    if not isinstance(error, grpc.RpcError):
        return f"malformed message: {error}", False
    code = error.code()
    return f"{code.name}: {error.details()}", code is grpc.StatusCode.PERMISSION_DENIED


def _pem(ders: bytes) -> str:
    """Certificates in DER, one after another, in PEM; raises ValueError."""
    found, at = [], 0
    while at < len(ders):
        end = at + _der_length(ders, at)
        found.append(x509.load_der_x509_certificate(ders[at:end]).public_bytes(Encoding.PEM).decode())
        at = end
    if not found:
        raise ValueError("it is empty")
    return "".join(found)


def _der_length(data: bytes, at: int) -> int:
    """Of the SEQUENCE there, with its head (X.690, 8.1.3); raises ValueError."""
    head = data[at : at + 2]
    if len(head) < 2 or head[0] != 0x30:
        raise ValueError("it is no certificate in DER")
    if head[1] < 0x80:
        return 2 + head[1]
    width = head[1] & 0x7F
    length = 2 + width + int.from_bytes(data[at + 2 : at + 2 + width])
    if not 1 <= width <= 4 or at + length > len(data):
        raise ValueError("it ends within a certificate")
    return length


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Fields that have a length, with their numbers; others are passed over. Raises ValueError."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(message, at)
            continue
        if kind == 2:
            length, at = _varint(message, at)
        elif kind in _LENGTHS:
            length = _LENGTHS[kind]
        else:
            raise ValueError(f"a field has the wire type {kind}")
        if at + length > len(message):
            raise ValueError("it ends within a field")
        if kind == 2:
            yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number there and where it ends; raises ValueError."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends within a number")
        byte = message[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")
