"""A writer of logs and receipts for tests, from docs/formats.md and the RFCs' own recursive definitions.

It shares nothing with the verifier under test (which pairs level by level) nor with the product; files are a mapping
from path to bytes, so that a test can damage one in place.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ORIGIN = "aether/node_test/1"
JOB = "job_018f6d2e-0000-7000-8000-000000000001"
OTHER_JOB = "job_018f6d2e-0000-7000-8000-000000000002"
POLICY, PLAN, SANDBOX = "permit(principal, action, resource);\n", "plan: näive ✓\n", "sandbox report\n"
FIGURES = (
    "wall_us cpu_user_us cpu_system_us memory_peak_bytes io_read_bytes io_write_bytes pids_peak oom_kills throttled_us "
    "stdout_bytes stderr_bytes output_dropped_bytes batch_size"
)
Files = dict[str, bytes]


def canonical(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Signer:
    seed: bytes
    name: str = ORIGIN

    @property
    def private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed)

    @property
    def public(self) -> bytes:
        return self.private.public_key().public_bytes_raw()

    @property
    def key_id(self) -> bytes:
        return hashlib.sha256(self.name.encode() + b"\x0a\x01" + self.public).digest()[:4]

    @property
    def verifier_key(self) -> bytes:
        public = base64.b64encode(b"\x01" + self.public).decode()
        return f"{self.name}+{self.key_id.hex()}+{public}\n".encode()

    def line(self, text: str) -> str:
        return f"— {self.name} {base64.b64encode(self.key_id + self.private.sign(text.encode())).decode()}\n"

    def note(self, text: str) -> str:
        return f"{text}\n{self.line(text)}"


def signer(number: int = 1, name: str = ORIGIN) -> Signer:
    return Signer(bytes([number]) * 32, name)


# RFC 6962 section 2.1: MTH and PATH as written there, by recursion.


def split(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def mth(entries: list[bytes]) -> bytes:
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = split(len(entries))
    return hashlib.sha256(b"\x01" + mth(entries[:k]) + mth(entries[k:])).digest()


def path(m: int, entries: list[bytes]) -> list[bytes]:
    if len(entries) == 1:
        return []
    k = split(len(entries))
    if m < k:
        return [*path(m, entries[:k]), mth(entries[k:])]
    return [*path(m - k, entries[k:]), mth(entries[:k])]


# Records.


def record(index: int, type_: str, **fields: Any) -> dict[str, Any]:
    names = (
        "tenant_id principal request_id traceparent operation effect job_id attempt kind op model_id model_version "
        "input_hash idempotency_hash ticket policy budget code cell_id state exit error usage result_digest "
        "result_bytes created_at started_at finished_at"
    )
    base: dict[str, Any] = dict.fromkeys(names.split())
    base |= {"schema_version": "1.0", "type": type_, "log_index": index, "node_id": "node_test", "labels": []}
    base |= {"time": f"2026-09-21T13:33:{index % 60:02d}.{index:06d}Z", "artifacts": [], "timings_us": {}, "detail": {}}
    unknown = fields.keys() - base.keys()
    assert not unknown, unknown
    return base | fields


def job_records(first: int, job_id: str) -> list[dict[str, Any]]:
    same = {"tenant_id": "t1", "principal": "uid:1000", "job_id": job_id, "attempt": 1, "kind": "command", "op": "run"}
    same |= {"input_hash": digest("input"), "effect": "cell", "request_id": "req_1", "operation": "jobs.submit"}
    ticket = {"implicit": True, "kid": "k1", "link_ids": ["l0", "l1"], "role": "user"}
    policy = {"decision": "allow", "determining": ["policy0"], "digest": digest(POLICY)}
    budget = {"accounts": ["l0", "l1"], "cpu_ms": 1000, "ops": 1, "reservation_id": "res_1", "settled": False}
    code = {"engine": "process", "model_digest": None, "plan_digest": digest(PLAN), "route": "local", "rung": "cell"}
    code |= {"sandbox_digest": digest(SANDBOX)}
    ended = {"code": 0, "oom_killed": False, "reason": None, "signal": None, "timed_out": False}
    usage = dict.fromkeys(FIGURES.split()) | {"wall_us": 12, "basis": {"wall_us": "measured"}}
    return [
        record(first, "job.intent", **same, ticket=ticket, policy=policy, budget=budget, state="queued"),
        record(first + 1, "job.started", **same, code=code, cell_id="cell_1", state="running"),
        record(
            first + 2,
            "job.outcome",
            **same,
            **{"budget": budget | {"settled": True, "cpu_ms": 7}, "exit": ended, "usage": usage, "state": "succeeded"},
            **{
                "code": code,
                "result_digest": digest("out"),
                "result_bytes": 3,
                "finished_at": "2026-09-21T13:34:00.000000Z",
            },
        ),
    ]


def records(count: int) -> list[dict[str, Any]]:
    found = [
        record(0, "node.started", detail={"version": "0.1.0", "origin": ORIGIN}),
        record(1, "policy.loaded", policy={"decision": "allow", "determining": [], "digest": digest(POLICY)}),
        record(2, "document.stored", detail={"digest": digest(POLICY)}),
        *job_records(3, JOB),
        *job_records(6, OTHER_JOB),
    ]
    error = {
        "code": "DENIED",
        "details": {"n": 1, "ok": False, "none": None},
        "message": 'cannot run: "é\u2028"',
        "remedy": "ask",
    }
    while len(found) < count:
        found.append(record(len(found), "access.denied", error=error, labels=["local-only"]))
    return found[:count]


# Files.


def frame(first: int, entries: list[bytes]) -> bytes:
    payload = b"".join(struct.pack(">I", len(entry)) + entry for entry in entries)
    head = b"AEF1" + struct.pack(">QII", first, len(entries), len(payload))
    return head + struct.pack(">I", zlib.crc32(head + payload)) + payload


def segment_header(first: int, origin: str = ORIGIN) -> bytes:
    head = b"AETHSEG1" + struct.pack(">QH", first, len(origin.encode())) + origin.encode()
    return head + struct.pack(">I", zlib.crc32(head))


def segments(entries: list[bytes], per_segment: int) -> Files:
    files: Files = {}
    for first in range(0, len(entries), per_segment):
        body, at, width = segment_header(first), first, 1
        end = min(first + per_segment, len(entries))
        while at < end:
            chosen = entries[at : min(at + width, end)]
            body += frame(at, chosen)
            at, width = at + len(chosen), width % 5 + 1
        files[f"segments/{first:020d}"] = body
    return files


def tile_name(level: str, number: int, width: int) -> str:
    text = f"{number:03d}" if number < 1000 else f"x{number // 1000:03d}/{number % 1000:03d}"
    return f"tile/{level}/{text}" + (f".p/{width}" if width < 256 else "")


def tiles(entries: list[bytes]) -> Files:
    files: Files = {}
    for number in range(0, len(entries), 256):
        chosen = entries[number : number + 256]
        bundle = b"".join(struct.pack(">H", len(entry)) + entry for entry in chosen)
        files[tile_name("entries", number // 256, len(chosen))] = bundle
    level = 0
    while len(entries) // 256**level:
        stride = 256**level
        subtrees = [mth(entries[k * stride : (k + 1) * stride]) for k in range(len(entries) // stride)]
        for at in range(0, len(subtrees), 256):
            chosen = subtrees[at : at + 256]
            files[tile_name(str(level), at // 256, len(chosen))] = b"".join(chosen)
        level += 1
    return files


def checkpoint(entries: list[bytes], by: Signer, origin: str = ORIGIN) -> str:
    return by.note(f"{origin}\n{len(entries)}\n{base64.b64encode(mth(entries)).decode()}\n")


@dataclass
class World:
    """A log as files, its entries and its key."""

    files: Files
    entries: list[bytes]
    covered: int
    by: Signer = field(default_factory=signer)

    def write(self, directory: Path, **changed: bytes | None) -> Path:
        """Write the log; `changed` replaces files by path, None leaves one out."""
        for name, data in {**self.files, **changed}.items():
            if data is not None:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                (directory / name).write_bytes(data)
        return directory


def world(count: int, per_segment: int, covered: int, made: list[dict[str, Any]] | None = None) -> World:
    by = signer()
    entries = [canonical(each) for each in (records(count) if made is None else made)]
    files = segments(entries, per_segment) | tiles(entries[:covered])
    files["checkpoint"] = checkpoint(entries[:covered], by).encode()
    for text in (POLICY, PLAN, SANDBOX):
        name = digest(text).removeprefix("sha256:")
        files[f"documents/sha256/{name[:2]}/{name}"] = text.encode()
    return World(files, entries, covered, by)


def verdict_text(intent: dict[str, Any]) -> str:
    names = ("job_id", "policy", "principal", "tenant_id", "ticket", "time")
    body = {name: intent[name] for name in names} | {"intent_index": intent["log_index"]}
    return f"aether.verdict/v1\n{canonical(body).decode()}\n"


def receipt(log: World, indexes: list[int], job_id: str = JOB) -> dict[str, Any]:
    covered = log.entries[: log.covered]
    proofs = [[base64.b64encode(each).decode() for each in path(index, covered)] for index in indexes]
    return {
        "receipt_version": "1.0",
        "job_id": job_id,
        "origin": ORIGIN,
        "entries": [
            {"entry": covered[index].decode(), "proof": {"log_index": index, "hashes": proof}}
            for index, proof in zip(indexes, proofs, strict=True)
        ],
        "documents": {digest(text): text for text in (POLICY, PLAN, SANDBOX)},
        "verdict": log.by.note(verdict_text(json.loads(covered[indexes[0]]))),
        "checkpoint": checkpoint(covered, log.by),
    }
