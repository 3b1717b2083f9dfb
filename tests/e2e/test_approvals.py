"""A real instance whose policy demands approvals: asked, killed in between, approved, run, verified; labels and replay
on the same one, which no other test changes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from aether.client import Client
from aether.contract.jobs import JobRequest, JobState
from aether.contract.paths import Layout
from aether.daemons import control
from tests.support import instance

AETHER = Path(sys.executable).with_name("aether")
ROOT = Path(__file__).parents[2]
EXAMPLE = re.search(r"```cedar\n(// An agent.*?)```", (ROOT / "docs/approvals.md").read_text(), re.DOTALL)
AGENT = """
permit (principal in Role::"agent", action in [Action::"submit", Action::"read", Action::"job.network"], resource);
"""


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    """With the example of docs/approvals.md after the default policy."""
    assert EXAMPLE is not None
    default = resources.files("aether.substrate.access").joinpath("default.cedar").read_text(encoding="utf-8")
    with instance.running() as found:
        control.down(found.root)
        found.policy.parent.mkdir(parents=True, exist_ok=True)
        found.policy.write_text(f"{default}\n{AGENT}\n{EXAMPLE[1]}")
        found.policy.chmod(0o644)
        control.ensure_running(found.root, lambda text: None)
        yield found


@pytest.fixture
def client(layout: Layout) -> Iterator[Client]:
    with instance.client(layout) as found:
        yield found


def aether(layout: Layout, *words: str, ticket: str | None = None, code: int = 0) -> str:
    env = {**os.environ, "AETHER_STATE": str(layout.root), **({"AETHER_TICKET": ticket} if ticket else {})}
    done = subprocess.run([AETHER, *words], capture_output=True, text=True, timeout=60, env=env, check=False)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout


def test_asked_killed_approved_run_and_verified(layout: Layout, client: Client, tmp_path: Path) -> None:
    ticket = aether(layout, "ticket", "mint", "--role", "agent", "--expires", "1h", "--quiet").strip()
    words = ("run", "--detach", "--allow", "pypi.org:443", "--approval", "10m", "--", "true")
    job_id = aether(layout, *words, ticket=ticket).strip()
    plain = aether(layout, "run", "--", "echo", "free", ticket=ticket)
    assert plain == "free\n", "without a network nobody is asked"
    assert client.get(job_id).state is JobState.WAITING_APPROVAL
    control.down(layout.root)
    control.ensure_running(layout.root, lambda text: None)
    listed = json.loads(aether(layout, "approvals", "list", "--json"))["approvals"]
    assert [(a["job_id"], a["hosts"], a["demanded_by"]) for a in listed] == [
        (job_id, ["pypi.org:443"], ["agents-ask-for-the-network"])
    ]
    assert '"pypi.org:443"' in aether(layout, "approvals", "show", job_id)
    aether(layout, "approvals", "approve", job_id, ticket=ticket, code=121)
    assert aether(layout, "approvals", "approve", job_id, "--reason", "seen").strip() == "granted"
    job = client.wait(job_id, 30)
    assert job.state in (JobState.SUCCEEDED, JobState.FAILED), job.error
    receipt = tmp_path / "receipt.json"
    receipt.write_bytes(client.receipt_bytes(job_id))
    key = str(layout.audit_public_key)
    aether(layout, "verify", str(receipt), "--key", key)
    second = [sys.executable, str(ROOT / "tools/aether_verify.py"), "receipt", str(receipt), "--key", key]
    checked = subprocess.run(second, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    page = aether(layout, "why", job_id)
    assert "granted by" in page and "seen" in page and "agents-ask-for-the-network" in page


def test_denied_on_the_command_line(layout: Layout, client: Client) -> None:
    ticket = client.tickets.mint(role="agent").ticket
    job_id = aether(layout, "run", "--detach", "--allow", "pypi.org:443", "--", "true", ticket=ticket).strip()
    assert aether(layout, "approvals", "deny", job_id).strip() == "denied"
    job = client.wait(job_id, 10)
    assert job.error is not None and job.error.code == "APPROVAL_DENIED"
    assert "denied" in aether(layout, "why", job_id)


def test_local_only_and_replay(layout: Layout, client: Client, tmp_path: Path) -> None:
    digest = client.artifact_put(b"patients", labels=["local-only"]).digest
    assert "local-only" in aether(layout, "artifact", "list")
    script = "tr a-z A-Z < in > out; date +%N > when; sed 1,2d /proc/net/dev | cut -d: -f1"
    params = {"argv": ["sh", "-c", script], "outputs": ["out"]}
    request = JobRequest(
        kind="command", op="run", params=params, inputs={"files": [{"path": "in", "artifact": digest}]}
    )
    job = client.wait(client.submit(request).job_id, 30)
    assert job.state is JobState.SUCCEEDED and job.labels == ("local-only",), job.error
    assert b"".join(client.logs(job.job_id, stream="stdout")).split() == [b"lo"]
    page = json.loads(aether(layout, "why", job.job_id, "--json"))
    assert page["rules"]["labels"] == ["local-only"] and page["enforced"]["network"] == "none"
    assert page["place"]["driver"] == "native"
    agreed = json.loads(aether(layout, "job", "replay", job.job_id, "--json"))
    assert agreed["differs"] == [] and "artifact/out" in agreed["same"]
    noisy = client.run(["sh", "-c", "date +%N > when; echo same > kept"], outputs=["when", "kept"])
    told = aether(layout, "job", "replay", noisy.job_id, code=1)
    assert "artifact/when" in told and "artifact/kept" not in told
    with contextlib.closing(client):
        assert client.get(agreed["job_id"]).replay_of == job.job_id
