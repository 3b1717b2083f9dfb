"""Builds the receipt of a job from the log: its records with their proofs, the documents they name, the verdict.

A receipt is a view: nothing is stored for it. The outcome names the indexes of the job's other records in
`detail` (`intent_index`, and `started_index`, `stop_index`, `approval_index`, `decision_index` where there was such a
record).
"""

from __future__ import annotations

from typing import Final

from aether.contract.errors import AetherError
from aether.contract.records import InclusionProof, Receipt, ReceiptEntry, Record
from aether.substrate.audit.entry import decode, named_documents
from aether.substrate.audit.log import AuditLog
from aether.substrate.audit.note import Signer
from aether.substrate.audit.receipt_rules import RECEIPT_VERSION, verdict_text

_INDEXES: Final = ("intent_index", "started_index", "stop_index", "approval_index", "decision_index")


class Receipts:
    """Receipts of one log; `signer` is the log's."""

    def __init__(self, log: AuditLog, signer: Signer) -> None:
        self._log = log
        self._signer = signer

    def build(self, job_id: str, outcome: Record) -> Receipt:
        """The receipt of a job whose outcome record is durable.

        Raises AetherError NOT_READY (not durable yet), NOT_FOUND (the record is not an outcome of this job, or a
        document it names is not kept) or LOG_CORRUPT.
        """
        if outcome.job_id != job_id or outcome.type != "job.outcome":
            raise AetherError("NOT_FOUND", f"cannot build the receipt of {job_id}: the record is not its outcome")
        indexes = sorted({int(outcome.detail[name]) for name in _INDEXES if name in outcome.detail})
        indexes.append(outcome.log_index)
        checkpoint, size = self._log.checkpoint(outcome.log_index + 1)
        texts = [self._log.entry(index) for index in indexes]
        records = [decode(text) for text in texts]
        if records[0].type != "job.intent" or any(record.job_id != job_id for record in records):
            raise AetherError("NOT_FOUND", f"cannot build the receipt of {job_id}: its outcome names other records")
        named = {digest for record in records for digest in named_documents(record)}
        return Receipt(
            receipt_version=RECEIPT_VERSION,
            job_id=job_id,
            origin=self._signer.name,
            entries=tuple(
                ReceiptEntry(
                    entry=text.decode(),
                    proof=InclusionProof(log_index=index, hashes=self._log.prove(index, size)),
                )
                for index, text in zip(indexes, texts, strict=True)
            ),
            documents={digest: self._log.document(digest).decode() for digest in sorted(named)},
            verdict=self._signer.sign(verdict_text(records[0])),
            checkpoint=checkpoint,
        )
