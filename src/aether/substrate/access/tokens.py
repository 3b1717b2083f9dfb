"""Tokens (JWT, RFC 7519) of issuers that the operator named (`issuers`): short-lived, signed, for this audience.

Rules, in this order; the first that fails is the answer (BAD_CREDENTIAL unless said otherwise):
- three parts of base64url, at most TOKEN_CHARS_MAX; a header with `alg` and `kid`, no `crit`, `typ` JWT or at+jwt;
- `iss` is an issuer of the file, `kid` one of its keys, and `alg` the one algorithm of that key: neither `none` nor a
  public key taken for a shared secret can get this far (RFC 8725, 3.1);
- the signature holds; `aud` holds the issuer's audience; `sub`, `iat` and `exp` are there;
- `exp - iat` is at most the issuer's `lifetime_s_max`; `iat` and `nbf` are not in the future; `exp` is not past
  (CREDENTIAL_EXPIRED); clocks may differ by TOKEN_LEEWAY_S;
- a grant of the issuer fits the claims.

The file and its key sets are looked at again once a second at most, and at once for a `kid` that is not known; a file
that cannot be used accepts nobody. What was verified is remembered until it expires or the files change.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt
from jwt.types import Options

from aether.contract import limits
from aether.contract.errors import AetherError
from aether.substrate.access import issuers
from aether.substrate.access.issuers import Granted, Issuers, Key, TokenIssuer

FILE_BYTES_MAX: Final = 1 << 20
_LOOK_AGAIN_NS: Final = 1_000_000_000
_REMEMBERED_MAX: Final = 1_024
_TYPES: Final = (None, "JWT", "jwt", "at+jwt")
_OPTIONS: Final[Options] = {
    "require": ["exp", "iat", "sub", "iss", "aud"],
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "verify_sub": False,
}
"""Times are checked here, against the clock that is passed in."""


@dataclass(frozen=True, slots=True)
class _Verified:
    granted: Granted
    expires_s: float


class IssuerFiles:
    """The file of issuers and its key sets as they stand. `on_loaded` hears of each new content before it is used."""

    def __init__(self, path: Path, on_loaded: Callable[[bytes], None]) -> None:
        self._path = path
        self._on_loaded = on_loaded
        self._looked_ns: int | None = None
        self._seen: tuple[tuple[str, int, int, int], ...] = ()
        self._error: AetherError | None = None
        self.file, self.raw = Issuers(), b""
        self.tokens: dict[str, tuple[TokenIssuer, dict[str, Key]]] = {}
        self.generation = 0

    def __repr__(self) -> str:
        return f"<IssuerFiles {sorted(self.tokens)} generation={self.generation}>"

    def refresh(self, now_ns: int, force: bool = False) -> None:
        """Reads what changed; `force` looks even when it did so a moment ago. Raises AetherError BAD_CREDENTIAL while
        the files cannot be used."""
        if force or self._looked_ns is None or abs(now_ns - self._looked_ns) >= _LOOK_AGAIN_NS:
            self._looked_ns = now_ns
            seen = self._stamps()
            if seen != self._seen or self._error is not None:
                self._seen = seen
                self._read()
        if self._error is not None:
            why = "the instance's file of issuers cannot be used"
            raise AetherError("BAD_CREDENTIAL", f"cannot check the token: {why}", "ask the operator") from self._error

    @property
    def error(self) -> AetherError | None:
        """Why the files cannot be used, if so."""
        return self._error

    def _stamps(self) -> tuple[tuple[str, int, int, int], ...]:
        paths = [self._path, *(self._path.with_name(i.jwks_file) for i in self.file.tokens if i.jwks_file)]
        return tuple(map(stamp_of, paths))

    def _read(self) -> None:
        self.generation += 1
        self.tokens, self._error = {}, None
        try:
            raw = self.content(self._path.name) if self._path.exists() else b"{}"
            file = issuers.parse(raw)
            tokens = {each.issuer: (each, issuers.keys_of(each, self.content)) for each in file.tokens}
            self._on_loaded(raw)
        except AetherError as error:
            self._error = error
        except OSError as error:
            self._error = AetherError("STATE_UNUSABLE", f"cannot read {self._path}: {error.strerror}")
        else:
            self.file, self.raw, self.tokens = file, raw, tokens
            self._seen = self._stamps()

    def beside(self, name: str) -> Path:
        """The path of a file beside the file of issuers."""
        return self._path.with_name(name)

    def content(self, name: str) -> bytes:
        """What is in that file; raises OSError."""
        return content_of(self.beside(name))


def content_of(path: Path) -> bytes:
    """What is in a file that others cannot write, at most FILE_BYTES_MAX; raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o022:
            raise OSError(0, f"others can write {path.name}")
        raw = file.read(FILE_BYTES_MAX + 1)
    if len(raw) > FILE_BYTES_MAX:
        raise OSError(0, f"{path.name} is longer than {FILE_BYTES_MAX} bytes")
    return raw


