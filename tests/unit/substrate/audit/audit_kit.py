"""What the audit tests share: a signer, small bounds, records, a log that is opened and filled."""

from __future__ import annotations

import os
import time
from pathlib import Path

from aether.contract.records import BudgetRef, PolicyRef, Record, TicketRef
from aether.substrate.audit.log import AuditLog
from aether.substrate.audit.note import Signer
from aether.substrate.audit.room import Bounds

NODE = "node_0190f6a2-7b3c-7def-8123-456789abcdef"
ORIGIN = f"aether/{NODE}/1"
SIGNER = Signer(ORIGIN, b"\x07" * 32)
PUBLIC_KEY = str(SIGNER.verifier)
SMALL = Bounds(segment_bytes=262_140, frame_bytes=131_070, headroom_bytes=65_536, step_bytes=65_536)
DIGEST = "sha256:" + "ab" * 32
GOLDEN = Path(__file__).parents[4] / "schema/v1/golden"


def fatal(error: BaseException) -> None:
    os._exit(97)


def open_log(directory: Path, **options: object) -> AuditLog:
    arguments = {"now_ns": time.monotonic_ns, "on_fatal": fatal, "bounds": SMALL} | options
    return AuditLog.open(directory, SIGNER, ORIGIN, **arguments)  # type: ignore[arg-type]


def intent(index: int, padding: int = 0) -> Record:
    """A full `job.intent`, as the hot path writes it."""
    return Record(
        type="job.intent",
        log_index=index,
        time="2026-11-21T02:10:00.123456Z",
        node_id=NODE,
        tenant_id="default",
        principal="uid:1000",
        request_id="req_0190f6a2-7b3c-7def-8123-456789abcdef",
        traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        operation="job.submit",
        effect="cell",
        job_id="job_0190f6a2-7b3c-7def-8123-456789abcdef",
        attempt=1,
        kind="command",
        op="run",
        input_hash=DIGEST,
        labels=("local-only",),
        ticket=TicketRef(kid="e1", role="user", link_ids=("ab" * 16, "cd" * 16), implicit=False),
        policy=PolicyRef(digest=DIGEST, decision="allow", determining=("user-submit",)),
        budget=BudgetRef(
            reservation_id="rsv_0190f6a2-7b3c-7def-8123-456789abcdef",
            accounts=("ab" * 16, "cd" * 16),
            ops=1,
            cpu_ms=0,
            settled=False,
        ),
        created_at="2026-11-21T02:10:00.123456Z",
        detail={"padding": "x" * padding} if padding else {},
    )


def plain(index: int, kind: str = "document.stored", padding: int = 0) -> Record:
    """A short record that names no document file."""
    text = {f"n{i}": "x" * 1900 for i in range(padding // 1900)}
    return Record(
        type=kind,  # type: ignore[arg-type]
        log_index=index,
        time="2026-11-21T02:10:00.123456Z",
        node_id=NODE,
        detail={"number": str(index)} | text,
    )


async def fill(log: AuditLog, count: int, padding: int = 0, batch: int = 7) -> None:
    """Appends `count` plain records, some per commit, and waits for them."""
    last = -1
    for number in range(count):
        last = log.append(lambda index: plain(index, padding=padding))
        if number % batch == batch - 1:
            await log.durable(last)
    if last >= 0:
        await log.durable(last)
