"""An entry: the canonical JSON of one record, at most RECORD_BYTES_MAX bytes.

Writing masks free text, then encodes with msgspec's sorted encoder, which is RFC 8785 for values without floats,
with ASCII keys and integers within 2^53 - `_check` holds a record to that. Reading accepts only what writing gives:
a text is canonical when the record read from it is written as the same bytes (unknown, missing or repeated
fields and any other spelling differ). `read` is for verifiers: it holds a record to what its types cannot say,
the forms of digests and times and the words of closed lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final

import msgspec
import rfc8785

from aether.contract.canonical import canonical_record
from aether.contract.errors import AetherError
from aether.contract.ids import is_digest
from aether.contract.limits import RECORD_BYTES_MAX
from aether.contract.records import RECORD_SCHEMA_VERSION, BudgetRef, Record
from aether.substrate.audit.note import NoteError
from aether.substrate.audit.redact import redact_detail, redact_error

INTEGER_MAX: Final = 2**53 - 1
_DECODER: Final = msgspec.json.Decoder(Record)
_TIME: Final = re.compile(r"[-0-9]{10}T[:0-9]{8}\.[0-9]{6}Z", re.ASCII)
_EFFECTS: Final = frozenset({None, "pure", "cell", "read", "control"})
_NAMING: Final = frozenset({"document.stored", "audit.epoch"})
"""Types whose `detail.digest` is a document's."""
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)
_BASES: Final = frozenset({"measured", "apportioned"})


def encode(record: Record) -> bytes:
    """The entry of `record`; raises AetherError TOO_LARGE or BAD_FIELD."""
    if record.error is not None or record.detail:
        error = None if record.error is None else redact_error(record.error)
        record = msgspec.structs.replace(record, error=error, detail=redact_detail(record.detail))
    if (why := _check(record)) is not None:
        raise AetherError("BAD_FIELD", f"cannot record {record.type}: {why}")
    try:
        entry = canonical_record(record)
    except UnicodeEncodeError as error:
        raise AetherError("BAD_FIELD", f"cannot record {record.type}: {error.reason}") from error
    if len(entry) > RECORD_BYTES_MAX:
        raise AetherError(
            "TOO_LARGE", f"cannot record {record.type}: {len(entry)} bytes are more than {RECORD_BYTES_MAX}"
        )
    return entry


def decode(entry: bytes) -> Record:
    """The record of an entry; raises NoteError ENTRY_NOT_CANONICAL or ENTRY_SCHEMA."""
    try:
        record = _DECODER.decode(entry)
        if record.schema_version == RECORD_SCHEMA_VERSION and _check(record) is None:
            if canonical_record(record) == entry and len(entry) <= RECORD_BYTES_MAX:
                return record
            reason = "a field is missing, unknown or repeated"
        else:
            reason = _check(record) or f"schema version {record.schema_version!r} is not known"
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        reason = str(error)
    if not _is_canonical(entry):
        raise NoteError("ENTRY_NOT_CANONICAL", f"the entry is not canonical JSON: {reason}")
    raise NoteError("ENTRY_SCHEMA", f"the entry is not a record: {reason}")


def read(entry: bytes) -> Record:
    """The record of an entry whose every field has its form; raises NoteError as `decode` does."""
    record = decode(entry)
    if (why := _misformed(record)) is not None:
        raise NoteError("ENTRY_SCHEMA", f"the entry is not a record: {why}")
    return record


def named_documents(record: Record) -> list[str]:
    """The digests of the documents that a record names."""
    named: list[str | None] = [record.detail.get("digest")] if record.type in _NAMING else []
    if record.policy is not None:
        named.append(record.policy.digest)
    if record.code is not None:
        named += (record.code.plan_digest, record.code.sandbox_digest)
    return [digest for digest in named if digest is not None]


def _misformed(record: Record) -> str | None:
    digests = [record.input_hash, record.idempotency_hash, record.result_digest, *named_documents(record)]
    digests += [artifact.digest for artifact in record.artifacts]
    times = (record.created_at, record.started_at, record.finished_at)
    if any(digest is not None and not is_digest(digest) for digest in digests):
        return "a digest is not sha256: and 64 lower-case hex digits"
    if not _is_time(record.time) or any(time is not None and not _is_time(time) for time in times):
        return "a time is not RFC 3339 UTC with six decimals"
    if record.effect not in _EFFECTS:
        return f"effect is {record.effect!r}"
    if record.type == "audit.pruned" and _INDEX.fullmatch(record.detail.get("end", "")) is None:
        return "detail.end is not an index"
    if record.type == "audit.epoch" and not {"digest", "previous_key"} <= record.detail.keys():
        return "detail lacks the digest or the key of the epoch before"
    if record.usage is not None and not _BASES.issuperset(record.usage.basis.values()):
        return "usage.basis says neither measured nor apportioned"
    return None


def _is_time(text: str) -> bool:
    try:
        return _TIME.fullmatch(text) is not None and bool(datetime.fromisoformat(text))
    except ValueError:
        return False


def _is_canonical(entry: bytes) -> bool:
    try:
        return len(entry) <= RECORD_BYTES_MAX and rfc8785.dumps(msgspec.json.decode(entry)) == entry
    except (msgspec.DecodeError, rfc8785.CanonicalizationError, UnicodeError, RecursionError):
        return False


def _check(record: Record) -> str | None:
    """Why the record cannot be written canonically, or None. Only fields that are free to vary are looked at."""
    integers: list[int | None] = [record.log_index, record.attempt, record.result_bytes]
    names: list[Iterable[str]] = []
    if record.budget is not None:
        integers += _budget_integers(record.budget)
        names += (record.budget.amounts, record.budget.grants, record.budget.limits, *record.budget.limits.values())
    if record.exit is not None:
        integers += (record.exit.code, record.exit.signal)
    if record.usage is not None:
        integers += [v for v in msgspec.structs.astuple(record.usage) if isinstance(v, int)]
        names.append(record.usage.basis)
    if record.artifacts:
        integers += [artifact.size_bytes for artifact in record.artifacts]
    if record.timings_us:
        integers += record.timings_us.values()
        names.append(record.timings_us)
    if record.detail:
        names.append(record.detail)
    if record.error is not None and record.error.details:
        if (why := _check_details(record.error.details)) is not None:
            return why
        names.append(record.error.details)
    if any(value is not None and not -INTEGER_MAX <= value <= INTEGER_MAX for value in integers):
        return "an integer is beyond 2^53"
    if any(not name.isascii() for keys in names for name in keys):
        return "a key is not ASCII"
    return None


def _budget_integers(budget: BudgetRef) -> list[int | None]:
    limits = [amount for each in budget.limits.values() for amount in each.values()]
    return [budget.ops, budget.cpu_ms, budget.expires_ms, *budget.amounts.values(), *budget.grants.values(), *limits]


def _check_details(details: Mapping[str, Any]) -> str | None:
    for name, value in details.items():
        if isinstance(value, int):
            if not -INTEGER_MAX <= value <= INTEGER_MAX:
                return f"error.details.{name} is beyond 2^53"
        elif value is not None and not isinstance(value, str):
            return f"error.details.{name} is not text, an integer, a boolean or null"
    return None
