"""`aether audit witness|witnesses|push|prove|retain|rotate-key`: what keeps the log honest, small and signed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.client import Client
    from aether.substrate.audit.note import Verifier
    from aether.substrate.audit.submit import Cosigned, Prove, WitnessAt
    from aether.substrate.audit.witnessing import Witness

RESTART_S_MAX: Final = 60.0
_WITNESS: Final = """Be a witness: cosign checkpoints of logs that only ever grew.

Run it where the node's root has no say. It keeps a key of its own, made at the first start, and the last checkpoint
of each log, and never signs a fork. Logs (or `aether audit push`) ask it as C2SP tlog-witness says. With --once it
asks the node itself, cosigns, hands that over and ends: for cron.

\b
Examples:
  aether audit witness --log audit.pub --listen unix:/run/witness.sock
  aether audit witness --log audit.pub --listen 127.0.0.1:8642 --name example.com/w1
  aether audit witness --log audit.pub --once
"""
_PUSH: Final = """Bring the newest checkpoint to the witnesses in policy/witnesses, and their cosignatures back.

Each line of that file is a witness's verifier key and its address: unix:/path, http://host:port or https://host.

\b
Examples:
  aether audit push
  aether audit push --every 10s
"""
_PROVE: Final = """Have the node prove that its log still contains a checkpoint that you kept.

Exits 0 when the proof holds, 123 when it does not. Needs the public key, not the log's files.

\b
Example:
  aether audit checkpoint > kept; ...; aether audit prove kept --key audit.pub
"""
_RETAIN: Final = """Take away records older than a time; their hashes stay, so that every proof still holds.

Whole segments go (64 MiB each, or less where an earlier call ended one); what open jobs, living cells and the node
itself still need is kept. Recorded in the log before it is done.

\b
Example:
  aether audit retain --keep 90d
"""
_ROTATE: Final = """Sign the log with a new key from now on.

The tree goes on: the new epoch's first record commits to the last checkpoint of the old key. Give the new
keys/audit.pub to those who verify; keys/audit-<epoch>.pub keeps the old. The node's authority starts again, cells
live on.

\b
Example:
  aether audit rotate-key
"""


def register(group: typer.Typer) -> None:
    """Adds them to the `audit` group."""
    command(group, "witness", help=_WITNESS)(_witness)
    command(group, "witnesses", help="The witnesses that the node lists, and what each cosigned last.")(_witnesses)
    command(group, "push", help=_PUSH)(_push)
    command(group, "prove", help=_PROVE)(_prove)
    command(group, "retain", help=_RETAIN)(_retain)
    command(group, "rotate-key", help=_ROTATE)(_rotate_key)


def _witness(
    session: Session,
    log: Annotated[
        list[Path] | None,
        typer.Option("--log", metavar="FILE", help="The public key of a log; this instance's otherwise; repeatable."),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Where the witness keeps its key and what it signed.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", metavar="ADDRESS", help="unix:PATH or 127.0.0.1:PORT.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Of a new witness; the host's otherwise.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Cosign the node's newest checkpoint and end.")] = False,
) -> None:
    import socket
    import time

    from aether.contract.errors import AetherError
    from aether.contract.paths import Layout
    from aether.substrate.audit.witnessing import Witness

    if once == (listen is not None):
        raise AetherError("BAD_FIELD", "cannot witness: say either --listen or --once")
    logs = [_verifier(path) for path in log or [Layout(session.state_dir).audit_public_key]]
    chosen = name or f"{socket.gethostname()}/witness"
    witness = Witness(directory or _witness_dir(), chosen, logs, lambda: int(time.time()))
    try:
        _witness_once(session, witness) if listen is None else _serve(session, witness, listen)
    finally:
        witness.close()


def _serve(session: Session, witness: Witness, address: str) -> None:
    import signal
    import threading

    from aether.cli.output import show_json
    from aether.substrate.audit.witnessing import listen

    server = listen(witness, address)
    for signo in (signal.SIGTERM, signal.SIGINT):
        # shutdown waits for serve_forever, which runs on this thread
        signal.signal(signo, lambda *_: threading.Thread(target=server.shutdown).start())
    host, *port = server.server_address if isinstance(server.server_address, tuple) else (address,)
    at = f"http://{host}:{port[0]}" if port else address
    if session.as_json:
        show_json({"key": str(witness.cosigner.key), "address": at})
    else:
        print(f"{witness.cosigner.key} {at}", flush=True)  # a line of policy/witnesses
    import sys

    sys.stdout.flush()
    with server:
        server.serve_forever(poll_interval=0.2)


def _witness_once(session: Session, witness: Witness) -> None:
    """The node's newest checkpoint, cosigned and handed over."""
    from aether.contract.errors import AetherError
    from aether.substrate.audit.note import parse_checkpoint, split_note
    from aether.substrate.audit.submit import cosignature
    from aether.substrate.audit.witness import AddCheckpoint

    with session.client() as client:
        prove = _prover(client)
        origin = client.checkpoint().partition("\n")[0]
        last = witness.seen.get(origin)
        known = last.size if last is not None else 0
        if known > parse_checkpoint(split_note(client.checkpoint())[0]).size:
            raise AetherError("VERIFY_FAILED", f"cannot cosign: {known} records were signed here, the log has fewer")
        note, proof = prove(known)
        answer = witness.answer(AddCheckpoint(known, proof, note).encode())
        if answer.status != 200:
            raise AetherError("VERIFY_FAILED", f"cannot cosign ({answer.status}): {answer.body.strip()}")
        given = cosignature(witness.cosigner.key, note, answer.body.encode())
        _hand_over(client, [given])
    _tell(session, [given])


