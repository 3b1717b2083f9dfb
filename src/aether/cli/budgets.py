"""`aether budget show|set|top-up|usage`, `aether usage`, `aether quota show|set`: what may be spent, and what was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.contract.budgetcalls import AccountView, QuotaView

By = Annotated[str, typer.Option("--by", metavar="WHAT", help="principal, tenant, kind or day.")]
Since = Annotated[str | None, typer.Option("--since", metavar="DAY", help="From this day (UTC) on: 2026-09-21.")]
Until = Annotated[str | None, typer.Option("--until", metavar="DAY", help="Up to this day (UTC), with it.")]
Tenant = Annotated[str | None, typer.Option("--tenant", metavar="TENANT", help="The account of a tenant.")]
OneTenant = Annotated[str, typer.Option("--tenant", metavar="TENANT", help="Whose budget.")]
Amounts = Annotated[list[str], typer.Argument(metavar="UNIT=N", help="ops=100 usd=1 cpu=10s wall=1m in=10MB ...")]
OfTenant = Annotated[str | None, typer.Option("--tenant", metavar="TENANT", help="Of a tenant.")]
OfPrincipal = Annotated[str | None, typer.Option("--principal", metavar="NAME", help="Of a principal: uid:1000.")]
Bounds = Annotated[
    list[str],
    typer.Argument(metavar="QUOTA=N", help="open_jobs, queued_jobs, live_cells, requests_per_s; N or default."),
]

_SHOW = """Show what a ticket, a link or a tenant may spend and spent; without one, what you are charged on.

\b
Examples:
  aether budget show
  aether budget show 00112233445566778899aabbccddeeff
  aether budget show --tenant default
"""
_SET = """Limit what a tenant may spend from now on. UNIT=none ends the limit of a unit.

\b
Example:
  aether budget set --tenant default ops=10000 cpu=1h usd=none
"""
_TOP_UP = """Add to what a link or a tenant may spend.

\b
Examples:
  aether budget top-up 00112233445566778899aabbccddeeff usd=1
  aether budget top-up tenant:default ops=1000
"""
_USAGE = """Show what was spent by principal, tenant, kind of job or day.

\b
Example:
  aether usage --by day --since 2026-09-01
"""
_QUOTA_SET = """Bound what a tenant or a principal may have at once.

\b
Example:
  aether quota set --principal uid:1000 open_jobs=100 requests_per_s=50
"""


def register(app: typer.Typer) -> None:
    """Adds `budget`, `usage` and `quota`."""
    group = typer.Typer(help="What may be spent, and what was.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="budget")
    command(group, "show", help=_SHOW)(_show)
    command(group, "set", help=_SET)(_set)
    command(group, "top-up", help=_TOP_UP)(_top_up)
    command(group, "usage", help=_USAGE)(_usage)
    command(app, "usage", help=_USAGE)(_usage)
    quota = typer.Typer(help="What may be had at once.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(quota, name="quota")
    command(quota, "show", help="Show the quotas of a tenant or principal; without one, yours.")(_show_quota)
    command(quota, "set", help=_QUOTA_SET)(_set_quota)


def _show(
    session: Session,
    target: Annotated[str | None, typer.Argument(metavar="TICKET|LINK", help="A ticket, - or a link.")] = None,
    tenant: Tenant = None,
) -> None:
    import sys
    from dataclasses import replace

    from aether.cli.output import show_json
    from aether.contract.tickets import PREFIX

    text = sys.stdin.readline().strip() if target == "-" else target
    account = f"tenant:{tenant}" if tenant is not None else text
    if account is not None and account.startswith(PREFIX):
        session, account = replace(session, ticket=account), None
    with session.client() as client:
        accounts = client.budgets.show(account)
    if session.as_json:
        show_json({"accounts": accounts})
    else:
        _table(accounts)


def _set(session: Session, amounts: Amounts, tenant: OneTenant) -> None:
    from aether.cli.amounts import SHORT, parse
    from aether.cli.output import show_json

    ended = {SHORT.get(name, (name,))[0]: None for name, _, text in _parted(amounts) if text == "none"}
    given = parse([f"{name}={text}" for name, _, text in _parted(amounts) if text != "none"])
    with session.client() as client:
        view = client.budgets.set(tenant, {**ended, **given})
    if session.as_json:
        show_json(view)
    else:
        _table((view,))


def _top_up(
    session: Session,
    account: Annotated[str, typer.Argument(metavar="LINK|tenant:NAME", help="Whose account.")],
    amounts: Amounts,
) -> None:
    from aether.cli.amounts import parse
    from aether.cli.output import show_json

    with session.client() as client:
        view = client.budgets.top_up(account, parse(amounts))
    if session.as_json:
        show_json(view)
    else:
        _table((view,))


def _usage(session: Session, by: By = "principal", since: Since = None, until: Until = None) -> None:
    from aether.cli.output import show_json, show_table
    from aether.contract.units import told

    with session.client() as client:
        report = client.budgets.usage(by, since=since, until=until)  # type: ignore[arg-type]
    if session.as_json:
        show_json(report)
        return
    rows = [(r.name, r.jobs, ", ".join(told(unit, amount) for unit, amount in r.amounts.items())) for r in report.rows]
    show_table((report.by, "jobs", "spent"), rows)


def _show_quota(session: Session, tenant: OfTenant = None, principal: OfPrincipal = None) -> None:
    with session.client() as client:
        quotas = client.budgets.quotas(_subject(tenant, principal))
    _show_quotas(session, quotas)


def _set_quota(session: Session, bounds: Bounds, tenant: OfTenant = None, principal: OfPrincipal = None) -> None:
    subject = _subject(tenant, principal)
    if subject is None:
        _refuse("whose quota", "", "add --tenant NAME or --principal NAME")
    given: dict[Any, int | None] = {}
    for name, equals, text in _parted(bounds):
        if not equals or not (text == "default" or (text.isascii() and text.isdigit() and len(text) < 10)):
            _refuse("the quota", f"{name}={text}", "write it like open_jobs=100 or open_jobs=default")
        given[name] = None if text == "default" else int(text)
    with session.client() as client:
        quotas = client.budgets.set_quotas(subject, given)
    _show_quotas(session, quotas)


def _subject(tenant: str | None, principal: str | None) -> str | None:
    if tenant is not None and principal is not None:
        _refuse("whose quota", tenant, "name a tenant or a principal, not both")
    return f"tenant:{tenant}" if tenant is not None else f"principal:{principal}" if principal is not None else None


def _parted(entries: list[str]) -> list[tuple[str, str, str]]:
    return [part.partition("=") for entry in entries for part in entry.split(",")]


def _show_quotas(session: Session, quotas: tuple[QuotaView, ...]) -> None:
    from aether.cli.output import show_json, show_table

    if session.as_json:
        show_json({"quotas": quotas})
        return
    rows = [(q.subject, q.quota, q.used, q.limit, "default" if q.is_default else "set") for q in quotas]
    show_table(("whose", "quota", "used", "limit", "by"), rows)


def _table(accounts: tuple[AccountView, ...]) -> None:
    from aether.cli.amounts import shown
    from aether.cli.output import show_table

    rows = [
        (account.account, b.unit, shown(b.unit, b.spent + b.reserved, b.limit), b.reserved)
        for account in accounts
        for b in account.budget
    ]
    show_table(("account", "unit", "used", "of it held"), rows)


def _refuse(what: str, text: str, remedy: str) -> NoReturn:
    from aether.contract.errors import AetherError

    raise AetherError("BAD_FIELD", f"cannot read {what} {text[:80]!r}", remedy)
