"""The log as users read it: by the command line, by curl, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.client import Client
from aether.contract.auditcalls import AuditFilter
from aether.contract.jobs import JobState
from aether.contract.paths import Layout
from tests.support import instance

AETHER = Path(sys.executable).with_name("aether")


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with instance.running() as found:
        yield found


@pytest.fixture
def client(layout: Layout) -> Iterator[Client]:
    with instance.client(layout) as found:
        yield found


def aether(layout: Layout, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "AETHER_STATE": str(layout.root)}
    return subprocess.run([AETHER, *words], capture_output=True, text=True, timeout=60, env=env, check=False, **more)


def curl(layout: Layout, path: str) -> subprocess.CompletedProcess[str]:
    asked = ["curl", "-sN", "--unix-socket", str(layout.api_socket), f"http://localhost{path}"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)


def run(client: Client) -> str:
    job = client.run(["sh", "-c", "echo out > out.txt; exit 0"], outputs=["out.txt"])
    assert job.state is JobState.SUCCEEDED, job.error
    return job.job_id


def test_a_log_is_asked_on_the_command_line(layout: Layout, client: Client) -> None:
    job_id = run(client)
    asked = aether(layout, "audit", "query", "--job", job_id, "--asc", "--json")
    assert asked.returncode == 0, asked.stderr
    records = json.loads(asked.stdout)["records"]
    assert [r["type"] for r in records] == ["job.intent", "job.started", "job.outcome"]
    table = aether(layout, "audit", "query", "--since", "10m", "--limit", "5")
    assert table.returncode == 0 and len(table.stdout.splitlines()) == 6
    link = records[0]["ticket"]["link_ids"][0]
    minted = aether(layout, "audit", "query", "--link", link, "--type", "ticket.minted", "--json")
    assert [r["type"] for r in json.loads(minted.stdout)["records"]] == ["ticket.minted"]
    tailed = aether(layout, "audit", "tail", "-n", "1", "--type", "job.outcome")
    assert job_id in tailed.stdout and "succeeded" in tailed.stdout
    assert aether(layout, "audit", "query", "--type", "nothing").returncode != 0
    assert aether(layout, "audit", "query", "--since", "yesterday").returncode != 0


def test_a_tail_is_followed(layout: Layout, client: Client) -> None:
    found: list[dict[str, Any]] = []
    begun = threading.Event()

    def follow() -> None:
        with instance.client(layout) as other:
            at = other.audit.query(AuditFilter()).log_size
            begun.set()
            for line in other.audit.tail(AuditFilter(type=("job.outcome",)), cursor=at, follow=True):
                found.append(json.loads(line))
                return

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    assert begun.wait(10)
    job_id = run(client)
    follower.join(10)
    assert [record["job_id"] for record in found] == [job_id]


def test_an_export_verifies_offline(layout: Layout, client: Client, tmp_path: Path) -> None:
    job_id = run(client)
    key = str(layout.audit_public_key)
    for name, words in (("all", ()), ("job", ("--job", job_id))):
        path = tmp_path / f"{name}.jsonl"
        made = aether(layout, "audit", "export", *words, "--out", str(path))
        assert made.returncode == 0, made.stderr
        verified = aether(layout, "audit", "verify", str(path), "--key", key)
        assert verified.returncode == 0 and "verified" in verified.stdout, verified.stdout + verified.stderr
    path.write_bytes(path.read_bytes().replace(b"succeeded", b"succeedeD"))
    assert aether(layout, "audit", "verify", str(path), "--key", key).returncode == 123
    path.write_bytes((tmp_path / "all.jsonl").read_bytes().rpartition(b'{"documents"')[0])
    assert "EXPORT_SHORT" in aether(layout, "audit", "verify", str(path), "--key", key).stdout


def test_why_tells_all_of_a_job(layout: Layout, client: Client, tmp_path: Path) -> None:
    job_id = run(client)
    shown = aether(layout, "why", job_id)
    assert shown.returncode == 0, shown.stderr
    for text in (f"uid:{os.getuid()}", "role=queen", "operator", "sha256:", "succeeded", "out.txt", "aether verify"):
        assert text in shown.stdout, text
    path = tmp_path / "receipt.json"
    path.write_text(aether(layout, "receipt", "show", job_id, "--json").stdout)
    offline = aether(layout, "why", "--receipt", str(path), "--json", cwd=tmp_path)
    assert offline.returncode == 0, offline.stderr
    page = json.loads(offline.stdout)
    assert page["job_id"] == job_id and page["end"]["state"] == "succeeded" and page["authority"]["caveats"] is None
    assert page["enforced"]["level"] and page["used"]["settled"].startswith("1 ops")
    path.write_text("{}")
    assert aether(layout, "why", "--receipt", str(path)).returncode != 0
    assert aether(layout, "why").returncode != 0


def test_by_curl(layout: Layout, client: Client) -> None:
    job_id = run(client)
    page = json.loads(curl(layout, f"/v0/audit/records?job={job_id}&order=oldest&limit=1").stdout)
    assert page["records"][0]["type"] == "job.intent" and page["next_cursor"] is not None
    rest = json.loads(curl(layout, f"/v0/audit/records?job={job_id}&order=oldest&cursor={page['next_cursor']}").stdout)
    assert [r["type"] for r in rest["records"]] == ["job.started", "job.outcome"] and rest["next_cursor"] is None
    lines = curl(layout, f"/v0/audit/tail?cursor=0&job={job_id}").stdout.splitlines()
    assert len(lines) == 3


@pytest.mark.parametrize(
    "query",
    [
        "type=%00", "type=job", "job=../..", "cell=%2e%2e", "ticket=" + "g" * 32, "since=2026-99-01T00:00:00Z",
        "until=now", "start=-1", "start=1e9", "end=99999999999999999999", "cursor=x", "order=up", "limit=0",
        "limit=501", "principal=%22,%22", "tenant=" + "a" * 999, "nothing=1", "job=a&job=b",
        "&".join(["type=job.stop"] * 64),
        "since=2026-02-30T00:00:00Z",
    ],
)  # fmt: skip
def test_hostile_queries_are_refused(layout: Layout, query: str) -> None:
    error = json.loads(curl(layout, f"/v0/audit/records?{query}").stdout)["error"]
    assert error["code"] in ("BAD_REQUEST", "BAD_ID", "BAD_FIELD"), error
