"""Records of what happens to the log itself: pruned, erased from, signed by another key."""

from __future__ import annotations

import base64
from collections.abc import Callable

from aether.contract.canonical import canonical_record
from aether.contract.ids import Digest
from aether.contract.records import Record, RecordType
from aether.substrate.audit.note import Verifier
from aether.substrate.audit.recover import Recovered
from aether.substrate.audit.store import Opening
from aether.substrate.cellentries import Order
from aether.substrate.entries import Node


def ordered(kind: RecordType, node: Node, order: Order, detail: dict[str, str], index: int, time: str) -> Record:
    """What somebody had done to the log, on what authority."""
    principal = order.admission.principal
    return Record(
        type=kind,
        log_index=index,
        time=time,
        node_id=node.node_id,
        tenant_id=principal.tenant_id,
        principal=principal.name,
        request_id=order.caller.request_id,
        traceparent=order.caller.traceparent,
        operation=order.operation,
        effect="control",
        ticket=order.admission.ticket,
        policy=order.admission.policy,
        budget=order.budget,
        detail=detail,
    )


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
