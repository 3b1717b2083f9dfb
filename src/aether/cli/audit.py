"""`aether receipt`, `aether verify`, `aether audit ...`: evidence, and checking it offline.

Verification trusts nothing but the public key: take it from the node once (`keys/audit.pub`) and keep it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from aether.cli import auditkeeping, auditlog, why
from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.contract.records import Receipt, Record
    from aether.substrate.audit.quorum import Quorum
    from aether.substrate.audit.report import Report

Key = Annotated[
    Path | None, typer.Option("--key", metavar="FILE", help="The public key; this instance's keys/audit.pub otherwise.")
]
WitnessKeys = Annotated[
    list[Path] | None,
    typer.Option("--witness-key", metavar="FILE", help="The public key of a witness that you trust; repeatable."),
]
Needed = Annotated[
    int | None,
    typer.Option("--quorum", metavar="N", help="How many of these witnesses must have cosigned; all otherwise."),
]
_JOB_ID: Final = re.compile(r"job_[0-9a-f-]{36}")
_VERIFY: Final = """Verify a receipt, from a file or of a job, with the public key alone.

Exits 0 when every proof holds, 123 when one does not.

\b
Examples:
  aether receipt show JOB --json > receipt.json
  aether verify receipt.json --key audit.pub
"""


def register(app: typer.Typer) -> None:
    """Adds `receipt`, `verify` and `audit`."""
    command(app, "verify", help=_VERIFY)(_verify)
    receipts = typer.Typer(help="The joined proof of a job.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(receipts, name="receipt")
    command(receipts, "show", help="Print a job's receipt; with --json exactly as it verifies.")(_show)
    group = typer.Typer(help="The audit log.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="audit")
    example = (
        "\n\n\b\nExamples:\n  aether audit verify ./logs/audit --key audit.pub --against checkpoint-of-last-month"
        "\n  aether audit verify --witness-key w1.pub --witness-key w2.pub --quorum 1"
    )
    about = "Verify a log directory (this instance's otherwise), or the file of an export."
    command(group, "verify", help=about + example)(_verify_log)
    auditlog.register(group)
    auditkeeping.register(group)
    why.register(app)
    command(group, "checkpoint", help="Print the signed checkpoint; keep it elsewhere to notice truncation.")(
        _checkpoint
    )


def _show(session: Session, job_id: Annotated[str, typer.Argument(metavar="JOB", help="A job id.")]) -> None:
    import sys

    import msgspec

    from aether.cli.output import show_fields
    from aether.contract.records import Receipt, Record

    with session.client() as client:
        text = client.receipt_bytes(job_id)
    if session.as_json:
        sys.stdout.write(text.decode() + "\n")
        return
    receipt = msgspec.json.decode(text, type=Receipt)
    show_fields([("job", receipt.job_id), ("origin", receipt.origin), ("documents", len(receipt.documents))])
    for item in receipt.entries:
        record = msgspec.json.decode(item.entry, type=Record)
        print(f"\n{record.time}  {record.type}  #{record.log_index}")
        show_fields(
            [
                ("  principal", record.principal),
                ("  ticket", record.ticket.kid if record.ticket else None),
                (
                    "  policy",
                    f"{record.policy.decision} by {', '.join(record.policy.determining)}" if record.policy else None,
                ),
                ("  enforced", _enforced(receipt, record)),
                ("  state", record.state),
                ("  error", record.error.code if record.error else None),
                ("  usage", _usage(record)),
                ("  artifacts", ", ".join(f"{ref.name} {ref.digest}" for ref in record.artifacts)),
                ("  result", record.result_digest),
            ]
        )


def _enforced(receipt: Receipt, record: Record) -> str | None:
    """What the kernel enforced, from the sandbox report that the record names."""
    import msgspec

    from aether.contract.cells import SandboxReport

    digest = record.code.sandbox_digest if record.code is not None and record.type == "job.started" else None
    if digest is None or digest not in receipt.documents:
        return None
    report = msgspec.json.decode(receipt.documents[digest], type=SandboxReport)
    missing = f"; missing: {', '.join(sorted(report.missing))}" if report.missing else ""
    return f"{report.level}: {', '.join(name for name, seen in sorted(report.enforced.items()) if seen)}{missing}"


def _usage(record: Record) -> str | None:
    """The figures that were measured, with how they were come by."""
    if record.usage is None:
        return None
    figures = {name: getattr(record.usage, name) for name in record.usage.basis}
    return ", ".join(f"{name} {value}" for name, value in figures.items() if value) or None


def _verify(
    session: Session,
    subject: Annotated[str, typer.Argument(metavar="FILE|JOB", help="A receipt, or a job.")],
    key: Key = None,
    witness_key: WitnessKeys = None,
    quorum: Needed = None,
) -> int:
    import msgspec

    from aether.contract.errors import AetherError
    from aether.contract.records import Receipt
    from aether.substrate.audit.verify import verify_receipt

    if _JOB_ID.fullmatch(subject) and not Path(subject).exists():
        with session.client() as client:
            text = client.receipt_bytes(subject)
        if msgspec.json.decode(text, type=Receipt).job_id != subject:
            raise AetherError("VERIFY_FAILED", f"cannot accept the receipt of {subject}: it is another job's")
    else:
        text = _read(Path(subject))
    return _show_report(session, verify_receipt(text, _key(session, key), _quorum(witness_key, quorum)))


def _verify_log(
    session: Session,
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR|FILE", help="The log's directory, or an export.")
    ] = None,
    key: Key = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            "--against", "--checkpoint", metavar="NOTE", help="A kept checkpoint that the log must contain; repeatable."
        ),
    ] = None,
    witness_key: WitnessKeys = None,
    quorum: Needed = None,
) -> int:
    from aether.cli.output import progress
    from aether.contract.errors import AetherError
    from aether.contract.paths import Layout
    from aether.substrate.audit.verify import verify_log

    chosen = directory if directory is not None else Layout(session.state_dir).audit
    if chosen.is_file():
        return _verify_export(session, chosen, key, checkpoint, _quorum(witness_key, quorum))
    if not chosen.is_dir():
        raise AetherError("NOT_FOUND", f"cannot verify {chosen}: no such directory", "name the log's directory")
    held = {str(path): _read(path) for path in checkpoint or ()}
    with progress("verifying the log"):
        try:
            report = verify_log(chosen, _key(session, key), held, _quorum(witness_key, quorum))
        except OSError as error:
            raise _unreadable(chosen, error) from error
    return _show_report(session, report)


def _verify_export(session: Session, path: Path, key: Path | None, held: list[Path] | None, quorum: Quorum) -> int:
    from aether.cli.output import progress
    from aether.contract.errors import AetherError
    from aether.substrate.audit.export_rules import LINE_BYTES_MAX, check_export

    if held:
        raise AetherError("BAD_FIELD", "cannot hold an export against a checkpoint", "verify the log's directory")
    try:
        with progress("verifying the export"), path.open("rb") as file:
            lines = iter(lambda: file.readline(LINE_BYTES_MAX + 1), b"")
            report = check_export(lines, _key(session, key), quorum)
    except OSError as error:
        raise _unreadable(path, error) from error
    return _show_report(session, report)


def _show_report(session: Session, report: Report) -> int:
    from aether.cli.output import show_fields, show_json
    from aether.cli.terminal import printable
    from aether.contract.errors import EXIT_VERIFY

    if session.as_json:
        show_json({"ok": report.ok, "subject": report.subject, "facts": report.facts, "problems": report.problems})
    else:
        facts: list[tuple[str, Any]] = [(name, value) for name, value in report.facts.items()]
        show_fields([("subject", report.subject), *facts])
        for problem in report.problems:
            at = "" if problem.index is None else f" entry {problem.index}"
            print(f"{problem.code}  {printable(problem.place)}{at}: {printable(problem.reason)}")
        print("verified" if report.ok else "NOT VERIFIED")
    return 0 if report.ok else EXIT_VERIFY


def _quorum(keys: list[Path] | None, needed: int | None) -> Quorum:
    from aether.contract.errors import AetherError
    from aether.substrate.audit.note import NoteError
    from aether.substrate.audit.quorum import Quorum

    try:
        return Quorum.of([_read(path).decode("utf-8", "replace") for path in keys or ()], needed)
    except (NoteError, ValueError) as error:
        raise AetherError("BAD_FIELD", f"cannot count witnesses: {error}", "name the witness.pub of each") from error


def _key(session: Session, key: Path | None) -> str:
    from aether.contract.paths import Layout

    chosen = key if key is not None else Layout(session.state_dir).audit_public_key
    return _read(chosen).decode("utf-8", "replace")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> Exception:
    from aether.contract.errors import AetherError

    return AetherError("NOT_FOUND", f"cannot read {path}: {error.strerror}", "name a readable file")


def _checkpoint(session: Session) -> None:
    from aether.cli.output import show_json

    with session.client() as client:
        note = client.checkpoint()
    show_json({"checkpoint": note}) if session.as_json else print(note, end="")
