"""Real servers for tests on this machine's loopback: HTTP and HTTPS with certificates of an authority made here."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Seen:
    """One request as a server got it; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def hello(seen: Seen) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, b"hello " + seen.path.encode()


@dataclass
class Server:
    """A running server and what it saw. `answer` may be replaced: gets a request, gives (status, headers, body)."""

    port: int
    seen: list[Seen] = field(default_factory=list)
    answer: Callable[[Seen], tuple[int, dict[str, str], bytes]] = hello


class Authority:
    """A certificate authority below `directory`; `ca` is the file to trust."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "aether test authority")])
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        certificate = self._build(self._name, self._key.public_key(), [(constraints, True)])
        self.ca = directory / "ca.pem"
        self.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.ca.chmod(0o644)

    def context(self, *names: str) -> ssl.SSLContext:
        """A server's context with a certificate for `names`."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternative = x509.SubjectAlternativeName([_general(name) for name in names])
        certificate = self._build(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]), key.public_key(), [(alternative, False)]
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        chain = self._directory / f"{names[0].replace(':', '_')}.pem"
        chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        return context

    def client(self) -> ssl.SSLContext:
        """Trusts this authority alone."""
        return ssl.create_default_context(cafile=str(self.ca))

    def _build(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, extensions: list[tuple[x509.ExtensionType, bool]]
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self._key, hashes.SHA256())


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_object: Server

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, self.path, headers, self._body(headers))
        self.server_object.seen.append(seen)
        status, extra, body = self.server_object.answer(seen)
        self.send_response(status)
        for name, value in extra.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        return self.rfile.read(int(headers.get("content-length", 0)))

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Threads(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave, or dislike the certificate, are no errors here."""


@contextlib.contextmanager
def server(context: ssl.SSLContext | None = None, address: str = "127.0.0.1") -> Iterator[Server]:
    """Serves until the end of the block; HTTPS with a context."""
    handler = type("Handler", (_Handler,), {})
    listening = _Threads((address, 0), handler)
    if context is not None:
        listening.socket = context.wrap_socket(listening.socket, server_side=True, do_handshake_on_connect=False)
    found = Server(listening.server_address[1])
    handler.server_object = found
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
