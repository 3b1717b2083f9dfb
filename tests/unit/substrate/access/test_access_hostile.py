"""Texts that the authority parses: policies and their tests, files of issuers and their keys, claims, requests for
certificates. A value, or the error that is documented for it."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract.policycalls import Case
from aether.substrate.access import issuers, policytext
from aether.substrate.access.issuers import TokenGrant, TokenIssuer
from aether.substrate.access.policy import Policy
from aether.substrate.access.review import run_cases
from aether.substrate.pki.certificates import requested_key
from tests.support.hostile import JSON, changed_bytes, changed_json, changed_text, outcome, refusal

POLICY = """@id("agents")
permit (principal in Role::"user", action in [Action::"job.submit"], resource is Job)
when { resource.kind == "command" && context.now.hour < 20 } unless { principal.tenant like "x*" };
"""
ISSUER = TokenIssuer(
    issuer="https://id.example.org", audience="aether", grants=(TokenGrant(role="user", tenant_claim="org"),), jwks={}
)
KEY = ec.generate_private_key(ec.SECP256R1())
REQUEST = (
    x509.CertificateSigningRequestBuilder()
    .subject_name(x509.Name([]))
    .sign(KEY, hashes.SHA256())
    .public_bytes(serialization.Encoding.DER)
)


@settings(max_examples=80, deadline=None)
@given(
    changed_text(POLICY) | st.text(alphabet='permitforbid(){}[]";,@=&|!<>.\\ \n', max_size=80) | st.text(max_size=60)
)
def test_any_text_is_a_policy_or_has_problems_at_places(text: str) -> None:
    rules, problems = policytext.examine(text)
    for problem in problems:
        assert problem.line >= 1 and problem.column >= 1 and problem.message
    assert not (rules and problems) or all(rule for rule in rules)
    assert (outcome(lambda: policytext.parse(text), "BAD_POLICY") is None) == bool(problems)


def file_of(keys: list[Any]) -> dict[str, Any]:
    grant = {"role": "user", "claims": {"groups": "agents"}, "tenant": "acme"}
    return {"tokens": [{"issuer": "i", "audience": "a", "grants": [grant], "jwks": {"keys": keys}}]}


KEYS = [
    {"kid": "a", "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "x": "AQ", "y": "AQ"},
    {"kid": "b", "kty": "OKP", "crv": "Ed25519", "x": base64.urlsafe_b64encode(b"k" * 32).rstrip(b"=").decode()},
    {"kid": "c", "kty": "RSA", "n": "AQAB", "e": "AQAB"},
]


@settings(max_examples=120, deadline=None)
@given(changed_json(file_of(KEYS[1:2])), st.sampled_from(KEYS).flatmap(changed_json))
def test_any_file_of_issuers_is_used_or_refused(value: Any, key: Any) -> None:
    for content in (value, file_of([key])):
        with refusal("STATE_UNUSABLE"):
            for issuer in issuers.parse(json.dumps(content).encode()).tokens:
                issuers.keys_of(issuer, lambda name: b"{}")


@pytest.mark.parametrize("raw", [b"\xff", b'{"tokens":"\xff"}', b'{"tokens":' + b"[" * 100_000, b""])
def test_bytes_that_are_no_file_of_issuers(raw: bytes) -> None:
    assert outcome(lambda: issuers.parse(raw), "STATE_UNUSABLE") is None
    assert outcome(lambda: issuers.keys_of(beside(), lambda name: raw), "STATE_UNUSABLE") is None


def beside() -> TokenIssuer:
    return TokenIssuer(issuer="i", audience="a", grants=(), jwks_file="keys.json")


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries({}, optional={"sub": JSON | st.text() | st.just("\ud800"), "org": JSON | st.just("acme")}))
def test_any_proven_claims_are_somebody_or_nobody(claims: dict[str, Any]) -> None:
    with refusal("BAD_CREDENTIAL"):
        granted = issuers.granted_token(ISSUER, claims)
        assert granted.name.isascii() and granted.name.startswith("jwt:") and granted.tenant == claims["org"]


@settings(max_examples=150, deadline=None)
@given(changed_bytes(REQUEST) | st.binary(max_size=60), st.booleans(), st.text(max_size=20))
def test_any_request_for_a_certificate_is_a_key_or_refused(der: bytes, whole: bool, text: str) -> None:
    pem = pem_of(der)
    outcome(lambda: requested_key(pem if whole else text + pem), "BAD_FIELD")


def test_a_request_of_another_version_is_refused() -> None:
    assert requested_key(pem_of(REQUEST))
    at = REQUEST.index(b"\x02\x01\x00")
    assert outcome(lambda: requested_key(pem_of(REQUEST[: at + 2] + b"\x07" + REQUEST[at + 3 :])), "BAD_FIELD") is None


def pem_of(der: bytes) -> str:
    name = "CERTIFICATE REQUEST"
    return f"-----BEGIN {name}-----\n{base64.encodebytes(der).decode()}-----END {name}-----\n"


CASE = {
    "operation": "job.submit", "principal": "uid:1000", "principal_kind": "user", "role": "user", "kind": "command",
    "id": "a", "op": "run", "labels": ["a"], "hosts": ["a.example.org:443"], "owner": "uid:0", "tenant_id": "acme",
    "time": "2026-09-21T13:33:20Z", "expect": "allow", "policies": ["user-submit"], "name": "it",
}  # fmt: skip
DEFAULT = Policy.default()
TIMES = changed_text("2026-09-21T13:33:20Z") | st.sampled_from(["9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z", "1"])


@settings(max_examples=120, deadline=None)
@given(changed_json(CASE), st.none() | TIMES)
def test_any_case_of_a_policy_test_has_a_result_or_is_refused(value: Any, time: str | None) -> None:
    for said in (value, {**CASE, "time": time}):
        try:
            case = msgspec.json.decode(json.dumps(said), type=Case)
        except msgspec.DecodeError:
            continue
        with refusal("BAD_FIELD"):
            tested = run_cases(DEFAULT, [case], 1_800_000_000_000_000_000)
            assert tested.passed + tested.failed == 1


def test_the_case_is_a_good_one() -> None:
    case = msgspec.convert(CASE | {"tenant_id": None, "owner": None}, Case)
    assert run_cases(DEFAULT, [case], 1_800_000_000_000_000_000).passed == 1
