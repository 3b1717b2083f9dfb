"""`aether key create|list|revoke`: API keys, for programs that cannot hold anything but one line of text.

A key is sent like a ticket: by AETHER_TICKET, `--ticket`, or `Authorization: Bearer aek1_...`.
"""

from __future__ import annotations

from typing import Annotated, Final

import typer

from aether.cli.session import Session, command
from aether.cli.tickets import Allow, Expires, Labels, Quiet, Role, Spend, lifetime_ms, narrowing

_CREATE: Final = """Make an API key, no wider than you are. Its text is shown this once.

\b
Examples:
  aether key create --name 'build server' --role user --expires 30d
  AETHER_TICKET=$(aether key create --budget ops=100 --allow job.* --quiet) ./agent
"""
_REVOKE: Final = """Revoke an API key: what it admitted ends.

\b
Example:
  aether key revoke 00112233445566ff
"""


def register(app: typer.Typer) -> None:
    """Adds `key`."""
    group = typer.Typer(help="API keys.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="key")
    command(group, "create", help=_CREATE)(_create)
    command(group, "list", help="List the API keys that are not expired.")(_list)
    command(group, "revoke", help=_REVOKE)(_revoke)


def _create(
    session: Session,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="What it is for.")] = "",
    role: Role = None,
    budget: Spend = None,
    expires: Expires = None,
    allow: Allow = None,
    label: Labels = None,
    quiet: Quiet = False,
) -> None:
    from aether.cli.output import show_fields, show_json
    from aether.contract.errors import AetherError
    from aether.contract.limits import KEY_MS_DEFAULT

    asked = narrowing(role, budget, allow, label)
    said_ms = lifetime_ms(expires, budget)
    expires_ms = KEY_MS_DEFAULT if said_ms is None else said_ms
    with session.client() as client:
        made = client.keys.create(name, expires_ms=expires_ms, **asked)
    if made.key is None:  # the first answer was lost on the way
        why = f"cannot show the API key {made.key_id}: it was told in an answer that was lost"
        raise AetherError("GONE", why, f"revoke it with `aether key revoke {made.key_id}` and create another")
    if quiet:
        print(made.key)
    elif session.as_json:
        show_json(made)
    else:
        show_fields(
            [
                ("id", made.key_id),
                ("name", made.name),
                ("role", made.role),
                ("tenant", made.tenant_id),
                ("expires", made.expires_at),
                ("says", "; ".join(made.caveats)),
                ("link", made.link_id),
            ]
        )
        print(made.key)


def _list(session: Session) -> None:
    from aether.cli.output import show_json, show_table

    with session.client() as client:
        keys = client.keys.list()
    if session.as_json:
        show_json({"keys": keys})
        return
    rows = [(k.key_id, k.name, k.role, "revoked" if k.revoked_at else k.expires_at, "; ".join(k.caveats)) for k in keys]
    show_table(("id", "name", "role", "expires", "says"), rows)


def _revoke(
    session: Session, key_id: Annotated[str, typer.Argument(metavar="ID", help="The id of a key, 16 hex digits.")]
) -> None:
    from aether.cli.output import show_json

    with session.client() as client:
        done = client.keys.revoke(key_id)
    if session.as_json:
        show_json(done)
    else:
        print(f"revoked {key_id}: {done.jobs} jobs and {done.cells} cells ended")
