"""A planted secret reaches the job that may have it, and is found nowhere else: logs, audit, artifacts, rows, process
lists, other processes' environments; also after the roles were killed."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.client import Client
from aether.contract.errors import AetherError
from aether.contract.jobs import JobRequest
from aether.contract.paths import Layout
from tests.support import instance

PLANTED = f"planted-{os.urandom(12).hex()}"
CHANGED = f"planted-{os.urandom(12).hex()}"
TELL = 'printf %s "$API_KEY" | sha256sum | cut -c1-64; printf %s "$API_KEY" | sha256sum > out.txt'


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with instance.running() as found:
        yield found


@pytest.fixture
def source(layout: Layout) -> Iterator[str]:
    path = plant(layout, PLANTED)
    yield f"file:{path}"
    path.unlink()


def plant(layout: Layout, value: str) -> Path:
    path = layout.secrets / "api"
    path.write_text(f"{value}\n")
    owner = layout.secrets.stat()
    os.chown(path, owner.st_uid, owner.st_gid)
    path.chmod(0o600)
    return path


def digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def said(client: Client, job_id: str) -> str:
    return b"".join(client.logs(job_id)).decode().strip()


def places(layout: Layout, value: str, own_uid: int | None) -> list[str]:
    """Where the value is found: files of the state directory but the secret's own, and what /proc shows of processes
    but the cell's own."""
    needle, found = value.encode(), []
    for path in layout.root.rglob("*"):
        if path.is_file() and path.parent != layout.secrets:
            try:
                if needle in path.read_bytes():
                    found.append(str(path))
            except OSError:
                continue
    for process in Path("/proc").glob("[0-9]*"):
        try:
            uid = process.stat().st_uid
            if needle in (process / "cmdline").read_bytes():
                found.append(f"{process} argv")
            if uid != own_uid and needle in (process / "environ").read_bytes():
                found.append(f"{process} environ of uid {uid}")
        except OSError:
            continue
    return found


def test_it_is_in_the_environment_of_the_job_and_nowhere_else(layout: Layout, source: str) -> None:
    with instance.client(layout) as client:
        job = client.run(["/bin/sh", "-c", TELL], secrets={"API_KEY": source}, outputs=["out.txt"])
        assert job.state == "succeeded" and said(client, job.job_id) == digest(PLANTED)
        sleeper = client.run(["/bin/sleep", "600"], secrets={"API_KEY": source}, wait=False).job_id
        while client.get(sleeper).started_at is None:
            time.sleep(0.02)
        receipt = client.receipt_bytes(job.job_id)
        assert PLANTED.encode() not in receipt
        own = os.getuid() if os.getuid() != 0 else sleeping_uid()
        assert places(layout, PLANTED, own) == []
        for role in ("aetherd", "egressd", "aurorad"):
            os.kill(instance.role_pid(layout, role), signal.SIGKILL)
        time.sleep(0.5)
        assert places(layout, PLANTED, own) == []
        until_up(client)
        client.stop(sleeper, grace_ms=0)
        client.wait(sleeper, 20)
    assert places(layout, PLANTED, None) == []


def sleeping_uid() -> int:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes() == b"/bin/sleep\x00600\x00":
                return process.stat().st_uid
        except OSError:
            continue
    raise AssertionError("the sleeper is not there")


def until_up(client: Client) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if client.health().status == "ok":
                return
        except AetherError:
            pass
        time.sleep(0.1)
    raise AssertionError("the roles did not come back")


def test_the_next_use_reads_the_new_value(layout: Layout, source: str) -> None:
    with instance.client(layout) as client:
        for value in (PLANTED, CHANGED):
            plant(layout, value)
            job = client.run(["/bin/sh", "-c", TELL], secrets={"API_KEY": source})
            assert said(client, job.job_id) == digest(value)


def test_an_executable_of_an_allocated_cell_gets_it_too(layout: Layout, source: str) -> None:
    with instance.client(layout) as client, client.cell("with-secret"):
        params = {"argv": ["/bin/sh", "-c", TELL], "cell": "with-secret", "secrets": {"API_KEY": source}}
        job = client.submit(JobRequest(kind="command", op="run", params=params))
        assert client.wait(job.job_id, 20).state == "succeeded"
        assert said(client, job.job_id) == digest(PLANTED)


def test_what_cannot_be_had_fails_the_job_and_a_ticket_without_leave_is_refused(layout: Layout, source: str) -> None:
    with instance.client(layout) as client:
        job = client.run(["/bin/true"], secrets={"API_KEY": f"file:{layout.keys}/tickets.key"})
        assert job.state == "failed" and job.error is not None and job.error.code == "BAD_FIELD"
        user = client.tickets.mint(role="user").ticket
        narrow = client.tickets.mint(paths=["r:/etc"]).ticket
        for ticket, code in ((user, "POLICY_DENIED"), (narrow, "TICKET_DENIED")):
            with Client(state=layout.root, ticket=ticket) as holder, pytest.raises(AetherError) as caught:
                holder.run(["/bin/true"], secrets={"API_KEY": source})
            assert caught.value.code == code
