"""Makes the lines of an export (docs/formats.md "An export"): records with the proofs that lead to one checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from aether.contract.auditcalls import EXPORT_VERSION, ExportDocument, ExportEnd, ExportEntry, ExportHead
from aether.contract.canonical import canonical_record
from aether.contract.records import InclusionProof
from aether.substrate.audit.entry import decode, named_documents
from aether.substrate.audit.log import AuditLog


class Export:
    """One export of the records `span` (indexes, the end left out) below a signed checkpoint of `size`."""

    def __init__(self, log: AuditLog, checkpoint: str, size: int, span: tuple[int, int], complete: bool) -> None:
        self._log = log
        self._checkpoint = checkpoint
        self._size = size
        self._complete = complete
        self.span = span
        self.named: dict[str, None] = {}
        """The documents that the entries so far name, in their order."""
        self._entries = 0
        self._documents = 0

    def head(self) -> bytes:
        start, end = self.span
        return _line(
            ExportHead(
                checkpoint=self._checkpoint,
                complete=self._complete,
                end=end,
                export_version=EXPORT_VERSION,
                origin=self._checkpoint.partition("\n")[0],
                start=start,
            )
        )

    def entries(self, found: Iterable[tuple[int, bytes]]) -> bytes:
        """The lines of some records, which must come in order. Raises AetherError LOG_CORRUPT."""
        lines: list[bytes] = []
        for index, text in found:
            self.named |= dict.fromkeys(named_documents(decode(text)))
            proof = InclusionProof(log_index=index, hashes=self._log.prove(index, self._size))
            lines.append(_line(ExportEntry(entry=text.decode(), proof=proof)))
        self._entries += len(lines)
        return b"".join(lines)

    def document(self, digest: str) -> bytes:
        """Raises AetherError NOT_FOUND or LOG_CORRUPT."""
        self._documents += 1
        return _line(ExportDocument(digest=digest, text=self._log.document(digest).decode()))

    def end(self) -> bytes:
        return _line(ExportEnd(documents=self._documents, entries=self._entries))


def _line(part: msgspec.Struct) -> bytes:
    return canonical_record(part) + b"\n"
