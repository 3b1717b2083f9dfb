"""Rules by which a receipt holds, pure: bytes and a public key in, a report out.

As in docs/formats.md "Verifying a receipt"; the name in parentheses is the failure:
- it is canonical JSON of the receipt's shape and version, within bounds (RECEIPT_FORMAT);
- its checkpoint is a note (NOTE_FORMAT) signed by the key (NOTE_SIGNATURE) for the key's origin, which is the
  receipt's (CHECKPOINT_ORIGIN);
- each entry is canonical (ENTRY_NOT_CANONICAL), a record (ENTRY_SCHEMA), at the index of its proof (ENTRY_INDEX), of
  the origin's node (ENTRY_NODE), and its proof leads to the checkpoint's root (PROOF_INVALID);
- entries are of this job (ENTRY_JOB): one intent first, one outcome last, in between only what belongs
  there, indexes rising (ENTRY_SEQUENCE);
- all are of one tenant; intent and outcome agree on what was admitted and for what price (ENTRY_CONTRADICTION);
- a job whose intent names an approval did nothing before that was granted, for its input (APPROVAL_MISSING);
- documents are those the entries name, all of them (DOCUMENT_MISSING) and no other or changed one (DOCUMENT_MISMATCH);
- of the witnesses asked for as many as the quorum cosigned the checkpoint (WITNESS_QUORUM);
- the verdict is the authority's on exactly this intent (VERDICT_MISMATCH).
"""

from __future__ import annotations

import base64
import itertools
from typing import Final

import msgspec

from aether.contract.canonical import canonical_record, digest_bytes
from aether.contract.records import PolicyRef, Receipt, Record, TicketRef
from aether.substrate.audit import entry as entries
from aether.substrate.audit.note import Checkpoint, NoteError, Verifier, decode_base64, node_of, open_checkpoint
from aether.substrate.audit.quorum import NO_QUORUM, Quorum
from aether.substrate.audit.report import Findings, Report
from aether.substrate.audit.tree import HASH_BYTES, leaf_hash, verify_inclusion

RECEIPT_VERSION: Final = "1.0"
RECEIPT_BYTES_MAX: Final = 16 * 1024 * 1024
VERDICT_HEAD: Final = "aether.verdict/v1"
_APPROVALS: Final = frozenset({"approval.requested", "approval.granted", "approval.denied", "approval.expired"})
_BETWEEN: Final = frozenset({"job.started", "job.stop"}) | _APPROVALS
_JOINED: Final = ("kind", "op", "input_hash")
_DECODER: Final = msgspec.json.Decoder(Receipt)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the authority signs about an intent: it verified this ticket for it, and the policy allowed it."""

    intent_index: int
    job_id: str | None
    policy: PolicyRef | None
    principal: str | None
    tenant_id: str | None
    ticket: TicketRef | None
    time: str


def verdict_text(intent: Record) -> str:
    """The text of the verdict's note: fixed by the intent, so that it is the same whenever it is signed."""
    verdict = Verdict(
        intent_index=intent.log_index,
        job_id=intent.job_id,
        policy=intent.policy,
        principal=intent.principal,
        tenant_id=intent.tenant_id,
        ticket=intent.ticket,
        time=intent.time,
    )
    return f"{VERDICT_HEAD}\n{canonical_record(verdict).decode()}\n"


def check_receipt(data: bytes, public_key: str, quorum: Quorum = NO_QUORUM) -> Report:
    """Applies every rule that can still be applied after earlier ones failed."""
    found = Findings()
    facts: dict[str, int | str | None] = {"job_id": None, "origin": None, "checkpoint_size": None}
    receipt = _parse(data, found)
    try:
        verifier = Verifier.parse(public_key)
    except NoteError as error:
        found.add(error.code, "public key", error.reason)
        return found.report("receipt", facts)
    if receipt is None:
        return found.report("receipt", facts)
    facts |= {"job_id": receipt.job_id, "origin": receipt.origin}
    checkpoint = _checkpoint(receipt, verifier, found)
    if checkpoint is not None:
        facts["checkpoint_size"] = checkpoint.size
    quorum.check({"checkpoint": receipt.checkpoint.encode("utf-8", "surrogatepass")}, found)
    facts |= quorum.facts()
    records = _entries(receipt, checkpoint, node_of(verifier.name), found)
    if len(records) == len(receipt.entries) and _sequence(receipt, records, found):
        _joins(records, found)
        _approved(records, found)
        _verdict(receipt, records[0], verifier, found)
    _documents(receipt, records, found)
    return found.report(f"receipt of {receipt.job_id}", facts)


def _parse(data: bytes, found: Findings) -> Receipt | None:
    if len(data) > RECEIPT_BYTES_MAX:
        found.add("RECEIPT_FORMAT", "receipt", f"it is longer than {RECEIPT_BYTES_MAX} bytes")
        return None
    try:
        receipt = _DECODER.decode(data)
        if receipt.receipt_version != RECEIPT_VERSION:
            raise ValueError(f"version {receipt.receipt_version!r} is not known")
        # the way back shows fields that are unknown or there twice, and every other spelling
        if canonical_record(receipt) != data.removesuffix(b"\n"):
            raise ValueError("it is not canonical JSON, or holds an unknown field")
        if not all(_is_hash(text) for item in receipt.entries for text in item.proof.hashes):
            raise ValueError("a hash of a proof is not base64 of 32 bytes")
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        found.add("RECEIPT_FORMAT", "receipt", str(error))
        return None
    return receipt


