"""Brings checkpoints to witnesses and their cosignatures back: the client's side of C2SP tlog-witness.

Runs outside of the authority, which talks no TCP: whoever asks (the command line) gets checkpoint and proof from the
node and hands it what the witnesses answered; the node takes only cosignatures that verify under the keys it lists.

The list of witnesses, `policy/witnesses`, has one per line, its verifier key and where it is: `unix:/path`,
`http://host[:port][/prefix]` or `https://...`; empty lines and those that begin with `#` are passed over.
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from aether.contract.errors import AetherError
from aether.contract.limits import WITNESSES_MAX
from aether.substrate.audit.cosign import WitnessKey
from aether.substrate.audit.note import SIZE_MAX, NoteError, parse_checkpoint, split_note
from aether.substrate.audit.unixhttp import UnixConnection
from aether.substrate.audit.witness import SIZE_TYPE, AddCheckpoint

ANSWER_BYTES_MAX: Final = 16 * 1024
TIMEOUT_S: Final = 10.0
Prove = Callable[[int], tuple[str, tuple[bytes, ...]]]
"""A checkpoint of the log (its note) and the proof that it contains the first so many entries."""


@dataclass(frozen=True, slots=True)
class WitnessAt:
    """A witness and where it answers."""

    key: WitnessKey
    address: str


@dataclass(frozen=True, slots=True)
class Cosigned:
    """What a witness gave: the bytes of its signature (key id, time, signature) on the checkpoint of `size`."""

    key: WitnessKey
    size: int
    raw: bytes
    time_s: int


def read_witnesses(text: str) -> tuple[WitnessAt, ...]:
    """The list in `policy/witnesses`. Raises AetherError BAD_FIELD."""
    found: list[WitnessAt] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            if len(words) != 2:
                raise ValueError("it is not a verifier key and an address")
            _target(words[1])
            found.append(WitnessAt(WitnessKey.parse(words[0]), words[1]))
        except (ValueError, NoteError) as error:
            raise AetherError(
                "BAD_FIELD", f"cannot read line {number} of the witnesses: {error}", "write: <verifier key> <address>"
            ) from error
    if len(found) > WITNESSES_MAX or len({each.key.key_id for each in found}) != len(found):
        raise AetherError("BAD_FIELD", f"cannot use the witnesses: one is there twice, or more than {WITNESSES_MAX}")
    return tuple(found)


def submit(witness: WitnessAt, prove: Prove, known: int = 0) -> Cosigned:
    """Has one witness cosign the log's newest checkpoint; `known` is the size that it signed last, as far as known.

    Raises AetherError UNREACHABLE, VERIFY_FAILED (it saw a larger or another tree, or its answer does not verify)."""
    note, proof = prove(known)
    status, media_type, body = _post(witness, AddCheckpoint(known, proof, note))
    if status == 409 and media_type == SIZE_TYPE:
        known = _size(witness, body)
        size = parse_checkpoint(split_note(note)[0]).size
        if known > size:
            raise _refused(witness.key, f"it signed {known} records, the checkpoint has {size}: was the log cut back?")
        note, proof = prove(known)
        status, media_type, body = _post(witness, AddCheckpoint(known, proof, note))
    if status != 200:
        raise _refused(witness.key, f"it answered {status}: {body[:200].decode('utf-8', 'replace').strip()!r}")
    return cosignature(witness.key, note, body)


def cosignature(key: WitnessKey, note: str, body: bytes) -> Cosigned:
    """What the body of a good answer gives. Raises AetherError VERIFY_FAILED."""
    try:
        text, signatures = split_note(note + body.decode("utf-8"))
        mine = [raw for name, raw in signatures if name == key.name and raw[:4] == key.key_id]
        if not mine:
            raise NoteError("NOTE_SIGNATURE", "there is no cosignature of its key")
        return Cosigned(key, parse_checkpoint(text).size, mine[-1], key.check(text, mine[-1]))
    except (UnicodeDecodeError, NoteError) as error:
        raise _refused(key, f"its answer does not hold: {error}") from error


def _size(witness: WitnessAt, body: bytes) -> int:
    text = body.decode("ascii", "replace")
    if not text.endswith("\n") or not text[:-1].isdecimal() or len(text) > 17 or int(text) > SIZE_MAX:
        raise _refused(witness.key, f"it says that it signed {text[:80]!r} records")
    return int(text)


def _refused(key: WitnessKey, why: str) -> AetherError:
    return AetherError("VERIFY_FAILED", f"cannot have {key.name} cosign: {why}", "see docs/verifying.md")


def _target(address: str) -> tuple[str, str, int | None, str]:
    """Scheme, host or path, port, path of the request. Raises ValueError."""
    if address.startswith("unix:"):
        return "unix", address.removeprefix("unix:"), None, "/add-checkpoint"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError(f"{address!r} is not unix:PATH or an http or https address")
    return parts.scheme, parts.hostname, parts.port, f"{parts.path.rstrip('/')}/add-checkpoint"


def _post(witness: WitnessAt, request: AddCheckpoint) -> tuple[int, str, bytes]:
    scheme, host, port, path = _target(witness.address)
    connection: http.client.HTTPConnection
    if scheme == "unix":
        connection = UnixConnection(Path(host), TIMEOUT_S)
    elif scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=ssl.create_default_context())
    else:
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", path, request.encode(), {"Content-Type": "text/plain; charset=utf-8"})
        answer = connection.getresponse()
        body = answer.read(ANSWER_BYTES_MAX + 1)
        if len(body) > ANSWER_BYTES_MAX:
            raise _refused(witness.key, "its answer is too long")
        return answer.status, (answer.headers.get("Content-Type") or "").partition(";")[0].strip(), body
    except (OSError, http.client.HTTPException) as error:
        why = f"cannot reach {witness.key.name} at {witness.address}: {error}"
        raise AetherError("UNREACHABLE", why, "start the witness, or correct its address") from error
    finally:
        connection.close()
