"""The authorities of the instance on disk, and which of them hold.

    keys/pki/                    0700, aetherd's alone
      authorities.json           the trust domain and the authorities, newest first; replaced by rename
      <name>.key                 the private key of each, PKCS#8 in PEM, 0600

The first authority issues. One that was replaced is trusted until `retires_at`, when the last certificate that it
issued has ended; then its private key is deleted. The log is written first (`pki.created`, `pki.rotated`): an authority
that a record names and no file holds was never used.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from aether.contract.clock import epoch_ns
from aether.contract.errors import AetherError
from aether.substrate.audit.files import fsync_dir, write_file
from aether.substrate.pki import certificates
from aether.substrate.pki.certificates import Authority


@dataclass(frozen=True, slots=True)
class Known:
    """An authority and when it stops being trusted (ms since the epoch); None for the one that issues."""

    authority: Authority
    retires_at: str | None

    def holds(self, now_ms: int) -> bool:
        return self.retires_at is None or now_ms < epoch_ns(self.retires_at) // 1_000_000


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    certificate: str
    retires_at: str | None


class _File(msgspec.Struct, frozen=True, kw_only=True):
    trust_domain: str
    authorities: tuple[_Entry, ...]


class AuthorityStore:
    """See the module head. `version` changes with every change of what is trusted."""

    def __init__(self, directory: Path) -> None:
        """Reads what is there; raises AetherError STATE_UNUSABLE."""
        self._directory = directory
        self.trust_domain = ""
        self.known: tuple[Known, ...] = ()
        self.version = 0
        try:
            self._load()
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            raise _unusable(directory, str(error)) from error

    def __repr__(self) -> str:
        return f"<AuthorityStore {self.trust_domain} {[each.authority.name for each in self.known]}>"

    @property
    def issuing(self) -> Authority:
        """The authority that issues; raises AetherError NO_PKI."""
        if not self.known:
            raise AetherError("NO_PKI", "cannot issue certificates: this instance has no authority of its own")
        return self.known[0].authority

    def trusted(self, now_ms: int) -> tuple[Known, ...]:
        """The authorities that hold, newest first."""
        return tuple(each for each in self.known if each.holds(now_ms))

    def trusts(self, name: str, now_ms: int) -> bool:
        return any(each.authority.name == name and each.holds(now_ms) for each in self.known)

    def replace(self, trust_domain: str, authority: Authority, retires_at: str | None, now_ms: int) -> None:
        """`authority` issues from now on; the one before it is trusted until `retires_at`, those before that as long as
        they were. Those that hold no more are forgotten, and all of them without a `retires_at`. Raises AetherError
        STATE_UNUSABLE."""
        before = [Known(each.authority, each.retires_at or retires_at) for each in self.known]
        kept = [each for each in before if retires_at is not None and each.holds(now_ms)]
        entries = (Known(authority, None), *kept)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            _write(self._key_path(authority.name), certificates.pem_of_key(authority.key))
            file = _File(
                trust_domain=trust_domain,
                authorities=tuple(_Entry(certificate=e.authority.pem, retires_at=e.retires_at) for e in entries),
            )
            _write(
                self._directory / "authorities.json", msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n"
            )
            names = {each.authority.name for each in entries}
            for path in self._directory.glob("*.key"):
                if path.stem not in names:
                    path.unlink()
        except OSError as error:
            raise _unusable(self._directory, error.strerror or str(error)) from error
        self.trust_domain, self.known = trust_domain, entries
        self.version += 1

    def _load(self) -> None:
        file = msgspec.json.decode((self._directory / "authorities.json").read_bytes(), type=_File)
        known: list[Known] = []
        for entry in file.authorities:
            certificate = x509.load_pem_x509_certificate(entry.certificate.encode())
            path = self._key_path(certificates.fingerprint(certificate)[:16])
            if path.stat().st_mode & 0o077:
                raise ValueError(f"others can read {path.name}")
            key = serialization.load_pem_private_key(path.read_bytes(), None)
            if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
                raise ValueError(f"{path.name} is not the key of its certificate")
            known.append(Known(Authority(certificate, key), entry.retires_at))
        if not known or known[0].retires_at is not None:
            raise ValueError("authorities.json names none that issues")
        self.trust_domain, self.known = file.trust_domain, tuple(known)

    def _key_path(self, name: str) -> Path:
        return self._directory / f"{name}.key"


def utc(now_ns: int) -> dt.datetime:
    """The time as X.509 tells it, in whole seconds."""
    return dt.datetime.fromtimestamp(now_ns // 1_000_000_000, dt.UTC)


def serial(random: Callable[[int], bytes] = os.urandom) -> int:
    """A fresh positive serial number of 127 bits (RFC 5280, 4.1.2.2: at most 20 octets, not guessable)."""
    return int.from_bytes(random(certificates.SERIAL_BYTES)) >> 1 | 1


def _write(path: Path, data: bytes) -> None:
    write_file(path, data, mode=0o600, sync=True)
    fsync_dir(path.parent)


def _unusable(path: Path, why: str) -> AetherError:
    return AetherError("STATE_UNUSABLE", f"cannot use the certificate authority in {path}: {why}")
