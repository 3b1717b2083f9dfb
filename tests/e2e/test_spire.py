"""Workloads of another trust domain: a mock of the Workload API, and the real roles, files, sockets and handshakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aether.client import Client
from aether.contract.auditcalls import AuditFilter
from aether.contract.canonical import digest_bytes
from aether.contract.errors import AetherError
from aether.contract.paths import Layout
from aether.contract.spiffe import ENDPOINT_VARIABLE
from tests.support import identities, instance
from tests.support import workloadapi as mock

pytest.importorskip("grpc", reason="the extra `spire` is not installed")

ROOT, LATER = mock.authority("example.org"), mock.authority("example.org")
AGENT = "spiffe://example.org/ns/build/agent"
GRANTS = [{"path": "/ns/build/*", "tenant": "acme", "role": "user"}]


@pytest.fixture(scope="module")
def agent() -> Iterator[mock.Agent]:
    directory = Path(tempfile.mkdtemp(prefix="aether-spire-"))
    directory.chmod(0o755)
    try:
        with mock.Agent(directory / "api.sock") as found, pytest.MonkeyPatch.context() as patch:
            patch.setenv(ENDPOINT_VARIABLE, f"unix://{directory}/api.sock")
            yield found
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def layout(agent: mock.Agent) -> Iterator[Layout]:
    with instance.running() as found:
        with instance.client(found) as owner:
            owner.pki.init()
        yield found


def name(layout: Layout, grants: list[dict[str, str]]) -> None:
    temporary = layout.issuers.with_suffix(".tmp")
    temporary.write_text(json.dumps({"workloads": [{"trust_domain": "example.org", "grants": grants}]}))
    temporary.chmod(0o644)
    temporary.replace(layout.issuers)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def outcome(layout: Layout, directory: Path) -> str:
    """Who the identity is, or how it is refused."""
    try:
        with Client(state=layout.root, identity=directory) as client:
            return client.health().principal
    except AetherError as error:
        return f"{error.code} {error.message}"


def test_a_workload_of_spire_is_a_principal_as_long_as_its_authority_is_in_the_bundle(
    layout: Layout, agent: mock.Agent, tmp_path: Path
) -> None:
    with instance.client(layout) as owner:
        bundle = owner.pki.show().bundle
        identities.write_leaf(tmp_path / "first", ROOT, AGENT, bundle)
        identities.write_leaf(tmp_path / "later", LATER, AGENT, bundle)
        identities.write_leaf(tmp_path / "nobody", ROOT, "spiffe://example.org/ns/other", bundle)
        agent.tell({"example.org": mock.ders(ROOT)})
        until(layout.trust_bundles.exists)
        assert "unknown ca" in outcome(layout, tmp_path / "first"), "no trust domain is named"
        name(layout, GRANTS)
        until(lambda: outcome(layout, tmp_path / "first") == AGENT)
        refused = outcome(layout, tmp_path / "nobody")
        assert refused.startswith("BAD_CREDENTIAL") and "no grant fits" in refused
        with Client(state=layout.root, identity=tmp_path / "first") as workload:
            done = workload.run(["echo", "by SPIRE"])
            assert (done.principal, done.tenant_id) == (AGENT, "acme")
            with pytest.raises(AetherError) as caught:
                workload.tickets.mint()
            assert caught.value.code in ("TICKET_DENIED", "POLICY_DENIED")
            agent.tell({"example.org": mock.ders(ROOT, LATER)})
            until(lambda: outcome(layout, tmp_path / "later") == AGENT)
            assert workload.health().principal == AGENT
            agent.tell({"example.org": mock.ders(LATER)})
            until(lambda: "unknown ca" in outcome(layout, tmp_path / "first"))
            with pytest.raises(AetherError) as caught:
                workload.health()
            assert caught.value.code == "BAD_CREDENTIAL" and "authority" in caught.value.message, "kept open"
        page = owner.audit.query(AuditFilter(type=("issuers.loaded",)), limit=10)
        said = [record.detail.get("bundles") for record in page.records]
        document = json.dumps({"example.org": LATER.pem}, separators=(",", ":")).encode()
        assert digest_bytes(document) in said and len(set(said)) >= 4, said


def test_spired_is_apart_and_returns(layout: Layout, agent: mock.Agent, tmp_path: Path) -> None:
    pid, aetherd = (instance.role_pid(layout, role) for role in ("spired", "aetherd"))
    assert pid is not None and aetherd is not None
    if os.getuid() == 0:
        assert "cygrpc" in Path(f"/proc/{pid}/maps").read_text()
        assert "grpc" not in Path(f"/proc/{aetherd}/maps").read_text(), "gRPC is in no process that holds keys"
        uids = {int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Uid:" in line}
        assert uids == {layout.spire.stat().st_uid} and 0 not in uids
        assert layout.spire.stat().st_uid != layout.run.stat().st_uid
    os.kill(pid, signal.SIGKILL)
    until(lambda: instance.role_pid(layout, "spired") not in (None, pid))
    with instance.client(layout) as owner:
        identities.write_leaf(tmp_path / "agent", LATER, AGENT, owner.pki.show().bundle)
    name(layout, GRANTS)
    agent.tell({"example.org": mock.ders(LATER)})
    until(lambda: outcome(layout, tmp_path / "agent") == AGENT)
    agent.deny()
    until(lambda: "unknown ca" in outcome(layout, tmp_path / "agent"))
