"""X.509 certificates of the embedded authority: how they are made, and what is taken from a request. Pure.

Profile (RFC 5280; SPIFFE X509-SVID, sections 4 and 5):
- authority: self-signed, CA with path length 0, keyCertSign and cRLSign, the trust domain as its URI SAN;
- workload: no CA, digitalSignature, clientAuth alone, its SPIFFE ID as the one URI SAN;
- server: the same with serverAuth alone and the DNS name `localhost`; so no workload can pass for the server.
Keys of ours are ECDSA P-256: every TLS stack takes them (Ed25519 is still missing from some). Of a request only the
public key is taken, and only after its signature proved that whoever asks has the private one.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aether.contract import limits
from aether.contract.errors import AetherError

AUTHORITY_DAYS: Final = 3_650
SERIAL_BYTES: Final = 16
SERVER_NAME: Final = "localhost"
"""What clients check the server's certificate for: they reach it by the path of a socket, which no name stands for."""
_BACKDATED: Final = dt.timedelta(minutes=1)
"""So that a clock that is a little behind takes a new certificate."""
_RSA_BITS_MIN: Final = 2_048

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey
Usage = Literal["client", "server"]


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def name(self) -> str:
        """The first 16 hex digits of the certificate's SHA-256."""
        return fingerprint(self.certificate)[:16]

    @property
    def pem(self) -> str:
        return pem_of(self.certificate)


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a certificate is to say beside its key. Times are UTC, `serial` is positive and has at most 16 bytes."""

    spiffe_id: str
    usage: Usage
    serial: int
    now: dt.datetime
    until: dt.datetime


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def new_authority(trust_domain: str, serial: int, now: dt.datetime) -> Authority:
    """A new self-signed authority for the trust domain."""
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"AetherOS {serial:032x}"[:41])])
    builder = _builder(name, name, key.public_key(), serial, now, now + dt.timedelta(days=AUTHORITY_DAYS))
    uri = x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
    )
    return Authority(builder.sign(key, hashes.SHA256()), key)


def issue(authority: Authority, key: PublicKey, leaf: Leaf) -> x509.Certificate:
    """A certificate of `authority` for the key; it never outlives its authority."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(leaf.spiffe_id)]
    if leaf.usage == "server":
        names.append(x509.DNSName(SERVER_NAME))
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if leaf.usage == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    until = min(leaf.until, authority.certificate.not_valid_after_utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, leaf.spiffe_id.rpartition("/")[2][:64])])
    builder = _builder(subject, authority.certificate.subject, key, leaf.serial, leaf.now, until)
    signer = authority.key.public_key()
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )
    return builder.sign(authority.key, hashes.SHA256())


def requested_key(csr: str) -> PublicKey:
    """The public key of a PKCS#10 request in PEM; raises AetherError BAD_FIELD."""
    try:
        if len(csr) > limits.CSR_BYTES_MAX:
            raise ValueError(f"it is longer than {limits.CSR_BYTES_MAX} characters")
        request = x509.load_pem_x509_csr(csr.encode())
        key = request.public_key()
        if not request.is_signature_valid:
            raise ValueError("its signature does not match its key")
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise _refused(f"it is no PKCS#10 request in PEM ({error})") from error
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        return key
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _RSA_BITS_MIN:
        return key
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    raise _refused(f"its key is none of ECDSA P-256, P-384, Ed25519, RSA from {_RSA_BITS_MIN} bits")


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 over the DER form, in hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def pem_of(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key as PKCS#8 in PEM, not encrypted: the file's mode guards it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PublicKey, serial: int, now: dt.datetime, until: dt.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _refused(why: str) -> AetherError:
    return AetherError("BAD_FIELD", f"cannot take the certificate request: {why}")
