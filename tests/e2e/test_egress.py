"""A job with a network, end to end: real roles, a real cell, real programs, a server on this machine's loopback.

The server listens on 127.0.0.2, which is this machine's own and reached only by being named; NO_PROXY of a cell
names 127.0.0.1 alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.client import Client
from aether.contract.cells import Interpreter
from aether.contract.errors import AetherError
from aether.contract.jobs import JobRequest, JobState, JobView
from aether.contract.network import Credential, Network
from aether.contract.paths import Layout
from tests.support import egressed, instance, machine, packageindex, web
from tests.support.egressed import ADDRESS

SECRET = "planted-5d41402abc4b2a76b9719d911017c592"
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
    with egressed.running(authority, SECRET) as found:
        yield found


@pytest.fixture
def client(layout: Layout) -> Iterator[Client]:
    with instance.client(layout) as found:
        yield found


def network(server: web.Server, **more: Any) -> Network:
    return Network(allow=(f"{ADDRESS}:{server.port}",), **more)


def credential(server: web.Server, source: str = "env:AETHER_SECRET_API") -> Credential:
    host = f"{ADDRESS}:{server.port}"
    return Credential(name="api", host=host, header="Authorization", source=source, prefix="Bearer ")


def run(client: Client, script: str, asked: Network | None, **more: Any) -> tuple[JobView, str]:
    """The ended job of a shell script, and all that it printed."""
    job = client.run(["sh", "-c", script], network=asked, **more)
    return job, b"".join(client.logs(job.job_id)).decode()


def test_programs_find_the_proxy(client: Client, server: web.Server) -> None:
    """Each through TLS that the proxy does not open: they are told to trust nobody, and must not need to."""
    url = f"https://{ADDRESS}:{server.port}"
    server.seen.clear()
    script = [f"curl -sSk {url}/curl; echo"]
    script.append(
        f'python3 -c "import ssl, urllib.request as u; c = ssl._create_unverified_context(); '
        f"print(u.urlopen('{url}/urllib', context=c).read().decode())\""
    )
    if shutil.which("git"):
        script.append(f"GIT_SSL_NO_VERIFY=1 git ls-remote {url}/git 2>&1 | head -1")
    if shutil.which("wget"):
        script.append(f"wget -q --no-check-certificate -O - {url}/wget; echo")
    job, text = run(client, "\n".join(script), network(server))
    assert "hello /curl" in text and "hello /urllib" in text, text
    paths = {seen.path.split("?")[0] for seen in server.seen}
    assert {"/curl", "/urllib"} <= paths
    assert ("/git/info/refs" in paths) == (shutil.which("git") is not None)
    assert all("authorization" not in seen.headers for seen in server.seen)
    page = client.egress(job.job_id)
    assert {row.verdict for row in page.connections} == {"allowed"}
    assert page.closed is not None and page.closed.connections >= len(script)
    assert page.closed.sent_bytes > 500 and page.closed.received_bytes > 500


def test_there_is_no_other_way_out(client: Client, server: web.Server) -> None:
    probe = f"""
import socket, urllib.request
def told(call):
    try: call()
    except OSError as error: return type(error).__name__
    return "reached"
