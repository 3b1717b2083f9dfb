"""From the options that bound a cell to `Limits`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.cli.bounds import to_limits, to_sched
from aether.contract.cells import Limits, Sched
from aether.contract.errors import AetherError
from aether.contract.jobs import check_bounds


def test_every_option_is_a_limit() -> None:
    asked = to_limits(
        memory="256M", memory_high="200M", cpu="0.5", cpu_weight=20, cpus_allowed="0-1", io_weight=30, timeout="5s",
        pids=7, nice=3, sched="batch", io_class="best-effort:6",
        more=["swap=1M", "io_write_bps=10M", "io_read_iops=100", "nofile=64", "cpuset_mems=0", "memory_low=4K"],
    )  # fmt: skip
    assert asked == Limits(
        memory_bytes=256 << 20, memory_high_bytes=200 << 20, cpu_millis=500, cpu_weight=20, cpuset_cpus="0-1",
        io_weight=30, timeout_ms=5000, pids=7, swap_bytes=1 << 20, io_write_bps=10 << 20, io_read_iops=100, nofile=64,
        cpuset_mems="0", memory_low_bytes=4096,
        sched=Sched(policy="batch", nice=3, io_class="best-effort", io_priority=6),
    )  # fmt: skip
    check_bounds(asked)
    assert to_limits() == Limits()


def test_classes() -> None:
    assert to_sched("fifo:10", None, None) == Sched(policy="fifo", priority=10)
    assert to_sched("deadline:2ms/100ms", None, "idle") == Sched(
        policy="deadline", runtime_us=2000, deadline_us=100_000, period_us=100_000, io_class="idle"
    )


@pytest.mark.parametrize("more", ["speed=9", "pids", "pids=many", "sched=fifo", "memory=lots"])
def test_what_is_no_limit_is_refused(more: str) -> None:
    with pytest.raises(AetherError, match="BAD_FIELD"):
        to_limits(more=[more])


@pytest.mark.parametrize(
    "wrong",
    [
        Limits(cpu_weight=0),
        Limits(io_weight=10_001),
        Limits(cpuset_cpus="1,"),
        Limits(cpuset_mems="0-"),
        Limits(io_read_bps=0),
        Limits(memory_high_bytes=-1),
        Limits(sched=Sched(nice=20)),
        Limits(sched=Sched(policy="fifo")),
        Limits(sched=Sched(policy="deadline", runtime_us=5)),
        Limits(sched=Sched(policy="idle", nice=2)),
        Limits(sched=Sched(io_priority=8)),
    ],
)
def test_what_is_out_of_bounds_is_refused(wrong: Limits) -> None:
    with pytest.raises(AetherError, match="BAD_FIELD"):
        check_bounds(wrong)


@given(st.text(max_size=30), st.one_of(st.none(), st.text(max_size=20)))
def test_any_text_is_read_or_refused(text: str, io_class: str | None) -> None:
    try:
        to_sched(text, None, io_class)
        to_limits(more=[text])
    except AetherError as error:
        assert error.code == "BAD_FIELD"
