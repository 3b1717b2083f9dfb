"""Reservations and settlements as amounts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.cells import ExecEnd, ExitStatus, Limits, Usage
from aether.substrate.access.tickets import Limit
from aether.substrate.metering import settle

LINKS = ("a", "b")


def test_a_job_holds_one_operation_and_says_what_its_cell_may_use() -> None:
    limits = settle.limits_of((Limit("a", "ops", 5), Limit("a", "ops", 3), Limit("b", "cpu_ms", 9)), "acme", {"ops": 7})
    assert limits == {"a": {"ops": 3}, "b": {"cpu_ms": 9}, "tenant:acme": {"ops": 7}}
    held = settle.reservation("rsv", LINKS, limits, 17, Limits(cpu_millis=500, memory_bytes=1 << 30))
    assert (held.ops, held.cpu_ms, held.settled, held.accounts, held.amounts) == (1, 0, False, LINKS, {})
    assert (held.limits, held.expires_ms, held.grants) == (limits, 17, {"cpu_millis": 500, "memory_bytes": 1 << 30})


def test_memory_is_charged_as_granted() -> None:
    held = settle.reservation("rsv", LINKS, {}, None, Limits(memory_bytes=1_000))
    settled = settle.settlement(held, Usage(wall_us=2_500_001, memory_peak_bytes=7))
    assert settled.amounts == {"wall_ms": 2_501, "memory_byte_s": 2_501}


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (None, 0),
        (Usage(), 0),
        (Usage(cpu_user_us=1), 1),
        (Usage(cpu_user_us=1_500, cpu_system_us=500), 2),
        (Usage(cpu_system_us=2_001), 3),
    ],
)
def test_settling_rounds_up(usage: Usage | None, expected: int) -> None:
    held = settle.reservation("rsv", LINKS, {}, None)
    settled = settle.settlement(held, usage)
    assert (settled.cpu_ms, settled.settled, settled.reservation_id) == (expected, True, "rsv")


def test_every_figure_says_how_it_was_found() -> None:
    end = ExecEnd(cell_id="c", exec_id="e", exit=ExitStatus(code=0), usage=Usage(wall_us=5, basis={"wall_us": "x"}))
    assert settle.usage_of(end).basis == {"wall_us": "x"}
    assert settle.with_basis(Usage(wall_us=5, oom_kills=0), settle.MEASURED).basis == {
        "wall_us": "measured",
        "oom_kills": "measured",
    }


@given(st.integers(0, 10**9), st.integers(1, 64))
def test_shares_of_a_batch_are_never_less_than_the_whole(cpu_us: int, count: int) -> None:
    share = settle.apportion(Usage(cpu_user_us=cpu_us, wall_us=7), count)
    assert cpu_us <= (share.cpu_user_us or 0) * count < cpu_us + count
    assert share.batch_size == count and share.basis["cpu_user_us"] == "apportioned" and share.cpu_system_us is None
