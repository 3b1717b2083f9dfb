"""Certificates of other trust domains (X509-SVID), SPIRE's above all: which are accepted, and as whom.

The operator names the trust domains and what their workloads may do (`issuers`, `workloads`). Their authorities come
from a file of the operator's, or from the file that spired writes as the SPIFFE Workload API tells it. Files are looked
at once a second at most; what cannot be used is trusted by nobody, one trust domain at a time. What is trusted is on
record before it is used.

A certificate is accepted (github.com/spiffe/spiffe, standards/X509-SVID.md, section 5) when
- the handshake proved a chain that ends in an authority which the bundle of its own trust domain holds now: neither an
  authority of another domain nor one that was removed while the connection was kept open will do;
- no certificate of that chain, the authority included, is outside its time (CREDENTIAL_EXPIRED, else BAD_CREDENTIAL);
- it is no authority itself, and has exactly one URI, a SPIFFE ID with a path;
- a grant of its trust domain fits the path.
Certificates of the instance's own trust domain are none of these: they must be on record (`credentials`).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from aether.contract import spiffe
from aether.contract.calls import PeerCertificate
from aether.contract.canonical import canonical
from aether.contract.errors import AetherError
from aether.contract.spiffe import SpiffeId
from aether.substrate.access import issuers
from aether.substrate.access.issuers import Granted, WorkloadIssuer
from aether.substrate.access.tokens import IssuerFiles, content_of, stamp_of

AUTHORITIES_MAX: Final = 64
"""Of one trust domain."""
_LOOK_AGAIN_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Bundle:
    """The authorities of one trust domain: PEM by the SHA-256 of the DER form, in hex."""

    issuer: WorkloadIssuer
    authorities: dict[str, str] = field(repr=False)


def parse_bundle(pem: str) -> dict[str, str]:
    """The authorities of a bundle as in `Bundle`; raises ValueError, ssl.SSLError."""
    found = x509.load_pem_x509_certificates(pem.encode())
    if len(found) > AUTHORITIES_MAX:
        raise ValueError(f"it has more than {AUTHORITIES_MAX} certificates")
    for each in found:
        if not _is_authority(each):
            raise ValueError("a certificate in it is not of an authority")
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=pem)  # it must not spoil the context of all
    return {
        hashlib.sha256(each.public_bytes(Encoding.DER)).hexdigest(): each.public_bytes(Encoding.PEM).decode()
        for each in found
    }


class TrustBundles:
    """The trust domains that are accepted, as the files stand. `told` is what spired writes, None where the Workload
    API is not configured. `on_loaded` hears of the file of issuers and of each new set of bundles before it is used."""

    def __init__(self, files: IssuerFiles, told: Path | None, on_loaded: Callable[[bytes, bytes], None]) -> None:
        self._files = files
        self._told = told
        self._on_loaded = on_loaded
        self._looked_ns: int | None = None
        self._seen: object = None
        self._recorded = b"{}"
        self._bundles: dict[str, Bundle] = {}
        self.on_unusable: Callable[[str, str], None] = lambda trust_domain, why: None
        """Hears why a trust domain that is named has no authorities."""

    def __repr__(self) -> str:
        return f"<TrustBundles {sorted(self._bundles)}>"

    def current(self, now_ns: int) -> dict[str, Bundle]:
        """What is accepted now, by trust domain; reads what changed."""
        if self._looked_ns is None or abs(now_ns - self._looked_ns) >= _LOOK_AGAIN_NS:
            self._looked_ns = now_ns
            try:
                self._files.refresh(now_ns)
                domains = self._files.file.workloads
            except AetherError:  # told by who reads that file; what it named before is trusted no more
                domains = ()
            self._look(domains)
        return self._bundles

    def roots(self, now_ns: int) -> dict[str, str]:
        """All authorities, PEM by their SHA-256: what a handshake may end in."""
        return {name: pem for bundle in self.current(now_ns).values() for name, pem in bundle.authorities.items()}

    def _look(self, domains: tuple[WorkloadIssuer, ...]) -> None:
        paths = [self._files.beside(each.bundle_file) for each in domains if each.bundle_file is not None]
        seen = (domains, *map(stamp_of, paths if self._told is None else [*paths, self._told]))
        if seen == self._seen:
            return
        self._seen, bundles = seen, dict[str, Bundle]()
        for each in domains:
            try:
                bundles[each.trust_domain] = Bundle(each, parse_bundle(self._pem(each)))
            except (OSError, ValueError, msgspec.MsgspecError, RecursionError) as error:
                self.on_unusable(each.trust_domain, str(error))
        trusted = canonical({name: "".join(bundle.authorities.values()) for name, bundle in bundles.items()})
        self._bundles = {}
        if trusted != self._recorded:
            try:
                self._on_loaded(self._files.raw, trusted)
            except AetherError:  # no room for the record: nobody is let in, and it is tried again
                self._seen = None
                return
            self._recorded = trusted
        self._bundles = bundles

    def _pem(self, domain: WorkloadIssuer) -> str:
        if domain.bundle_file is not None:
            return self._files.content(domain.bundle_file).decode()
        if self._told is None:
            raise ValueError(f"{spiffe.ENDPOINT_VARIABLE} is not set, and it has no bundle_file")
        told = msgspec.json.decode(content_of(self._told), type=dict[str, str])
        if domain.trust_domain not in told:
            raise ValueError("the Workload API tells no bundle of it")
        return told[domain.trust_domain]


class Workloads:
    """Accepts certificates; see the module head. `own` is the instance's own trust domain."""

    def __init__(self, bundles: TrustBundles, own: Callable[[], str]) -> None:
        self._bundles = bundles
        self._own = own

    def verify(self, certificate: PeerCertificate, now_ns: int) -> Granted | None:
        """Who the workload is, None for one of the instance's own trust domain; raises AetherError BAD_CREDENTIAL,
        CREDENTIAL_EXPIRED."""
        if not certificate.chain:
            return None
        try:
            chain = [x509.load_der_x509_certificate(each) for each in certificate.chain]
            workload = _workload(chain[0])
        except ValueError as error:
            raise _refused(str(error)) from error
        if workload.trust_domain == self._own():
            return None
        bundle = self._bundles.current(now_ns).get(workload.trust_domain)
        if bundle is None:
            raise _refused(f"the trust domain {workload.trust_domain} is not accepted here")
        if hashlib.sha256(certificate.chain[-1]).hexdigest() not in bundle.authorities:
            raise _refused(f"its authority is none of the trust domain {workload.trust_domain}")
        _check_times(chain, now_ns)
        return issuers.granted_workload(bundle.issuer, workload)