def stamp_of(path: Path) -> tuple[str, int, int, int]:
    """What changes when the file does; zeros when there is none."""
    try:
        found = path.stat()
    except OSError:
        return (path.name, 0, 0, 0)
    return (path.name, found.st_mtime_ns, found.st_size, found.st_ino)


class Tokens:
    """Verifies tokens; see the module head."""

    def __init__(self, files: IssuerFiles) -> None:
        self._files = files
        self._remembered: OrderedDict[bytes, _Verified] = OrderedDict()
        self._generation = 0

    def verify(self, text: str, now_ns: int) -> Granted:
        """Who the token's holder is; raises AetherError BAD_CREDENTIAL, CREDENTIAL_EXPIRED."""
        self._files.refresh(now_ns)
        if self._generation != self._files.generation:
            self._remembered.clear()
            self._generation = self._files.generation
        now_s = now_ns / 1e9
        digest = hashlib.sha256(text.encode()).digest()
        known = self._remembered.get(digest)
        if known is None:
            known = self._verify(text, now_ns)
            self._remembered[digest] = known
            if len(self._remembered) > _REMEMBERED_MAX:
                self._remembered.popitem(last=False)
        if now_s >= known.expires_s + limits.TOKEN_LEEWAY_S:
            raise AetherError("CREDENTIAL_EXPIRED", "cannot use the token: it expired")
        return known.granted

    def _verify(self, text: str, now_ns: int) -> _Verified:
        header, claimed = _unproven(text)
        issuer, key = self._key(claimed, header, now_ns)
        try:
            claims = jwt.decode(
                text,
                key.key,
                algorithms=[key.algorithm],
                audience=issuer.audience,
                issuer=issuer.issuer,
                options=_OPTIONS,
            )
        except jwt.InvalidAudienceError as error:
            raise _refused("it is made for another audience") from error
        except jwt.MissingRequiredClaimError as error:
            raise _refused(f"it has no {error.claim}") from error
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise _refused("its signature does not match, or it is malformed") from error
        expires_s = _check_times(claims, issuer, now_ns / 1e9)
        return _Verified(issuers.granted_token(issuer, claims), expires_s)

    def _key(self, issuer_name: str, header: dict[str, Any], now_ns: int) -> tuple[TokenIssuer, Key]:
        found = self._files.tokens.get(issuer_name)
        if found is None or header["kid"] not in found[1]:
            self._files.refresh(now_ns, force=True)  # keys may have been changed a moment ago
            found = self._files.tokens.get(issuer_name)
        if found is None:
            raise _refused("its issuer is not known here")
        key = found[1].get(header["kid"])
        if key is None:
            raise _refused("its key is none of its issuer's")
        if header["alg"] != key.algorithm:
            raise _refused("its algorithm is not that of its key")
        return found[0], key


def _unproven(text: str) -> tuple[dict[str, Any], str]:
    """The header and the issuer that a token claims; raises AetherError BAD_CREDENTIAL."""
    if len(text) > limits.TOKEN_CHARS_MAX:
        raise _refused("it is too long")
    try:
        whole = jwt.decode_complete(text, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        raise _refused("it is malformed") from error
    header, issuer = whole["header"], whole["payload"].get("iss")
    if not isinstance(header.get("kid"), str) or not isinstance(header.get("alg"), str):
        raise _refused("its header names no key (kid), or no algorithm")
    if "crit" in header or header.get("typ") not in _TYPES:
        raise _refused("its header asks for what is not understood here")
    if not isinstance(issuer, str):
        raise _refused("it names no issuer")
    return header, issuer


def _check_times(claims: dict[str, Any], issuer: TokenIssuer, now_s: float) -> float:
    """When it expires, in seconds since the epoch; raises AetherError BAD_CREDENTIAL, CREDENTIAL_EXPIRED."""
    times = {name: claims.get(name) for name in ("exp", "iat", "nbf")}
    for name, value in times.items():
        if value is None and name == "nbf":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
            raise _refused(f"its {name} is no time")
    expires_s, issued_s = float(claims["exp"]), float(claims["iat"])
    begins_s = max(issued_s, float(claims.get("nbf") or 0))
    if begins_s > now_s + limits.TOKEN_LEEWAY_S:
        raise AetherError("BAD_CREDENTIAL", "cannot use the token: it is not valid yet", "set the clocks right")
    if expires_s - issued_s > issuer.lifetime_s_max:
        raise _refused(f"it lives longer than {issuer.lifetime_s_max} s")
    if now_s >= expires_s + limits.TOKEN_LEEWAY_S:
        raise AetherError("CREDENTIAL_EXPIRED", "cannot use the token: it expired")
    return expires_s


def _refused(why: str) -> AetherError:
    return AetherError("BAD_CREDENTIAL", f"cannot use the token: {why}")