def _witnesses(session: Session) -> None:
    from aether.cli.output import show_json, show_table

    with session.client() as client:
        found = client.audit.witnesses()
    if session.as_json:
        show_json(found)
        return
    rows = [(each.witness, each.size, found.size, each.cosigned_at, each.address) for each in found.witnesses]
    show_table(("WITNESS", "COSIGNED", "OF", "AT", "ADDRESS"), rows)


def _push(
    session: Session,
    every: Annotated[
        str | None, typer.Option("--every", metavar="DURATION", help="Go on, as often as the log grew.")
    ] = None,
) -> int:
    import time

    from aether.cli.output import note
    from aether.cli.parse import duration_ms
    from aether.contract.errors import EXIT_UNREACHABLE, AetherError

    pause_s = duration_ms(every) / 1000 if every is not None else None
    with session.client() as client:
        while True:
            try:
                complete = _round(session, client, anew=pause_s is None)
            except AetherError as error:
                if pause_s is None:
                    raise
                complete = False
                note(f"{error.message}; trying again")
            if pause_s is None:
                return 0 if complete else EXIT_UNREACHABLE
            time.sleep(pause_s)


def _round(session: Session, client: Client, anew: bool) -> bool:
    """Asks each witness that has not cosigned the newest checkpoint; false when one could not be had."""
    from aether.cli.output import note
    from aether.contract.errors import AetherError
    from aether.substrate.audit.cosign import WitnessKey
    from aether.substrate.audit.submit import WitnessAt, submit

    state = client.audit.witnesses()
    if not state.witnesses and anew:
        raise AetherError("NOT_FOUND", "cannot push: the node lists no witness", "write policy/witnesses")
    given: list[Cosigned] = []
    complete = True
    for each in state.witnesses:
        if each.size == state.size:
            continue
        at: WitnessAt = WitnessAt(WitnessKey.parse(each.key), each.address)
        try:
            given.append(submit(at, _prover(client), each.size or 0))
        except AetherError as error:
            complete = False
            note(error.message)
    for size in {each.size for each in given}:
        _hand_over(client, [each for each in given if each.size == size])
    if given or anew:
        _tell(session, given)
    return complete


def _hand_over(client: Client, given: list[Cosigned]) -> None:
    import base64

    from aether.contract.auditcalls import Cosignature

    client.audit.cosign(
        given[0].size,
        [Cosignature(witness=each.key.name, signature=base64.b64encode(each.raw).decode()) for each in given],
    )


