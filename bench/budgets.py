"""What a budget costs and how late it is: accounts in memory, and CPU spent above what was left.

`python -m bench.budgets`: microseconds of reserve, intent and outcome on the accounts, by depth of the ticket; then the
CPU overshoot of jobs that spin until their ticket has none left, alone and sharing it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from aether.client import Client
from aether.contract.jobs import JobRequest
from aether.contract.paths import Layout
from aether.contract.records import BudgetRef, Record
from aether.substrate.access.budget import Accounts
from bench import harness

ROUNDS = 50_000
SHAPES = ((1, 1_000), (1, 2_000), (4, 500), (8, 1_000))
"""Jobs on one ticket, thousandths of a CPU of each."""
LEFT_MS = 300
_SPIN = "while True: pass"


def accounting(links: int) -> float:
    """Microseconds for one job on a ticket of so many links with a budget."""
    accounts, names = Accounts(), tuple(f"{number:032x}" for number in range(max(links, 1)))
    limits = {name: {"ops": 1 << 50, "cpu_ms": 1 << 50} for name in names[:links]}
    refs = [
        BudgetRef(reservation_id=str(n), accounts=names, ops=1, cpu_ms=0, settled=False, limits=limits)
        for n in range(ROUNDS)
    ]
    done = [BudgetRef(reservation_id=str(n), accounts=names, ops=1, cpu_ms=3, settled=True) for n in range(ROUNDS)]
    intents = [_record("job.intent", ref) for ref in refs]
    outcomes = [_record("job.outcome", ref) for ref in done]
    began_s = time.perf_counter()
    for ref, intent, outcome in zip(refs, intents, outcomes, strict=True):
        accounts.reserve(ref, runs=True)
        accounts.apply(intent)
        accounts.apply(outcome)
    return (time.perf_counter() - began_s) / ROUNDS * 1e6


def _record(kind: Any, ref: BudgetRef) -> Record:
    return Record(type=kind, log_index=0, time="", node_id="", budget=ref)


def overshoot_ms(layout: Layout, jobs: int, cpu_millis: int) -> int:
    """CPU spent above LEFT_MS by jobs that share it."""
    with Client(state=layout.root) as owner:
        minted = owner.tickets.mint(role="user", budget={"cpu_ms": LEFT_MS})
        params = {"argv": [sys.executable, "-c", _SPIN], "limits": {"cpu_millis": cpu_millis}}
        with Client(state=layout.root, ticket=minted.ticket) as holder:
            ids = [holder.submit(JobRequest(kind="command", op="run", params=params)).job_id for _ in range(jobs)]
        for job_id in ids:
            owner.wait(job_id, 60)
        return owner.tickets.show(minted.link_id).budget[0].spent - LEFT_MS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(json.dumps({"us_per_job": {links: round(accounting(links), 2) for links in (0, 1, 4)}}))
    with harness.instance() as layout:
        for jobs, cpu_millis in SHAPES:
            found = sorted(overshoot_ms(layout, jobs, cpu_millis) for _ in range(rounds))
            print(json.dumps({"jobs": jobs, "cpu_millis": cpu_millis, "overshoot_ms": found}))


if __name__ == "__main__":
    main()
