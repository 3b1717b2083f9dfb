"""The audit log alone: durable records a second at concurrency 256, and how long one waits at 16.

Records are those of model jobs (an intent and an outcome in turn), canonical JSON, through `AuditLog` as the authority
uses it: appended on the event loop, acknowledged after the fdatasync of their frame. Each of so many tasks appends one
and waits for it. Beside it the fdatasync of the same file system, taken before and after, and what a search costs.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop
from msgspec.structs import replace

from aether.contract.cells import Usage
from aether.contract.records import BudgetRef, CodeRef, PolicyRef, Record, TicketRef
from aether.substrate.audit.entry import encode
from aether.substrate.audit.log import AuditLog
from aether.substrate.audit.note import Signer
from aether.substrate.audit.search import Sight, Wanted, search
from bench import harness

NODE = "node_0190f6a2-7b3c-7def-8123-456789abcdef"
SIGNER = Signer(f"aether/{NODE}/1", b"\x07" * 32)
DIGEST = "sha256:" + "ab" * 32
TIME = "2026-11-21T02:10:00.123456Z"
LINKS = ("ab" * 16, "cd" * 16)


def records() -> tuple[Record, Record]:
    """An intent and an outcome, as a model job leaves them."""
    intent = Record(
        type="job.intent",
        log_index=0,
        time=TIME,
        node_id=NODE,
        tenant_id="default",
        principal="uid:1000",
        request_id="req_0190f6a2-7b3c-7def-8123-456789abcdef",
        operation="job.submit",
        effect="pure",
        job_id="job_0190f6a2-7b3c-7def-8123-456789abcdef",
        attempt=1,
        kind="model",
        op="predict_trajectory",
        model_id="pendulum",
        input_hash=DIGEST,
        idempotency_hash=DIGEST,
        ticket=TicketRef(kid="e1", role="user", link_ids=LINKS, implicit=False),
        policy=PolicyRef(digest=DIGEST, decision="allow", determining=("user-submit",)),
        budget=BudgetRef(reservation_id="rsv_0190f6a2", accounts=LINKS, ops=1, cpu_ms=0, settled=False),
        created_at=TIME,
    )
    outcome = replace(
        intent,
        type="job.outcome",
        state="succeeded",
        ticket=None,
        policy=None,
        code=CodeRef(model_digest=DIGEST, route="local", engine="cfcd", rung="cell"),
        usage=Usage(wall_us=1200, batch_size=4, basis={"wall_us": "measured", "batch_size": "measured"}),
        result_digest=DIGEST,
        result_bytes=900,
        started_at=TIME,
        finished_at=TIME,
        timings_us={"queue": 120, "run": 900},
        detail={"intent_index": "1"},
    )
    return intent, outcome


def maker() -> Callable[[int], Record]:
    pair = records()
    return lambda index: replace(pair[index & 1], log_index=index)


async def load(directory: Path, tasks: int, seconds: float) -> tuple[list[float], int, float]:
    """Latencies in ms, how many records, how long it took."""
    log = AuditLog.open(directory, SIGNER, SIGNER.name, now_ns=time.monotonic_ns, on_fatal=_fatal)
    make = maker()
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def one() -> None:
        while (start := time.perf_counter()) < end:
            await log.durable(log.append(make))
            latencies.append((time.perf_counter() - start) * 1e3)

    begun = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(tasks)))
    elapsed, size = time.perf_counter() - begun, log.size
    log.close()
    return latencies, size, elapsed


def _fatal(error: BaseException) -> None:
    raise SystemExit(f"cannot measure: {error}")


def row(tasks: int, seconds: float) -> dict[str, Any]:
    """One run in a directory of its own, and the fdatasync there."""
    directory = Path(tempfile.mkdtemp(prefix="aether-bench-"))
    try:
        before = harness.fdatasync_ms(directory, 100)
        latencies, count, elapsed = uvloop.run(load(directory / "log", tasks, seconds))
        sync = statistics.median(before + harness.fdatasync_ms(directory, 100))
        return {
            "concurrency": tasks,
            "records": count,
            "records_per_s": count / elapsed,
            "p50_ms": statistics.median(latencies),
            "p99_ms": harness.percentile(latencies, 0.99),
            "fdatasync_p50_ms": sync,
            "p50_above_fdatasync_ms": statistics.median(latencies) - sync,
        }
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def searching(count: int) -> dict[str, Any]:
    """What a search costs a record: the filter over entries in memory, with few that fit."""
    make = maker()
    entries = [encode(make(index)) for index in range(count)]
    wanted = Wanted(Sight(True, None), principal="uid:4242")
    start = time.perf_counter()
    found = search(entries, 0, (0, count), wanted, True, (50, 1 << 20))
    elapsed = time.perf_counter() - start
    assert not found.entries
    return {"records": count, "search_us_per_record": elapsed / count * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0)
    asked = parser.parse_args()
    harness.report("audit", [row(tasks, asked.seconds) for tasks in (1, 16, 256)])
    harness.report("audit_search", [searching(50_000)])


if __name__ == "__main__":
    main()
