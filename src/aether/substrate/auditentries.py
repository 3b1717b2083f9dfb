"""The first record of an epoch of the log, which is signed by another key than the one before."""

from __future__ import annotations

import base64
from collections.abc import Callable

from aether.contract.canonical import canonical_record
from aether.contract.ids import Digest
from aether.contract.records import Record
from aether.substrate.audit.note import Verifier
from aether.substrate.audit.recover import Recovered
from aether.substrate.audit.store import Opening


def opening(node_id: str, former: Verifier, now: Callable[[], str]) -> Opening:
    """Makes the first record of an epoch: it commits to the last checkpoint that the key before signed."""

    def make(index: int, before: Recovered, digest: Digest) -> bytes:
        detail = {
            "digest": digest,
            "previous_key": str(former),
            "previous_root": base64.b64encode(before.checkpoint.root).decode(),
            "previous_size": str(before.checkpoint.size),
        }
        return canonical_record(Record(type="audit.epoch", log_index=index, time=now(), node_id=node_id, detail=detail))

    return make
