"""`aether approvals list|show|approve|deny`: what waits for somebody's leave, and giving it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.contract.approvals import ApprovalView
    from aether.contract.jobs import JobView

Wait = Annotated[
    str | None, typer.Option("--approval", metavar="TIME", help="Wait so long for an approval, if one is demanded.")
]
_ID = Annotated[str, typer.Argument(metavar="ID", help="An approval, or the job that waits for it.")]
_Reason = Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Why; kept in the audit log.")]

_LIST: Final = """List what waits for an approval, newest first.

\b
Examples:
  aether approvals list
  aether approvals list --only granted --only denied
"""
_APPROVE: Final = """Let a request go ahead, exactly as it was asked, once. Look at it first with `approvals show`.

\b
Example:
  aether approvals approve JOB --reason "reviewed the hosts"
"""
_DENY: Final = """Refuse a request: its job is cancelled.

\b
Example:
  aether approvals deny JOB --reason "not on a Friday"
"""


def register(app: typer.Typer) -> None:
    """Adds the `approvals` group."""
    group = typer.Typer(help="What waits for somebody's leave.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="approvals")
    command(group, "list", help=_LIST)(_list)
    command(group, "show", help="Show an approval and the exact request that it is for.")(_show)
    command(group, "approve", help=_APPROVE)(_approve)
    command(group, "deny", help=_DENY)(_deny)


def wait_ms(text: str | None) -> int | None:
    """The time of `--approval`."""
    from aether.contract.approvals import parse_expiry

    return None if text is None else parse_expiry(text)


def tell(job: JobView) -> None:
    """Says on stderr that a job waits, and how that ends."""
    from aether.cli.output import note
    from aether.contract.jobs import JobState

    if job.state is JobState.WAITING_APPROVAL:
        note(f"{job.job_id} waits for an approval: aether approvals approve {job.job_id}")


def _list(
    session: Session,
    only: Annotated[
        list[str] | None, typer.Option(metavar="STATE", help="Only in this state; may be repeated.")
    ] = None,
) -> None:
    from aether.cli.output import show_json, show_table
    from aether.contract.approvals import ApprovalState
    from aether.contract.errors import AetherError

    try:
        states = tuple(ApprovalState(text) for text in only or ())
    except ValueError:
        known = ", ".join(state.value for state in ApprovalState)
        raise AetherError("BAD_FIELD", f"cannot list: the state is none of {known}") from None
    with session.client() as client:
        found = client.approvals.list(states)
    if session.as_json:
        show_json({"approvals": found})
        return
    rows = [
        (a.approval_id, a.state.value, _what(a), f"{a.principal} ({a.role})", ", ".join(a.demanded_by), a.expires_at)
        for a in found
    ]
    show_table(("APPROVAL", "STATE", "FOR", "ASKED BY", "DEMANDED BY", "EXPIRES"), rows)


def _show(session: Session, approval: _ID) -> None:
    from aether.cli.output import show_json

    with session.client() as client:
        found = client.approvals.show(approval)
    if session.as_json:
        show_json(found)
        return
    _fields(found)
    print("request")
    show_json(found.request)


def _approve(session: Session, approval: _ID, reason: _Reason = None) -> None:
    from aether.cli.output import show_json

    with session.client() as client:
        found = client.approvals.approve(approval, reason=reason)
    show_json(found) if session.as_json else print(found.state.value)


def _deny(session: Session, approval: _ID, reason: _Reason = None) -> None:
    from aether.cli.output import show_json

    with session.client() as client:
        found = client.approvals.deny(approval, reason=reason)
    show_json(found) if session.as_json else print(found.state.value)


def _what(approval: ApprovalView) -> str:
    job = f"{approval.kind} {approval.op} {approval.job_id}"
    what = job if approval.cell is None else f"cell {approval.cell}"
    return what + (f" -> {', '.join(approval.hosts)}" if approval.hosts else "")


def _fields(found: ApprovalView) -> None:
    from aether.cli.output import show_fields

    show_fields(
        [
            ("approval", found.approval_id),
            ("state", found.state.value),
            ("for", _what(found)),
            ("asked by", f"{found.principal} as {found.role}"),
            ("tenant", found.tenant_id),
            ("demanded by", ", ".join(found.demanded_by)),
            ("labels", ", ".join(found.labels)),
            ("input", found.input_hash),
            ("asked", found.requested_at),
            ("expires", found.expires_at),
            ("decided", f"{found.decided_by or 'nobody'} at {found.decided_at}" if found.decided_at else None),
            ("reason", found.reason),
        ]
    )
