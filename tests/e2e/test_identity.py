"""Identity, end to end: the real command, roles, sockets and handshakes; curl and openssl where they are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.client import Client
from aether.contract.auditcalls import AuditFilter
from aether.contract.errors import AetherError
from aether.contract.paths import Layout
from tests.support import identities, instance

AETHER = Path(sys.executable).with_name("aether")
PAGE = Path(__file__).parents[2] / "docs/identity.md"


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with instance.running() as found:
        yield found


@pytest.fixture
def owner(layout: Layout) -> Iterator[Client]:
    with instance.client(layout) as client:
        client.pki.init()
        yield client


def shell(layout: Layout, text: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{AETHER.parent}:{os.environ['PATH']}"
    env = {**os.environ, "AETHER_STATE": str(layout.root), "PATH": path}
    return subprocess.run(["bash", "-eu", "-c", text], capture_output=True, text=True, timeout=120, env=env, cwd=cwd)


def refused(layout: Layout, directory: Path) -> AetherError:
    with Client(state=layout.root, identity=directory) as client, pytest.raises(AetherError) as caught:
        client.health()
    return caught.value


def until_denied(owner: Client, operation: str, code: str) -> None:
    """Returns once the latest refusal on record is that; what a read was refused for is not awaited by its answer."""
    deadline = time.monotonic() + 10
    while True:
        page = owner.audit.query(AuditFilter(type=("access.denied",)), limit=1)
        if [(r.operation, r.error.code) for r in page.records if r.error is not None] == [(operation, code)]:
            return
        assert time.monotonic() < deadline, page.records
        time.sleep(0.05)


def test_the_examples_of_the_page(layout: Layout, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    for script in PAGE.read_text().split("```sh\n")[1:]:
        done = shell(layout, script.partition("```")[0], tmp_path)
        assert done.returncode == 0, done.stderr
        if "curl" in script:
            assert '"principal":"spiffe://aether.internal/default/agent-1"' in done.stdout
            assert "by certificate" in done.stdout and "[CREDENTIAL_REVOKED]" in done.stderr
    assert (tmp_path / "agent-1/key.pem").stat().st_mode & 0o777 == 0o600


def test_a_certificate_works_on_the_second_socket_until_it_is_revoked(
    layout: Layout, owner: Client, tmp_path: Path
) -> None:
    issued = owner.pki.issue("worker", directory=tmp_path / "worker", role="user")
    with Client(state=layout.root, identity=tmp_path / "worker") as worker:
        assert worker.health().principal == issued.spiffe_id
        assert worker.run(["echo", "one"]).principal == issued.spiffe_id
        owner.pki.rotate()
        assert worker.health().principal == issued.spiffe_id, "the connection that is kept"
        with Client(state=layout.root, identity=tmp_path / "worker") as again:
            assert again.health().principal == issued.spiffe_id, "and one that is new"
        owner.pki.revoke(issued.fingerprint)
        with pytest.raises(AetherError) as caught:
            worker.health()
        assert caught.value.code == "CREDENTIAL_REVOKED"


def test_who_has_no_certificate_or_a_foreign_one_is_told_and_recorded(
    layout: Layout, owner: Client, tmp_path: Path
) -> None:
    bundle, evil = owner.pki.show().bundle, identities.foreign_authority()
    identities.write_leaf(tmp_path / "foreign", evil, "spiffe://aether.internal/default/worker", bundle)
    error = refused(layout, tmp_path / "foreign")
    assert error.code == "UNAUTHENTICATED" and "unknown ca" in error.message
    until_denied(owner, "tls.handshake", "UNAUTHENTICATED")
    if shutil.which("curl") is not None:
        (tmp_path / "bundle.pem").write_text(bundle)
        asked = ["curl", "-sS", "--unix-socket", str(layout.tls_socket), "--cacert", str(tmp_path / "bundle.pem")]
        done = subprocess.run([*asked, "https://localhost/v0/health"], capture_output=True, text=True, timeout=20)
        assert done.returncode != 0 and "certificate required" in done.stderr


def test_a_client_does_not_talk_to_a_server_of_a_foreign_authority(
    layout: Layout, owner: Client, tmp_path: Path
) -> None:
    owner.pki.issue("careful", directory=tmp_path / "careful")
    (tmp_path / "careful/bundle.pem").write_text(identities.foreign_authority().pem)
    error = refused(layout, tmp_path / "careful")
    assert error.code == "BAD_CREDENTIAL" and "cannot trust the instance" in error.message


def test_a_certificate_of_a_workload_cannot_pass_for_the_server(owner: Client, tmp_path: Path) -> None:
    import socket
    import ssl
    import threading

    owner.pki.issue("liar", directory=tmp_path / "liar")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "liar/cert.pem", tmp_path / "liar/key.pem")

    def serve(listener: socket.socket) -> None:
        with listener.accept()[0] as connection, pytest.raises(OSError):
            context.wrap_socket(connection, server_side=True)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        with Client(tmp_path / "s", identity=tmp_path / "liar") as client, pytest.raises(AetherError) as caught:
            client.health()
        server.join(10)
    assert caught.value.code == "BAD_CREDENTIAL" and "unsuitable certificate purpose" in caught.value.message


def test_a_token_of_a_named_issuer_is_a_principal_of_its_tenant(layout: Layout, owner: Client) -> None:
    issuer = identities.TokenIssuer(identities.new_keys())
    identities.write_issuers(layout.issuers, issuer)
    try:
        with Client(state=layout.root, ticket=issuer.token("ES256")) as ada:
            health = ada.health()
            assert (health.principal, health.tenant_id) == (f"jwt:{identities.ISSUER}#ada", "acme")
            assert ada.run(["echo", "x"]).tenant_id == "acme"
        with (
            Client(state=layout.root, ticket=issuer.token(aud="another")) as lost,
            pytest.raises(AetherError) as caught,
        ):
            lost.health()
        assert caught.value.code == "BAD_CREDENTIAL"
        until_denied(owner, "health", "BAD_CREDENTIAL")
    finally:
        layout.issuers.unlink()


def test_an_api_key_by_the_command(layout: Layout, tmp_path: Path) -> None:
    text = """
    KEY=$(aether key create --name ci --role user --budget ops=1 --quiet)
    AETHER_TICKET=$KEY aether run -- echo by key
    AETHER_TICKET=$KEY aether run -- echo again || echo "refused with $?"
    aether key revoke "$(aether key list | tail -1 | cut -f1)"
    AETHER_TICKET=$KEY aether health || echo "refused with $?"
    """
    done = shell(layout, text, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "by key" in done.stdout and done.stdout.count("refused with 121") == 2
    assert "[BUDGET_EXHAUSTED]" in done.stderr and "[CREDENTIAL_REVOKED]" in done.stderr


def test_a_cell_reaches_neither_socket(layout: Layout, owner: Client) -> None:
    looks = "import os,sys; print(os.path.exists(sys.argv[1]), os.path.exists(sys.argv[2]))"
    done = owner.run(["python3", "-c", looks, str(layout.tls_socket), str(layout.api_socket)])
    assert b"".join(owner.logs(done.job_id)).strip() == b"False False"


def test_keys_lie_where_only_the_authority_reads_them(layout: Layout, owner: Client) -> None:
    assert layout.pki.stat().st_mode & 0o777 == 0o700
    for path in layout.pki.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert json.loads((layout.pki / "authorities.json").read_text())["trust_domain"] == "aether.internal"