print(told(lambda: socket.create_connection(("{ADDRESS}", {server.port}), 2)))
print(told(lambda: socket.getaddrinfo("example.com", 80)))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print(told(lambda: udp.sendto(b"x", ("8.8.8.8", 53))))
"""
    _, text = run(client, f"python3 - <<'END'\n{probe}END", network(server))
    assert text.split() == ["ConnectionRefusedError", "gaierror", "OSError"]
    _, text = run(client, "curl -sS -m 3 http://127.0.0.1:3128/ 2>&1; env | grep -ci proxy", None)
    assert "refused" in text.lower() or "connect" in text.lower()
    assert text.split()[-1] == "0"


def test_what_is_not_allowed_is_refused_and_noted(client: Client, server: web.Server) -> None:
    script = f"curl -sS http://example.test/ ; curl -sSk https://{ADDRESS}:{server.port + 1}/; true"
    job, text = run(client, script, network(server))
    assert "no rule allows example.test:80" in text and "403" in text
    rows = client.egress(job.job_id).connections
    assert {(row.host, row.verdict, row.reason) for row in rows} == {
        ("example.test", "refused", "not-allowed"),
        (ADDRESS, "refused", "not-allowed"),
    }


def test_the_secret_is_sent_and_never_seen(client: Client, server: web.Server, layout: Layout) -> None:
    """By its rewritten name and by interception; nowhere in the cell, the logs, the records or process lists."""
    server.seen.clear()
    server.answer = lambda seen: (200, {}, b"you sent " + seen.headers.get("authorization", "nothing").encode())
    asked = network(server, credentials=(credential(server),), intercept=True)
    look = (
        "cat /proc/*/environ /proc/*/cmdline 2>/dev/null; cat /work/.aether/trusted.pem; env; find / -xdev 2>/dev/null"
    )
    url = f"https://{ADDRESS}:{server.port}"
    script = f"""
curl -sS http://api.internal/internal; echo
curl -sS {url}/curl; echo
python3 -c "import urllib.request as u; print(u.urlopen('{url}/urllib').read().decode())"
({look}) > /work/found 2>/dev/null
"""
    job, text = run(client, script, asked, outputs=["found"])
    server.answer = web.hello
    assert {seen.path for seen in server.seen} == {"/internal", "/curl", "/urllib"}
    assert {seen.headers["authorization"] for seen in server.seen} == {f"Bearer {SECRET}"}
    assert text.count("you sent Bearer " + "*" * len(SECRET)) == 3
    assert SECRET not in text
    assert len(job.artifacts) == 1 and job.artifacts[0].size_bytes > 2_000  # what was found lies among the files below
    assert {row.credential for row in client.egress(job.job_id).connections} == {"api"}
    for directory, _, files in os.walk(layout.root):  # where cells come and go meanwhile
        for path in (Path(directory, name) for name in files):
            with contextlib.suppress(OSError):
                assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    for role in ("spawner", "aetherd", "aurorad"):
        pid = instance.role_pid(layout, role)
        assert SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes(), role


def test_no_intercepted_bytes_pass_without_the_cells_trust(client: Client, server: web.Server) -> None:
    asked = network(server, credentials=(credential(server),), intercept=True)
    server.seen.clear()
    script = f"env -u SSL_CERT_FILE -u CURL_CA_BUNDLE curl -sS https://{ADDRESS}:{server.port}/x; true"
    _, text = run(client, script, asked)
    assert "certificate" in text.lower() and server.seen == []


def test_secrets_come_from_files_too(client: Client, server: web.Server, layout: Layout) -> None:
    key = layout.secrets / "api"
    key.write_text(SECRET + "\n")
    key.chmod(0o600)
    os.chown(key, layout.secrets.stat().st_uid, -1)
    server.seen.clear()
    asked = network(server, credentials=(credential(server, f"file:{key}"),))
    run(client, "curl -sS http://api.internal/", asked)
    assert server.seen[0].headers["authorization"] == f"Bearer {SECRET}"
    for source in (f"file:{layout.keys}/tickets.key", "file:/none", "env:AETHER_SECRET_NONE"):
        job, _ = run(client, "true", network(server, credentials=(credential(server, source),)))
        assert job.state is JobState.FAILED and job.error is not None, source
        assert "cannot use credential api" in job.error.message


def installs(client: Client, server: web.Server, asked: Network, *options: str, **more: Any) -> str:
    """What a module prints that pip installed from the server's index."""
    target = f"--index-url=https://{ADDRESS}:{server.port}/simple/"
    words = ["pip", "install", "-q", "--no-cache-dir", "--disable-pip-version-check", "-t", "lib", target]
    code = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-m', *{words!r}, *sys.argv[1:]]) or "
    code += "subprocess.call([sys.executable, '-c', 'import aether_tiny; print(aether_tiny.WORD)'], cwd='lib'))"
    argv = ["-c", code, *options, packageindex.NAME]
    job = client.run(argv, python=Interpreter(), network=asked, **more)
    return b"".join(client.logs(job.job_id)).decode()


