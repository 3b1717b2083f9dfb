"""The certificate authority of one cell, for hosts whose TLS is intercepted to add a credential.

Its key never leaves this process and it is trusted in that cell alone; name constraints (RFC 5280 4.2.1.10) bind it
to the very hosts that are intercepted, so that it is good for nothing else even there.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME: Final = datetime.timedelta(days=8)
"""Longer than any job may run."""
_SLACK: Final = datetime.timedelta(hours=1)


class CellAuthority:
    """Makes server contexts for `hosts` (names or addresses as text). `now` is the wall clock, aware."""

    def __init__(self, cell_id: str, hosts: Iterable[str], now: datetime.datetime) -> None:
        self._hosts = frozenset(hosts)
        self._now = now
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"aether egress {cell_id}"[:64])])
        self._certificate = self._root()
        self._contexts: dict[str, ssl.SSLContext] = {}

    @property
    def pem(self) -> bytes:
        """The certificate to be trusted in the cell."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def context(self, host: str) -> ssl.SSLContext:
        """For the server's end of TLS as `host`; raises KeyError for a host that is not intercepted."""
        if host not in self._hosts:
            raise KeyError(host)
        if host not in self._contexts:
            self._contexts[host] = _server_context(self._leaf(host), self._leaf_key)
        return self._contexts[host]

    def _root(self) -> x509.Certificate:
        public = self._key.public_key()
        usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = (
            self._dated(x509.CertificateBuilder())
            .subject_name(self._name)
            .public_key(public)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.NameConstraints(sorted_names(self._hosts), None), critical=True)
        )
        return builder.sign(self._key, hashes.SHA256())

    def _leaf(self, host: str) -> x509.Certificate:
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            self._dated(x509.CertificateBuilder())
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])]))
            .public_key(self._leaf_key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([general_name(host)]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(authority, critical=False)
        )
        return builder.sign(self._key, hashes.SHA256())

    def _dated(self, builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
        return (
            builder.issuer_name(self._name)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - _SLACK)
            .not_valid_after(self._now + LIFETIME)
        )


def general_name(host: str) -> x509.GeneralName:
    """A host as certificates name it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def sorted_names(hosts: Iterable[str]) -> list[x509.GeneralName]:
    """Hosts as name constraints, where an address is a network (RFC 5280)."""
    found: list[x509.GeneralName] = []
    for host in sorted(hosts):
        try:
            found.append(x509.IPAddress(ipaddress.ip_network(host)))
        except ValueError:
            found.append(x509.DNSName(host))
    return found


def _server_context(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    text = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    fd = os.memfd_create("aether-leaf", os.MFD_CLOEXEC)  # ssl reads chains from files alone; this one is memory
    try:
        os.write(fd, text)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context


def bundle(authority_pem: bytes) -> bytes:
    """What a cell is to trust: the host's certificates and the cell's authority, since SSL_CERT_FILE replaces all."""
    paths = ssl.get_default_verify_paths()
    try:
        trusted = Path(paths.cafile).read_bytes() if paths.cafile else b""
    except OSError:
        trusted = b""
    return trusted + (b"" if trusted.endswith(b"\n") or not trusted else b"\n") + authority_pem
