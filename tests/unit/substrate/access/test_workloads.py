"""Certificates of other trust domains: which are taken and as whom, and what ends that."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.calls import PeerCertificate
from aether.contract.errors import AetherError
from aether.substrate.access.issuers import Granted
from aether.substrate.access.tokens import IssuerFiles
from aether.substrate.access.workloads import TrustBundles, Workloads, parse_bundle
from aether.substrate.pki import certificates
from aether.substrate.pki.certificates import Authority
from tests.support import workloadapi as mock

ROOT, OTHER = mock.authority("example.org"), mock.authority("other.org")
AGENT = "spiffe://example.org/ns/build/agent"
GRANTS = [
    {"path": "/ns/ops/root", "tenant": "default", "role": "queen"},
    {"path": "/ns/build/*", "tenant": "acme", "role": "user"},
]
STEP_NS = 2_000_000_000


class Desk:
    """What accepts, over files of its own; each look is two seconds after the one before."""

    def __init__(self, directory: Path) -> None:
        self.issuers, self.told = directory / "issuers.json", directory / "bundles.json"
        self.loaded: list[dict[str, Any]] = []
        self.full = False
        files = IssuerFiles(self.issuers, lambda raw: None)
        self.bundles = TrustBundles(files, self.told, self.on_loaded)
        self.workloads = Workloads(self.bundles, lambda: "aether.internal")
        self.now_ns = time.time_ns()

    def on_loaded(self, raw: bytes, bundles: bytes) -> None:
        if self.full:
            raise AetherError("STATE_UNUSABLE", "cannot write: no room")
        self.loaded.append(json.loads(bundles))

    def write(self, path: Path, content: object) -> None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        path.chmod(0o640)

    def name(self, **changed: Any) -> None:
        domain = {"trust_domain": "example.org", "grants": GRANTS, **changed}
        self.write(self.issuers, {"workloads": [domain]})

    def verify(self, leaf: x509.Certificate, *above: Authority) -> Granted | None:
        self.now_ns += STEP_NS
        ders = [each.public_bytes(Encoding.DER) for each in (leaf, *(each.certificate for each in above))]
        shown = PeerCertificate(certificates.fingerprint(leaf), 0, 1 << 50, tuple(ders))
        return self.workloads.verify(shown, self.now_ns)

    def refused(self, leaf: x509.Certificate, *above: Authority) -> str:
        with pytest.raises(AetherError) as caught:
            self.verify(leaf, *above)
        assert caught.value.kind.http == 401
        return f"{caught.value.code} {caught.value.message}"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    made = Desk(tmp_path)
    made.name()
    made.write(made.told, {"example.org": ROOT.pem, "other.org": OTHER.pem})
    return made


def test_a_grant_decides_on_tenant_and_role(desk: Desk) -> None:
    assert desk.verify(mock.svid(ROOT, AGENT), ROOT) == Granted(AGENT, "acme", "user")
    root = "spiffe://example.org/ns/ops/root"
    assert desk.verify(mock.svid(ROOT, root), ROOT) == Granted(root, "default", "queen")
    for path in ("/ns/ops/root/x", "/ns/ops", "/ns/build", "/ns/builds/x"):
        assert "no grant fits" in desk.refused(mock.svid(ROOT, f"spiffe://example.org{path}"), ROOT)
    assert desk.loaded == [{"example.org": ROOT.pem}], "recorded once, and only what is named"


def test_a_trust_domain_that_nobody_named_is_refused(desk: Desk) -> None:
    assert "other.org is not accepted here" in desk.refused(mock.svid(OTHER, "spiffe://other.org/x"), OTHER)
    desk.write(desk.issuers, {})
    assert "example.org is not accepted here" in desk.refused(mock.svid(ROOT, AGENT), ROOT)
    assert desk.bundles.roots(desk.now_ns) == {} and desk.loaded[-1] == {}


def test_an_authority_vouches_for_its_own_trust_domain_alone(desk: Desk) -> None:
    both = [{"trust_domain": name, "grants": GRANTS} for name in ("example.org", "other.org")]
    desk.write(desk.issuers, {"workloads": both})
    assert "none of the trust domain example.org" in desk.refused(mock.svid(OTHER, AGENT), OTHER)
    own = mock.svid(ROOT, "spiffe://aether.internal/default/agent")
    assert desk.verify(own, ROOT) is None, "of the instance's own: it must be on record"


def test_rotation_and_removal_take_effect_without_a_restart(desk: Desk) -> None:
    leaf, later = mock.svid(ROOT, AGENT), mock.authority("example.org")
    assert desk.verify(leaf, ROOT) is not None
    desk.write(desk.told, {"example.org": ROOT.pem + later.pem})
    assert desk.verify(leaf, ROOT) is not None and desk.verify(mock.svid(later, AGENT), later) is not None
    desk.write(desk.told, {"example.org": later.pem})
    assert "none of the trust domain" in desk.refused(leaf, ROOT)
    desk.write(desk.told, {})
    assert "is not accepted here" in desk.refused(mock.svid(later, AGENT), later)
    assert [len(each.get("example.org", "")) > 0 for each in desk.loaded] == [True, True, True, False]
    desk.told.unlink()
    assert "is not accepted here" in desk.refused(leaf, ROOT)


def test_expiry_of_the_certificate_and_of_its_authority(desk: Desk) -> None:
    expired = mock.svid(ROOT, AGENT, -dt.timedelta(minutes=1))
    assert desk.refused(expired, ROOT) == "CREDENTIAL_EXPIRED cannot use the certificate: it expired"
    ended = mock.authority("example.org", dt.timedelta(days=-3_651))
    desk.write(desk.told, {"example.org": ended.pem})
    assert desk.refused(mock.svid(ROOT, AGENT), ended).startswith(
        "CREDENTIAL_EXPIRED cannot use the certificate: an auth"
    )
    leaf = mock.svid(ROOT, AGENT)
    desk.write(desk.told, {"example.org": ROOT.pem})
    desk.now_ns -= 600 * 1_000_000_000
    assert "not valid yet" in desk.refused(leaf, ROOT)


def test_a_file_of_the_operator_s_instead(desk: Desk, tmp_path: Path) -> None:
    desk.name(bundle_file="example.pem")
    assert "is not accepted here" in desk.refused(mock.svid(ROOT, AGENT), ROOT)
    desk.write(tmp_path / "example.pem", ROOT.pem)
    assert desk.verify(mock.svid(ROOT, AGENT), ROOT) is not None
    (tmp_path / "example.pem").chmod(0o666)
    desk.write(desk.told, {})
    assert "is not accepted here" in desk.refused(mock.svid(ROOT, AGENT), ROOT)


@pytest.mark.parametrize(
    "told", ["", "[]", '{"example.org": 1}', {"example.org": "no PEM"}, {"example.org": ""}, "x" * (1 << 21)]
)
def test_a_malformed_bundle_is_trusted_by_nobody(desk: Desk, told: object) -> None:
    heard: list[str] = []
    desk.bundles.on_unusable = lambda domain, why: heard.append(domain)
    desk.write(desk.told, told)
    assert "is not accepted here" in desk.refused(mock.svid(ROOT, AGENT), ROOT)
    assert heard == ["example.org"]
    desk.write(desk.told, {"example.org": ROOT.pem})
    assert desk.verify(mock.svid(ROOT, AGENT), ROOT) is not None


def test_what_is_no_certificate_of_a_workload_is_refused(desk: Desk) -> None:
    assert "of an authority" in desk.refused(ROOT.certificate, ROOT)
    assert "of a trust domain" in desk.refused(mock.svid(ROOT, "spiffe://example.org"), ROOT)
    assert "no SPIFFE ID" in desk.refused(mock.svid(ROOT, "https://example.org/x"), ROOT)
    assert "too long" in desk.refused(mock.svid(ROOT, "spiffe://example.org/ns/build/" + "a" * 300), ROOT)


def test_what_cannot_be_recorded_is_not_trusted(desk: Desk) -> None:
    desk.full = True
    assert "is not accepted here" in desk.refused(mock.svid(ROOT, AGENT), ROOT)
    desk.full = False
    assert desk.verify(mock.svid(ROOT, AGENT), ROOT) is not None


@pytest.mark.parametrize(
    "changed",
    [
        {"trust_domain": "Example"},
        {"bundle_file": "../x.pem"},
        {"grants": [{"path": "ns", "tenant": "acme", "role": "user"}]},
        {"grants": [{"path": "/a*", "tenant": "acme", "role": "user"}]},
        {"grants": [{"path": "/a", "tenant": "ACME", "role": "user"}]},
        {"grants": [{"path": "/a", "tenant": "acme", "role": "no role"}]},
    ],
)
def test_a_file_that_makes_no_sense_accepts_nobody(desk: Desk, changed: dict[str, Any]) -> None:
    desk.name(**changed)
    assert "is not accepted here" in desk.refused(mock.svid(ROOT, AGENT), ROOT)


@given(st.text(max_size=200) | st.just(ROOT.pem).flatmap(lambda pem: st.integers(0, len(pem)).map(lambda n: pem[:n])))
def test_no_bundle_makes_the_parser_fail_otherwise(text: str) -> None:
    with contextlib.suppress(ValueError, OSError):
        assert parse_bundle(text)
