"""Credentials to be refused and taken: tokens of an issuer of the test's own, certificates of a foreign authority."""

from __future__ import annotations

import base64
import datetime as dt
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from aether.substrate.pki import certificates
from aether.substrate.pki.certificates import Authority, Leaf
from aether.substrate.pki.store import serial

ISSUER = "https://id.example.org"
AUDIENCE = "aether"
ALGORITHMS = {"EdDSA": "ed", "ES256": "ec", "RS256": "rs"}


def new_keys() -> dict[str, Any]:
    """A private key for each algorithm."""
    return {
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "RS256": rsa.generate_private_key(65_537, 2_048),
    }


@dataclass
class TokenIssuer:
    """Signs tokens; `jwks` is what it publishes."""

    keys: dict[str, Any]

    @property
    def jwks(self) -> dict[str, Any]:
        return {"keys": [self.jwk(name) for name in self.keys]}

    def jwk(self, name: str) -> dict[str, Any]:
        algorithm = jwt.get_algorithm_by_name(name)
        public = algorithm.to_jwk(self.keys[name].public_key(), as_dict=True)
        return {**public, "kid": ALGORITHMS[name], "use": "sig", "alg": name}

    def token(self, name: str = "EdDSA", now_s: float | None = None, **claims: Any) -> str:
        """A token that holds, but for what `claims` change; a claim of None is left out. `header` and `key` too."""
        header, key = claims.pop("header", {}), claims.pop("key", self.keys[name])
        now = int(time.time() if now_s is None else now_s)
        said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "iat": now, "exp": now + 300, "groups": ["dev"], **claims}
        present = {claim: value for claim, value in said.items() if value is not None}
        return jwt.encode(present, key, algorithm=name, headers={"kid": ALGORITHMS[name], **header})


def write_issuers(path: Path, signer: TokenIssuer, **changed: Any) -> None:
    """`policy/issuers.json` with the issuer's keys inline; holders in `ops` are operators, others users of acme."""
    grants = [
        {"claims": {"groups": "ops"}, "tenant": "default", "role": "queen"},
        {"claims": {"groups": "dev"}, "tenant": "acme", "role": "user"},
    ]
    entry = {"issuer": ISSUER, "audience": AUDIENCE, "jwks": signer.jwks, "grants": grants, **changed}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"tokens": [entry]}))
    temporary.chmod(0o644)
    temporary.replace(path)


def unsigned(claims: dict[str, Any], **header: Any) -> str:
    """A token with `alg` none."""
    parts = [{"alg": "none", "typ": "JWT", "kid": "ed", **header}, claims]
    return ".".join(base64.urlsafe_b64encode(json.dumps(each).encode()).rstrip(b"=").decode() for each in parts) + "."


def foreign_authority(trust_domain: str = "aether.internal") -> Authority:
    """An authority with the same trust domain that nobody trusts."""
    return certificates.new_authority(trust_domain, serial(), dt.datetime.now(dt.UTC))


def write_leaf(directory: Path, authority: Authority, spiffe_id: str, bundle: str) -> None:
    """The files of an identity whose certificate `authority` issued."""
    key, now = certificates.new_key(), dt.datetime.now(dt.UTC)
    leaf = certificates.issue(
        authority, key.public_key(), Leaf(spiffe_id, "client", serial(), now, now + dt.timedelta(hours=1))
    )
    directory.mkdir()
    (directory / "cert.pem").write_text(certificates.pem_of(leaf))
    (directory / "key.pem").write_bytes(certificates.pem_of_key(key))
    (directory / "bundle.pem").write_text(bundle)
