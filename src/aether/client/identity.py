"""Proving who calls: a client certificate for the second socket, and the operations on API keys and certificates.

    from aether.client import Client

    with Client() as client:                                  # by uid, on the first socket
        client.pki.init()
        client.pki.issue("agent", directory="agent-id", role="user")
    with Client(identity="agent-id") as agent:                # by certificate, on the second
        agent.run(["echo", "hello"])

A directory of an identity holds `cert.pem`, `key.pem` (0600) and `bundle.pem`, the authorities that the server is
checked against. The private key is made here and never sent.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec

from aether.contract import identitycalls as wire
from aether.contract import ids, limits
from aether.contract.errors import AetherError
from aether.contract.ticketcalls import Revoked

T = TypeVar("T")
SERVER_NAME: Final = "localhost"
"""What the server's certificate is made out for, whatever the path of its socket."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The files of a client certificate."""

    certificate: Path
    key: Path
    bundle: Path

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> Identity:
        """The files as `aether pki issue` writes them."""
        root = Path(directory)
        return cls(root / "cert.pem", root / "key.pem", root / "bundle.pem")

    @classmethod
    def chosen(cls, given: Identity | str | os.PathLike[str] | None, env: Mapping[str, str]) -> Identity | None:
        """What was given, else the directory in AETHER_IDENTITY."""
        shown = given if given is not None else env.get("AETHER_IDENTITY") or None
        return shown if shown is None or isinstance(shown, Identity) else cls.of(shown)

    def context(self) -> ssl.SSLContext:
        """TLS 1.3, the server checked against the bundle; raises AetherError BAD_CREDENTIAL."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_verify_locations(self.bundle)
            context.load_cert_chain(self.certificate, self.key)
        except OSError as error:  # ssl.SSLError is one
            why = error.strerror or str(error)
            remedy = "get one with `aether pki issue NAME --out DIR`"
            raise AetherError(
                "BAD_CREDENTIAL", f"cannot use the identity {self.certificate.parent}: {why}", remedy
            ) from error
        return context


def write_identity(directory: str | os.PathLike[str], key: bytes, issued: wire.IssuedCertificate) -> Identity:
    """Writes the three files, the key last and 0600; the directory is made 0700. Raises AetherError BAD_FIELD."""
    identity = Identity.of(directory)
    try:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(identity.bundle, issued.bundle.encode(), 0o644)
        _write(identity.certificate, issued.certificate.encode(), 0o644)
        _write(identity.key, key, 0o600)
    except OSError as error:
        raise AetherError(
            "BAD_FIELD", f"cannot write {error.filename}: {error.strerror}", "name a directory"
        ) from error
    return identity


def _write(path: Path, data: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with open(fd, "wb") as file:
        file.write(data)
    temporary.replace(path)


def new_request(name: str) -> tuple[bytes, str]:
    """A fresh private key (ECDSA P-256, PKCS#8 in PEM) and the PKCS#10 request for it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[-64:] or "aether")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem, request.public_bytes(serialization.Encoding.PEM).decode()


class Calls(Protocol):
    """What is needed of `Client`."""

    def call_json(self, name: str, reply: type[T], argument: str | None = None, **rest: Any) -> T: ...


class _Desk:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def _send(self, name: str, reply: type[T], body: msgspec.Struct, key: str | None = None) -> T:
        headers = {"Content-Type": "application/json", "Idempotency-Key": key or ids.new(ids.REQUEST)}
        return self._calls.call_json(name, reply, body=msgspec.json.encode(body), headers=headers)


class Keys(_Desk):
    """`client.keys`: API keys. All methods raise AetherError."""

    def create(
        self,
        name: str = "",
        *,
        expires_ms: int = limits.KEY_MS_DEFAULT,
        idempotency_key: str | None = None,
        **narrowing: Any,
    ) -> wire.CreatedKey:
        """A key for the caller's tenant; `narrowing` are further fields of `KeyRequest`. Its text is told once."""
        request = wire.KeyRequest(name=name, expires_ms=expires_ms, **narrowing)
        return self._send("key.create", wire.CreatedKey, request, idempotency_key)

    def list(self) -> tuple[wire.KeyView, ...]:
        """The tenant's keys that are not expired, newest first."""
        return self._calls.call_json("key.list", wire.KeyList).keys

    def revoke(self, key_id: str) -> Revoked:
        return self._send("key.revoke", Revoked, wire.RevokeKeyCall(key_id=key_id))


class Pki(_Desk):
    """`client.pki`: the embedded certificate authority. All methods raise AetherError."""

    def init(self, trust_domain: str = limits.TRUST_DOMAIN_DEFAULT) -> wire.PkiView:
        """Makes the authority, and has the instance listen for clients with a certificate."""
        return self._send("pki.init", wire.PkiView, wire.InitRequest(trust_domain=trust_domain))

    def show(self) -> wire.PkiView:
        return self._calls.call_json("pki.show", wire.PkiView)

    def rotate(self, *, at_once: bool = False) -> wire.PkiView:
        """Replaces the authority; `at_once` ends what the old one issued."""
        return self._send("pki.rotate", wire.PkiView, wire.RotateCall(at_once=at_once))

    def sign(
        self, name: str, csr: str, *, expires_ms: int = limits.CERTIFICATE_MS_DEFAULT, **narrowing: Any
    ) -> wire.IssuedCertificate:
        """A certificate for a request in PEM; `narrowing` are further fields of `IssueRequest`."""
        request = wire.IssueRequest(name=name, csr=csr, expires_ms=expires_ms, **narrowing)
        return self._send("pki.issue", wire.IssuedCertificate, request)

    def issue(self, name: str, *, directory: str | os.PathLike[str], **asked: Any) -> wire.IssuedCertificate:
        """A certificate for a fresh key, written to `directory`; `asked` as for `sign`."""
        key, csr = new_request(name)
        issued = self.sign(name, csr, **asked)
        write_identity(directory, key, issued)
        return issued

    def revoke(self, fingerprint: str) -> Revoked:
        return self._send("pki.revoke", Revoked, wire.RevokeCertificateCall(fingerprint=fingerprint))
