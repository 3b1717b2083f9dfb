"""Tokens: what is taken and what is refused, each with its reason; rotation of keys; no token makes the parser fail."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.errors import AetherError
from aether.substrate.access import issuers
from aether.substrate.access.tokens import IssuerFiles, Tokens
from tests.support import identities
from tests.support.identities import TokenIssuer

Factory = pytest.TempPathFactory
KEYS = identities.new_keys()
ISSUER = TokenIssuer(KEYS)
NOW_S = 1_800_000_000
SECOND_NS = 1_000_000_000


class Desk:
    """A verifier over a file of its own, at NOW_S."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "issuers.json"
        self.loaded: list[bytes] = []
        identities.write_issuers(self.path, ISSUER)
        self.files = IssuerFiles(self.path, self.loaded.append)
        self.tokens = Tokens(self.files)

    def verify(self, text: str, now_s: float = NOW_S) -> issuers.Granted:
        return self.tokens.verify(text, int(now_s * SECOND_NS))

    def refused(self, text: str, now_s: float = NOW_S) -> str:
        with pytest.raises(AetherError) as caught:
            self.verify(text, now_s)
        assert text[:12] not in caught.value.message, "a refusal names no part of the token"
        assert caught.value.kind.http == 401
        return f"{caught.value.code} {caught.value.message}"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def token(name: str = "EdDSA", **claims: Any) -> str:
    return ISSUER.token(name, now_s=NOW_S, **claims)


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "RS256"])
def test_a_token_names_its_holder_tenant_and_role(desk: Desk, algorithm: str) -> None:
    granted = desk.verify(token(algorithm))
    assert granted == issuers.Granted(f"jwt:{identities.ISSUER}#ada", "acme", "user")
    assert desk.verify(token(algorithm, groups=["ops"])).role == "queen"
    assert json.loads(desk.loaded[0])["tokens"][0]["issuer"] == identities.ISSUER


@pytest.mark.parametrize(
    ("claims", "code", "why"),
    [
        ({"exp": NOW_S - 60, "iat": NOW_S - 300}, "CREDENTIAL_EXPIRED", "expired"),
        ({"nbf": NOW_S + 120}, "BAD_CREDENTIAL", "not valid yet"),
        ({"iat": NOW_S + 120}, "BAD_CREDENTIAL", "not valid yet"),
        ({"exp": NOW_S + 7_200}, "BAD_CREDENTIAL", "lives longer than 3600 s"),
        ({"aud": "another"}, "BAD_CREDENTIAL", "another audience"),
        ({"aud": None}, "BAD_CREDENTIAL", "no aud"),
        ({"exp": None}, "BAD_CREDENTIAL", "no exp"),
        ({"iat": None}, "BAD_CREDENTIAL", "no iat"),
        ({"sub": None}, "BAD_CREDENTIAL", "no sub"),
        ({"sub": ""}, "BAD_CREDENTIAL", "no subject"),
        ({"sub": "x" * 300}, "BAD_CREDENTIAL", "too long"),
        ({"iss": "https://evil.example"}, "BAD_CREDENTIAL", "issuer is not known"),
        ({"groups": ["guests"]}, "BAD_CREDENTIAL", "no grant fits"),
        ({"header": {"kid": "gone"}}, "BAD_CREDENTIAL", "none of its issuer's"),
        ({"header": {"kid": "ec"}}, "BAD_CREDENTIAL", "not that of its key"),
        ({"header": {"crit": ["b64"]}}, "BAD_CREDENTIAL", "malformed"),
        ({"header": {"typ": "secevent+jwt"}}, "BAD_CREDENTIAL", "not understood"),
        ({"key": identities.new_keys()["EdDSA"]}, "BAD_CREDENTIAL", "signature"),
    ],
)
def test_what_does_not_hold_is_refused_with_its_reason(desk: Desk, claims: dict[str, Any], code: str, why: str) -> None:
    said = desk.refused(token(**claims))
    assert said.startswith(code) and why in said


