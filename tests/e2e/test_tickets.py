"""Tickets, end to end: the real command, roles and kernel; the page's example, a death after a revocation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.client import Client
from aether.client.tickets import attenuate
from aether.contract.errors import AetherError
from aether.contract.jobs import JobRequest, JobState, JobView
from aether.contract.paths import Layout
from tests.support import instance, machine

AETHER = Path(sys.executable).with_name("aether")
PAGE = Path(__file__).parents[2] / "docs/tickets.md"


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with instance.running() as found:
        yield found


def shell(layout: Layout, text: str) -> subprocess.CompletedProcess[str]:
    path = f"{AETHER.parent}:{os.environ['PATH']}"
    env = {**os.environ, "AETHER_STATE": str(layout.root), "PATH": path}
    return subprocess.run(["bash", "-eu", "-c", text], capture_output=True, text=True, timeout=120, env=env)


def sleeps(client: Client, count: int, mark: str) -> list[str]:
    """Jobs whose processes can be told by `mark`."""
    request = JobRequest(kind="command", op="run", params={"argv": ["sleep", mark]})
    return [client.submit(request).job_id for _ in range(count)]


def until_alive(mark: str, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(alive(mark)) != count:
        assert time.monotonic() < deadline, alive(mark)
        time.sleep(0.02)


def ended(client: Client, job_id: str) -> JobView:
    """The job once it is terminal, however often the node is away meanwhile."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return client.wait(job_id, 30)
        except AetherError as error:
            assert error.code in ("UNAVAILABLE", "UNREACHABLE") and time.monotonic() < deadline, error
            time.sleep(0.1)


def alive(mark: str) -> list[int]:
    return [pid for pid in machine.mentioning(mark) if machine.argv_of(pid)[:1] == ["sleep"]]


def test_the_example_of_the_page(layout: Layout) -> None:
    script = PAGE.read_text().partition("```sh\n")[2].partition("```")[0]
    done = shell(layout, script)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("\n")
    assert [line for line in said if line in ("one", "two", "three", "four")] == ["one", "two"]
    assert said.count("refused with 121") == 3
    assert "2 of 5 ops" in done.stdout and "1 jobs and 0 cells ended" in done.stdout
    for code in ("BUDGET_EXHAUSTED", "TICKET_DENIED", "TICKET_REVOKED"):
        assert f"[{code}]" in done.stderr
    with instance.client(layout) as client:
        job = client.list().jobs[0]
        assert job.state is JobState.CANCELLED and job.error is not None and job.error.code == "REVOKED"


def test_a_ticket_is_told_once_and_never_logged(layout: Layout) -> None:
    done = shell(layout, "aether ticket mint --quiet; aether ticket list --json; aether ticket mint --budget gold=1")
    assert done.returncode == 2 and "gold" in done.stderr and "[BAD_FIELD]" in done.stderr
    ticket, _, listed = done.stdout.partition("\n")
    assert len(ticket) < 512 and "aetk1_" not in listed
    kept = [p for p in layout.root.rglob("*") if p.is_file() and not p.is_symlink()]
    assert not [path for path in kept if ticket[-40:].encode() in path.read_bytes()]


def test_a_ticket_from_standard_input(layout: Layout) -> None:
    done = shell(
        layout, "aether ticket mint --quiet | aether ticket attenuate - --budget ops=1 | aether ticket verify -"
    )
    assert done.returncode == 0 and "0 of 1 ops" in done.stdout, done.stderr


@pytest.mark.parametrize("kill", [False, True], ids=["alive", "killed"])
def test_a_revocation_ends_processes_and_outlives_aetherd(layout: Layout, kill: bool) -> None:
    mark = f"{600 + kill}.{os.getpid()}"
    with instance.client(layout) as owner:
        minted = owner.tickets.mint(role="user")
        narrow = attenuate(minted.ticket, kinds=["command"])
        with Client(state=layout.root, ticket=narrow) as holder:
            jobs = sleeps(holder, 3, mark)
            until_alive(mark, 3)
            owner.tickets.revoke(minted.link_id)
            if kill:
                pid = instance.role_pid(layout, "aetherd")
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
            until_alive(mark, 0)
            for job_id in jobs:
                job = ended(owner, job_id)
                assert job.state is JobState.CANCELLED and job.error is not None and job.error.code == "REVOKED"
            with pytest.raises(AetherError) as refused:
                sleeps(holder, 1, mark)
            assert refused.value.code == "TICKET_REVOKED"
        assert owner.tickets.show(minted.link_id).revoked_at is not None
