"""Budgets, end to end: the real command, socket and kernel; 256 clients on one ticket, CPU that runs out, a death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aether.client import Client
from aether.contract.errors import AetherError
from aether.contract.jobs import JobRequest, JobState, JobView
from aether.contract.paths import Layout
from tests.support import instance, machine

AETHER = Path(sys.executable).with_name("aether")
SPIN = "while True: pass"
OVERSHOOT_MS = 100


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with instance.running() as found:
        yield found


def shell(layout: Layout, text: str) -> subprocess.CompletedProcess[str]:
    path = f"{AETHER.parent}:{os.environ['PATH']}"
    env = {**os.environ, "AETHER_STATE": str(layout.root), "PATH": path}
    return subprocess.run(["bash", "-eu", "-c", text], capture_output=True, text=True, timeout=120, env=env)


def job(*argv: str, **params: Any) -> JobRequest:
    return JobRequest(kind="command", op="run", params={"argv": list(argv), **params})


def ended(client: Client, job_id: str) -> JobView:
    """The job once it is terminal, however often the node is away meanwhile."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return client.wait(job_id, 30)
        except AetherError as error:
            assert error.code in ("UNAVAILABLE", "UNREACHABLE") and time.monotonic() < deadline, error
            time.sleep(0.1)


def can_count_cpu(layout: Layout) -> bool:
    with instance.client(layout) as client:
        view = client.submit(job("true"), wait_s=20)
        usage = client.wait(view.job_id, 20).usage
        return usage is not None and usage.cpu_user_us is not None


def test_256_clients_on_one_ticket_of_100(layout: Layout) -> None:
    with instance.client(layout) as owner:
        minted = owner.tickets.mint(role="user", budget={"ops": 100, "micro_usd": 1_000_000})

        def submit(_: int) -> str:
            with Client(state=layout.root, ticket=minted.ticket) as client:
                try:
                    client.submit(job("true"))
                except AetherError as error:
                    assert "100 ops of 100 ops" in error.message, error.message
                    return error.code
                return "OK"

        with ThreadPoolExecutor(64) as pool:
            codes = Counter(pool.map(submit, range(256)))
        assert codes == {"OK": 100, "BUDGET_EXHAUSTED": 156}
        told = {b.unit: (b.spent + b.reserved, b.limit) for b in owner.tickets.show(minted.link_id).budget}
        assert told == {"ops": (100, 100), "micro_usd": (0, 1_000_000)}


@pytest.mark.parametrize(("left_ms", "jobs", "cpu_millis"), [(400, 1, 1_000), (400, 3, 500), (300, 1, 2_000)])
def test_cpu_runs_out_for_all_that_share_it(layout: Layout, left_ms: int, jobs: int, cpu_millis: int) -> None:
    if not can_count_cpu(layout):
        pytest.skip("no CPU accounting for cells here")
    with instance.client(layout) as owner:
        minted = owner.tickets.mint(role="user", budget={"cpu_ms": left_ms})
        with Client(state=layout.root, ticket=minted.ticket) as client:
            asked = job(sys.executable, "-c", SPIN, limits={"cpu_millis": cpu_millis})
            started = [client.submit(asked).job_id for _ in range(jobs)]
            views = [ended(client, job_id) for job_id in started]
        for view in views:
            assert view.state is JobState.FAILED and view.error is not None
            assert view.error.code == "BUDGET_EXHAUSTED" and view.error.details["limit"] == left_ms
            assert f"{left_ms / 1000:g} s of CPU ran out" in view.error.message
        spent = owner.tickets.show(minted.link_id).budget[0].spent
        assert left_ms <= spent <= left_ms + OVERSHOOT_MS, spent


def test_a_budget_binds_though_aetherd_is_killed(layout: Layout) -> None:
    """The job runs on while there is no aetherd; the next one ends it."""
    mark = f"{600}.{os.getpid()}"
    with instance.client(layout) as owner:
        minted = owner.tickets.mint(role="user", budget={"wall_ms": 2_500})
        with Client(state=layout.root, ticket=minted.ticket) as client:
            job_id = client.submit(job("sleep", mark)).job_id
            deadline = time.monotonic() + 20
            while not machine.mentioning(mark):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        pid = instance.role_pid(layout, "aetherd")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        view = ended(owner, job_id)
        assert view.error is not None and view.error.code == "BUDGET_EXHAUSTED", view
        deadline = time.monotonic() + 20
        while any(machine.argv_of(pid)[:1] == ["sleep"] for pid in machine.mentioning(mark)):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_by_the_command(layout: Layout) -> None:
    done = shell(
        layout,
        """
        T=$(aether ticket mint --role user --budget ops=1,usd=1,cpu=1m,ttl=1h --expires 2h --quiet)
        L=$(aether ticket inspect "$T" --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["link_id"])')
        AETHER_TICKET=$T aether run -- echo one
        AETHER_TICKET=$T aether run -- echo two || echo "refused with $?"
        aether budget top-up "$L" ops=1 usd=0.5
        AETHER_TICKET=$T aether run -- echo three
        aether budget show "$L"
        aether budget show "$T" --json
        aether budget set --tenant acme ops=5 wall=1h && aether budget show --tenant acme
        aether budget set --tenant acme ops=none wall=none
        aether quota set --principal uid:4711 open_jobs=3
        aether usage --by kind
        aether budget usage --by principal --json
        """,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line in ("one", "two", "three")] == ["one", "three"]
    assert "refused with 121" in lines and "[BUDGET_EXHAUSTED]" in done.stderr
    assert "2 of 2 ops" in done.stdout and "0 of 1.5 USD" in done.stdout and "0 of 5 ops" in done.stdout
    assert any(line.startswith("command\t") for line in lines)
    assert "principal:uid:4711\topen_jobs\t0\t3\tset" in lines
    shown = json.loads(done.stdout[done.stdout.index("{") :].partition("\n}")[0] + "\n}")
    assert {b["unit"]: b["limit"] for b in shown["accounts"][0]["budget"]}["micro_usd"] == 1_500_000


def test_a_rate_is_answered_with_a_time_to_wait(layout: Layout) -> None:
    with instance.client(layout) as owner:
        minted = owner.tickets.mint(role="user")
        with Client(state=layout.root, ticket=minted.ticket) as client:
            client.budgets.usage()
        owner.budgets.set_quotas("tenant:default", {"requests_per_s": 5})
        try:
            curl = f"curl -s -o /dev/null -D - --unix-socket {layout.api_socket} http://localhost/v0/usage"
            answers = shell(layout, f"for i in $(seq 30); do {curl}; done").stdout.lower()
        finally:
            time.sleep(1.1)
            owner.budgets.set_quotas("tenant:default", {"requests_per_s": None})
        assert "http/1.1 429" in answers and "retry-after: 1" in answers and "http/1.1 200" in answers
