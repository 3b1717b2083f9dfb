"""`aether job activity|trace`, `aether cell activity|trace`: what the processes of a cell do, as the kernel sees."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Final

import typer

from aether.cli.session import Session

if TYPE_CHECKING:
    from aether.contract.activity import ActivityEvent, Trace

Job = Annotated[str, typer.Argument(metavar="JOB", help="A job id.")]
Cell = Annotated[str, typer.Argument(metavar="NAME", help="A cell's name or id.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Until the cell is over.")]
Seconds = Annotated[str, typer.Option("--seconds", metavar="TIME", help="How long: 5, 500ms.")]

ACTIVITY_HELP: Final = """Show which programs ran in a job's cell, how they ended, and the signals they got.

\b
Example:
  aether job activity -f JOB
"""
TRACE_HELP: Final = """Count the system calls of a running job's cell for a while, and show the last ones.

\b
Example:
  aether job trace JOB --seconds 5
"""
CELL_ACTIVITY_HELP: Final = """Show which programs ran in a cell, how they ended, and the signals they got.

\b
Example:
  aether cell activity -f agent
"""
CELL_TRACE_HELP: Final = """Count the system calls of a cell for a while, and show the last ones.

\b
Example:
  aether cell trace agent --seconds 5
"""
LAST_SHOWN: Final = 20


def of_job(session: Session, job_id: Job, follow: Follow = False) -> None:
    with session.client() as client:
        show_events(session, lambda cursor: client.activity(job_id, follow=follow, cursor=cursor))


def trace_job(session: Session, job_id: Job, seconds: Seconds = "5") -> None:
    from aether.cli.output import progress
    from aether.cli.parse import duration_ms

    with session.client() as client, progress("tracing"):
        found = client.trace(job_id, duration_ms=duration_ms(seconds))
    show_trace(session, found)


def of_cell(session: Session, cell: Cell, follow: Follow = False) -> None:
    with session.client() as client:
        show_events(session, lambda cursor: client.cells.activity(cell, follow=follow, cursor=cursor))


def trace_cell(session: Session, cell: Cell, seconds: Seconds = "5") -> None:
    from aether.cli.output import progress
    from aether.cli.parse import duration_ms

    with session.client() as client, progress("tracing"):
        found = client.cells.trace(cell, duration_ms=duration_ms(seconds))
    show_trace(session, found)


def show_events(session: Session, read: Callable[[int], Iterator[tuple[ActivityEvent, int]]]) -> None:
    """One line per event as it comes (JSON lines with --json), resumed at the same event after a break."""
    import msgspec

    from aether.cli.follow import RESUME_S, RESUMED
    from aether.contract.errors import AetherError

    cursor, broken_since = 0, None
    while True:
        try:
            for event, behind in read(cursor):
                cursor, broken_since = behind, None
                sys.stdout.write(msgspec.json.encode(event).decode() if session.as_json else event_line(event))
                sys.stdout.write("\n")
                sys.stdout.flush()
            return
        except AetherError as error:
            broken_since = broken_since or time.monotonic()
            if error.code not in RESUMED or time.monotonic() - broken_since > RESUME_S:
                raise
            time.sleep(0.1)


def event_line(event: ActivityEvent) -> str:
    """`TIME  KIND  PROCESS  what`, without anything that a terminal would obey."""
    from aether.cli.terminal import printable
    from aether.contract.clock import rfc3339

    when = rfc3339(event.time_us * 1000) if event.time_us is not None else "-"
    who = f"{event.pid or '-'} {event.comm or ''}".rstrip()
    return printable(f"{when}  {event.kind:<8}  {who:<24}  {_what(event)}".rstrip())


def _what(event: ActivityEvent) -> str:
    match event.kind:
        case "exec":
            return event.path or ""
        case "exit":
            return signal_name(event.signal) if event.signal is not None else f"code {event.code}"
        case "signal":
            sender = f"{event.sender_pid} {event.sender_comm}" if event.sender == "process" else event.sender
            return f"{signal_name(event.signal)} from {sender}"
        case "oom":
            return "killed for want of memory"
        case "throttle":
            return f"waited {(event.count or 0) / 1e6:.3f} s for its share of CPU"
        case "dropped" | "ended":
            return f"{event.count} events were not kept" if event.count else ""
        case "gap":
            return "older events were not kept"


def signal_name(number: int | None) -> str:
    """`SIGTERM`; the number where there is no name."""
    import signal

    try:
        return signal.Signals(number or 0).name
    except ValueError:
        return f"signal {number}"


def show_trace(session: Session, trace: Trace) -> None:
    """Two tables: calls by count, and the last ones."""
    from aether.cli.output import show_json, show_table

    if session.as_json:
        show_json(trace)
        return
    show_table(("CALLS", "NUMBER", "NAME"), [(call.count, call.number, call.name) for call in trace.calls])
    rows = [(c.pid, c.thread, c.comm, f"{c.name}({', '.join(c.arguments)}, ...)") for c in trace.last[-LAST_SHOWN:]]
    show_table(("PID", "THREAD", "COMM", "LAST CALLS"), rows)