def _is_hash(text: str) -> bool:
    raw = decode_base64(text)
    return raw is not None and len(raw) == HASH_BYTES


def _checkpoint(receipt: Receipt, verifier: Verifier, found: Findings) -> Checkpoint | None:
    try:
        checkpoint = open_checkpoint(receipt.checkpoint, verifier)
    except NoteError as error:
        found.add(error.code, "checkpoint", error.reason)
        return None
    if receipt.origin != checkpoint.origin:
        found.add("CHECKPOINT_ORIGIN", "origin", f"the checkpoint is of {checkpoint.origin!r}")
    return checkpoint


def _entries(receipt: Receipt, checkpoint: Checkpoint | None, node_id: str | None, found: Findings) -> list[Record]:
    records: list[Record] = []
    for number, item in enumerate(receipt.entries):
        place, proof = f"entries[{number}]", item.proof
        entry = item.entry.encode()
        path = [base64.b64decode(text) for text in proof.hashes]
        if checkpoint is not None and not verify_inclusion(
            proof.log_index, checkpoint.size, leaf_hash(entry), path, checkpoint.root
        ):
            found.add("PROOF_INVALID", place, "the proof does not lead to the checkpoint's root", proof.log_index)
        try:
            record = entries.read(entry)
        except NoteError as error:
            found.add(error.code, place, error.reason, proof.log_index)
            continue
        records.append(record)
        if record.log_index != proof.log_index:
            found.add("ENTRY_INDEX", place, f"the record says it is record {record.log_index}", proof.log_index)
        if record.node_id != node_id:
            found.add("ENTRY_NODE", place, f"the record is of node {record.node_id!r}", proof.log_index)
    return records


def _sequence(receipt: Receipt, records: list[Record], found: Findings) -> bool:
    for number, record in enumerate(records):
        if record.job_id != receipt.job_id:
            found.add("ENTRY_JOB", f"entries[{number}]", f"it is of {record.job_id}", record.log_index)
    types = [record.type for record in records]
    indexes = [record.log_index for record in records]
    good = (
        len(types) >= 2
        and types[0] == "job.intent"
        and types[-1] == "job.outcome"
        and all(kind in _BETWEEN for kind in types[1:-1])
        and all(a < b for a, b in itertools.pairwise(indexes))
    )
    if not good:
        found.add("ENTRY_SEQUENCE", "entries", "they are not one intent, what followed, and one outcome, in order")
    return good


def _joins(records: list[Record], found: Findings) -> None:
    intent, outcome = records[0], records[-1]
    for record in records:
        if record.tenant_id != intent.tenant_id:
            found.add("ENTRY_CONTRADICTION", "entries", "it is of another tenant than the intent", record.log_index)
    for name in _JOINED:
        if getattr(intent, name) != getattr(outcome, name):
            found.add("ENTRY_CONTRADICTION", "entries", f"intent and outcome differ in {name}", outcome.log_index)
    if intent.policy is None or intent.policy.decision != "allow":
        found.add("ENTRY_CONTRADICTION", "entries", "no policy allowed the intent", intent.log_index)
    reserved, settled = intent.budget, outcome.budget
    if reserved is None or settled is None:
        if reserved is not settled:
            found.add("ENTRY_CONTRADICTION", "entries", "only one of intent and outcome has a budget")
        return
    links = intent.ticket.link_ids if intent.ticket is not None else None
    if (
        (reserved.reservation_id, reserved.accounts) != (settled.reservation_id, settled.accounts)
        or reserved.settled
        or not settled.settled
        or reserved.accounts != links
    ):
        found.add("ENTRY_CONTRADICTION", "entries", "the outcome does not settle the intent's reservation")


def _approved(records: list[Record], found: Findings) -> None:
    """Approvals are of this job and its input; what was to wait for one did nothing before it was granted."""
    intent, outcome = records[0], records[-1]
    named = intent.detail.get("approval")
    granted = False
    for record in records:
        if record.type in _APPROVALS:
            if (record.detail.get("approval"), record.input_hash) != (named, intent.input_hash):
                found.add("APPROVAL_MISSING", "entries", "it is an approval of something else", record.log_index)
            granted = granted or record.type == "approval.granted"
        ran = record is outcome and (outcome.state == "succeeded" or outcome.exit is not None)
        if (ran or record.type == "job.started") and named is not None and not granted:
            found.add("APPROVAL_MISSING", "entries", "the job was not approved before it", record.log_index)


def _documents(receipt: Receipt, records: list[Record], found: Findings) -> None:
    named = {digest: record.log_index for record in records for digest in entries.named_documents(record)}
    for digest, index in named.items():
        if digest not in receipt.documents:
            found.add("DOCUMENT_MISSING", "documents", f"{digest} is named and not carried", index)
    complete = len(records) == len(receipt.entries)
    for digest, text in receipt.documents.items():
        if digest_bytes(text.encode()) != digest:
            found.add("DOCUMENT_MISMATCH", "documents", f"the text of {digest[:80]} has another digest")
        elif complete and digest not in named:
            found.add("DOCUMENT_MISMATCH", "documents", f"no entry names {digest}")


def _verdict(receipt: Receipt, intent: Record, verifier: Verifier, found: Findings) -> None:
    try:
        text = verifier.open(receipt.verdict)
    except NoteError as error:
        found.add(error.code, "verdict", error.reason)
        return
    if text != verdict_text(intent):
        found.add("VERDICT_MISMATCH", "verdict", "the verdict is not on this intent", intent.log_index)