def test_a_token_without_signature_or_with_a_public_key_as_secret_is_refused(desk: Desk) -> None:
    claims = {"iss": identities.ISSUER, "aud": "aether", "sub": "ada", "iat": NOW_S, "exp": NOW_S + 60}
    assert "algorithm" in desk.refused(identities.unsigned(claims))
    head, body, _ = identities.unsigned(claims, alg="HS256", kid="rs").split(".")
    public = (
        KEYS["RS256"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    tag = hmac.digest(public, f"{head}.{body}".encode(), hashlib.sha256)

    forged = f"{head}.{body}.{base64.urlsafe_b64encode(tag).rstrip(b'=').decode()}"
    assert "algorithm" in desk.refused(forged)


def test_a_remembered_token_expires(desk: Desk) -> None:
    text = token()
    assert desk.verify(text) == desk.verify(text)
    assert desk.refused(text, NOW_S + 331).startswith("CREDENTIAL_EXPIRED")


def test_keys_are_rotated_by_kid_and_a_key_that_left_is_refused(desk: Desk) -> None:
    old = token()
    assert desk.verify(old)
    fresh = TokenIssuer(identities.new_keys())
    entry = json.loads(desk.path.read_text())["tokens"][0]
    next_key = {**fresh.jwk("EdDSA"), "kid": "next"}
    identities.write_issuers(desk.path, ISSUER, jwks={"keys": [*entry["jwks"]["keys"], next_key]})
    assert desk.verify(fresh.token(now_s=NOW_S, header={"kid": "next"}), NOW_S), "a new kid is looked up at once"
    identities.write_issuers(desk.path, ISSUER, jwks={"keys": [next_key]})
    assert "none of its issuer's" in desk.refused(old, NOW_S + 2)
    assert len(desk.loaded) == 3


def test_keys_may_lie_in_a_file_beside(desk: Desk) -> None:
    beside = desk.path.with_name("id.jwks.json")
    beside.write_text(json.dumps(ISSUER.jwks))
    beside.chmod(0o644)
    identities.write_issuers(desk.path, ISSUER, jwks=None, jwks_file="id.jwks.json")
    assert desk.verify(token(), NOW_S + 1)
    beside.write_text(json.dumps({"keys": [ISSUER.jwk("ES256")]}))
    assert "none of its issuer's" in desk.refused(token(), NOW_S + 3)


@pytest.mark.parametrize("spoiled", ["{", '{"tokens": [{}]}', "writable"])
def test_a_file_that_cannot_be_used_accepts_nobody(desk: Desk, spoiled: str) -> None:
    text = token()
    assert desk.verify(text)
    if spoiled == "writable":
        desk.path.chmod(0o666)
        desk.path.write_text(desk.path.read_text() + " ")
    else:
        desk.path.write_text(spoiled)
    assert "file of issuers" in desk.refused(text, NOW_S + 2)
    identities.write_issuers(desk.path, ISSUER)
    assert desk.verify(text, NOW_S + 4)


@pytest.mark.parametrize(
    "change",
    [
        {"issuer": ""},
        {"audience": ""},
        {"jwks": None},
        {"jwks_file": "x.json"},
        {"jwks": None, "jwks_file": "../x.json"},
        {"lifetime_s_max": 0},
        {"jwks": {"keys": [{"kty": "oct", "kid": "a", "k": "c2VjcmV0"}]}},
        {"jwks": {"keys": []}},
        {"jwks": {"keys": [{**ISSUER.jwk("ES256"), "alg": "ES384"}]}},
        {"jwks": {"keys": [ISSUER.jwk("ES256"), ISSUER.jwk("ES256")]}},
        {"grants": [{"role": "user"}]},
        {"grants": [{"role": "No Role", "tenant": "acme"}]},
        {"grants": [{"role": "user", "tenant": "../acme"}]},
        {"unknown": 1},
    ],
)
def test_a_file_that_says_too_little_or_too_much_is_refused(desk: Desk, change: dict[str, Any]) -> None:
    identities.write_issuers(desk.path, ISSUER, **change)
    assert "file of issuers" in desk.refused(token(), NOW_S + 2)


PARTS = st.text(alphabet="abcXYZ019_-", max_size=60)


@given(st.one_of(st.text(max_size=200), st.tuples(PARTS, PARTS, PARTS).map(".".join)))
def test_no_text_makes_the_parser_fail(text: str) -> None:
    tokens = Tokens(IssuerFiles(Path("/nonexistent/issuers.json"), lambda raw: None))
    with pytest.raises(AetherError) as caught:
        tokens.verify(text, time.time_ns())
    assert caught.value.code == "BAD_CREDENTIAL"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(claims=st.dictionaries(st.sampled_from(["exp", "iat", "nbf", "sub", "aud", "iss", "groups"]), JSON))
def test_no_signed_claims_make_the_parser_fail(
    tmp_path_factory: pytest.TempPathFactory, claims: dict[str, Any]
) -> None:
    desk = Desk(tmp_path_factory.mktemp("issuers", numbered=True))
    head, body, _ = identities.unsigned({"iss": identities.ISSUER, **claims}, alg="EdDSA").split(".")

    signature = KEYS["EdDSA"].sign(f"{head}.{body}".encode())
    text = f"{head}.{body}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
    with pytest.raises(AetherError) as caught:
        desk.verify(text)
    assert caught.value.code in ("BAD_CREDENTIAL", "CREDENTIAL_EXPIRED")
