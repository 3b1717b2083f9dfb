"""`aether audit query|tail|export`: records of the audit log."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.contract.auditcalls import AuditFilter, Order
    from aether.contract.records import Record

Type = Annotated[list[str] | None, typer.Option("--type", metavar="TYPE", help="Only this type; may be repeated.")]
Who = Annotated[str | None, typer.Option("--principal", metavar="NAME", help="Only what it did: uid:1000.")]
Tenant = Annotated[str | None, typer.Option("--tenant", metavar="NAME", help="Only this tenant's.")]
Job = Annotated[str | None, typer.Option("--job", metavar="JOB", help="Only of this job.")]
Cell = Annotated[str | None, typer.Option("--cell", metavar="CELL", help="Only of this cell: its id or name.")]
Link = Annotated[str | None, typer.Option("--link", metavar="ID", help="Only by tickets with this link.")]
Since = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="From then on: 10m ago, or 2026-09-21T13:33:20Z.")
]
Until = Annotated[str | None, typer.Option("--until", metavar="TIME", help="Before then.")]
Start = Annotated[int, typer.Option("--start", metavar="INDEX", help="From this index on.")]
End = Annotated[int | None, typer.Option("--end", metavar="INDEX", help="Before this index.")]

_QUERY: Final = """Find records of the audit log, newest first.

\b
Examples:
  aether audit query --job JOB --asc
  aether audit query --type access.denied --since 1h
  aether audit query --principal uid:1000 --limit 20 --json
"""
_TAIL: Final = """Print records as they are written.

\b
Examples:
  aether audit tail -f
  aether audit tail -f --type job.outcome --json
"""
_EXPORT: Final = """Write records with their proofs to a file that `aether audit verify` checks offline.

\b
Examples:
  aether audit export --out audit.jsonl
  aether audit export --job JOB --out job.jsonl && aether audit verify job.jsonl --key audit.pub
