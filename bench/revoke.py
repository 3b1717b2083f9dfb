"""What a revocation takes: 100 running cells and 1,000 waiting jobs of one ticket, and one running job.

A time ends when the answer is there; then every job of the ticket is terminal, which is checked.
64 cells run commands of their own, the others are allocated cells with one guest each: so many places there are.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from aether.client import Client
from aether.contract.jobs import TERMINAL, JobRequest
from aether.contract.paths import Layout
from aether.orchestrator.service import CELLS_RUNNING_MAX
from bench import harness

RUNNING, WAITING = 100, 1_000
_MIB = 1 << 20


def sleeping(client: Client, cell: str | None = None) -> str:
    limits = {"memory_bytes": 16 * _MIB}
    params: dict[str, Any] = {"argv": ["sleep", "600"]} | ({"cell": cell} if cell else {"limits": limits})
    return client.submit(JobRequest(kind="command", op="run", params=params)).job_id


def until_running(client: Client, jobs: list[str]) -> None:
    for job_id in jobs:
        while client.get(job_id).started_at is None:
            time.sleep(0.01)


def many(layout: Layout) -> dict[str, Any]:
    """One revocation of RUNNING cells and WAITING jobs."""
    with Client(state=layout.root) as owner:
        minted = owner.tickets.mint(role="user")
        with Client(state=layout.root, ticket=minted.ticket) as holder:
            cells = [f"agent{number}" for number in range(RUNNING - CELLS_RUNNING_MAX)]
            for name in cells:
                holder.cells.allocate(name)
            runs = [*(sleeping(holder, name) for name in cells), *(sleeping(holder) for _ in range(CELLS_RUNNING_MAX))]
            until_running(holder, runs)
            waits = [sleeping(holder) for _ in range(WAITING)]
        took_ms = timed(owner, minted.link_id)
        late = sum(owner.get(job_id).state not in TERMINAL for job_id in (*runs, *waits))
        return row(RUNNING, WAITING, [took_ms], late)


def one(layout: Layout, rounds: int) -> dict[str, Any]:
    """The same of one running job, `rounds` times."""
    times, late = [], 0
    with Client(state=layout.root) as owner:
        for _ in range(rounds):
            minted = owner.tickets.mint(role="user")
            with Client(state=layout.root, ticket=minted.ticket) as holder:
                job_id = sleeping(holder)
                until_running(holder, [job_id])
            times.append(timed(owner, minted.link_id))
            late += owner.get(job_id).state not in TERMINAL
    return row(1, 0, times, late)


def row(running: int, waiting: int, times_ms: list[float], late: int) -> dict[str, Any]:
    figures = {f"p{share}_ms": harness.percentile(times_ms, share / 100) for share in (50, 99)}
    return {"running": running, "waiting": waiting, "rounds": len(times_ms), **figures, "not_ended": late}


def timed(owner: Client, link_id: str) -> float:
    """Milliseconds until the answer."""
    start = time.perf_counter()
    owner.tickets.revoke(link_id)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    asked = parser.parse_args()
    with harness.instance() as layout:
        rows = [one(layout, asked.rounds), many(layout)]
    harness.report("revoke", rows)


if __name__ == "__main__":
    main()
