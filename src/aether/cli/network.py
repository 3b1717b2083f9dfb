"""Options about the network of jobs and cells, and `aether egress list|draft`: what they reached or tried to reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Final

import typer

from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.contract.egresswire import CellEgressPage, EgressConnection, EgressPage
    from aether.contract.network import Credential, Network

Allow = Annotated[
    list[str] | None, typer.Option("--allow", metavar="HOST:PORT", help="Reach this host: a name, *.suffix or address.")
]
Credentials = Annotated[
    list[str] | None,
    typer.Option("--credential", metavar="NAME=HOST:HEADER:SOURCE", help="Send a secret the job never sees."),
]
Secrets = Annotated[
    list[str] | None,
    typer.Option("--secret", metavar="NAME=REFERENCE", help="A variable whose value egressd reads at the start."),
]
Intercept = Annotated[bool, typer.Option("--intercept", help="Add credentials inside TLS to their hosts too.")]
Learn = Annotated[bool, typer.Option("--learn", help="Reach any public host, and note which.")]
Job = Annotated[str, typer.Argument(metavar="JOB|CELL", help="A job id, or a cell's name or id.")]

LIST_HELP: Final = """Show what a job, or an allocated cell, reached or tried to reach, newest first.

\b
Example:
  aether egress list JOB
"""
DRAFT_HELP: Final = """Print the rules that a job, or an allocated cell, would have needed.

\b
Example:
  aether run --learn --detach -- python3 agent.py
  aether egress draft JOB
"""


def register(app: typer.Typer) -> None:
    """Adds `egress`."""
    group = typer.Typer(help="The network of jobs and cells.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="egress")
    command(group, "list", help=LIST_HELP)(_list)
    command(group, "draft", help=DRAFT_HELP)(_draft)


def secrets_of(given: list[str] | None) -> dict[str, str]:
    """`NAME=REFERENCE` by name; raises AetherError BAD_FIELD."""
    from aether.contract.secrets import check_secrets

    found = {name: source for name, _, source in (text.partition("=") for text in given or ())}
    check_secrets(found, {})
    return found


def network_of(allow: list[str] | None, credentials: list[str] | None, intercept: bool, learn: bool) -> Network | None:
    """The network that the options ask for; raises AetherError BAD_FIELD."""
    from aether.contract.network import Network, check_network

    if not (allow or credentials or learn):
        return None
    asked = Network(
        allow=tuple(allow or ()),
        credentials=tuple(credential_of(text) for text in credentials or ()),
        intercept=intercept,
        learn=learn,
    )
    check_network(asked)
    return asked


def credential_of(text: str) -> Credential:
    """`NAME=HOST[:PORT]:HEADER:file:/PATH` or `...:env:VARIABLE`; a value after HEADER and a space is its prefix.

    Raises AetherError BAD_FIELD.
    """
    from aether.contract.errors import AetherError
    from aether.contract.network import Credential, parse_rule

    name, _, rest = text.partition("=")
    for kind in ("file", "env"):
        where, found, source = rest.partition(f":{kind}:")
        if not found:
            continue
        host, _, header = where.rpartition(":")
        header, space, prefix = header.partition(" ")
        try:
            rule = str(parse_rule(host if host.rpartition(":")[2].isdigit() else f"{host}:443"))
        except ValueError as error:
            raise AetherError("BAD_FIELD", f"cannot read --credential {text[:80]!r}: {error}") from error
        return Credential(
            name=name, host=rule, header=header, source=f"{kind}:{source}", prefix=f"{prefix} " if space else ""
        )
    raise AetherError(
        "BAD_FIELD",
        f"cannot read --credential {text[:80]!r}: it names no source",
        "write NAME=HOST:HEADER:file:/PATH or NAME=HOST:HEADER:env:VARIABLE",
    )


def _pages(session: Session, subject: str) -> Iterator[EgressPage | CellEgressPage]:
    with session.client() as client:
        cursor: int | None = 0
        while cursor is not None:
            ask = client.egress if subject.startswith("job_") else client.cells.egress
            page: EgressPage | CellEgressPage = ask(subject, cursor=cursor)
            yield page
            cursor = page.next_cursor if page.connections else None


def _list(session: Session, subject: Job) -> None:
    from aether.cli.output import show_json
    from aether.cli.terminal import printable

    pages = list(_pages(session, subject))
    if session.as_json:
        kind = "job_id" if subject.startswith("job_") else "cell"
        show_json({kind: subject, "connections": [row for page in pages for row in page.connections]})
        return
    for row in (row for page in pages for row in page.connections):
        print(printable(_line(row)))
    sums = next((page.closed for page in pages if page.closed is not None), None)
    if sums is not None:
        told = f"{sums.connections} in all, {sums.refused} refused"
        print(f"{told}, {sums.sent_bytes} bytes sent, {sums.received_bytes} received")


def _line(row: EgressConnection) -> str:
    where = f"{row.host}:{row.port}" if row.host else "-"
    times = f" x{row.count}" if row.count > 1 else ""
    why = f" ({row.reason})" if row.reason else ""
    secret = f" with {row.credential}" if row.credential else ""
    by = f" by {row.rule}" if row.rule else ""
    return f"{row.verdict:<8} {where}{times}{why}{by}{secret} {row.sent_bytes}>{row.received_bytes} B {row.ms} ms"


def _draft(
    session: Session,
    subject: Job,
    refused: Annotated[bool, typer.Option("--refused", help="Also what was refused.")] = False,
) -> None:
    from aether.cli.output import note, show_json

    rows = [row for page in _pages(session, subject) for row in page.connections]
    show_json({"allow": draft(rows, refused=refused)})
    left = [] if refused else sorted(set(draft(rows, refused=True)) - set(draft(rows, refused=False)))
    if left:
        note(f"refused, and left out: {', '.join(left)}")


def draft(rows: Iterable[EgressConnection], *, refused: bool) -> list[str]:
    """The rules that take what was reached, and what was refused for want of one if `refused`; each once, sorted."""
    from aether.contract.network import LEARN, parse_rule

    found: set[str] = set()
    for row in rows:
        host = f"[{row.host}]" if ":" in row.host else row.host
        reached = row.verdict != "refused" and row.credential is None
        wanted = refused and row.reason in ("not-allowed", "address")
        if reached and row.rule is not None and row.rule != LEARN:
            found.add(row.rule)
        elif reached or wanted:
            found.add(str(parse_rule(f"{host}:{row.port}")))
    return sorted(found)
