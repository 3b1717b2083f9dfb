"""`aether why`: one page on a job. Who asked, on what authority, where it ran, what it touched, how to check that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.cli.whypage import More, Why
    from aether.client import Client
    from aether.contract.records import Receipt

_WHY: Final = """Explain a finished job: who asked, on what authority, by which rules, where it ran, what was enforced,
what it used and touched, how it ended, and how to verify all that.

With --receipt no node is asked: the receipt alone speaks.

\b
Examples:
  aether why JOB
  aether why --receipt receipt.json --json
"""
_TITLES: Final = {
    "asked": "Who asked",
    "authority": "On what authority",
    "rules": "By which rules",
    "place": "Where it ran",
    "enforced": "What was enforced",
    "used": "What it used",
    "touched": "What it touched",
    "end": "How it ended",
    "proof": "How to verify it",
}
_CONNECTIONS_MAX: Final = 100


def register(app: typer.Typer) -> None:
    """Adds `why`."""
    command(app, "why", help=_WHY)(_why)


def _why(
    session: Session,
    job_id: Annotated[str | None, typer.Argument(metavar="[JOB]", help="A job id.")] = None,
    receipt: Annotated[
        Path | None, typer.Option("--receipt", metavar="FILE", help="A receipt, instead of a job.")
    ] = None,
) -> None:
    import msgspec

    from aether.cli.output import show_json
    from aether.cli.whypage import More, page
    from aether.contract.errors import AetherError
    from aether.contract.records import Receipt

    if (job_id is None) == (receipt is None):
        raise AetherError("BAD_FIELD", "cannot explain: name a job or a receipt", "aether why JOB")
    try:
        if receipt is not None:
            found = page(msgspec.json.decode(receipt.read_bytes(), type=Receipt), More())
        else:
            assert job_id is not None
            with session.client() as client:
                shown = client.receipt(job_id)
                found = page(shown, _more(client, job_id, shown))
    except OSError as error:
        raise AetherError("NOT_FOUND", f"cannot read {receipt}: {error.strerror}", "name a readable file") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise AetherError("VERIFY_FAILED", f"cannot explain the receipt: {error}") from error
    show_json(found) if session.as_json else _show(found)


def _more(client: Client, job_id: str, receipt: Receipt) -> More:
    """What the node says besides; what it does not say to this caller stays null."""
    from aether.cli.whypage import More
    from aether.contract.errors import AetherError

    parts: dict[str, Any] = {}
    for name, ask in (("caveats", _caveats), ("connections", _connections), ("activity", _activity)):
        try:
            parts[name] = ask(client, job_id, receipt)
        except AetherError as error:
            if error.code not in ("TICKET_DENIED", "POLICY_DENIED", "NOT_FOUND", "GONE"):
                raise
    return More(**parts)


def _caveats(client: Client, job_id: str, receipt: Receipt) -> dict[str, str] | None:
    """By link, from the records of minting; links that their holder appended offline were never minted."""
    import msgspec

    from aether.contract.auditcalls import AuditFilter
    from aether.contract.records import Record

    ticket = msgspec.json.decode(receipt.entries[0].entry, type=Record).ticket
    if ticket is None:
        return None
    found: dict[str, str] = {}
    for link in ticket.link_ids:
        page = client.audit.query(AuditFilter(type=("ticket.minted",), ticket=link), limit=1)
        if page.records and (minted := page.records[0].ticket) is not None:
            found[minted.link_ids[-1]] = page.records[0].detail.get("caveats", "")
    return found or None


def _connections(client: Client, job_id: str, receipt: Receipt) -> Any:
    return client.egress(job_id, limit=_CONNECTIONS_MAX).connections


def _activity(client: Client, job_id: str, receipt: Receipt) -> dict[str, int] | None:
    from collections import Counter

    counted = Counter(str(event.kind) for event, _ in client.activity(job_id))
    return dict(sorted(counted.items())) or None


def _show(found: Why) -> None:
    from aether.cli.output import show_fields

    show_fields([("job", found.job_id)])
    for section, title in _TITLES.items():
        print(f"\n{title}")
        show_fields([(f"  {name.replace('_', ' ')}", text) for name, value in getattr(found, section).items()
                     if (text := _text(value)) is not None])  # fmt: skip


def _text(value: Any) -> str | None:
    """A fact in one line; None for what does not apply."""
    if value in (None, (), [], {}, ""):
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {what}" for name, what in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
