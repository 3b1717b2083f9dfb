"""Allocated cells with a network, end to end: real roles, a real cell, a TLS server on this machine's loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.client import Client
from aether.contract.allocations import CellState
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState, JobView
from aether.contract.network import Credential, Network
from aether.contract.paths import Layout
from tests.support import egressed, instance, web
from tests.support.egressed import ADDRESS

SECRET = "planted-7c211433f02071597741e6ff5a8ea349"
AETHER = Path(sys.executable).with_name("aether")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> web.Authority:
    return web.Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def server(authority: web.Authority) -> Iterator[web.Server]:
    with web.server(authority.context(ADDRESS), ADDRESS) as found:
        yield found


@pytest.fixture(scope="module")
def layout(authority: web.Authority) -> Iterator[Layout]:
    if os.geteuid() != 0:
        pytest.skip("without root an allocated cell has no network")
    with egressed.running(authority, SECRET) as found:
        yield found


@pytest.fixture
def client(layout: Layout) -> Iterator[Client]:
    with instance.client(layout) as found:
        yield found
        for cell in found.cells.list():
            found.cells.free(cell.cell_id, grace_ms=0)


def network(server: web.Server, **more: Any) -> Network:
    return Network(allow=(f"{ADDRESS}:{server.port}",), **more)


def run(client: Client, cell: str, script: str) -> tuple[JobView, str]:
    job = client.wait(client.cells.start(cell, ["sh", "-c", script]).job_id)
    return job, b"".join(client.logs(job.job_id)).decode()


def until(met: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := met()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return found


def events(client: Client, cell_id: str) -> list[Any]:
    return list(client.cells.events(cell_id))


def test_every_executable_reaches_what_the_cell_may_and_nothing_else(client: Client, server: web.Server) -> None:
    cell = client.cells.allocate("session", network=network(server))
    assert cell.network is not None and cell.network.hosts() == (f"{ADDRESS}:{server.port}",)
    for n in range(2):
        job, text = run(client, "session", f"curl -sSk https://{ADDRESS}:{server.port}/{n}")
        assert (job.state, text) == (JobState.SUCCEEDED, f"hello /{n}")
    _, text = run(client, "session", "curl -sS http://example.test/")
    assert "no rule allows example.test:80" in text
    _, text = run(client, "session", f"curl -sSk --noproxy '*' -m 3 https://{ADDRESS}:{server.port}/ 2>&1; true")
    assert "hello" not in text
    page = until(lambda: (told := client.cells.egress("session")).connections and told)
    assert (page.cell_id, page.closed) == (cell.cell_id, None)
    assert {(row.host, row.verdict) for row in page.connections} == {(ADDRESS, "allowed"), ("example.test", "refused")}
    assert client.cells.free("session").state is CellState.FREED
    told = [event.type for event in events(client, cell.cell_id) if event.type.split(".")[0] in ("cell", "egress")]
    assert told[:3] == ["cell.allocated", "egress.opened", "cell.started"] and told[-2:] == [
        "cell.freed",
        "egress.closed",
    ]
    page = client.cells.egress(cell.cell_id)
    assert page.closed is not None and (page.closed.connections, page.closed.refused) == (3, 1)


def test_another_cell_has_no_network(client: Client, server: web.Server) -> None:
    client.cells.allocate("with", network=network(server))
    client.cells.allocate("without")
    _, text = run(client, "without", "curl -sS -m 3 http://127.0.0.1:3128/ 2>&1; env | grep -ci proxy; true")
    assert "connect" in text.lower() and text.split()[-1] == "0"


def test_the_secret_is_sent_and_never_seen(client: Client, server: web.Server) -> None:
    host = f"{ADDRESS}:{server.port}"
    secret = Credential(name="api", host=host, header="X-Key", source="env:AETHER_SECRET_API")
    client.cells.allocate("secret", network=network(server, credentials=(secret,), intercept=True))
    server.seen.clear()
    script = f"curl -sS http://api.internal/a; curl -sS https://{host}/b; cat /proc/*/environ .aether/trusted.pem; env"
    _, text = run(client, "secret", script)
    assert {(seen.path, seen.headers.get("x-key")) for seen in server.seen} == {("/a", SECRET), ("/b", SECRET)}, text
    assert SECRET not in text


def test_egressd_returns_and_the_cell_goes_on(client: Client, server: web.Server, layout: Layout) -> None:
    cell = client.cells.allocate("again", network=network(server))
    pid = instance.role_pid(layout, "egressd")
    assert pid is not None
    os.kill(pid, 9)
    script = f"until curl -sSk -m 2 https://{ADDRESS}:{server.port}/after; do sleep 0.1; done"
    job, text = run(client, "again", script)
    assert job.state is JobState.SUCCEEDED and text.endswith("hello /after")
    client.cells.free("again")
    assert client.cells.egress(cell.cell_id).closed is not None


def test_aetherd_returns_and_the_cell_is_served_on(client: Client, server: web.Server, layout: Layout) -> None:
    cell = client.cells.allocate("kept", network=network(server))
    pid = instance.role_pid(layout, "aetherd")
    assert pid is not None
    os.kill(pid, 9)
    until(lambda: instance.role_pid(layout, "aetherd") not in (None, pid))
    until(lambda: _running(client, "kept"))
    job, text = run(client, "kept", f"curl -sSk https://{ADDRESS}:{server.port}/kept")
    assert (job.state, text) == (JobState.SUCCEEDED, "hello /kept")
    client.cells.free("kept")
    page = client.cells.egress(cell.cell_id)
    assert page.closed is not None and page.closed.connections == 1


def _running(client: Client, name: str) -> bool:
    try:
        return client.cells.show(name).state is CellState.RUNNING
    except AetherError:
        return False


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"network": Network(allow=("nonsense",))}, "BAD_FIELD"),
        ({"network": Network()}, "BAD_FIELD"),
        ({"network": Network(allow=("a.test:443",)), "isolate_network": False}, "BAD_FIELD"),
        ({"network": Network(allow=("a.test:443",)), "labels": ("local-only",)}, "POLICY_DENIED"),
    ],
)
def test_requests_that_are_refused(client: Client, more: dict[str, Any], code: str) -> None:
    with pytest.raises(AetherError) as caught:
        client.cells.allocate("refused", **more)
    assert caught.value.code == code


def test_what_is_local_only_enters_no_cell_with_a_network(client: Client, server: web.Server) -> None:
    client.cells.allocate("open", network=network(server))
    with pytest.raises(AetherError) as caught:
        client.cells.start("open", ["true"], labels=["local-only"])
    assert caught.value.code == "POLICY_DENIED"


def test_the_command_line(client: Client, server: web.Server, layout: Layout) -> None:
    def aether(*words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "AETHER_STATE": str(layout.root)}
        return subprocess.run([AETHER, *words], capture_output=True, text=True, timeout=60, env=env, check=False)

    host = f"{ADDRESS}:{server.port}"
    made = aether("cell", "allocate", "web", "--allow", host)
    assert made.returncode == 0, made.stderr
    done = aether("cell", "exec", "web", "--", "sh", "-c", f"curl -sSk https://{host}/cli; curl -sS http://other.test/")
    assert done.stdout.startswith("hello /cli"), done.stderr
    listed = until(lambda: "other.test:80" in (out := aether("egress", "list", "web").stdout) and out)
    assert "other.test:80 (not-allowed)" in listed and f"allowed  {host}" in listed
    assert json.loads(aether("egress", "draft", "web").stdout) == {"allow": [host]}
    assert aether("cell", "free", "web").returncode == 0
    assert "2 in all, 1 refused" in aether("egress", "list", made.stdout.strip()).stdout
    assert aether("audit", "verify").returncode == 0