"""


def register(group: typer.Typer) -> None:
    """Adds them to the `audit` group."""
    command(group, "query", help=_QUERY)(_query)
    command(group, "tail", help=_TAIL)(_tail)
    command(group, "export", help=_EXPORT)(_export)


def _query(
    session: Session, kind: Type = None, principal: Who = None, tenant: Tenant = None, job_id: Job = None,
    cell: Cell = None, link: Link = None, since: Since = None, until: Until = None, start: Start = 0, end: End = None,
    asc: Annotated[bool, typer.Option("--asc", help="Oldest first.")] = False,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="How many.")] = 50,
    cursor: Annotated[int | None, typer.Option("--cursor", metavar="INDEX", help="Go on from there.")] = None,
) -> None:  # fmt: skip
    from aether.cli.output import note, show_json, show_table
    from aether.contract.limits import PAGE_ITEMS_MAX

    wanted = _wanted(kind, principal, tenant, job_id, cell, link, since, until, start, end)
    found: list[Record] = []
    order: Order = "oldest" if asc else "newest"
    with session.client() as client:
        while len(found) < limit:
            page = client.audit.query(wanted, order=order, cursor=cursor, limit=min(limit - len(found), PAGE_ITEMS_MAX))
            found += page.records
            cursor = page.next_cursor
            if cursor is None:
                break
    if session.as_json:
        show_json({"records": found, "next_cursor": cursor})
        return
    columns = ("INDEX", "TIME", "TYPE", "PRINCIPAL", "ABOUT", "WHAT")
    show_table(columns, [(r.log_index, r.time, r.type, r.principal, r.job_id or r.cell_id, what(r)) for r in found])
    if cursor is not None and sys.stderr.isatty():
        note(f"more: --cursor {cursor}")


def _tail(
    session: Session, kind: Type = None, principal: Who = None, tenant: Tenant = None, job_id: Job = None,
    cell: Cell = None, link: Link = None,
    last: Annotated[int, typer.Option("--last", "-n", metavar="N", help="How many of the latest first.")] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="And those to come.")] = False,
) -> None:  # fmt: skip
    from aether.contract.errors import AetherError
    from aether.contract.limits import PAGE_ITEMS_MAX

    if not 0 <= last <= PAGE_ITEMS_MAX:
        raise AetherError("BAD_FIELD", f"cannot tail: --last must be within 0..{PAGE_ITEMS_MAX}")
    wanted = _wanted(kind, principal, tenant, job_id, cell, link, None, None, 0, None)
    with session.client() as client:
        page = client.audit.query(wanted, limit=max(last, 1))
        first = page.records[:last]
        for record in reversed(first):
            _show(session, record)
        if follow:
            _follow(session, client, wanted, page.log_size)


def _follow(session: Session, client: Any, wanted: AuditFilter, at: int) -> None:
    """Prints records from index `at` on, resumed behind the last one after a break."""
    import time

    import msgspec

    from aether.cli.follow import RESUME_S, RESUMED
    from aether.contract.errors import AetherError
    from aether.contract.records import Record

    broken_since = None
    while True:
        try:
            for line in client.audit.tail(wanted, cursor=at, follow=True):
                record = msgspec.json.decode(line, type=Record)
                at, broken_since = record.log_index + 1, None
                _show(session, record)
            return
        except AetherError as error:
            broken_since = broken_since or time.monotonic()
            if error.code not in RESUMED or time.monotonic() - broken_since > RESUME_S:
                raise
            time.sleep(0.1)


def _show(session: Session, record: Record) -> None:
    import msgspec

    from aether.cli.terminal import printable

    if session.as_json:
        sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
    else:
        about = record.job_id or record.cell_id or "-"
        who = record.principal or "-"
        line = f"{record.log_index:>8}  {record.time}  {record.type:<17}  {who:<10}  {about}  {what(record)}"
        sys.stdout.write(printable(line.rstrip()) + "\n")
    sys.stdout.flush()


def _export(
    session: Session, out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to; - is stdout.")],
    kind: Type = None, principal: Who = None, tenant: Tenant = None, job_id: Job = None, cell: Cell = None,
    link: Link = None, since: Since = None, until: Until = None, start: Start = 0, end: End = None,
) -> None:  # fmt: skip
    from aether.cli.output import note, progress
    from aether.contract.errors import AetherError

    wanted = _wanted(kind, principal, tenant, job_id, cell, link, since, until, start, end)
    with session.client() as client:
        if str(out) == "-":
            client.audit.export(wanted, sys.stdout.buffer)
            return
        partial = out.with_name(f".{out.name}.part")
        try:
            with progress("exporting the log"), partial.open("wb") as file:
                size = client.audit.export(wanted, file)
            partial.replace(out)
        except OSError as error:
            raise AetherError(
                "BAD_FIELD", f"cannot write {out}: {error.strerror}", "name a file that may be written"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
    note(f"{size} bytes in {out}; check them with `aether audit verify {out}`")


def what(record: Record) -> str:
    """One phrase on what a record says."""
    if record.error is not None:
        return f"{record.operation or record.state or ''} {record.error.code}".strip()
    if record.type == "job.outcome":
        return record.state or ""
    if record.type == "job.intent":
        return f"{record.kind} {record.model_id or record.op}"
    return " ".join(f"{name}={text}" for name, text in list(record.detail.items())[:4])


def _wanted(
    kind: list[str] | None, principal: str | None, tenant: str | None, job_id: str | None, cell: str | None,
    link: str | None, since: str | None, until: str | None, start: int, end: int | None,
) -> AuditFilter:  # fmt: skip
    from aether.contract.auditcalls import AuditFilter

    return AuditFilter(
        type=tuple(kind or ()),
        principal=principal,
        tenant=tenant,
        job_id=job_id,
        cell=cell,
        ticket=link,
        since=moment(since),
        until=moment(until),
        start=start,
        end=end,
    )


def moment(text: str | None) -> str | None:
    """A time as it stands, or how long ago it is (`10m`)."""
    import time

    from aether.cli.parse import duration_ms
    from aether.contract.clock import rfc3339

    if text is None or "T" in text:
        return text
    return rfc3339(time.time_ns() - duration_ms(text) * 1_000_000)
