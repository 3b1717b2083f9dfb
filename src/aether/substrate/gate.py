"""The gate every operation passes: identity -> ticket -> policy, and the record of a refusal.

`admit` is synchronous and pure but for the clock. A refused operation that is not a read is recorded, and so
is whoever is not let in at all; reads are neither recorded nor charged. One uid may cause REFUSALS_PER_S records a
second, with a burst; what is left out is counted in its next record, so that nobody fills the log by being refused.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from aether.contract.calls import Caller
from aether.contract.errors import AetherError
from aether.contract.records import Record
from aether.substrate.access.access import Access, Admission, PolicyDeniedError, Resource
from aether.substrate.access.credentials import Shown
from aether.substrate.book import Book
from aether.substrate.entries import Node, masked
from aether.substrate.known import Known

REFUSALS_PER_S: Final = 5
REFUSALS_BURST: Final = 50
_UIDS_MAX: Final = 4_096
_READS: Final = frozenset(
    {
        "health", "metrics", "job.list", "job.get", "job.result", "job.logs", "job.receipt", "job.story",
        "artifact.get", "artifact.list", "image.list", "image.show", "model.list", "audit.checkpoint", "cell.explain",
        "node.doctor", "audit.growth", "audit.witnesses", "audit.query", "audit.tail", "audit.export", "audit.inspect",
        "cell.list", "cell.show", "cell.stats", "cell.events", "cell.get", "cell.files",
        "approval.list", "approval.show", "approval.oversee",
        "ticket.list", "ticket.show", "ticket.verify", "key.list", "pki.show",
        "policy.show", "policy.list", "policy.explain", "policy.check", "policy.test", "policy.diff",
        "policy.counterfactual",
        "job.activity", "cell.activity", "job.egress", "cell.egress", "budget.show", "usage", "quota.show",
    }
)  # fmt: skip


class _Bucket:
    """A token bucket of one uid; `skipped` refusals were not recorded."""

    __slots__ = ("level", "skipped", "time_ns")

    def __init__(self, now_ns: int) -> None:
        self.level, self.time_ns, self.skipped = float(REFUSALS_BURST), now_ns, 0

    def take(self, now_ns: int) -> bool:
        earned = max(0, now_ns - self.time_ns) * 1e-9 * REFUSALS_PER_S
        self.level, self.time_ns = min(float(REFUSALS_BURST), self.level + earned), now_ns
        if self.level < 1:
            self.skipped += 1
            return False
        self.level -= 1
        return True


class Gate:
    """Applies `Access` to callers; see the module head."""

    def __init__(self, node: Node, access: Access, book: Book) -> None:
        self.node = node
        self._access = access
        self._book = book
        access.describe = Known(book).describe
        self._buckets: OrderedDict[int, _Bucket] = OrderedDict()

    def admit(self, caller: Caller, operation: str, resource: Resource) -> Admission:
        """Who the caller is and on what authority; raises the AetherError of the stage that refused."""
        now_ns, shown = self._book.now_ns(), None
        try:
            shown = self._access.identify(caller, operation, now_ns)
            admission = self._access.admit_shown(shown, operation, resource, now_ns)
            self._book.quotas.admitted(caller, admission.principal.tenant_id, admission.principal.name)
            return admission
        except AetherError as error:
            if operation not in _READS or shown is None:
                self._record_refusal(caller, shown, operation, resource, error)
            raise

    def looks_at(self, operation: str, kind: str) -> bool:
        """Whether the policy may look at whose a resource is: then it has to be found before `admit`."""
        return self._access.policy.describes(operation, kind)

    def refused(self, caller: Caller, operation: str, error: AetherError) -> None:
        """Records a refusal that came before any operation: a TLS handshake that failed."""
        self._record_refusal(caller, None, operation, Resource(kind="node"), error)

    def admit_node(self, operation: str, resource: Resource) -> Admission:
        """Leave for the node's own work, which waits for nobody; raises like `admit`."""
        admission = self._access.admit_node(operation, resource, self._book.now_ns())
        if admission.demand is not None:
            by = ", ".join(admission.demand.determining) or "no policy"
            raise AetherError("POLICY_DENIED", f"cannot {operation}: the node's own work waits for nobody ({by})")
        return admission

    def _record_refusal(
        self, caller: Caller, shown: Shown | None, operation: str, resource: Resource, error: AetherError
    ) -> None:
        now_ns = self._book.now_ns()
        bucket = self._buckets.setdefault(caller.uid, _Bucket(now_ns))
        if len(self._buckets) > _UIDS_MAX:
            self._buckets.popitem(last=False)
        if not bucket.take(now_ns):
            return
        detail = {"not_recorded_before": str(bucket.skipped)} if bucket.skipped else {}
        bucket.skipped = 0
        denied = error if isinstance(error, PolicyDeniedError) else None
        self._book.write(
            lambda index, time: Record(
                type="access.denied",
                log_index=index,
                time=time,
                node_id=self.node.node_id,
                principal=shown.principal.name if shown is not None else f"uid:{caller.uid}",
                request_id=caller.request_id,
                traceparent=caller.traceparent,
                operation=operation,
                kind=resource.kind,
                op=resource.op,
                model_id=resource.model,
                labels=resource.labels,
                ticket=denied.ticket if denied else None,
                policy=denied.policy if denied else None,
                error=masked(error.body()),
                detail=detail,
            )
        )
