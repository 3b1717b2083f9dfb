"""The options that bound a cell, for every command that makes one: from their notations to `Limits`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from aether.contract.cells import Limits, Sched

Memory = Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="Memory bound: 256M, 1G.")]
MemoryHigh = Annotated[
    str | None, typer.Option("--memory-high", metavar="SIZE", help="Memory above which it is slowed down.")
]
Disk = Annotated[str | None, typer.Option("--disk", metavar="SIZE", help="What it may keep on disk: 500M.")]
Cpu = Annotated[str | None, typer.Option("--cpu", metavar="CPUS", help="CPUs: 0.5, 2.")]
CpuWeight = Annotated[
    int | None, typer.Option("--cpu-weight", metavar="N", help="Share of contended CPUs: 1 to 10000, 100 by default.")
]
CpusAllowed = Annotated[str | None, typer.Option("--cpus-allowed", metavar="LIST", help="Which CPUs: 0-3,6.")]
IoWeight = Annotated[
    int | None, typer.Option("--io-weight", metavar="N", help="Share of a contended disk: 1 to 10000.")
]
Nice = Annotated[int | None, typer.Option("--nice", metavar="N", help="Nice value: -20 to 19.")]
SchedText = Annotated[
    str | None,
    typer.Option("--sched", metavar="CLASS", help="batch, idle, fifo:PRIORITY, rr:PRIORITY, deadline:RUNTIME/PERIOD."),
]
IoClassText = Annotated[
    str | None, typer.Option("--io-class", metavar="CLASS", help="idle, best-effort:PRIORITY, realtime:PRIORITY.")
]
Limit = Annotated[
    list[str] | None,
    typer.Option("--limit", metavar="NAME=VALUE", help="Any other limit: swap=64M, io_write_bps=10M, nofile=4096."),
]
Driver = Annotated[
    str | None, typer.Option("--driver", metavar="NAME", help="Who builds the cell: native, runc, crun, runsc.")
]
_SIZES: Final = ("memory_", "swap_", "tmp_", "file_", "disk_", "io_read_b", "io_write_b")


def required(words: list[str] | None, driver: str | None) -> list[str]:
    """What a cell requires: levels, mechanisms, and its driver."""
    return [*(words or ()), *([driver] if driver else ())]


def to_limits(
    *,
    memory: str | None = None,
    memory_high: str | None = None,
    disk: str | None = None,
    cpu: str | None = None,
    cpu_weight: int | None = None,
    cpus_allowed: str | None = None,
    io_weight: int | None = None,
    timeout: str | None = None,
    pids: int | None = None,
    nice: int | None = None,
    sched: str | None = None,
    io_class: str | None = None,
    more: list[str] | None = None,
) -> Limits:
    """What the options say; raises AetherError BAD_FIELD for a notation that is not understood."""
    from aether.cli import parse
    from aether.contract.cells import Limits

    asked: dict[str, Any] = dict(_named(entry) for entry in more or [])
    for name, text, read in (
        ("memory_bytes", memory, parse.size_bytes),
        ("memory_high_bytes", memory_high, parse.size_bytes),
        ("disk_bytes", disk, parse.size_bytes),
        ("cpu_millis", cpu, parse.cpu_millis),
        ("timeout_ms", timeout, parse.duration_ms),
    ):
        if text is not None:
            asked[name] = read(text)
    plain = {"cpu_weight": cpu_weight, "cpuset_cpus": cpus_allowed, "io_weight": io_weight, "pids": pids}
    asked |= {name: value for name, value in plain.items() if value is not None}
    if sched is not None or nice is not None or io_class is not None:
        asked["sched"] = to_sched(sched, nice, io_class)
    return Limits(**asked)


def _named(entry: str) -> tuple[str, Any]:
    """`NAME=VALUE`; the unit of a name in bytes may be left out: swap=64M."""
    from aether.cli import parse
    from aether.contract.cells import Limits
    from aether.contract.errors import AetherError

    name, equals, text = entry.partition("=")
    known = {field for field in Limits.__struct_fields__ if field != "sched"}
    name = name if name in known else f"{name}_bytes"
    if not equals or name not in known:
        names = ", ".join(sorted(known))
        raise AetherError("BAD_FIELD", f"cannot read --limit {entry[:80]!r}: no such limit", f"name one of {names}")
    if name.startswith("cpuset_"):
        return name, text
    if name.startswith(_SIZES):
        return name, parse.size_bytes(text)
    if name.endswith("_ms"):
        return name, parse.duration_ms(text)
    if not (text.isascii() and text.isdigit()):
        raise AetherError("BAD_FIELD", f"cannot read --limit {entry[:80]!r}: {name} is a whole number")
    return name, int(text)


def to_sched(sched: str | None, nice: int | None, io_class: str | None) -> Sched:
    """`--sched`, `--nice` and `--io-class` as one; what does not go together is refused by the node."""
    from aether.cli import parse
    from aether.contract.cells import Sched
    from aether.contract.errors import AetherError

    asked: dict[str, Any] = {"nice": nice or 0}
    policy, _, detail = (sched or "other").partition(":")
    io_name, _, io_priority = (io_class or "none").partition(":")
    try:
        if policy == "deadline":
            runtime, _, period = detail.partition("/")
            runtime_us, period_us = parse.duration_ms(runtime) * 1000, parse.duration_ms(period) * 1000
            asked |= {"runtime_us": runtime_us, "deadline_us": period_us, "period_us": period_us}
        elif detail:
            asked["priority"] = int(detail)
        if io_priority:
            asked["io_priority"] = int(io_priority)
    except ValueError as error:
        raise AetherError("BAD_FIELD", f"cannot read {sched or io_class!r}: a priority is a whole number") from error
    _check_word("--sched", policy, ("other", "batch", "idle", "fifo", "rr", "deadline"))
    _check_word("--io-class", io_name, ("none", "realtime", "best-effort", "idle"))
    return Sched(policy=policy, io_class=io_name, **asked)  # type: ignore[arg-type]


def _check_word(option: str, word: str, words: tuple[str, ...]) -> None:
    from aether.contract.errors import AetherError

    if word not in words:
        raise AetherError("BAD_FIELD", f"cannot read {option} {word[:80]!r}: it is none of {', '.join(words)}")
