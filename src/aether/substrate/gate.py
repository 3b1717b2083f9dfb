"""The gate every operation passes: identity -> ticket -> policy, and the record of a refusal.

`admit` is synchronous and pure but for the clock. A refused operation that is not a read is recorded; reads
are neither recorded nor charged.
"""

from __future__ import annotations

from typing import Final

from aether.contract.calls import Caller
from aether.contract.errors import AetherError
from aether.contract.records import Record
from aether.substrate.access.access import Access, Admission, Resource
from aether.substrate.book import Book
from aether.substrate.entries import Node, masked

_READS: Final = frozenset(
    {
        "health", "metrics", "job.list", "job.get", "job.result", "job.logs", "job.receipt", "job.story",
        "artifact.get", "artifact.list", "model.list", "audit.checkpoint", "cell.explain", "node.doctor",
    }
)  # fmt: skip


class Gate:
    """Applies `Access` to callers; see the module head."""

    def __init__(self, node: Node, access: Access, book: Book) -> None:
        self.node = node
        self._access = access
        self._book = book

    def admit(self, caller: Caller, operation: str, resource: Resource) -> Admission:
        """Who the caller is and on what authority; raises the AetherError of the stage that refused."""
        try:
            return self._access.admit(caller, operation, resource, self._book.now_ns())
        except AetherError as error:
            if operation not in _READS:
                self._record_refusal(caller, operation, resource, error)
            raise

    def admit_node(self, operation: str, resource: Resource) -> Admission:
        """Leave for the node's own work; raises like `admit`."""
        return self._access.admit_node(operation, resource, self._book.now_ns())

    def _record_refusal(self, caller: Caller, operation: str, resource: Resource, error: AetherError) -> None:
        self._book.write(
            lambda index, time: Record(
                type="access.denied",
                log_index=index,
                time=time,
                node_id=self.node.node_id,
                principal=f"uid:{caller.uid}",
                request_id=caller.request_id,
                traceparent=caller.traceparent,
                operation=operation,
                kind=resource.kind,
                op=resource.op,
                model_id=resource.model,
                labels=resource.labels,
                error=masked(error.body()),
            )
        )
