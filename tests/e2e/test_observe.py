"""What a user sees of a cell's processes: by HTTP, the client and the command line, of jobs and of allocated cells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.client import Client
from aether.contract.errors import AetherError
from aether.contract.jobs import JobRequest, JobState
from aether.contract.limits import TRACE_MS_MAX
from aether.contract.paths import Layout
from aether.spawner.linux.bpf import permission
from tests.support import instance

AETHER = Path(sys.executable).with_name("aether")


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    lack = permission.lacking()
    if lack is not None:
        pytest.skip(f"{lack[0]}: {lack[1]}")
    with instance.running() as found:
        yield found


@pytest.fixture
def client(layout: Layout) -> Iterator[Client]:
    with instance.client(layout) as found:
        yield found


def aether(layout: Layout, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "AETHER_STATE": str(layout.root)}
    return subprocess.run([AETHER, *words], capture_output=True, text=True, timeout=60, env=env, check=False)


def command(client: Client, script: str, **params: Any) -> str:
    params |= {"argv": ["sh", "-c", script]}
    return client.submit(JobRequest(kind="command", op="run", params=params, inputs={})).job_id


def test_a_job_is_followed_by_http(layout: Layout, client: Client) -> None:
    """curl --unix-socket ... '/v0/jobs/ID/events?follow=1'"""
    job_id = command(client, "/bin/true; sleep 0.5; exit 4")
    path = f"http://localhost/v0/jobs/{job_id}/events?follow=1"
    asked = ["curl", "-sN", "--unix-socket", str(layout.api_socket), path]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["kind"] for event in events] == ["exec", "exec", "exit", "exec", "exit", "exit", "ended"]
    assert events[-2]["code"] == 4 and events[-2]["pid"] == events[0]["pid"]
    later = [event for event, _ in client.activity(job_id)]
    assert [event.kind for event in later] == [event["kind"] for event in events]
    behind = [cursor for _, cursor in client.activity(job_id)]
    assert [event for event, _ in client.activity(job_id, cursor=behind[2])] == later[3:]


def test_on_the_command_line(layout: Layout, client: Client) -> None:
    job_id = command(client, "cp /bin/true \"$(printf 'e\\033[2Jx')\"; ./e*; kill -9 $$")
    shown = aether(layout, "job", "activity", "-f", job_id)
    assert shown.returncode == 0 and "\x1b" not in shown.stdout
    assert "./e\\x1b[2Jx" in shown.stdout and "SIGKILL from" in shown.stdout and "ended" in shown.stdout
    rows = aether(layout, "job", "activity", "--json", job_id).stdout.splitlines()
    assert [json.loads(row)["kind"] for row in rows][-1] == "ended"


def test_a_running_job_is_traced(layout: Layout, client: Client) -> None:
    job_id = command(client, "while :; do cd /tmp; done")
    while client.get(job_id).state is not JobState.RUNNING:
        time.sleep(0.02)
    trace = client.trace(job_id, duration_ms=300)
    assert {call.name: call.count for call in trace.calls}["chdir"] > 100
    shown = aether(layout, "job", "trace", job_id, "--seconds", "0.2")
    assert shown.returncode == 0 and "chdir" in shown.stdout, shown.stderr
    client.stop(job_id, grace_ms=0)
    client.wait(job_id)
    for code, of, duration_ms in (
        ("NOT_READY", job_id, 10),
        ("BAD_FIELD", job_id, TRACE_MS_MAX + 1),
        ("NOT_FOUND", job_id[:-4] + "0000", 10),
    ):
        with pytest.raises(AetherError) as refused:
            client.trace(of, duration_ms=duration_ms)
        assert refused.value.code == code


def test_an_allocated_cell_shows_all_its_executables(layout: Layout, client: Client) -> None:
    assert aether(layout, "cell", "allocate", "seen").returncode == 0
    try:
        assert aether(layout, "cell", "exec", "seen", "--", "/bin/ls", "/").returncode == 0
        assert aether(layout, "cell", "exec", "seen", "--", "/bin/sh", "-c", "exit 5").returncode == 5
        time.sleep(0.3)
        found = [event for event, _ in client.cells.activity("seen")]
        assert [Path(event.path or "").name for event in found if event.kind == "exec"] == ["ls", "sh"]
        assert [event.code for event in found if event.kind == "exit"] == [0, 5]
        assert client.cells.trace("seen", duration_ms=50).duration_ms >= 50
    finally:
        assert aether(layout, "cell", "free", "seen").returncode == 0
    shown = aether(layout, "cell", "activity", "-f", "seen")
    assert shown.returncode == 0 and shown.stdout.count("exec") == 2 and "ended" in shown.stdout
