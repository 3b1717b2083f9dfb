"""The Idempotency-Key of the call that is being served: the first record that the call writes carries it.

A call runs in a context of its own (contextvars), so that calls served at once do not see each other's key. What a
record of no job carries is (`idempotency_hash`, `input_hash`); in a record of a job `input_hash` is the job's, and what
the key stands for is `detail.request_hash`.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from aether.contract.records import Record

REQUEST_HASH: Final = "request_hash"
_BEFORE: Final = frozenset({"access.denied", "approval.requested"})
"""Records of a call that did not take effect."""


@dataclass(slots=True)
class Mark:
    """`key_hash` names the key, `request_hash` the call's input; `written` once a record has them."""

    operation: str
    key_hash: str
    request_hash: str
    written: bool = False


MARK: Final[ContextVar[Mark | None]] = ContextVar("aether.keymark", default=None)


def marked(record: Record) -> Record:
    """The record, with the key of its call if it is the one to carry it."""
    mark = MARK.get()
    if mark is None or mark.written or record.operation != mark.operation or record.type in _BEFORE:
        return record
    if record.job_id is None:
        return replace(record, idempotency_hash=mark.key_hash, input_hash=mark.request_hash)
    detail = record.detail | {REQUEST_HASH: mark.request_hash}
    return replace(record, idempotency_hash=mark.key_hash, detail=detail)


def note_written(record: Record) -> None:
    """The record was appended."""
    mark = MARK.get()
    if mark is not None and record.idempotency_hash == mark.key_hash:
        mark.written = True


def request_hash(record: Record) -> str | None:
    """What the key of a record stands for."""
    return record.detail.get(REQUEST_HASH) or record.input_hash
