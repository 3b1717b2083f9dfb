#!/usr/bin/env python3
"""Verify an AetherOS audit log, receipt, export or record with nothing but Python and a public key.

    python aether_verify.py log DIR --key KEYFILE [--against NOTE]...
    python aether_verify.py receipt FILE --key KEYFILE
    python aether_verify.py export FILE --key KEYFILE
    python aether_verify.py record FILE

All but the last take `--witness-key KEYFILE`, repeated, and `--quorum N`: so many witnesses must have cosigned.

Written from docs/formats.md and the specifications it names alone; it shares no code with the program that writes the
files, so that two readings of one page must agree. Standard library only, one file: read it before you trust it.

Exit status: 0 verified, 1 not verified (each failure with its name in docs/formats.md, file, field, index and byte
offset where known), 2 usage. `--json` prints the report as one JSON object.

Nothing here writes. Every byte read is taken as hostile. A check that cannot be made is a failure, never a pass; files
that no check looked at are listed as `unchecked`, entries that no signature covers yet are counted as
`entries_unproven`. `--against` names a checkpoint kept elsewhere that the log must still contain: nothing else shows
a log that was cut back to an older checkpoint, or that the holder of the key wrote anew.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import struct
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

ENTRY_BYTES_MAX = 65_535
INTEGER_MAX = 2**53 - 1
NOTE_BYTES_MAX = 65_536
EXPORT_LINE_BYTES_MAX = 8 * 1024 * 1024
RECEIPT_BYTES_MAX = 16 * 1024 * 1024
SEGMENT_BYTES_MAX = 67_108_864
FRAME_BYTES_MAX = 1_048_576
DOCUMENT_BYTES_MAX = 1_048_576
LISTED_MAX = 100  # failures and files printed as text; --json has them all
Json = Any  # what json.loads returns


class VerifyError(Exception):
    """One reason not to believe: the check's name, why, and the place (`field`, `index`, `offset`) as far as known."""

    def __init__(self, name: str, reason: str, **place: Any) -> None:
        super().__init__(name, reason)
        self.failure = {"name": name, "reason": reason, **place}


@dataclass
class Report:
    """What was looked at and what is wrong with it. Verified when nothing is."""

    failures: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def at(self, file: str, start: int = 0, **place: Any) -> Iterator[None]:
        """Checks made inside are of this place; a failed one is noted, and what follows the block goes on."""
        try:
            yield
        except VerifyError as error:
            failure = {"file": file, "field": None, "index": None, "offset": None, **place, **error.failure}
            if failure["offset"] is not None:
                failure["offset"] += start
            self.failures.append(failure)


# Ed25519 verification, RFC 8032 section 5.1.

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int, int, int]  # extended coordinates X, Y, Z, T: x = X/Z, y = Y/Z, xy = T/Z