def _tell(session: Session, given: list[Cosigned]) -> None:
    from aether.cli.output import show_json
    from aether.contract.clock import rfc3339

    rows = [
        {"witness": each.key.name, "size": each.size, "cosigned_at": rfc3339(each.time_s * 1_000_000_000)}
        for each in given
    ]
    if session.as_json:
        show_json({"cosigned": rows})
        return
    for row in rows:
        print(f"{row['witness']} cosigned {row['size']} records at {row['cosigned_at']}")
    if not rows:
        print("nothing new to cosign")


def _prover(client: Client) -> Prove:
    import base64

    def prove(size: int) -> tuple[str, tuple[bytes, ...]]:
        grown = client.audit.growth(size)
        return grown.checkpoint, tuple(base64.b64decode(text) for text in grown.hashes)

    return prove


def _prove(
    session: Session,
    kept: Annotated[Path, typer.Argument(metavar="NOTE", help="The kept checkpoint.")],
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="The public key; this instance's otherwise.")
    ] = None,
) -> int:
    import base64

    from aether.cli.output import show_fields, show_json
    from aether.contract.errors import EXIT_VERIFY, AetherError
    from aether.contract.paths import Layout
    from aether.substrate.audit.note import NoteError, open_checkpoint
    from aether.substrate.audit.tree import EMPTY_ROOT, verify_consistency

    verifier = _verifier(key or Layout(session.state_dir).audit_public_key)
    try:
        old = open_checkpoint(_text(kept), verifier)
        with session.client() as client:
            grown = client.audit.growth(old.size)
        new = open_checkpoint(grown.checkpoint, verifier)
    except NoteError as error:
        raise AetherError("VERIFY_FAILED", f"cannot compare: {error.reason}") from error
    path = [base64.b64decode(text) for text in grown.hashes]
    if old.size:
        holds = verify_consistency(old.size, new.size, old.root, new.root, path)
    else:
        holds = old.root == EMPTY_ROOT and not path
    facts = {"origin": new.origin, "kept": old.size, "now": new.size, "hashes": len(path), "holds": holds}
    show_json(facts) if session.as_json else show_fields(list(facts.items()))
    return 0 if holds else EXIT_VERIFY


def _retain(
    session: Session,
    keep: Annotated[str, typer.Option("--keep", metavar="DURATION", help="How old a record must be to go: 90d.")],
) -> None:
    from aether.cli.output import progress, show_fields, show_json
    from aether.cli.parse import duration_ms

    with session.client() as client, progress("pruning the log"):
        kept = client.audit.retain(duration_ms(keep))
    if session.as_json:
        show_json(kept)
        return
    show_fields(
        [("pruned", kept.pruned), ("first record", kept.first), ("recorded at", kept.log_index), ("kept", kept.held_by)]
    )


def _rotate_key(session: Session) -> None:
    from aether.cli.output import progress, show_json

    with session.client() as client, progress("changing the key"):
        rotated = client.audit.rotate_key()
        _await_origin(client, rotated.origin)
    if session.as_json:
        show_json(rotated)
        return
    print(f"the log is signed by this key from now on; those who verify need it:\n{rotated.key}")


def _await_origin(client: Client, origin: str) -> None:
    """Until the authority is back and signs for it. Raises AetherError as soon as that takes RESTART_S_MAX."""
    import time

    from aether.contract.errors import AetherError

    deadline = time.monotonic() + RESTART_S_MAX
    while True:
        try:
            if client.checkpoint().startswith(f"{origin}\n"):
                return
        except AetherError as error:
            if error.code not in ("UNREACHABLE", "UNAVAILABLE", "DRAINING") or time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise AetherError("UNREACHABLE", "cannot see the new key in use yet", "see `aether health`")
        time.sleep(0.1)


def _witness_dir() -> Path:
    import os

    return Path("/var/lib/aether/witness") if os.geteuid() == 0 else Path.home() / ".local/state/aether-witness"


def _verifier(path: Path) -> Verifier:
    from aether.contract.errors import AetherError
    from aether.substrate.audit.note import NoteError, Verifier

    try:
        return Verifier.parse(_text(path))
    except NoteError as error:
        raise AetherError("BAD_FIELD", f"cannot use {path}: {error.reason}", "name the log's audit.pub") from error


def _text(path: Path) -> str:
    from aether.contract.errors import AetherError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AetherError("NOT_FOUND", f"cannot read {path}: {error}", "name a readable file") from error