def _workload(leaf: x509.Certificate) -> SpiffeId:
    """The SPIFFE ID of a workload's certificate; raises ValueError, AetherError BAD_CREDENTIAL."""
    if _is_authority(leaf):
        raise ValueError("it is of an authority, not of a workload")
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as error:
        raise ValueError("it has no SPIFFE ID") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise ValueError("it has not exactly one URI")
    workload = spiffe.parse(uris[0])
    if not workload.path:
        raise ValueError("its SPIFFE ID is of a trust domain, not of a workload")
    return workload


def _is_authority(certificate: x509.Certificate) -> bool:
    """Whether it may sign certificates by either extension that says so; raises ValueError."""
    extensions = certificate.extensions
    for kind in (x509.BasicConstraints, x509.KeyUsage):
        try:
            said = extensions.get_extension_for_class(kind).value
        except x509.ExtensionNotFound:
            continue
        if isinstance(said, x509.BasicConstraints) and said.ca:
            return True
        if isinstance(said, x509.KeyUsage) and (said.key_cert_sign or said.crl_sign):
            return True
    return False


def _check_times(chain: list[x509.Certificate], now_ns: int) -> None:
    now = dt.datetime.fromtimestamp(now_ns / 1e9, dt.UTC)
    if any(now < each.not_valid_before_utc for each in chain):
        raise AetherError("BAD_CREDENTIAL", "cannot use the certificate: it is not valid yet", "set the clocks right")
    for each in chain:
        if now >= each.not_valid_after_utc:
            what = "it" if each is chain[0] else "an authority that vouches for it"
            raise AetherError("CREDENTIAL_EXPIRED", f"cannot use the certificate: {what} expired")


def _refused(why: str) -> AetherError:
    return AetherError("BAD_CREDENTIAL", f"cannot use the certificate: {why}")
