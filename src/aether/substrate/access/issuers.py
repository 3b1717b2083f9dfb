"""`policy/issuers.json`: whose tokens and certificates are accepted, and what their holders may do. Pure.

    {
      "tokens": [{
        "issuer": "https://id.example.org", "audience": "aether", "jwks_file": "id.jwks.json",
        "grants": [{"claims": {"groups": "ops"}, "tenant": "acme", "role": "queen"},
                   {"tenant_claim": "org", "role": "user"}]
      }],
      "workloads": [{
        "trust_domain": "example.org", "grants": [{"path": "/ns/build/*", "tenant": "acme", "role": "user"}]
      }]
    }

The first grant that fits decides; where none does, the caller is nobody here. Keys come as `jwks` in the file or as
`jwks_file` beside it: aetherd never fetches anything from a network. A key pins its algorithm (EdDSA for Ed25519, ES256
for P-256, RS256 for RSA from 2,048 bits), so that no token chooses one; secret keys (`oct`) are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric import rsa

from aether.contract import limits, spiffe, ticketcalls
from aether.contract.errors import AetherError
from aether.contract.spiffe import SpiffeId

NAME_CHARS_MAX: Final = 255
"""Of a principal's name."""
_TENANT: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
_PATH: Final = re.compile(r"(/[A-Za-z0-9._-]+)+(/\*)?|/\*", re.ASCII)
_RSA_BITS_MIN: Final = 2_048
_ALGORITHMS: Final = {("OKP", "Ed25519"): "EdDSA", ("EC", "P-256"): "ES256", ("RSA", None): "RS256"}


class TokenGrant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the holder of a token may do when each of `claims` has that value, or holds it in its list."""

    role: str
    claims: dict[str, str] = {}
    tenant: str | None = None
    tenant_claim: str | None = None


class TokenIssuer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who signs tokens, and for what `audience` they must be made."""

    issuer: str
    audience: str
    grants: tuple[TokenGrant, ...]
    jwks: dict[str, Any] | None = None
    jwks_file: str | None = None
    lifetime_s_max: int = 3_600


class WorkloadGrant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What workloads may do whose SPIFFE ID has this path, or one below it where it ends in `/*`."""

    path: str
    tenant: str
    role: str


class WorkloadIssuer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A trust domain whose certificates (X509-SVID) are accepted. Its authorities are those in `bundle_file`, PEM
    beside the file; without one, those that the Workload API tells."""

    trust_domain: str
    grants: tuple[WorkloadGrant, ...]
    bundle_file: str | None = None


class Issuers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file."""

    tokens: tuple[TokenIssuer, ...] = ()
    workloads: tuple[WorkloadIssuer, ...] = ()


@dataclass(frozen=True, slots=True)
class Granted:
    """Who somebody is here, by a grant."""

    name: str
    tenant: str
    role: str


@dataclass(frozen=True, slots=True)
class Key:
    """One key of an issuer, with the one algorithm that it may be used with."""

    algorithm: str
    key: Any


def parse(raw: bytes) -> Issuers:
    """The file's content; raises AetherError STATE_UNUSABLE."""
    try:
        found = msgspec.json.decode(raw, type=Issuers)
        for issuer in found.tokens:
            _check_issuer(issuer)
        if len({issuer.issuer for issuer in found.tokens}) != len(found.tokens):
            raise ValueError("an issuer is named twice")
        for domain in found.workloads:
            _check_domain(domain)
        if len({domain.trust_domain for domain in found.workloads}) != len(found.workloads):
            raise ValueError("a trust domain is named twice")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise AetherError("STATE_UNUSABLE", f"cannot use the file of issuers: {str(error)[:400]}") from error
    return found


def parse_jwks(document: Mapping[str, Any]) -> dict[str, Key]:
    """The keys of a JWK set (RFC 7517) by `kid`; raises ValueError. Keys for encryption are passed over."""
    found: dict[str, Key] = {}
    entries = document.get("keys")
    if not isinstance(entries, list) or not entries:
        raise ValueError("a JWK set has no keys")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(kid := entry.get("kid"), str) or kid in found:
            raise ValueError("each key of a JWK set needs a `kid` of its own")
        if entry.get("use", "sig") != "sig":
            continue
        kind = entry.get("kty")
        curve = None if kind == "RSA" else entry.get("crv")
        algorithm = next((name for named, name in _ALGORITHMS.items() if named == (kind, curve)), None)
        if algorithm is None or entry.get("alg", algorithm) != algorithm:
            raise ValueError(f"the key {kid[:40]!r} is none of Ed25519, P-256, RSA with EdDSA, ES256, RS256")
        public = {name: value for name, value in entry.items() if name not in ("d", "p", "q", "dp", "dq", "qi")}
        try:
            key = jwt.PyJWK.from_dict(public, algorithm=algorithm).key
        except (jwt.PyJWTError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"the key {kid[:40]!r} is malformed: {error}") from error
        if isinstance(key, rsa.RSAPublicKey) and key.key_size < _RSA_BITS_MIN:
            raise ValueError(f"the key {kid[:40]!r} is shorter than {_RSA_BITS_MIN} bits")
        found[kid] = Key(algorithm, key)
    return found


