"""The ledger is a fold: feeding it live and feeding it again at start give the same memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract import ids
from aether.contract.clock import epoch_ns
from aether.contract.limits import IDEMPOTENCY_WINDOW_S
from aether.contract.records import BudgetRef, Record, RecordType
from aether.substrate.ledger import Ledger, OpenJob, grant_of

TIME = "2026-09-21T13:33:20.000000Z"
JOBS = [ids.new(ids.JOB) for _ in range(4)]


def record(index: int, kind: RecordType, job_id: str | None, key: str | None = None) -> Record:
    budget = BudgetRef(reservation_id="rsv_x", accounts=("a",), ops=1, cpu_ms=0, settled=kind == "job.outcome")
    return Record(
        type=kind,
        log_index=index,
        time=TIME,
        node_id="node",
        job_id=job_id,
        attempt=1,
        input_hash="sha256:" + "0" * 64,
        idempotency_hash=key,
        budget=budget,
        cell_id="cell",
        detail={"exec_id": "exec"},
    )


KINDS = st.sampled_from(["job.intent", "job.started", "job.stop", "job.outcome", "ticket.minted"])
HISTORIES = st.lists(st.tuples(KINDS, st.sampled_from(JOBS), st.sampled_from([None, "k1", "k2"])), max_size=40)


def fold(records: list[Record]) -> Ledger:
    ledger = Ledger()
    for one in records:
        ledger.apply(one)
    return ledger


def memory(ledger: Ledger) -> tuple[int, dict[str, OpenJob], object]:
    return ledger.applied, ledger.open, ledger.keys()


@given(HISTORIES, st.integers(0, 40))
def test_snapshot_and_tail_equal_the_whole_fold(history: list[tuple[RecordType, str, str | None]], cut: int) -> None:
    records = [record(index, kind, job_id, key) for index, (kind, job_id, key) in enumerate(history)]
    whole, head = fold(records), fold(records[:cut])
    resumed = Ledger()
    resumed.restore(head.applied, list(head.open.values()), head.keys())
    for one in records[cut:]:
        resumed.apply(one)
    assert memory(resumed) == memory(whole)


@given(HISTORIES)
def test_a_job_is_open_between_its_intent_and_its_outcome(history: list[tuple[RecordType, str, str | None]]) -> None:
    records = [record(index, kind, job_id, key) for index, (kind, job_id, key) in enumerate(history)]
    expected: set[str] = set()
    for kind, job_id, _ in history:
        if kind == "job.intent":
            expected.add(job_id)
        elif kind == "job.outcome":
            expected.discard(job_id)
    assert set(fold(records).open) == expected


def test_records_come_in_order_and_once() -> None:
    ledger = fold([record(0, "job.intent", JOBS[0])])
    with pytest.raises(ValueError, match="out of order"):
        ledger.apply(record(0, "job.intent", JOBS[0]))


def test_a_key_is_forgotten_after_its_window() -> None:
    ledger = fold([record(0, "job.intent", JOBS[0], "key")])
    start = epoch_ns(TIME)
    entry = ledger.remembered("key", start)
    assert entry is not None and entry.job_id == JOBS[0]
    assert ledger.remembered("key", start + IDEMPOTENCY_WINDOW_S * 10**9) is None


def test_a_grant_is_the_same_after_a_restart() -> None:
    intent = record(0, "job.intent", JOBS[0])
    assert grant_of(intent) == fold([intent]).open[JOBS[0]].grant
    assert grant_of(intent).job_id == JOBS[0]
