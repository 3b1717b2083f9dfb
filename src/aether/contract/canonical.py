"""Canonical JSON (RFC 8785, JCS) and the digests over it.

`canonical` takes any JSON value and is exact, numbers included. `canonical_record` is the fast path for
our own frozen records: their keys are ASCII and they hold no floats, and for such values msgspec's sorted
encoding is JCS (a property test holds the two together).
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec
import rfc8785

from aether.contract.errors import AetherError
from aether.contract.ids import Digest

_SORTED: Final = msgspec.json.Encoder(order="sorted")


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes of a JSON value; raises AetherError BAD_FIELD for NaN, Inf or integers above 2^53."""
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, RecursionError) as error:
        raise AetherError("BAD_FIELD", f"cannot write canonical JSON: {error}") from error


def canonical_record(record: msgspec.Struct) -> bytes:
    """RFC 8785 bytes of a record without floats and with ASCII keys."""
    return _SORTED.encode(record)


def digest_bytes(data: bytes) -> Digest:
    """`sha256:<hex>` of `data`."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def digest_json(value: Any) -> Digest:
    """The digest of the canonical JSON of `value`."""
    return digest_bytes(canonical(value))


def input_hash(schema_version: str, kind: str, op: str, params: Any, inputs: Any) -> Digest:
    """SHA-256 over `{schema_version, kind, op, params, inputs}`: what the job computes from, without ids and times."""
    return digest_json({"schema_version": schema_version, "kind": kind, "op": op, "params": params, "inputs": inputs})