def point_add(p: Point, q: Point) -> Point:
    a, b = (p[1] - p[0]) * (q[1] - q[0]) % P, (p[1] + p[0]) * (q[1] + q[0]) % P
    c, d = 2 * p[3] * q[3] * D % P, 2 * p[2] * q[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def point_times(scalar: int, p: Point) -> Point:
    total = (0, 1, 1, 0)
    while scalar:
        if scalar & 1:
            total = point_add(total, p)
        p, scalar = point_add(p, p), scalar >> 1
    return total


def point_decode(data: bytes) -> Point:
    """Section 5.1.3. Raises ValueError for 32 bytes that encode no point, y not below p included."""
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & (2**255 - 1)
    x2 = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(x2, (P + 3) // 8, P)
    if (x * x - x2) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    if y >= P or (x * x - x2) % P or (x == 0 and sign):
        raise ValueError("not a point of the curve")
    x = P - x if x & 1 != sign else x
    return x, y, 1, x * y % P


def point_encode(p: Point) -> bytes:
    inverse = pow(p[2], -1, P)
    return (p[1] * inverse % P | (p[0] * inverse % P & 1) << 255).to_bytes(32, "little")


BASE = point_decode((4 * pow(5, -1, P) % P).to_bytes(32, "little"))


def ed25519_good(public: bytes, signature: bytes, message: bytes) -> bool:
    """Section 5.1.7, the equation without cofactor: encode([S]B - [k]A) is R, bit for bit."""
    s = int.from_bytes(signature[32:], "little")
    if len(public) != 32 or len(signature) != 64 or s >= L:
        return False
    try:
        x, y, z, t = point_decode(public)
    except ValueError:
        return False
    k = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % L
    return point_encode(point_add(point_times(s, BASE), point_times(k, (P - x, y, z, P - t)))) == signature[:32]


# Keys, signed notes and checkpoints: C2SP signed-note, tlog-checkpoint.


class Key(NamedTuple):
    name: str
    public: bytes
    id: bytes


class Checkpoint(NamedTuple):
    origin: str
    size: int
    root: bytes


def unbase64(encoded: str) -> bytes:
    """RFC 4648 section 4 in its one spelling, as Python's decoder takes pad bits that are not zero; b"" if wrong."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except ValueError:
        return b""
    return data if base64.b64encode(data).decode() == encoded else b""


def utf8(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise VerifyError(name, "not UTF-8", offset=error.start) from None


def read_key(data: bytes, algorithm: int = 1) -> Key:
    """`<name>+<key id>+<base64(algorithm || public key)>`, one line; 4 is a witness's. Raises KEY_FORMAT."""
    match = re.fullmatch(r"([^\s+]+)\+([0-9a-f]{8})\+(\S+)\n?", utf8(data, "KEY_FORMAT"))
    body = unbase64(match[3]) if match else b""
    if match is None or len(body) != 33 or body[0] != algorithm:
        raise VerifyError("KEY_FORMAT", f"not one line <name>+<8 hex digits>+<base64 of 0x0{algorithm} and 32 bytes>")
    key_id = hashlib.sha256(match[1].encode() + b"\n" + body).digest()[:4]
    if key_id.hex() != match[2]:
        raise VerifyError("KEY_FORMAT", f"key id is {match[2]}, name and key give {key_id.hex()}")
    return Key(match[1], body[1:], key_id)


def split_note(data: bytes) -> tuple[str, list[tuple[str, bytes]]]:
    """The text, and name and bytes of each signature line. Raises NOTE_FORMAT."""
    if len(data) > NOTE_BYTES_MAX:
        raise VerifyError("NOTE_FORMAT", f"longer than {NOTE_BYTES_MAX} bytes", offset=NOTE_BYTES_MAX)
    control = re.search(rb"[\x00-\x09\x0b-\x1f]", data)
    if control:
        raise VerifyError("NOTE_FORMAT", "a control character", offset=control.start())
    text, empty, tail = utf8(data, "NOTE_FORMAT").rpartition("\n\n")
    if not empty or not tail.endswith("\n"):
        raise VerifyError("NOTE_FORMAT", "not a text, an empty line and signature lines that end in a newline")
    signatures, offset = [], len(data) - len(tail.encode())
    for line in tail[:-1].split("\n"):
        match = re.fullmatch(r"— ([^\s+]+) (\S+)", line)
        body = unbase64(match[2]) if match else b""
        if match is None or len(body) < 5:
            raise VerifyError("NOTE_FORMAT", "not a signature line", offset=offset)
        signatures.append((match[1], body))
        offset += len(line.encode()) + 1
    return text + "\n", signatures


def read_note(data: bytes, key: Key) -> tuple[str, VerifyError | None]:
    """The text, and NOTE_SIGNATURE unless a line of this key is there and each of them good. Raises NOTE_FORMAT."""
    text, signatures = split_note(data)
    mine = [
        ed25519_good(key.public, body[4:], text.encode())
        for name, body in signatures
        if name == key.name and body[:4] == key.id
    ]
    wrong = "does not verify" if mine else "is not there"
    name = f"{key.name}+{key.id.hex()}"
    bad = None if mine and all(mine) else VerifyError("NOTE_SIGNATURE", f"the signature of {name} {wrong}")
    return text, bad


def cosigned(data: bytes, key: Key) -> bool:
    """Whether a witness cosigned a note (C2SP tlog-cosignature, version 1). Raises NOTE_FORMAT, NOTE_SIGNATURE."""
    text, signatures = split_note(data)
    found = False
    for name, body in signatures:
        if name == key.name and body[:4] == key.id:
            time = int.from_bytes(body[4:12], "big")
            said = f"cosignature/v1\ntime {time}\n{text}".encode()
            if len(body) != 76 or time >= 2**63 or not ed25519_good(key.public, body[12:], said):
                raise VerifyError("NOTE_SIGNATURE", f"the cosignature of {name} does not verify")
            found = True
    return found


class Witnesses(NamedTuple):
    """The keys of witnesses, and how many of them must have cosigned."""

    keys: list[Key]
    quorum: int

    def check(self, notes: dict[str, bytes], report: Report) -> None:
        """WITNESS_QUORUM; counts public keys, as two names may be one witness."""
        found: dict[bytes, int] = {}
        for file, data in notes.items():
            for key in self.keys:
                with report.at(file):
                    if cosigned(data, key):
                        size = int(data.split(b"\n")[1])
                        found[key.public] = max(size, found.get(key.public, 0))
        with report.at("cosignatures"):
            if len(found) < self.quorum:
                raise VerifyError("WITNESS_QUORUM", f"{len(found)} witnesses cosigned, {self.quorum} are needed")
        if self.keys:
            sizes = sorted(found.values(), reverse=True) + [None] * max(self.quorum, 1)
            report.facts.update(witnesses=len(found), witnessed_size=sizes[max(self.quorum, 1) - 1])


NO_WITNESSES = Witnesses([], 0)


def check_checkpoint(data: bytes, key: Key, report: Report, file: str, where: str | None = None) -> Checkpoint | None:
    """What a checkpoint claims, its failures noted; None when nothing can be read from it."""
    claim = None
    with report.at(file, field=where):
        text, bad = read_note(data, key)
        match = re.fullmatch(r"([^\n]+)\n(0|[1-9][0-9]{0,15})\n([^\n]+)\n", text)
        root = unbase64(match[3]) if match else b""
        if match is None or len(root) != 32 or int(match[2]) > INTEGER_MAX:
            raise VerifyError("NOTE_FORMAT", "the text is not origin, size and base64 of a 32-byte root")
        claim = Checkpoint(match[1], int(match[2]), root)
        if bad:
            raise bad
    with report.at(file, field=where):
        if claim and claim.origin != key.name:
            raise VerifyError("CHECKPOINT_ORIGIN", f"origin {claim.origin} is not the key's name {key.name}")
    return claim


# Canonical JSON: RFC 8785 without floats.


def read_json(data: bytes) -> Json:
    """The value. Raises ValueError for whatever records may not hold, RFC 8785 or not."""

    def refuse(what: str) -> Json:
        raise ValueError(f"{what[:20]} is a number that records do not hold")

    def members(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        if len(dict(pairs)) < len(pairs) or not all(name.isascii() for name, _ in pairs):
            raise ValueError("a key is there twice or not ASCII")
        return dict(pairs)

    def number(digits: str) -> int:
        return int(digits) if len(digits) < 18 and abs(int(digits)) <= INTEGER_MAX else refuse(digits)

    text = data.decode("utf-8")
    try:
        value = json.loads(text, parse_int=number, parse_float=refuse, parse_constant=refuse, object_pairs_hook=members)
        write_json(value)  # a lone surrogate has no UTF-8
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def write_json(value: Json) -> bytes:
    """The canonical spelling: `json` escapes as RFC 8785 section 3.2.2.2 says, ASCII keys sort alike in any coding."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode("utf-8")


def fault_place(error: ValueError) -> dict[str, int]:
    """Byte offset of a JSON or UTF-8 error, where it has one."""
    if isinstance(error, json.JSONDecodeError):
        return {"offset": len(error.doc[: error.pos].encode())}
    return {"offset": error.start} if isinstance(error, UnicodeDecodeError) else {}


def first_difference(a: bytes, b: bytes) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# Shapes. A shape is a name in KINDS, words between bars (one of them), either with `?` (or null), [shape] (a list),
# {"*": shape} (any keys), {field: shape, ...} (exactly these fields) or a tuple of one object (or null).


def is_time(value: Json) -> bool:
    try:
        return bool(re.fullmatch(r"[-0-9]{10}T[:0-9]{8}\.[0-9]{6}Z", value) and datetime.fromisoformat(value))
    except (TypeError, ValueError):
        return False


def like(pattern: str) -> Callable[[Json], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def is_index(value: Json) -> bool:
    return isinstance(value, str) and re.fullmatch(r"0|[1-9][0-9]{0,15}", value) is not None


KINDS: dict[str, Callable[[Json], bool]] = {
    "plain": lambda value: value is None or isinstance(value, str | int),
    "text": lambda value: isinstance(value, str),
    "integer": lambda value: type(value) is int,  # true is an int to isinstance
    "boolean": lambda value: isinstance(value, bool),
    "digest": like(r"sha256:[0-9a-f]{64}"),
    "hash": like(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]="),
    "time": is_time,
}
# fmt: off
TYPES = ("|node.started|node.stopped|ticket.minted|ticket.revoked|ticket.key-rotated|policy.loaded|access.denied"
         "|key.created|pki.created|pki.rotated|pki.issued|issuers.loaded"
         "|document.stored"
         "|audit.pruned|audit.key-rotated|audit.epoch"
         "|job.intent|job.started|job.stop|job.outcome|job.signal|job.attach|job.trace"
         "|cell.allocated|cell.started|cell.frozen|cell.thawed|cell.resized|cell.trace|cell.put|cell.freed|cell.lost"
         "|image.imported|image.removed|egress.opened|egress.connection|egress.closed"
         "|budget.set|budget.raised|budget.exhausted|quota.set"
         "|approval.requested|approval.granted|approval.denied|approval.expired|")
TEXTS = "tenant_id principal request_id traceparent operation job_id kind op model_id model_version cell_id state"
FIGURES = ("wall_us cpu_user_us cpu_system_us memory_peak_bytes io_read_bytes io_write_bytes pids_peak oom_kills "
           "throttled_us stdout_bytes stderr_bytes output_dropped_bytes batch_size")
DECISION = {"decision": "|allow|deny|", "determining": ["text"], "digest": "digest"}
QUESTION = {
    "operation": "text", "roles": ["text"], "principal_kind": "text", "principal_tenant": "text", "kind": "text",
    "raises/": "boolean", "complete/": "boolean",
    **{name: ["text"] for name in ["labels/", "hosts/", "credentials/", "paths/"]},
    **dict.fromkeys(["op/", "model/", "id/", "owner/", "tenant_id/", "intent/", "provider/", "route/"], "text"),
}
RECORD = {
    "schema_version": "|1.0|", "type": TYPES, "log_index": "integer", "time": "time", "node_id": "text",
    **dict.fromkeys(TEXTS.split(), "text?"), "effect": "|pure|cell|read|control|?", "attempt": "integer?",
    **dict.fromkeys(["input_hash", "idempotency_hash", "result_digest"], "digest?"), "labels": ["text"],
    "ticket": ({"implicit": "boolean", "kid": "text", "link_ids": ["text"], "role": "text"},),
    "policy": ({**DECISION, "question/": QUESTION, "shadow/": DECISION},),
    "budget": ({"accounts": ["text"], "cpu_ms": "integer", "ops": "integer", "reservation_id": "text",
                "settled": "boolean", "amounts/": {"*": "integer"}, "grants/": {"*": "integer"},
                "limits/": {"*": {"*": "integer"}}, "expires_ms/": "integer"},),
    "code": ({**dict.fromkeys(["engine", "model_digest", "route", "rung"], "text?"),
              **dict.fromkeys(["plan_digest", "sandbox_digest"], "digest?")},),
    "exit": ({"code": "integer?", "oom_killed": "boolean", "reason": "text?", "signal": "integer?",
              "timed_out": "boolean"},),
    "error": ({"code": "text", "details": {"*": "plain"}, "message": "text", "remedy": "text"},),
    "usage": ({**dict.fromkeys(FIGURES.split(), "integer?"), "basis": {"*": "|measured|apportioned|"}},),
    "artifacts": [{"digest": "digest", "media_type": "text", "name": "text", "size_bytes": "integer"}],
    "result_bytes": "integer?",
    **dict.fromkeys(["created_at", "started_at", "finished_at"], "time?"),
    "timings_us": {"*": "integer"}, "detail": {"*": "text"},
}
BETWEEN = {"job.started", "job.stop", "approval.requested", "approval.granted", "approval.denied", "approval.expired"}
RECEIPT = {
    "receipt_version": "|1.0|", "job_id": "text", "origin": "text", "verdict": "text", "checkpoint": "text",
    "entries": [{"entry": "text", "proof": {"log_index": "integer", "hashes": ["hash"]}}],
    "documents": {"*": "text"},
}
# fmt: on


def misfit(value: Json, shape: Any, where: str = "") -> str | None:
    """What keeps a value from having a shape, or None. A field named with a slash is left out where it is empty."""
    if isinstance(shape, str):
        kind = shape.removesuffix("?")
        known = KINDS.get(kind) or (lambda value: isinstance(value, str) and value in kind[1:-1].split("|"))
        return None if known(value) or (value is None and kind != shape) else f"{where} is not {shape}"
    if isinstance(shape, tuple):
        return None if value is None else misfit(value, shape[0], where)
    if type(value) is not type(shape):
        return f"{where or 'it'} is not {'a list' if isinstance(shape, list) else 'an object'}"
    if isinstance(shape, list):
        parts = [(item, shape[0], f"{where}[{at}]") for at, item in enumerate(value)]
    elif "*" in shape:
        parts = [(item, shape["*"], f"{where}.{name}") for name, item in value.items()]
    else:
        known = {name.removesuffix("/"): each for name, each in shape.items()}
        lacking = sorted(shape.keys() - value.keys() - {f"{name}/" for name in known})
        unknown = sorted(value.keys() - known)
        if lacking or unknown or any(value[name] in (None, {}, []) for name in value if f"{name}/" in shape):
            return f"{where or 'it'} lacks {lacking}, has unknown {unknown}, or a part that is empty and not left out"
        parts = [(item, known[name], f"{where}.{name}".lstrip(".")) for name, item in value.items()]
    return next(filter(None, (misfit(*part) for part in parts)), None)


def read_record(data: bytes) -> dict[str, Json]:
    """The record in an entry. Raises ENTRY_NOT_CANONICAL or ENTRY_SCHEMA."""
    if not 1 <= len(data) <= ENTRY_BYTES_MAX:
        raise VerifyError("ENTRY_NOT_CANONICAL", f"{len(data)} bytes, allowed are 1 to {ENTRY_BYTES_MAX}", offset=0)
    try:
        record = read_json(data)
    except ValueError as error:
        raise VerifyError("ENTRY_NOT_CANONICAL", str(error), **fault_place(error)) from None
    canonical = write_json(record)
    if canonical != data:
        at = first_difference(canonical, data)
        raise VerifyError("ENTRY_NOT_CANONICAL", "RFC 8785 spells it otherwise", offset=at)
    wrong = misfit(record, RECORD)
    detail = {} if wrong else record["detail"]
    if wrong is None and record["type"] in ("document.stored", "audit.epoch") and "digest" in detail:
        wrong = misfit(detail["digest"], "digest", "detail.digest")
    if wrong is None and record["type"] == "audit.pruned" and not is_index(detail.get("end")):
        wrong = "detail.end is not an index"
    if wrong is None and record["type"] == "audit.epoch" and not {"digest", "previous_key"} <= detail.keys():
        wrong = "detail lacks digest or previous_key"
    if wrong:
        raise VerifyError("ENTRY_SCHEMA", wrong)
    return dict(record)


def check_node(record: dict[str, Json], origin: str) -> None:
    """An origin is `aether/<node id>/<epoch>`. Raises ENTRY_NODE."""
    head, _, rest = origin.partition("/")
    if head != "aether" or rest.count("/") != 1 or rest.partition("/")[0] != record["node_id"]:
        raise VerifyError("ENTRY_NODE", f"of node {record['node_id']}, the origin is {origin}", field="node_id")


def is_epoch_of(origin: str, current: str) -> bool:
    """Whether it is an origin, or that of an earlier epoch of the same log."""
    parts = [re.fullmatch(r"(.*)/([1-9][0-9]{0,8})", each, re.DOTALL | re.ASCII) for each in (origin, current)]
    if origin == current:
        return True
    old, new = parts
    return old is not None and new is not None and old[1] == new[1] and int(old[2]) <= int(new[2])


def documents_of(record: dict[str, Json]) -> set[str]:
    """Digests of the documents that a record names."""
    policy, code = record["policy"] or {}, record["code"] or {}
    stored = record["detail"].get("digest") if record["type"] in ("document.stored", "audit.epoch") else None
    named = (stored, policy.get("digest"), code.get("plan_digest"), code.get("sandbox_digest"))
    return {digest for digest in named if digest is not None}


# The tree: RFC 6962 section 2.1, RFC 9162 section 2.1.3.2.


def leaf_hash(entry: bytes) -> bytes:
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def root_of(row: list[bytes]) -> bytes:
    """Root over hashes. Pairing level by level and lifting an odd last one splits where RFC 6962 does."""
    while len(row) > 1:
        paired = [node_hash(row[at], row[at + 1]) for at in range(0, len(row) - 1, 2)]
        row = paired + row[len(paired) * 2 :]
    return row[0] if row else hashlib.sha256(b"").digest()


def included(leaf: bytes, index: int, claim: Checkpoint, path: list[bytes]) -> bool:
    if not 0 <= index < claim.size:
        return False
    fn, sn, r = index, claim.size - 1, leaf
    for c in path:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            r = node_hash(c, r)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            r = node_hash(r, c)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and r == claim.root


# The log directory.


class Frame(NamedTuple):
    first: int
    entries: list[tuple[int, bytes]]  # offset in the segment, bytes
    end: int


def frame_end(data: bytes, at: int) -> int | None:
    """Where a frame that was written whole at an offset ends, whatever it says; None where there is none."""
    if len(data) < at + 24 or data[at : at + 4] != b"AEF1":
        return None
    length, check = struct.unpack_from(">II", data, at + 16)
    end = at + 24 + int(length)
    if end > len(data) or end - at > FRAME_BYTES_MAX:
        return None
    return end if zlib.crc32(memoryview(data)[at + 24 : end], zlib.crc32(data[at : at + 20])) == check else None


def frame_at(data: bytes, at: int) -> Frame | str:
    """The frame at an offset, or why there is none."""
    end = frame_end(data, at)
    if end is None:
        return "no frame, a frame that is cut off or above its bound, or a wrong check sum"
    first, count = struct.unpack_from(">QI", data, at + 4)
    entries: list[tuple[int, bytes]] = []
    cursor = at + 24
    while cursor + 4 <= end and len(entries) < count:
        size = int.from_bytes(data[cursor : cursor + 4], "big")
        if not 1 <= size <= ENTRY_BYTES_MAX:
            return f"an entry of {size} bytes"
        entries.append((cursor + 4, data[cursor + 4 : cursor + 4 + size]))
        cursor += 4 + size
    if cursor != end or len(entries) != count or count == 0:
        return f"the payload is not {count} entries and nothing else"
    return Frame(first, entries, end)


def is_torn(data: bytes, at: int) -> bool:
    """What one write left unfinished: no more than one frame's bytes, and no frame written whole from here on."""
    if len(data) - at > FRAME_BYTES_MAX:
        return False
    while (at := data.find(b"AEF1", at)) >= 0:
        if frame_end(data, at) is not None:
            return False
        at += 1
    return True


def read_file(path: Path, limit: int) -> bytes | None:
    """At most `limit + 1` bytes, None where no regular file is (a fifo would block, a device never end)."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(limit + 1)


def tile_path(level: str, number: int, width: int) -> str:
    digits = f"{number:03d}"
    digits = digits.zfill(-(-len(digits) // 3) * 3)
    groups = [f"x{digits[at : at + 3]}" for at in range(0, len(digits) - 3, 3)]
    return "/".join(["tile", level, *groups, digits[-3:]]) + (f".p/{width}" if width else "")


class LogCheck:
    """One pass over a log directory. Entries count for the tree as far as they follow one another without a hole."""

    def __init__(self, directory: Path, key: Key, held: list[Path], witnesses: Witnesses = NO_WITNESSES) -> None:
        self.directory, self.key, self.held, self.witnesses = directory, key, held, witnesses
        self.report = Report()
        self.pruned = self.pruned_said = 0
        self.epochs: list[tuple[int, dict[str, Json]]] = []
        self.changes: list[tuple[int, str]] = []  # where a segment of another epoch begins
        self.origin: str | None = None
        self.leaves: list[bytes] = []
        self.bundle: list[bytes] = []
        self.named: dict[str, int] = {}
        self.looked_at = {"lock", "checkpoint"}
        self.size = self.entries = self.torn_bytes = 0

    def run(self) -> Report:
        claims = [("checkpoint", self.checkpoint())]
        notes = {str(path): path.read_bytes() for path in self.held} | self.witnessed()
        for file, note in notes.items():
            claims.append((file, check_checkpoint(note, self.key, self.report, file)))
        for index, entry, file, offset in self.segments():
            self.entry(index, entry, file, offset)
        for file, claim in claims:
            with self.report.at(file):
                self.root(claim)
        self.tiles()
        self.check_epochs()
        self.documents()
        with self.report.at("segments"):
            if self.pruned_said < self.pruned:
                raise VerifyError("SEGMENT_MISSING", f"no record says that entries below {self.pruned} were pruned")
        files = (str(path.relative_to(self.directory)) for path in self.directory.rglob("*") if not path.is_dir())
        self.report.facts = {
            **{"origin": self.key.name, "size": self.size, "root": root_of(self.leaves[: self.size]).hex()},
            **{"entries": self.entries, "entries_unproven": max(self.entries + self.pruned - self.size, 0)},
            **{"torn_bytes": self.torn_bytes, "held_checkpoints": len(self.held), "pruned": self.pruned},
            "unchecked": sorted(set(files) - self.looked_at),
        }
        self.witnesses.check(notes, self.report)
        return self.report

    def witnessed(self) -> dict[str, bytes]:
        """The checkpoints of this epoch that witnesses cosigned."""
        found = {}
        for path in sorted((self.directory / "witnessed").glob("*")):
            data = read_file(path, NOTE_BYTES_MAX) if re.fullmatch(r"[0-9a-f]{8}", path.name) else None
            if data is not None and data.startswith(self.key.name.encode() + b"\n"):
                found[f"witnessed/{path.name}"] = data
        self.looked_at |= found.keys()
        return found

    def take_pruned(self, begin: int) -> None:
        """Hashes of what was pruned, from the tiles, and the entries that the bundle around `begin` still has."""
        self.pruned = begin
        for number in range(-(-begin // 256)):
            data = read_file(self.directory / tile_path("0", number, 0), 8192)
            if data is None:
                raise VerifyError("TILE_MISSING", f"tile {number} of level 0 holds the hashes of what was pruned")
            if len(data) != 8192:
                raise VerifyError("TILE_MISMATCH", f"tile {number} of level 0 is not 8,192 bytes")
            self.leaves += [data[at : at + 32] for at in range(0, 8192, 32)]
        del self.leaves[begin:]
        first = begin // 256 * 256
        if begin > first:
            data = read_file(self.directory / tile_path("entries", begin // 256, 0), 256 * 65_537) or b""
            at = 0
            for index in range(first, begin):
                size = int.from_bytes(data[at : at + 2], "big")
                entry, at = data[at + 2 : at + 2 + size], at + 2 + size
                if leaf_hash(entry) != self.leaves[index]:
                    raise VerifyError("TILE_MISMATCH", "a kept entry is not that of the hash tiles", index=index)
                self.bundle.append(len(entry).to_bytes(2, "big") + entry)
                self.read(index, entry, tile_path("entries", begin // 256, 0), at - size)

    def check_epochs(self) -> None:
        begun = {index for index, _ in self.epochs}
        for index, file in self.changes:
            with self.report.at(file, index=index):
                if index not in begun:
                    raise VerifyError("EPOCH_BROKEN", "does not begin with the record of its epoch")
        for index, record in self.epochs:
            with self.report.at("documents", index=index):
                self.check_epoch(index, record["detail"])

    def check_epoch(self, index: int, detail: dict[str, str]) -> None:
        """The last checkpoint of the epoch before is of this log. Raises EPOCH_BROKEN."""
        digest = detail["digest"]
        data = read_file(self.directory / f"documents/sha256/{digest[7:9]}/{digest[7:]}", NOTE_BYTES_MAX)
        if data is None:
            return  # DOCUMENT_MISSING
        trial = Report()
        try:
            key = read_key(detail["previous_key"].encode())
        except VerifyError as error:
            raise VerifyError("EPOCH_BROKEN", str(error)) from None
        claim = check_checkpoint(data, key, trial, "")
        if claim is None or trial.failures:
            raise VerifyError("EPOCH_BROKEN", f"the note does not hold: {trial.failures}")
        if claim.origin == self.key.name or not is_epoch_of(claim.origin, self.key.name):
            raise VerifyError("EPOCH_BROKEN", f"{claim.origin} is no earlier epoch of {self.key.name}")
        if claim.size > index or index >= self.size or root_of(self.leaves[: claim.size]) != claim.root:
            raise VerifyError("EPOCH_BROKEN", f"the first {claim.size} entries are not what the epoch before signed")

    def checkpoint(self) -> Checkpoint | None:
        """Step 1."""
        claim = None
        with self.report.at("checkpoint"):
            data = read_file(self.directory / "checkpoint", NOTE_BYTES_MAX)
            if data is None:
                raise VerifyError("CHECKPOINT_MISSING", "nothing says what the log should hold")
            claim = check_checkpoint(data, self.key, self.report, "checkpoint")
        self.size = claim.size if claim else 0
        return claim

    def segments(self) -> Iterator[tuple[int, bytes, str, int]]:
        """Step 2: index, bytes, file and offset of each entry in a valid frame."""
        found = sorted((self.directory / "segments").glob("*"))
        found = [path for path in found if re.fullmatch(r"[0-9]{20}", path.name) and int(path.name) < 2**64]
        following: int | None = 0
        if found and int(found[0].name):
            with self.report.at(f"segments/{found[0].name}"):
                self.take_pruned(int(found[0].name))
                following = self.pruned
        for path in found:
            file, first = f"segments/{path.name}", int(path.name)
            self.looked_at.add(file)
            with self.report.at(file, index=following):
                if following is not None and first != following:
                    raise VerifyError("SEGMENT_MISSING", f"entry {following} should be the first here")
            data, following = read_file(path, SEGMENT_BYTES_MAX) or b"", None
            with self.report.at(file):
                start = self.header(data, first, file)
                following = yield from self.frames(data, start, first, file, path == found[-1])

    def header(self, data: bytes, first: int, file: str) -> int:
        """Where the frames start. Raises SEGMENT_HEADER."""
        said = data[18 : 18 + int.from_bytes(data[16:18], "big")]
        origin = said if is_epoch_of(said.decode("utf-8", "replace"), self.key.name) else self.key.name.encode()
        header = b"AETHSEG1" + struct.pack(">QH", first, len(origin)) + origin
        header += struct.pack(">I", zlib.crc32(header))
        if not data.startswith(header):
            at = first_difference(header, data)
            raise VerifyError("SEGMENT_HEADER", f"not a header of {self.key.name} from {first} on", offset=at)
        if len(data) > SEGMENT_BYTES_MAX:
            raise VerifyError("SEGMENT_HEADER", f"longer than {SEGMENT_BYTES_MAX} bytes", offset=SEGMENT_BYTES_MAX)
        before, self.origin = self.origin, origin.decode()
        if before is not None and before != self.origin:
            self.changes.append((first, file))
            if not is_epoch_of(before, self.origin):
                raise VerifyError("SEGMENT_HEADER", f"of {self.origin}, behind one of {before}")
        return len(header)

    def frames(
        self, data: bytes, at: int, index: int, file: str, last: bool
    ) -> Generator[tuple[int, bytes, str, int], None, int]:
        """The entries of a segment; returns the index that follows them. Raises FRAME_BAD."""
        while at < len(data):
            frame = frame_at(data, at)
            if isinstance(frame, str) or frame.first != index:
                if last and index >= self.size and is_torn(data, at):
                    self.torn_bytes = len(data) - at
                    return index
                why = frame if isinstance(frame, str) else f"it begins with {frame.first}, not {index}"
                raise VerifyError("FRAME_BAD", why, index=index, offset=at)
            for offset, entry in frame.entries:
                yield index, entry, file, offset
                index += 1
            at = frame.end
        return index

    def entry(self, index: int, entry: bytes, file: str, offset: int) -> None:
        """Step 3; and the leaf and the bundle of this entry when all before it are there."""
        self.entries += 1
        self.read(index, entry, file, offset)
        if index != len(self.leaves):
            return
        self.leaves.append(leaf_hash(entry))
        self.bundle.append(len(entry).to_bytes(2, "big") + entry)
        if index < self.size and (len(self.bundle) == 256 or index == self.size - 1):
            self.match(tile_path("entries", index // 256, len(self.bundle) % 256), self.bundle, index // 256 * 256)
        if len(self.bundle) == 256:
            self.bundle = []

    def read(self, index: int, entry: bytes, file: str, offset: int) -> None:
        with self.report.at(file, start=offset, index=index):
            record = read_record(entry)
            for digest in documents_of(record):
                self.named.setdefault(digest, index)
            if record["type"] == "audit.pruned":
                self.pruned_said = max(self.pruned_said, int(record["detail"]["end"]))
            elif record["type"] == "audit.epoch":
                self.epochs.append((index, record))
            if record["log_index"] != index:
                raise VerifyError("ENTRY_INDEX", f"the record says {record['log_index']}", field="log_index", offset=0)
            check_node(record, self.key.name)

    def root(self, claim: Checkpoint | None) -> None:
        """Step 4, for the published checkpoint and for those kept elsewhere. Raises LOG_SHORT or ROOT_MISMATCH."""
        have = len(self.leaves)
        if claim and have < claim.size:
            raise VerifyError(
                "LOG_SHORT", f"{have} entries without a hole, the checkpoint has {claim.size}", index=have
            )
        if claim and root_of(self.leaves[: claim.size]) != claim.root:
            raise VerifyError("ROOT_MISMATCH", f"the first {claim.size} entries have another root")

    def tiles(self) -> None:
        """Step 5 for hash tiles, level by level, as far as the segments give hashes."""
        row, level = self.leaves[: self.size], 0
        while row:
            whole = len(row) == self.size >> 8 * level
            for at in range(0, len(row) if whole else len(row) // 256 * 256, 256):
                hashes = row[at : at + 256]
                self.match(tile_path(str(level), at // 256, len(hashes) % 256), hashes, at << 8 * level, 8 * level)
            row = [root_of(row[at : at + 256]) for at in range(0, len(row) // 256 * 256, 256)]
            level += 1

    def match(self, file: str, pieces: list[bytes], index: int, shift: int = 0) -> None:
        """Step 5: a tile is these pieces in a row, each for `2^shift` entries."""
        self.looked_at.add(file)
        with self.report.at(file, index=index):
            data, at = self.tile(file, sum(map(len, pieces))), 0
            for position, piece in enumerate([*pieces, b""]):
                found = data[at : at + len(piece)] if piece else data[at:]
                if found != piece:
                    place = {"index": index + (position << shift), "offset": at + first_difference(piece, found)}
                    raise VerifyError("TILE_MISMATCH", "differs from what the segments give", **place)
                at += len(piece)

    def tile(self, file: str, length: int) -> bytes:
        """A tile; for a partial one that is gone the beginning of the full or a wider one. Raises TILE_MISSING."""
        whole, _, width = file.partition(".p/")
        data = read_file(self.directory / file, length)
        for other in [whole, *(f"{whole}.p/{wider}" for wider in range(int(width) + 1, 256))] if width else []:
            if data is None:
                data = (read_file(self.directory / other, length) or b"")[:length] or None
        if data is None:
            raise VerifyError("TILE_MISSING", "the checkpoint needs it")
        return data

    def documents(self) -> None:
        """Step 6."""
        present = set()
        for path in sorted((self.directory / "documents").rglob("*")):
            file = str(path.relative_to(self.directory))
            if path.is_dir() or file.endswith(".tmp"):
                continue
            self.looked_at.add(file)
            present.add(f"sha256:{path.name}")
            with self.report.at(file):
                match = re.fullmatch(r"documents/sha256/(..)/(\1[0-9a-f]{62})", file)
                text = read_file(path, DOCUMENT_BYTES_MAX)
                if text is None or len(text) > DOCUMENT_BYTES_MAX:
                    raise VerifyError("DOCUMENT_MISMATCH", f"not a file of at most {DOCUMENT_BYTES_MAX} bytes")
                if match is None or hashlib.sha256(text).hexdigest() != match[2]:
                    raise VerifyError("DOCUMENT_MISMATCH", "its bytes have another digest than its name")
        for digest, index in self.named.items():
            with self.report.at("documents", index=index):
                if digest not in present:
                    raise VerifyError("DOCUMENT_MISSING", f"entry {index} names {digest}")


# Receipts.


def verify_receipt(data: bytes, key: Key, file: str, witnesses: Witnesses = NO_WITNESSES) -> Report:
    """Steps 1 to 7. After the first each step goes on with what could be read, so that the report is whole."""
    report = Report()
    with report.at(file):
        receipt = read_receipt(data)
    if report.failures:
        return report
    claim = check_checkpoint(receipt["checkpoint"].encode(), key, report, file, "checkpoint")
    with report.at(file, field="origin"):
        if claim and receipt["origin"] != claim.origin:
            raise VerifyError("CHECKPOINT_ORIGIN", "not the checkpoint's first line")
    given = enumerate(receipt["entries"])
    read = [check_entry(each, f"entries[{at}]", claim, key, report, file) for at, each in given]
    records = [record for record in read if record]
    if len(records) == len(receipt["entries"]):
        check_story(records, receipt["job_id"], report, file)
        check_documents(records, receipt["documents"], report, file)
        with report.at(file, field="verdict"):
            check_verdict(receipt["verdict"], records, key)
    report.facts = {
        **{"job_id": receipt["job_id"], "origin": receipt["origin"], "size": claim.size if claim else None},
        "log_indexes": [record["log_index"] for record in records],
        "state": records[-1]["state"] if records else None,
    }
    witnesses.check({f"{file} checkpoint": receipt["checkpoint"].encode()}, report)
    return report


def read_receipt(data: bytes) -> dict[str, Json]:
    """Step 1. Raises RECEIPT_FORMAT."""
    if len(data) > RECEIPT_BYTES_MAX:
        raise VerifyError("RECEIPT_FORMAT", f"longer than {RECEIPT_BYTES_MAX} bytes", offset=RECEIPT_BYTES_MAX)
    try:
        receipt = read_json(data)
    except ValueError as error:
        raise VerifyError("RECEIPT_FORMAT", f"not JSON: {error}", **fault_place(error)) from None
    canonical, spelled = write_json(receipt), data.removesuffix(b"\n")
    if canonical != spelled:
        at = first_difference(canonical, spelled)
        raise VerifyError("RECEIPT_FORMAT", "RFC 8785 spells it otherwise", offset=at)
    wrong = misfit(receipt, RECEIPT)
    if wrong:
        raise VerifyError("RECEIPT_FORMAT", wrong)
    return dict(receipt)


def check_entry(
    given: dict[str, Json], where: str, claim: Checkpoint | None, key: Key, report: Report, file: str
) -> dict[str, Json] | None:
    """Step 3 for one entry: the record, or None when its text is none."""
    record, index, entry = None, given["proof"]["log_index"], given["entry"].encode()
    with report.at(file, field=f"{where}.proof", index=index):
        path = [unbase64(each) for each in given["proof"]["hashes"]]
        if claim and not included(leaf_hash(entry), index, claim, path):
            raise VerifyError("PROOF_INVALID", "does not lead to the checkpoint's root")
    with report.at(file, field=f"{where}.entry", index=index):
        record = read_record(entry)
        if record["log_index"] != index:
            raise VerifyError("ENTRY_INDEX", f"the record says {record['log_index']}, the proof {index}")
        check_node(record, key.name)
    return record


def check_story(records: list[dict[str, Json]], job_id: str, report: Report, file: str) -> None:
    """Steps 4 and 5: one job told in order, and its end agrees with its beginning."""
    for at, record in enumerate(records):
        with report.at(file, field=f"entries[{at}]", index=record["log_index"]):
            if record["job_id"] != job_id:
                raise VerifyError("ENTRY_JOB", f"belongs to {record['job_id']}, not to {job_id}")
    types = [record["type"] for record in records]
    indexes = [record["log_index"] for record in records]
    ends = len(types) > 1 and types[0] == "job.intent" and types[-1] == "job.outcome"
    with report.at(file, field="entries"):
        if not ends or not {*types[1:-1]} <= BETWEEN or sorted({*indexes}) != indexes:
            told = ", ".join(f"{index} {kind}" for index, kind in zip(indexes, types, strict=True))
            raise VerifyError("ENTRY_SEQUENCE", f"not an intent, what may follow, an outcome, in order: {told}")
        with report.at(file, field="entries"):
            check_approval(records)
        intent, outcome = records[0], records[-1]
        wrong = [name for name in ("kind", "op", "input_hash") if intent[name] != outcome[name]]
        wrong += [] if all(record["tenant_id"] == intent["tenant_id"] for record in records) else ["tenant_id"]
        wrong += [] if budgets_agree(intent, outcome) else ["budget"]
        wrong += [] if (intent["policy"] or {}).get("decision") == "allow" else ["policy"]
        if wrong:
            raise VerifyError("ENTRY_CONTRADICTION", f"the entries differ or do not fit in {', '.join(wrong)}")


def check_approval(records: list[dict[str, Json]]) -> None:
    """Step 5: what was to wait for an approval did nothing before it. Raises APPROVAL_MISSING."""
    intent, outcome = records[0], records[-1]
    wanted = intent["detail"].get("approval")
    ran = outcome["state"] == "succeeded" or outcome["exit"] is not None
    first = next((at for at, record in enumerate(records) if record["type"] == "job.started"), len(records) - 1)
    for record in records:
        about = (record["detail"].get("approval"), record["input_hash"])
        if record["type"].startswith("approval.") and about != (wanted, intent["input_hash"]):
            raise VerifyError("APPROVAL_MISSING", f"record {record['log_index']} approves something else")
    granted = any(record["type"] == "approval.granted" for record in records[:first])
    if wanted is not None and (ran or records[first]["type"] == "job.started") and not granted:
        raise VerifyError("APPROVAL_MISSING", "it acted, and no approval was granted before")


def budgets_agree(intent: dict[str, Json], outcome: dict[str, Json]) -> bool:
    before, after, ticket = intent["budget"], outcome["budget"], intent["ticket"]
    if before is None or after is None:
        return before is after
    same = before["reservation_id"] == after["reservation_id"] and before["accounts"] == after["accounts"]
    charged = ticket is not None and before["accounts"] == ticket["link_ids"]
    return bool(same and charged and after["settled"] and not before["settled"])


def check_documents(records: list[dict[str, Json]], documents: dict[str, str], report: Report, file: str) -> None:
    """Step 6."""
    named = {digest: record["log_index"] for record in records for digest in documents_of(record)}
    for digest, index in named.items():
        with report.at(file, field="documents", index=index):
            if digest not in documents:
                raise VerifyError("DOCUMENT_MISSING", f"entry {index} names {digest}")
    for digest, text in documents.items():
        with report.at(file, field=f"documents.{digest}"):
            if digest not in named or digest != "sha256:" + hashlib.sha256(text.encode()).hexdigest():
                raise VerifyError("DOCUMENT_MISMATCH", "no entry names it, or its text has another digest")


def check_verdict(note: str, records: list[dict[str, Json]], key: Key) -> None:
    """Step 7: the one text that the intent allows, signed. Raises NOTE_FORMAT, NOTE_SIGNATURE, VERDICT_MISMATCH."""
    text, bad = read_note(note.encode(), key)
    if bad:
        raise bad
    intent = records[0] if records else {}
    verdict = {name: intent.get(name) for name in ("job_id", "policy", "principal", "tenant_id", "ticket", "time")}
    expected = b"aether.verdict/v1\n" + write_json({"intent_index": intent.get("log_index"), **verdict}) + b"\n"
    if text.encode() != expected:
        at = first_difference(expected, text.encode())
        raise VerifyError("VERDICT_MISMATCH", "not the verdict on this intent", offset=at)


# Exports.

EXPORT_LINES = (
    {"checkpoint": "text", "complete": "boolean", "end": "integer", "export_version": "|1.0|", "origin": "text",
     "start": "integer"},
    {"entry": "text", "proof": {"log_index": "integer", "hashes": ["hash"]}},
    {"digest": "digest", "text": "text"},
    {"documents": "integer", "entries": "integer"},
)  # fmt: skip


class ExportCheck:
    """One pass over the lines of an export, steps 1 to 5. A line that is no line of an export ends it."""

    def __init__(self, key: Key, file: str, witnesses: Witnesses) -> None:
        self.key, self.file, self.witnesses = key, file, witnesses
        self.report = Report()
        self.claim: Checkpoint | None = None
        self.head: dict[str, Json] = {}
        self.ended = False
        self.stage = self.following = self.entries = 0
        self.named: dict[str, int] = {}
        self.carried: set[str] = set()

    def run(self, lines: Iterator[bytes]) -> Report:
        with self.report.at(self.file):
            number = 0
            for number, line in enumerate(lines, 1):
                self.line(self.read(line, number), f"line {number}")
            if number == 0:
                raise VerifyError("EXPORT_FORMAT", "there is no head")
        with self.report.at(self.file, field="the last line"):
            if not self.ended:
                raise VerifyError("EXPORT_SHORT", "there is no end: it was cut off")
            if self.head["complete"] and self.following != self.head["end"]:
                raise VerifyError("ENTRY_SEQUENCE", f"records from {self.following} on are missing")
        for digest, index in self.named.items():
            with self.report.at(self.file, index=index):
                if self.ended and digest not in self.carried:
                    raise VerifyError("DOCUMENT_MISSING", f"entry {index} names {digest}")
        self.report.facts = {
            **{name: self.head.get(name) for name in ("origin", "start", "end", "complete")},
            **{"size": self.claim.size if self.claim else None, "entries": self.entries},
            "documents": len(self.carried),
        }
        if self.head:
            self.witnesses.check({"line 1": self.head["checkpoint"].encode()}, self.report)
        return self.report

    def read(self, line: bytes, number: int) -> dict[str, Json]:
        """Step 1 for one line. Raises EXPORT_FORMAT."""
        where = f"line {number}"
        if len(line) > EXPORT_LINE_BYTES_MAX or not line.endswith(b"\n"):
            raise VerifyError("EXPORT_FORMAT", "too long, or without its newline", field=where)
        try:
            value = read_json(line[:-1])
        except ValueError as error:
            raise VerifyError("EXPORT_FORMAT", f"not JSON: {error}", field=where) from None
        first = 0 if number == 1 else max(self.stage, 1)
        fits = [stage for stage in range(first, 1 if number == 1 else 4) if misfit(value, EXPORT_LINES[stage]) is None]
        if not fits or self.ended or write_json(value) != line[:-1]:
            raise VerifyError("EXPORT_FORMAT", "not a line that may stand here, canonical and whole", field=where)
        self.stage = fits[0]
        return dict(value)

    def line(self, value: dict[str, Json], where: str) -> None:
        if self.stage == 0:
            self.begin(value, where)
        elif self.stage == 1:
            self.entry(value, where)
        elif self.stage == 2:
            self.document(value, where)
        else:
            self.ended = True
            with self.report.at(self.file, field=where):
                if (value["entries"], value["documents"]) != (self.entries, len(self.carried)):
                    raise VerifyError("EXPORT_SHORT", "it counts other lines than there are")

    def begin(self, head: dict[str, Json], where: str) -> None:
        if not 0 <= head["start"] <= head["end"]:
            raise VerifyError("EXPORT_FORMAT", "its range is none", field=where)
        self.head, self.following = head, head["start"]
        self.claim = check_checkpoint(head["checkpoint"].encode(), self.key, self.report, self.file, where)
        with self.report.at(self.file, field=where):
            if self.claim and head["origin"] != self.claim.origin:
                raise VerifyError("CHECKPOINT_ORIGIN", "not the checkpoint's first line")

    def entry(self, given: dict[str, Json], where: str) -> None:
        """Steps 2 and 3."""
        self.entries += 1
        index = given["proof"]["log_index"]
        record = check_entry(given, where, self.claim, self.key, self.report, self.file)
        for digest in documents_of(record) if record else ():
            self.named.setdefault(digest, index)
        with self.report.at(self.file, field=where, index=index):
            due, self.following = self.following, max(self.following, index + 1)
            if not due <= index < self.head["end"] or (self.head["complete"] and index != due):
                raise VerifyError("ENTRY_SEQUENCE", f"record {due} or a later one was due")

    def document(self, given: dict[str, Json], where: str) -> None:
        """Step 4."""
        digest = given["digest"]
        with self.report.at(self.file, field=where):
            known = digest in self.named and digest not in self.carried
            self.carried.add(digest)
            if not known or digest != "sha256:" + hashlib.sha256(given["text"].encode()).hexdigest():
                raise VerifyError("DOCUMENT_MISMATCH", "not named, there twice, or its text has another digest")


# Command line.


def verify_record(data: bytes, file: str) -> Report:
    """Form alone: a record by itself carries no proof. `leaf` is what a log would commit to."""
    report = Report(facts={"leaf": leaf_hash(data).hex()})
    with report.at(file):
        record = read_record(data)
        report.facts.update({name: record[name] for name in ("type", "log_index", "job_id")})
    return report


def show(report: Report, as_json: bool) -> None:
    """Print a report. As text, what came from files is escaped: it must not steer a terminal."""
    if as_json:
        print(
            json.dumps({"verified": not report.failures, "failures": report.failures, **report.facts}, sort_keys=True)
        )
        return
    lines = [f"NOT VERIFIED: {len(report.failures)} failures" if report.failures else "verified"]
    for failure in report.failures[:LISTED_MAX]:
        place = [
            f"{name} {failure[name]}" for name in ("file", "field", "index", "offset") if failure[name] is not None
        ]
        lines.append(f"  {failure['name']}: {', '.join(place)}: {failure['reason']}")
    for name, value in report.facts.items():
        lines.append(f"  {name}: {value[:LISTED_MAX] if isinstance(value, list) else value}")
    print("\n".join(ascii(line)[1:-1] for line in lines))


def verify(options: argparse.Namespace) -> Report:
    """Raises OSError naming the file that cannot be read."""
    path: Path = options.path
    if options.what == "record":
        return verify_record(path.read_bytes(), str(path))
    report, key = Report(), None
    with report.at(str(options.key)):
        key = read_key(options.key.read_bytes())
    witnesses = read_witnesses(options, report)
    if key is None or report.failures:
        return report
    if options.what == "log":
        next(path.iterdir(), None)
        return LogCheck(path, key, options.against, witnesses).run()
    with path.open("rb") as file:
        if options.what == "export":
            lines = iter(lambda: file.readline(EXPORT_LINE_BYTES_MAX + 1), b"")
            return ExportCheck(key, str(path), witnesses).run(lines)
        return verify_receipt(file.read(RECEIPT_BYTES_MAX + 1), key, str(path), witnesses)


def read_witnesses(options: argparse.Namespace, report: Report) -> Witnesses:
    keys = []
    for path in options.witness_key:
        with report.at(str(path)):
            keys.append(read_key(path.read_bytes(), algorithm=4))
    return Witnesses(keys, len({key.public for key in keys}) if options.quorum is None else options.quorum)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="aether_verify", description="Verify an AetherOS audit log, receipt, export or record."
    )
    commands = parser.add_subparsers(dest="what", required=True)
    kinds = {"log": "audit directory", "receipt": "receipt file", "export": "file of an export"}
    for what, meaning in {**kinds, "record": "file of one record"}.items():
        command = commands.add_parser(what, help=f"verify a {what}")
        command.add_argument("path", type=Path, help=meaning)
        command.add_argument("--json", action="store_true", help="print the report as one JSON object")
        if what != "record":
            command.add_argument("--key", type=Path, required=True, help="the public key, as in keys/audit.pub")
            trusted = "the public key of a witness that must have cosigned; may be repeated"
            command.add_argument("--witness-key", type=Path, action="append", default=[], help=trusted)
            command.add_argument("--quorum", type=int, help="how many of these witnesses are needed; all otherwise")
        if what == "log":
            kept = "a checkpoint kept elsewhere that the log must still contain; may be repeated"
            command.add_argument("--against", "--checkpoint", type=Path, action="append", default=[], help=kept)
    options = parser.parse_args(arguments)
    try:
        report = verify(options)
    except OSError as error:
        parser.error(f"cannot read {error.filename}: {error.strerror}")
    show(report, options.json)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