def granted_token(issuer: TokenIssuer, claims: Mapping[str, Any]) -> Granted:
    """Who the holder of a token with these proven claims is; raises AetherError BAD_CREDENTIAL."""
    subject = claims.get("sub")
    if not isinstance(subject, str) or not subject:
        raise _nobody("it names no subject")
    try:
        name = f"jwt:{quote(issuer.issuer, safe=_SAFE)}#{quote(subject, safe=_SAFE)}"
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
        raise _nobody("its subject is no Unicode text") from error
    if len(name) > NAME_CHARS_MAX:
        raise _nobody("the name of its subject is too long")
    for grant in issuer.grants:
        if all(_holds(claims.get(claim), value) for claim, value in grant.claims.items()):
            tenant = grant.tenant if grant.tenant is not None else claims.get(grant.tenant_claim or "")
            if not isinstance(tenant, str) or _TENANT.fullmatch(tenant) is None:
                raise _nobody(f"its claim {grant.tenant_claim} names no tenant")
            return Granted(name, tenant, grant.role)
    raise _nobody("no grant fits its claims")


_SAFE: Final = ":/._@+=|~-"


def granted_workload(domain: WorkloadIssuer, workload: SpiffeId) -> Granted:
    """Who a workload of the trust domain is here; raises AetherError BAD_CREDENTIAL."""
    name = str(workload)
    if len(name) > NAME_CHARS_MAX:
        raise AetherError("BAD_CREDENTIAL", "cannot use the certificate: its SPIFFE ID is too long")
    for grant in domain.grants:
        below = grant.path.removesuffix("*") if grant.path.endswith("/*") else None
        if workload.path == grant.path or (below is not None and workload.path.startswith(below)):
            return Granted(name, grant.tenant, grant.role)
    raise AetherError("BAD_CREDENTIAL", f"cannot use the certificate: no grant fits {name}", "ask the operator")


def keys_of(issuer: TokenIssuer, read: Callable[[str], bytes]) -> dict[str, Key]:
    """The issuer's keys; `read` gives the content of a file beside the file of issuers. Raises AetherError."""
    try:
        document = issuer.jwks if issuer.jwks is not None else json.loads(read(issuer.jwks_file or ""))
        if not isinstance(document, dict):
            raise ValueError("a JWK set is a JSON object")
        return parse_jwks(document)
    except (OSError, ValueError, RecursionError) as error:
        why = f"the keys of {issuer.issuer[:80]!r} cannot be read: {error}"
        raise AetherError("STATE_UNUSABLE", f"cannot use the file of issuers: {why}") from error


def _check_issuer(issuer: TokenIssuer) -> None:
    if not issuer.issuer or not issuer.audience:
        raise ValueError("an issuer needs a name and an audience")
    if (issuer.jwks is None) == (issuer.jwks_file is None):
        raise ValueError(f"the issuer {issuer.issuer!r} needs either jwks or jwks_file")
    if issuer.jwks_file is not None and ("/" in issuer.jwks_file or issuer.jwks_file.startswith(".")):
        raise ValueError("jwks_file is the name of a file beside the file of issuers")
    if not 1 <= issuer.lifetime_s_max <= limits.TOKEN_S_MAX:
        raise ValueError(f"lifetime_s_max must be within 1..{limits.TOKEN_S_MAX}")
    for grant in issuer.grants:
        if (grant.tenant is None) == (grant.tenant_claim is None):
            raise ValueError("a grant needs either tenant or tenant_claim")
        _check_grant(grant.tenant, grant.role)


def _check_domain(domain: WorkloadIssuer) -> None:
    if re.fullmatch(spiffe.TRUST_DOMAIN_PATTERN, domain.trust_domain) is None:
        raise ValueError(f"the trust domain {domain.trust_domain[:40]!r} is no name such as example.org")
    if domain.bundle_file is not None and ("/" in domain.bundle_file or domain.bundle_file.startswith(".")):
        raise ValueError("bundle_file is the name of a file beside the file of issuers")
    for grant in domain.grants:
        if _PATH.fullmatch(grant.path) is None:
            raise ValueError(f"the path {grant.path[:40]!r} is no path such as /ns/ops/agent or /ns/ops/*")
        _check_grant(grant.tenant, grant.role)


def _check_grant(tenant: str | None, role: str) -> None:
    if re.fullmatch(ticketcalls.ROLE_PATTERN, role) is None:
        raise ValueError(f"the role {role[:40]!r} is no name such as user")
    if tenant is not None and _TENANT.fullmatch(tenant) is None:
        raise ValueError(f"the tenant {tenant[:40]!r} is no name such as acme")


def _holds(claim: Any, value: str) -> bool:
    return claim == value or (isinstance(claim, list) and value in claim)


def _nobody(why: str) -> AetherError:
    return AetherError("BAD_CREDENTIAL", f"cannot use the token: {why}")