def test_pip_installs_through_closed_tls(client: Client, server: web.Server, authority: web.Authority) -> None:
    server.answer = packageindex.index()
    text = installs(client, server, network(server), "--cert", "ca.pem", files={"ca.pem": authority.ca})
    server.answer = web.hello
    assert text.strip().endswith(packageindex.WORD), text


def test_pip_installs_from_a_private_index_without_the_key(client: Client, server: web.Server) -> None:
    """The index wants a token that only egressd has, and pip trusts the cell's authority by its variable."""
    server.answer = packageindex.index(SECRET)
    refused = installs(client, server, network(server, intercept=True), "--trusted-host", ADDRESS, "--retries", "0")
    text = installs(client, server, network(server, credentials=(credential(server),), intercept=True))
    server.answer = web.hello
    assert text.strip().endswith(packageindex.WORD), text
    assert packageindex.WORD not in refused


def test_requests_and_httpx_find_the_proxy(client: Client, server: web.Server, authority: web.Authority) -> None:
    """Through closed TLS with an authority that the program names; intercepted, with the one that the cell is given."""
    code = "import sys, httpx, requests\nurl, ca = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None\n"
    code += "print(requests.get(url + '/requests', verify=ca or True).text)\n"
    code += "print(httpx.get(url + '/httpx', verify=ca or True).text)\n"
    url = f"https://{ADDRESS}:{server.port}"
    secret = network(server, credentials=(credential(server),), intercept=True)
    for asked, words in ((network(server), [url, "ca.pem"]), (secret, [url])):
        server.seen.clear()
        job = client.run(["-c", code, *words], python=Interpreter(), network=asked, files={"ca.pem": authority.ca})
        text = b"".join(client.logs(job.job_id)).decode()
        assert text.split("\n")[:2] == ["hello /requests", "hello /httpx"], text
        sent = {seen.headers.get("authorization") for seen in server.seen}
        assert sent == ({f"Bearer {SECRET}"} if asked is secret else {None})


NODE = """
const get = (from, url) => new Promise((done, failed) =>
  from.get(url, (answer) => answer.toArray().then((parts) => done(String(Buffer.concat(parts))))).on('error', failed));
const [closed, named] = process.argv.slice(2);
(async () => {
  console.log(await get(require('https'), closed + '/https'));
  console.log(await (await fetch(closed + '/fetch', { method: 'POST', body: 'x' })).text());
  console.log(await get(require('http'), named + '/http'));
  console.log(await (await fetch(named + '/fetch-http')).text());
  await fetch('https://example.test/').catch((error) => console.log(error.cause.message));
})();
"""


def test_node_finds_the_proxy(client: Client, server: web.Server, tmp_path: Path) -> None:
    """By itself from version 24 on, before that by the file that NODE_OPTIONS loads."""
    if shutil.which("node") is None:
        pytest.skip("no node: apt-get install nodejs")
    (tmp_path / "main.js").write_text(NODE)
    asked = network(server, credentials=(credential(server),), intercept=True)
    words = ["node", "main.js", f"https://{ADDRESS}:{server.port}", "http://api.internal"]
    job = client.run(words, network=asked, files={"main.js": tmp_path / "main.js"})
    text = b"".join(client.logs(job.job_id)).decode()
    assert text.split("\n")[:4] == ["hello /https", "hello /fetch", "hello /http", "hello /fetch-http"], text
    assert "403" in text.split("\n")[4]
    job = client.run(["node", "-p", "typeof fetch"], network=asked, env={"NODE_OPTIONS": ""})
    assert b"".join(client.logs(job.job_id)) == b"function\n", "what the job sets itself stays"


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"network": {"allow": ["nonsense"]}}, "BAD_FIELD"),
        ({"network": {}}, "BAD_FIELD"),
        ({"network": {"allow": ["a.test:443"], "other": 1}}, "BAD_FIELD"),
        ({"network": {"allow": ["a.test:443"]}, "labels": ["local-only"]}, "POLICY_DENIED"),
    ],
)
def test_requests_that_are_refused(client: Client, params: dict[str, Any], code: str) -> None:
    labels = tuple(params.get("labels", ()))
    body = {"argv": ["true"], "network": params["network"]}
    with pytest.raises(AetherError) as caught:
        client.submit(JobRequest(kind="command", op="run", params=body, labels=labels))
    assert caught.value.code == code


