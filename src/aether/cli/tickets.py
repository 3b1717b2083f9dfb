"""`aether ticket mint|attenuate|inspect|verify|revoke|rotate-key|list|show`: capabilities that can be handed on.

A TICKET is given as an argument, as `-` (one line of standard input) or by AETHER_TICKET; arguments can be seen by
every user of the machine (ps(1)). `attenuate` and `inspect` talk to nobody.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.contract.ticketcalls import Budget, TicketView

Role = Annotated[str | None, typer.Option("--role", metavar="ROLE", help="What its holder is: user, worker-gpu, ...")]
Spend = Annotated[
    list[str] | None,
    typer.Option("--budget", metavar="UNIT=N[,UNIT=N]", help="At most this much: ops=100,usd=1,cpu=10s,in=10MB, ..."),
]
Expires = Annotated[str | None, typer.Option("--expires", metavar="TIME", help="For how long: 30m, 1h, 7d.")]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="WHAT=ITEM[,ITEM]",
        help="Only these: operations, kinds, models, hosts, paths or cells. Alone, ITEM is an operation.",
    ),
]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="LABEL", help="Every job carries it.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the ticket alone.")]
Ticket = Annotated[str | None, typer.Argument(metavar="TICKET", help="A ticket, or - for standard input.")]
TTL_MS: Final = "ttl_ms"
_ALLOWED: Final = ("operations", "kinds", "models", "hosts", "paths", "cells")

_MINT: Final = """Make a ticket, no wider than you are.

\b
Examples:
  aether ticket mint --role user --budget ops=100,usd=1 --expires 1h
  AETHER_TICKET=$(aether ticket mint --allow job.* --allow cells=agent --quiet) ./agent
"""
_ATTENUATE: Final = """Narrow a ticket, offline. It never becomes wider.

\b
Example:
  aether ticket attenuate "$TICKET" --budget ops=1 --allow kinds=command --expires 10m
"""
_REVOKE: Final = """Revoke a ticket, or a link of one: what it admitted ends, what derives from it is refused.

\b
Example:
  aether ticket revoke 00112233445566778899aabbccddeeff
"""
_ROTATE: Final = """Mint tickets with a new key from now on. Those given out before hold until they expire.

\b
Example:
  aether ticket rotate-key
