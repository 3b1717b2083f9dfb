"""`aether pki init|issue|rotate|revoke|show`: the instance's certificate authority, and certificates of clients.

A certificate is shown on the second socket: `--identity DIR` or AETHER_IDENTITY names the directory that `issue` wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from aether.cli.session import Session, command
from aether.cli.tickets import Allow, Expires, Labels, Role, Spend, lifetime_ms, narrowing

if TYPE_CHECKING:
    from aether.contract.identitycalls import PkiView

_INIT: Final = """Make the instance's certificate authority; from then on the second socket listens.

\b
Example:
  aether pki init --trust-domain example.org
"""
_ISSUE: Final = """Issue a certificate, no wider than you are: cert.pem, key.pem and bundle.pem in DIR.

\b
The private key is made here and stays here; with --csr it is yours already. Examples:
  aether pki issue agent-1 --role user --expires 8h --out agent-1
  AETHER_IDENTITY=agent-1 aether run -- echo hello
"""
_ROTATE: Final = """Replace the certificate authority. The old one is trusted until its certificates have ended.

\b
Examples:
  aether pki rotate
  aether pki rotate --at-once      # its key leaked: what it issued ends now
"""
_REVOKE: Final = """Revoke a certificate: what it admitted ends.

\b
Example:
  aether pki revoke --cert agent-1/cert.pem
"""


def register(app: typer.Typer) -> None:
    """Adds `pki`."""
    group = typer.Typer(help="Certificates of clients.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="pki")
    command(group, "init", help=_INIT)(_init)
    command(group, "issue", help=_ISSUE)(_issue)
    command(group, "rotate", help=_ROTATE)(_rotate)
    command(group, "revoke", help=_REVOKE)(_revoke)
    command(group, "show", help="Show the authorities that are trusted, and the certificates.")(_show)


def _init(
    session: Session,
    trust_domain: Annotated[
        str | None, typer.Option("--trust-domain", metavar="NAME", help="Of the SPIFFE IDs: aether.internal.")
    ] = None,
) -> None:
    from aether.contract.limits import TRUST_DOMAIN_DEFAULT

    with session.client() as client:
        _print(session, client.pki.init(trust_domain or TRUST_DOMAIN_DEFAULT))


def _issue(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The end of its SPIFFE ID: agent, team/agent-1.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to; by default NAME.")] = None,
    csr: Annotated[
        Path | None, typer.Option("--csr", metavar="FILE", help="A PKCS#10 request in PEM; prints the certificate.")
    ] = None,
    role: Role = None,
    budget: Spend = None,
    expires: Expires = None,
    allow: Allow = None,
    label: Labels = None,
) -> None:
    from aether.cli.output import show_fields, show_json
    from aether.contract.limits import CERTIFICATE_MS_DEFAULT

    asked = narrowing(role, budget, allow, label)
    said_ms = lifetime_ms(expires, budget)
    expires_ms = CERTIFICATE_MS_DEFAULT if said_ms is None else said_ms
    directory = out or Path(name.rpartition("/")[2])
    with session.client() as client:
        if csr is not None:
            issued = client.pki.sign(name, _text(csr), expires_ms=expires_ms, **asked)
        else:
            issued = client.pki.issue(name, directory=directory, expires_ms=expires_ms, **asked)
    if session.as_json:
        show_json(issued)
    elif csr is not None:
        print(issued.certificate, end="")
    else:
        show_fields(
            [
                ("identity", issued.spiffe_id),
                ("role", issued.role),
                ("tenant", issued.tenant_id),
                ("expires", issued.expires_at),
                ("says", "; ".join(issued.caveats)),
                ("fingerprint", issued.fingerprint),
                ("files", directory),
            ]
        )


def _rotate(
    session: Session,
    at_once: Annotated[bool, typer.Option("--at-once", help="End what the old authority issued.")] = False,
) -> None:
    with session.client() as client:
        _print(session, client.pki.rotate(at_once=at_once))


def _revoke(
    session: Session,
    fingerprint: Annotated[str | None, typer.Argument(metavar="FINGERPRINT", help="SHA-256 in hex.")] = None,
    cert: Annotated[Path | None, typer.Option("--cert", metavar="FILE", help="The certificate itself.")] = None,
) -> None:
    import hashlib
    import ssl

    from aether.cli.output import show_json
    from aether.contract.errors import AetherError

    if (fingerprint is None) == (cert is None):
        raise AetherError("BAD_FIELD", "cannot revoke: name either a fingerprint or a certificate with --cert")
    if cert is not None:
        try:
            fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(_text(cert))).hexdigest()
        except ValueError as error:
            raise AetherError("BAD_FIELD", f"cannot read {cert}: it is no certificate in PEM") from error
    assert fingerprint is not None
    with session.client() as client:
        done = client.pki.revoke(fingerprint)
    if session.as_json:
        show_json(done)
    else:
        print(f"revoked {fingerprint[:16]}: {done.jobs} jobs and {done.cells} cells ended")


def _show(
    session: Session,
    bundle: Annotated[bool, typer.Option("--bundle", help="Print the authorities' certificates in PEM alone.")] = False,
) -> None:
    with session.client() as client:
        view = client.pki.show()
    if bundle:
        print(view.bundle, end="")
    else:
        _print(session, view)


def _print(session: Session, view: PkiView) -> None:
    from aether.cli.output import show_fields, show_json, show_table

    if session.as_json:
        show_json(view)
        return
    show_fields([("trust domain", view.trust_domain), ("socket", view.socket)])
    for each in view.authorities:
        until = f"trusted until {each.retires_at}" if each.retires_at else f"issues until {each.expires_at}"
        print(f"authority {each.authority}  {until}")
    if view.certificates:
        rows = [
            (c.fingerprint[:16], c.spiffe_id, c.role, "revoked" if c.revoked_at else c.expires_at)
            for c in view.certificates
        ]
        show_table(("fingerprint", "identity", "role", "expires"), rows)


def _text(path: Path) -> str:
    from aether.contract.errors import AetherError

    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise AetherError("BAD_FIELD", f"cannot read {path}: {error}") from error
