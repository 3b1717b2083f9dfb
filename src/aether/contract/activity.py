"""What the processes of a cell do, as the kernel tells it: the public shapes of events and traces, and the calls.

An event is one line of JSON (`aether.spawner.eventlog` writes them and explains the fields). A trace counts the
system calls of a cell for a while.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from aether.contract import limits

ActivityKind = Literal["exec", "exit", "signal", "oom", "throttle", "dropped", "gap", "ended"]
Sender = Literal["process", "outside", "kernel"]


class ActivityEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event. `pid` and `ppid` as the cell counts (a ppid of 0 is outside), `host_pid` as the host does.

    `count`: microseconds lost to the CPU quota (throttle), events not kept so far (dropped, ended), the offset at
    which the stream goes on after a gap: what a long log leaves out between its head and its tail.
    """

    time_us: int | None
    kind: ActivityKind
    pid: int | None
    ppid: int | None
    host_pid: int | None
    comm: str | None
    path: str | None
    code: int | None
    signal: int | None
    sender: Sender | None
    sender_pid: int | None
    sender_comm: str | None
    count: int | None


class CallCount(msgspec.Struct, frozen=True, kw_only=True):
    """How often one system call was made; those that a trace does not tell apart are together."""

    number: int
    name: str
    count: int


class TracedCall(msgspec.Struct, frozen=True, kw_only=True):
    """One system call as it was entered. `arguments` are the first three, in hexadecimal."""

    time_us: int
    pid: int
    thread: int
    number: int
    name: str
    arguments: tuple[str, ...]
    comm: str


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """`job.trace`, `cell.trace`: `calls` by count, `last` the latest ones in order. Calls that the cell's filter
    refuses are not seen."""

    arch: str
    duration_ms: int
    total: int
    calls: tuple[CallCount, ...]
    last: tuple[TracedCall, ...]


class ActivityCall(msgspec.Struct, frozen=True, kw_only=True):
    """`job.activity`: the events of the job's cell from byte `cursor`; `follow` streams until the job is over."""

    job_id: str
    follow: bool = False
    cursor: int = 0


class CellActivityCall(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.activity`: the same of an allocated cell, until it is freed."""

    cell: str
    follow: bool = False
    cursor: int = 0


class TraceCall(msgspec.Struct, frozen=True, kw_only=True):
    """`job.trace`: answers when `duration_ms` are over, or the cell is."""

    job_id: str
    duration_ms: int = limits.TRACE_MS_DEFAULT


class CellTraceCall(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.trace`."""

    cell: str
    duration_ms: int = limits.TRACE_MS_DEFAULT