"""


def register(app: typer.Typer) -> None:
    """Adds `ticket`."""
    group = typer.Typer(help="Capabilities that can be handed on.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="ticket")
    command(group, "mint", help=_MINT)(_mint)
    command(group, "attenuate", help=_ATTENUATE)(_attenuate)
    command(group, "inspect", help="Show what a ticket says, offline and unproven.")(_inspect)
    command(group, "verify", help="Ask the authority whether a ticket holds, and what it may still spend.")(_verify)
    command(group, "revoke", help=_REVOKE)(_revoke)
    command(group, "rotate-key", help=_ROTATE)(_rotate_key)
    command(group, "list", help="List the minted tickets that are not expired.")(_list)
    command(group, "show", help="Show a minted ticket by its link.")(_show)


def narrowing(role: str | None, budget: list[str] | None, allow: list[str] | None, label: list[str] | None) -> Any:
    """The fields of a `Narrowing` that the options name; raises AetherError BAD_FIELD."""
    lists: dict[str, tuple[str, ...]] = {}
    for text in allow or ():
        name, equals, items = text.partition("=")
        if not equals:
            name, items = "operations", text
        if name not in _ALLOWED:
            _refuse("--allow", text, f"write it like job.submit or {'|'.join(_ALLOWED)}=ITEM")
        lists[name] = (*lists.get(name, ()), *(item for item in items.split(",") if item))
    if label:
        lists["labels"] = tuple(label)
    return {"role": role, "budget": amounts(budget), **lists}


def amounts(budget: list[str] | None) -> dict[str, int]:
    """Entries of `--budget` but `ttl`; the smallest of a unit holds. Raises AetherError BAD_FIELD."""
    from aether.cli.amounts import parse

    return {unit: amount for unit, amount in parse(budget or ()).items() if unit != TTL_MS}


def lifetime_ms(expires: str | None, budget: list[str] | None) -> int | None:
    """How long a ticket is to hold: the shorter of `--expires` and `--budget ttl=...`."""
    from aether.cli.amounts import parse
    from aether.cli.parse import duration_ms

    said = [] if expires is None else [duration_ms(expires)]
    ttl_ms = parse(budget or ()).get(TTL_MS)
    return min([*said, ttl_ms] if ttl_ms is not None else said, default=None)


def _mint(
    session: Session,
    role: Role = None,
    budget: Spend = None,
    expires: Expires = None,
    allow: Allow = None,
    label: Labels = None,
    quiet: Quiet = False,
) -> None:
    from aether.cli.output import show_json
    from aether.contract.limits import TICKET_MS_DEFAULT

    asked = narrowing(role, budget, allow, label)
    said_ms = lifetime_ms(expires, budget)
    expires_ms = TICKET_MS_DEFAULT if said_ms is None else said_ms
    with session.client() as client:
        minted = client.tickets.mint(expires_ms=expires_ms, **asked)
    if quiet:
        print(minted.ticket)
    elif session.as_json:
        show_json(minted)
    else:
        _show_fields(minted)
        print(minted.ticket)


def _attenuate(
    session: Session,
    given: Ticket = None,
    role: Role = None,
    budget: Spend = None,
    expires: Expires = None,
    allow: Allow = None,
    label: Labels = None,
) -> None:
    import time

    from aether.cli.output import show_json
    from aether.client.tickets import attenuate, inspect

    said_ms = lifetime_ms(expires, budget)
    until_ms = time.time_ns() // 1_000_000 + said_ms if said_ms is not None else None
    narrower = attenuate(_ticket(session, given), expires_at_ms=until_ms, **narrowing(role, budget, allow, label))
    if session.as_json:
        show_json({"ticket": narrower, "link_id": inspect(narrower).link_id})
    else:
        print(narrower)


def _inspect(session: Session, given: Ticket = None) -> None:
    from aether.cli.output import show_fields, show_json
    from aether.client.tickets import inspect

    said = inspect(_ticket(session, given))
    if session.as_json:
        show_json(said)
        return
    show_fields([("tenant", said.tenant_id), ("key", said.kid), ("last link", said.link_id)])
    for number, link in enumerate(said.links):
        print(f"link {number}  {_line(link)}")


def _verify(session: Session, given: Ticket = None) -> None:
    from aether.cli.output import show_fields, show_json

    with replace(session, ticket="").client() as client:
        found = client.tickets.verify(_ticket(session, given))
    if session.as_json:
        show_json(found)
        return
    show_fields([("tenant", found.tenant_id), ("key", found.kid), ("roles", ", ".join(found.roles))])
    for link in found.links:
        print(f"{link.link_id}  {_line(link.caveats)}{_spent(link.budget)}")


def _revoke(
    session: Session,
    target: Annotated[str | None, typer.Argument(metavar="LINK|TICKET", help="The id of a link, or a ticket.")] = None,
) -> None:
    from aether.cli.output import show_json
    from aether.contract.tickets import PREFIX

    text = _ticket(session, target)
    shown = replace(session, ticket="") if text.startswith(PREFIX) else session
    with shown.client() as client:
        done = client.tickets.revoke(text)
    if session.as_json:
        show_json(done)
    else:
        print(f"revoked {done.link_id}: {done.jobs} jobs and {done.cells} cells ended")


def _rotate_key(session: Session) -> None:
    from aether.cli.output import show_json

    with session.client() as client:
        rotated = client.tickets.rotate_key()
    if session.as_json:
        show_json(rotated)
    else:
        kept = f"; kept for live tickets: {', '.join(rotated.kept)}" if rotated.kept else ""
        print(f"tickets are minted with {rotated.kid} from now on{kept}")


def _list(session: Session) -> None:
    from aether.cli.output import show_json, show_table

    with session.client() as client:
        tickets = client.tickets.list()
    if session.as_json:
        show_json({"tickets": tickets})
        return
    rows = [
        (t.link_id, t.role, "revoked" if t.revoked_at else t.expires_at, _spent(t.budget).strip(), _line(t.caveats))
        for t in tickets
    ]
    show_table(("link", "role", "expires", "spent", "says"), rows)


def _show(session: Session, link: Annotated[str, typer.Argument(metavar="LINK", help="The id of a link.")]) -> None:
    from aether.cli.output import show_json

    with session.client() as client:
        view = client.tickets.show(link)
    if session.as_json:
        show_json(view)
    else:
        _show_fields(view)


def _ticket(session: Session, given: str | None) -> str:
    """The ticket or link that is meant; raises AetherError BAD_FIELD when none is named."""
    text = sys.stdin.readline().strip() if given == "-" else given or session.ticket
    if not text:
        _refuse("the ticket", "", "name one, or set AETHER_TICKET")
    return text


def _show_fields(view: TicketView) -> None:
    from aether.cli.output import show_fields

    show_fields(
        [
            ("link", view.link_id),
            ("role", view.role),
            ("tenant", view.tenant_id),
            ("minted by", view.principal),
            ("expires", view.expires_at),
            ("says", _line(view.caveats)),
            ("spent", _spent(view.budget).strip()),
            ("revoked", view.revoked_at),
            ("revoked links", ", ".join(view.revoked_links)),
        ]
    )


def _line(caveats: tuple[str, ...]) -> str:
    from aether.cli.terminal import printable

    return printable("; ".join(caveats))


def _spent(budgets: tuple[Budget, ...]) -> str:
    from aether.cli.amounts import shown

    return "".join(f"  {shown(b.unit, b.spent + b.reserved, b.limit)}" for b in budgets)


def _refuse(what: str, text: str, remedy: str) -> NoReturn:
    from aether.contract.errors import AetherError

    raise AetherError("BAD_FIELD", f"cannot read {what} {text[:80]!r}", remedy)
