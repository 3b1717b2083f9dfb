"""Rules by which an export holds, pure: its lines and a public key in, a report out.

As in docs/formats.md "Verifying an export"; the name in parentheses is the failure:
- each line is canonical JSON of its shape, a head first, then entries, then documents, an end last (EXPORT_FORMAT);
- the checkpoint of the head is a note (NOTE_FORMAT) signed by the key (NOTE_SIGNATURE) for the key's origin, which is
  the head's (CHECKPOINT_ORIGIN);
- each entry is canonical (ENTRY_NOT_CANONICAL), a record (ENTRY_SCHEMA), at the index of its proof (ENTRY_INDEX), of
  the origin's node (ENTRY_NODE), and its proof leads to the checkpoint's root (PROOF_INVALID);
- indexes rise within the head's range, without a gap where the head says that it is complete (ENTRY_SEQUENCE);
- documents are those the entries name, all of them (DOCUMENT_MISSING) and no other or changed one (DOCUMENT_MISMATCH);
- of the witnesses asked for as many as the quorum cosigned the checkpoint (WITNESS_QUORUM);
- the end counts what was there (EXPORT_SHORT).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Final, TypeVar

import msgspec

from aether.contract.auditcalls import EXPORT_VERSION, ExportDocument, ExportEnd, ExportEntry, ExportHead
from aether.contract.canonical import canonical_record, digest_bytes
from aether.substrate.audit import entry as entries
from aether.substrate.audit.note import Checkpoint, NoteError, Verifier, decode_base64, node_of, open_checkpoint
from aether.substrate.audit.quorum import NO_QUORUM, Quorum
from aether.substrate.audit.report import Findings, Report
from aether.substrate.audit.tree import HASH_BYTES, leaf_hash, verify_inclusion

LINE_BYTES_MAX: Final = 8 * 1024 * 1024
"""A document of 1 MiB, each of its bytes escaped."""
_STAGES: Final = ("entry", "digest", "documents")
"""The first key of each kind of line behind the head, in their order."""
T = TypeVar("T", bound=msgspec.Struct)


def check_export(lines: Iterable[bytes], public_key: str, quorum: Quorum = NO_QUORUM) -> Report:
    """Applies every rule; `lines` may be a file, read line by line."""
    return _ExportCheck(public_key, quorum).run(lines)


class _ExportCheck:
    """One pass."""

    def __init__(self, public_key: str, quorum: Quorum) -> None:
        self._public_key = public_key
        self._quorum = quorum
        self._found = Findings()
        self._head: ExportHead | None = None
        self._checkpoint: Checkpoint | None = None
        self._node_id: str | None = None
        self._next = 0
        self._stage = 0
        self._named: dict[str, int] = {}
        self._carried: set[str] = set()
        self._entries = 0
        self._end: ExportEnd | None = None

    def run(self, lines: Iterable[bytes]) -> Report:
        try:
            verifier = Verifier.parse(self._public_key)
        except NoteError as error:
            self._found.add(error.code, "public key", error.reason)
            return self._report()
        self._node_id = node_of(verifier.name)
        for number, line in enumerate(lines, 1):
            place = f"line {number}"
            if number == 1:
                self._begin(line, place, verifier)
                if self._head is None:
                    return self._report()
            else:
                self._line(line, place)
        if self._head is None:
            self._found.add("EXPORT_FORMAT", "line 1", "there is no head")
        self._finish()
        return self._report()

    def _report(self) -> Report:
        head = self._head
        facts: dict[str, int | str | None] = {
            "origin": head.origin if head else None,
            "checkpoint_size": self._checkpoint.size if self._checkpoint else None,
            "start": head.start if head else None,
            "end": head.end if head else None,
            "complete": ("yes" if head.complete else "no") if head else None,
            "entries": self._entries,
            "documents": len(self._carried),
            **self._quorum.facts(),
        }
        return self._found.report("export", facts)

    def _begin(self, line: bytes, place: str, verifier: Verifier) -> None:
        head = self._read(line, ExportHead, place)
        if head is None:
            return
        if head.export_version != EXPORT_VERSION or not 0 <= head.start <= head.end:
            self._found.add("EXPORT_FORMAT", place, "its version is not known, or its range is none")
            return
        self._head, self._next = head, head.start
        try:
            self._checkpoint = open_checkpoint(head.checkpoint, verifier)
        except NoteError as error:
            self._found.add(error.code, place, error.reason)
            return
        if head.origin != self._checkpoint.origin:
            self._found.add("CHECKPOINT_ORIGIN", place, f"the checkpoint is of {self._checkpoint.origin!r}")

    def _line(self, line: bytes, place: str) -> None:
        stage = next((i for i, key in enumerate(_STAGES) if line.startswith(f'{{"{key}":'.encode())), None)
        if stage is None or stage < self._stage or self._end is not None:
            self._found.add("EXPORT_FORMAT", place, "it is not a line that may stand here")
            return
        self._stage = stage
        if stage == 0 and (item := self._read(line, ExportEntry, place)) is not None:
            self._entry(item, place)
        elif stage == 1 and (document := self._read(line, ExportDocument, place)) is not None:
            self._document(document, place)
        elif stage == 2:
            self._end = self._read(line, ExportEnd, place)

    def _read(self, line: bytes, kind: type[T], place: str) -> T | None:
        try:
            if len(line) > LINE_BYTES_MAX:
                raise ValueError(f"it is longer than {LINE_BYTES_MAX} bytes")
            part = msgspec.json.decode(line, type=kind)
            if canonical_record(part) + b"\n" != line:
                raise ValueError("it is not canonical JSON and a newline")
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            self._found.add("EXPORT_FORMAT", place, str(error))
            return None
        return part

    def _entry(self, item: ExportEntry, place: str) -> None:
        self._entries += 1
        proof, text = item.proof, item.entry.encode()
        self._prove(item, text, place)
        self._order(proof.log_index, place)
        try:
            record = entries.read(text)
        except NoteError as error:
            self._found.add(error.code, place, error.reason, proof.log_index)
            return
        if record.log_index != proof.log_index:
            self._found.add("ENTRY_INDEX", place, f"the record says it is record {record.log_index}", proof.log_index)
        if record.node_id != self._node_id:
            self._found.add("ENTRY_NODE", place, f"the record is of node {record.node_id!r}", proof.log_index)
        for digest in entries.named_documents(record):
            self._named.setdefault(digest, proof.log_index)

    def _prove(self, item: ExportEntry, text: bytes, place: str) -> None:
        path = [decode_base64(hash_) for hash_ in item.proof.hashes]
        if any(raw is None or len(raw) != HASH_BYTES for raw in path):
            self._found.add("EXPORT_FORMAT", place, "a hash of a proof is not base64 of 32 bytes")
        elif (known := self._checkpoint) is not None and not verify_inclusion(
            item.proof.log_index,
            known.size,
            leaf_hash(text),
            [base64.b64decode(h) for h in item.proof.hashes],
            known.root,
        ):
            why = "the proof does not lead to the checkpoint's root"
            self._found.add("PROOF_INVALID", place, why, item.proof.log_index)

    def _order(self, index: int, place: str) -> None:
        head = self._head
        assert head is not None
        if not self._next <= index < head.end or (head.complete and index != self._next):
            self._found.add("ENTRY_SEQUENCE", place, f"record {self._next} or a later one was due", index)
        self._next = max(self._next, index + 1)

    def _document(self, document: ExportDocument, place: str) -> None:
        if digest_bytes(document.text.encode()) != document.digest:
            self._found.add("DOCUMENT_MISMATCH", place, f"the text of {document.digest[:80]} has another digest")
        if document.digest not in self._named or document.digest in self._carried:
            self._found.add("DOCUMENT_MISMATCH", place, f"{document.digest[:80]} is not named, or there twice")
        self._carried.add(document.digest)

    def _finish(self) -> None:
        if self._head is not None:
            self._quorum.check({"line 1": self._head.checkpoint.encode()}, self._found)
        for digest, index in self._named.items():
            if digest not in self._carried:
                self._found.add("DOCUMENT_MISSING", "documents", f"{digest} is named and not carried", index)
        if self._end is None:
            self._found.add("EXPORT_SHORT", "the last line", "there is no end: the export was cut off")
        elif (self._end.entries, self._end.documents) != (self._entries, len(self._carried)):
            self._found.add("EXPORT_SHORT", "the last line", f"{self._end.entries} entries were written")
        if self._head is not None and self._head.complete and self._next != self._head.end:
            self._found.add("ENTRY_SEQUENCE", "the last line", f"records from {self._next} on are missing", self._next)
