"""A witness of logs, pure: what `add-checkpoint` answers (C2SP tlog-witness).

https://c2sp.org/tlog-witness. A request is `old <size>`, at most PROOF_LINES_MAX lines of base64 hashes, an empty line
and a checkpoint; an answer is a status and a body. Rules, in this order:
- a body that is not of this form, or an old size above the checkpoint's: 400;
- an origin that is not known here: 404; no good signature of its key: 403;
- an old size other than that of the last checkpoint signed here: 409 with that size as `text/x.tlog.size`;
- the same size with another root: 409 (that is a fork, and it is kept as evidence by whoever drives this);
- a proof that does not lead from the one to the other: 422;
- otherwise 200 with the cosignature, which may leave only after the new checkpoint is durable.

Whoever drives this holds one lock from reading the last checkpoint to storing the next: two requests at once could
otherwise both be answered and the older one be stored last.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from aether.substrate.audit.cosign import Cosigner
from aether.substrate.audit.note import (
    NOTE_BYTES_MAX,
    SIZE_MAX,
    Checkpoint,
    NoteError,
    Verifier,
    decode_base64,
    open_checkpoint,
    parse_checkpoint,
    split_note,
)
from aether.substrate.audit.tree import EMPTY_ROOT, HASH_BYTES, verify_consistency

PROOF_LINES_MAX: Final = 63
REQUEST_BYTES_MAX: Final = NOTE_BYTES_MAX + 64 * 48
SIZE_TYPE: Final = "text/x.tlog.size"
TEXT_TYPE: Final = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class AddCheckpoint:
    """A parsed request: `proof` leads from `old` entries to those of the checkpoint in `note`."""

    old: int
    proof: tuple[bytes, ...]
    note: str

    def encode(self) -> bytes:
        hashes = "".join(f"{encode_hash(each)}\n" for each in self.proof)
        return f"old {self.old}\n{hashes}\n{self.note}".encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """`status` and `body` to send; with `keep` the checkpoint that must be durable before."""

    status: int
    body: str
    media_type: str = TEXT_TYPE
    keep: Checkpoint | None = None


def encode_hash(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def parse_request(body: bytes) -> AddCheckpoint:
    """Raises ValueError for what is no `add-checkpoint` request."""
    if len(body) > REQUEST_BYTES_MAX:
        raise ValueError(f"it is longer than {REQUEST_BYTES_MAX} bytes")
    head, gap, note = body.decode("utf-8").partition("\n\n")
    lines = head.split("\n")
    digits = lines[0].removeprefix("old ")
    if not gap or not lines[0].startswith("old ") or len(lines) > 1 + PROOF_LINES_MAX:
        raise ValueError("it is not an old size, proof lines, an empty line and a checkpoint")
    if not (digits.isascii() and digits.isdecimal()) or (digits[0] == "0" and digits != "0") or len(digits) > 16:
        raise ValueError("the old size is not a plain decimal number")
    if int(digits) > SIZE_MAX:
        raise ValueError(f"the old size is beyond {SIZE_MAX}")
    proof: list[bytes] = []
    for line in lines[1:]:
        raw = decode_base64(line)
        if raw is None or len(raw) != HASH_BYTES:
            raise ValueError("a proof line is not base64 of 32 bytes")
        proof.append(raw)
    return AddCheckpoint(int(digits), tuple(proof), note)


def add_checkpoint(
    body: bytes, logs: Mapping[str, Verifier], seen: Mapping[str, Checkpoint], cosigner: Cosigner, time_s: int
) -> Answer:
    """The answer to a request; `logs` are the known keys and `seen` the last checkpoint signed, both by origin."""
    try:
        request = parse_request(body)
        claim = parse_checkpoint(split_note(request.note)[0])
    except (ValueError, NoteError) as error:
        return Answer(400, f"cannot read the request: {error}\n")
    if request.old > claim.size:
        return Answer(400, f"the old size {request.old} is above the checkpoint's {claim.size}\n")
    verifier = logs.get(claim.origin)
    if verifier is None:
        return Answer(404, "this witness does not know that log\n")
    try:
        open_checkpoint(request.note, verifier)
    except NoteError as error:
        return Answer(403, f"{error.reason}\n")
    last = seen.get(claim.origin, Checkpoint(claim.origin, 0, EMPTY_ROOT))
    if request.old != last.size:
        return Answer(409, f"{last.size}\n", SIZE_TYPE)
    if claim.size == last.size and claim.root != last.root:
        return Answer(409, f"{last.size}\n", SIZE_TYPE)
    if not _grows(last, claim, request.proof):
        return Answer(422, "the proof does not lead from the last checkpoint to this one\n")
    return Answer(200, cosigner.line(claim.text(), time_s), keep=claim)


def _grows(last: Checkpoint, claim: Checkpoint, proof: tuple[bytes, ...]) -> bool:
    """Whether `claim` contains `last`; the empty tree is in every tree, by the empty proof."""
    if last.size == 0:
        return not proof
    return verify_consistency(last.size, claim.size, last.root, claim.root, proof)