def test_egressd_returns_and_cells_go_on(client: Client, server: web.Server, layout: Layout) -> None:
    script = f"while ! curl -sSk -m 2 https://{ADDRESS}:{server.port}/again; do sleep 0.1; done; sleep 1; "
    script += f"until curl -sSk -m 2 https://{ADDRESS}:{server.port}/after; do sleep 0.1; done"
    server.seen.clear()
    job = client.run(["sh", "-c", script], network=network(server), wait=False)
    _until(lambda: any(seen.path == "/again" for seen in server.seen))
    pid = instance.role_pid(layout, "egressd")
    assert pid is not None
    os.kill(pid, 9)
    done = client.wait(job.job_id, timeout_s=30)
    assert done.state is JobState.SUCCEEDED
    assert any(seen.path == "/after" for seen in server.seen)
    assert done.cell_id is not None, "a job that ran names its cell"
    assert not machine.mentioning(done.cell_id)


def test_the_command_line(server: web.Server, layout: Layout) -> None:
    def aether(*words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "AETHER_STATE": str(layout.root)}
        return subprocess.run([AETHER, *words], capture_output=True, text=True, timeout=60, env=env, check=False)

    host = f"{ADDRESS}:{server.port}"
    done = aether(
        "run", "--json", "--allow", host, "--credential", f"api={host}:X-Key:env:AETHER_SECRET_API", "--", "sh", "-c",
        "curl -sS http://api.internal/cli; curl -sS http://other.test/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job_id = json.loads(done.stdout)["job_id"]
    listed = aether("egress", "list", job_id).stdout
    assert "with api" in listed and "other.test:80 (not-allowed)" in listed and "2 in all, 1 refused" in listed
    assert json.loads(aether("egress", "draft", job_id).stdout) == {"allow": []}
    assert json.loads(aether("egress", "draft", "--refused", job_id).stdout) == {"allow": ["other.test:80"]}
    assert aether("verify", job_id).returncode == 0
    assert aether("audit", "verify").returncode == 0


def _until(met: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def test_the_port_is_the_cells_own(server: web.Server) -> None:
    """Nothing listens on the proxy's port of this machine, however many cells have one."""
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", 3128)) != 0


def test_a_budget_of_bytes_ends_the_jobs_that_share_it(layout: Layout, client: Client, server: web.Server) -> None:
    """Two cells fetch without end on one ticket: both end soon after it is used up; what passed is on the account."""
    limit = 2 << 20
    minted = client.tickets.mint(role="user", budget={"bytes_in": limit})
    server.answer = lambda seen: (200, {}, bytes(1 << 18))
    try:
        with Client(state=layout.root, ticket=minted.ticket) as holder:
            script = f"while :; do curl -sk -o /dev/null https://{ADDRESS}:{server.port}/; done"
            params = {"argv": ["sh", "-c", script], "network": {"allow": [f"{ADDRESS}:{server.port}"]}}
            request = JobRequest(kind="command", op="run", params=params)
            views = [client.wait(job_id, 60) for job_id in [holder.submit(request).job_id for _ in range(2)]]
    finally:
        server.answer = web.hello
    for view in views:
        assert view.error is not None and view.error.code == "BUDGET_EXHAUSTED", view
        assert view.error.details["unit"] == "bytes_in" and view.error.details["used"] >= limit
    deadline = time.monotonic() + 5
    while (spent := client.tickets.show(minted.link_id).budget[0].spent) < limit and time.monotonic() < deadline:
        time.sleep(0.05)
    assert limit <= spent < 4 * limit
